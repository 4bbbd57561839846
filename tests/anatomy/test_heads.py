from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attar.zoo  # noqa: F401 - registers the CIFAR networks
from attar.anatomy import Stage, Tap, survey
from attar.anatomy.heads import AttentionGate, Exit, early_exits, separable


def stage(channels: int, height: int, width: int, name: str = "stage") -> Stage:
    return Stage(name, channels, height, width, 1.0, Tap(name))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["bottleneck", "attention"]),
    st.integers(1, 12),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 12),
)
def test_any_map_becomes_the_deepest_features(
    kind: str, channels: int, size: tuple[int, int], least: tuple[int, int], features: int
) -> None:
    high = stage(channels, max(size[0], least[0]), max(size[1], least[1]))
    head = Exit(high, stage(8, *least), features, 3, kind).eval()  # type: ignore[arg-type]
    deep, pooled, logits = head(torch.randn(2, channels, high.height, high.width))
    assert pooled.shape == (2, features)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(pooled, deep.mean(dim=(2, 3)))
    ratios = (high.height / least[0], high.width / least[1])
    if all(ratio in (1, 2, 4, 8) for ratio in ratios) and (kind == "bottleneck" or ratios[0] == ratios[1]):
        assert deep.shape[2:] == least


def test_sizes_of_the_specification() -> None:
    """ResNet-18 for small images: k = 8, 4, 2 between 1x1 convolutions at a quarter of 512; 3, 2, 1 doublings."""
    last = stage(512, 4, 4)
    for high, kernel, widths in (
        (stage(64, 32, 32), 8, [64, 128, 256, 512]),
        (stage(128, 16, 16), 4, [128, 256, 512]),
        (stage(256, 8, 8), 2, [256, 512]),
    ):
        convolutions = [m for m in Exit(high, last, 512, 10).neck if isinstance(m, nn.Conv2d)]
        assert [(m.in_channels, m.out_channels, m.kernel_size, m.stride) for m in convolutions] == [
            (high.channels, 128, (1, 1), (1, 1)),
            (128, 128, (kernel, kernel), (kernel, kernel)),
            (128, 512, (1, 1), (1, 1)),
        ]
        assert all(m.bias is not None for m in convolutions)
        neck = Exit(high, last, 512, 10, "attention").neck
        assert isinstance(neck[0], AttentionGate)
        assert [step[0].in_channels for step in neck[1:]] == widths[:-1]
        assert [step[5].out_channels for step in neck[1:]] == widths[1:]
        assert all(step[0].stride == (2, 2) for step in neck[1:])


def test_a_large_reduction_is_averaged_first() -> None:
    neck = Exit(stage(4, 112, 112), stage(8, 7, 7), 8, 3).neck
    assert neck[0].kernel_size == (2, 2)
    assert neck[4].kernel_size == (8, 8)
    assert neck(torch.randn(2, 4, 112, 112)).shape == (2, 8, 7, 7)


def test_equal_resolutions_keep_it() -> None:
    for kind in ("bottleneck", "attention"):
        neck = Exit(stage(6, 8, 8), stage(6, 8, 8), 6, 3, kind).neck  # type: ignore[arg-type]
        assert neck(torch.randn(2, 6, 8, 8)).shape == (2, 6, 8, 8)


def test_the_gate_only_weighs() -> None:
    x = torch.randn(3, 4, 7, 5)
    weighed = AttentionGate(4)(x)
    assert weighed.shape == x.shape
    share = weighed / x
    assert ((share >= 0.5 - 1e-6) & (share < 1)).all()  # a sigmoid of what a ReLU left
    assert separable(4, 6)(x).shape == (3, 6, 4, 3)


def test_without_norm_there_is_none() -> None:
    for kind in ("bottleneck", "attention"):
        head = Exit(stage(4, 8, 8), stage(8, 2, 2), 8, 3, kind, norm=False)  # type: ignore[arg-type]
        assert not any(isinstance(m, nn.BatchNorm2d) for m in head.modules())


@pytest.mark.parametrize(
    ("name", "size"), [("cifar_resnet20", 32), ("densenet121", 64), ("vit_tiny_patch16_224", 32), ("convnext_atto", 64)]
)
def test_networks_that_end_early(name: str, size: int) -> None:
    """Every exit gives what its head gives inside the whole network, and computes nothing behind it."""
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "depth": 4} if "vit" in name else {}
    student = timm.create_model(name, num_classes=5, **options)
    images = torch.randn(2, 3, size, size)
    anatomy, _ = survey(student, images, None, 5)
    *shallow, last = anatomy.stages
    heads = [Exit(s, last, anatomy.embedding_dim, 5) for s in shallow]
    networks = early_exits(student, shallow, heads, images)
    assert list(networks) == [*(f"exit{i + 1}" for i in range(len(shallow))), "ensemble"]
    for module in (student, *networks.values()):
        module.eval()
    from attar.anatomy import Recorder

    recorder = Recorder(student, [s.tap for s in shallow])
    with torch.no_grad():
        logits, values = recorder.run(images)
        recorder.remove()
        expected = [head(values[s.tap].clone()).logits for head, s in zip(heads, shallow, strict=True)]
        for number, own in enumerate(expected, start=1):
            torch.testing.assert_close(networks[f"exit{number}"](images), own)
        torch.testing.assert_close(networks["ensemble"](images), torch.stack([*expected, logits]).mean(0))
    sizes = [sum(p.numel() for p in network.parameters()) for network in networks.values()]
    assert sizes[0] < sum(p.numel() for p in student.parameters()) + sum(p.numel() for p in heads[0].parameters())
    own = {id(p) for p in student.parameters()} | {id(p) for head in heads for p in head.parameters()}
    assert all(id(p) in own for network in networks.values() for p in network.parameters())


def test_what_cannot_be_cut_is_left_out() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.high, self.head = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, 2), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.low(x)
            if x.sum() > 0:
                x = x + 1
            return self.head(self.high(x).mean(dim=(2, 3)))

    low, high = stage(4, 7, 7, "low"), stage(4, 3, 3, "high")
    assert early_exits(Branching(), [low], [Exit(low, high, 4, 5)], torch.randn(2, 3, 16, 16)) == {}


@pytest.mark.parametrize("kind", ["bottleneck", "attention"])
def test_a_dense_head_classifies_every_position(kind: str) -> None:
    head = Exit(stage(4, 16, 24), stage(8, 4, 6), 8, 3, kind, dense=True).eval()  # type: ignore[arg-type]
    deep, pooled, logits = head(torch.randn(2, 4, 16, 24), (61, 95))
    assert deep.shape == (2, 8, 4, 6)
    torch.testing.assert_close(pooled, deep.mean(dim=(2, 3)))
    at_positions = torch.einsum("kd,ndhw->nkhw", head.classifier.weight[:, :, 0, 0], deep)
    at_positions = at_positions + head.classifier.bias[None, :, None, None]
    expected = nn.functional.interpolate(at_positions, (61, 95), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits, expected)
