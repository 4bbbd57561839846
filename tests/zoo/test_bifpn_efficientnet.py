"""FRSKD's segmentation network: its published parts, any image size, and what timm, fx and export ask of it."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import nn

import attar.zoo
from attar.anatomy import split, survey
from attar.errors import AttarError

NAMES = attar.zoo.segmentation_names()
B0 = "bifpn_efficientnet_b0"


def make(name: str = B0, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **options)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.fixture(scope="module")
def net() -> nn.Module:
    made = make(num_classes=5)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return made.eval()


@pytest.mark.parametrize(
    ("name", "channels", "inputs"),
    [
        ("bifpn_efficientnet_b0", 64, [24, 40, 80, 320]),
        ("bifpn_efficientnet_b1", 88, [24, 40, 80, 320]),
        ("bifpn_efficientnet_b2", 112, [24, 48, 88, 352]),
    ],
)
def test_parts_have_the_published_sizes(name: str, channels: int, inputs: list[int]) -> None:
    """frskd.md: outc 64, 88, 112; three layers of 11 nodes with 4 outc parameters; a head of 196,629 at d0."""
    with torch.device("meta"):
        net, encoder = timm.create_model(name), timm.create_model(name.replace("bifpn", "tf"))
    assert net.encoder.channels == inputs
    assert [len(layer.up) + len(layer.down) for layer in net.neck.layers] == [11, 11, 11]
    assert parameters(net.neck) == 3 * 11 * 4 * channels
    assert parameters(net.head) == 9 * channels * 256 + 256 + 2 * 256 + 9 * 256 * 21 + 21
    assert name != B0 or parameters(net.head) == 196_629
    block = 3 * channels  # a convolution's bias and batch norm
    laterals = sum(c * channels + block for c in inputs)
    assert parameters(net.pyramid) == laterals + 9 * inputs[-1] * channels + 9 * channels**2 + 2 * block
    kept = [encoder.conv_stem, encoder.bn1, encoder.blocks]
    assert parameters(net.encoder) == sum(map(parameters, kept))
    assert net.num_features == channels
    for norm in (net.head.bn, net.pyramid.beyond[0][1], net.pyramid.laterals[0][1]):
        assert (norm.eps, norm.momentum) == (1e-4, 0.997)


def test_the_encoder_is_timms_without_the_stems_activation(net: nn.Module) -> None:
    encoder = timm.create_model("tf_efficientnet_b0", num_classes=0).eval()
    encoder.load_state_dict(net.encoder.state_dict(), strict=False)
    encoder.bn1.act = nn.Identity()
    seen: list[torch.Tensor] = []
    for block in (encoder.blocks[1][0], encoder.blocks[2][0], encoder.blocks[3][0], encoder.blocks[6]):
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        encoder.forward_features(images)
        found = net.encoder(images)
        with_activation = make(stem_activation=True).eval()
        with_activation.encoder.load_state_dict(net.encoder.state_dict())
        other = with_activation.encoder(images)
    assert all(torch.equal(a, b) for a, b in zip(found, seen, strict=True))
    assert [64 // m.shape[2] for m in found] == [4, 8, 16, 32]
    assert not torch.allclose(other[0], found[0])


def test_the_pyramid_against_the_definition(net: nn.Module) -> None:
    maps = [torch.randn(1, c, h, w) for c, h, w in ((24, 13, 9), (40, 7, 5), (80, 4, 3), (320, 2, 2))]
    pyramid = net.pyramid
    with torch.no_grad():
        found = pyramid(maps)
        expected = [pyramid.laterals[3](maps[3])]
        for level in (2, 1, 0):
            lateral = pyramid.laterals[level](maps[level])
            up = F.interpolate(expected[0], size=tuple(lateral.shape[2:]), mode="bilinear", align_corners=False)
            expected.insert(0, up + lateral)
        expected.append(pyramid.beyond[0](maps[3]))
        expected.append(pyramid.beyond[1](expected[-1]))
    assert [tuple(m.shape[1:]) for m in found] == [
        *((64, 13, 9), (64, 7, 5), (64, 4, 3), (64, 2, 2)),
        *((64, 1, 1), (64, 1, 1)),
    ]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [(8, 8), (37, 53), (64, 96), (180, 240)])
def test_any_size(net: nn.Module, size: tuple[int, int]) -> None:
    with torch.no_grad():
        logits = net(torch.randn(1, 3, *size))
        maps = net.pyramid(net.encoder(torch.randn(1, 3, *size)))
    assert logits.shape == (1, 5, *size)
    assert logits.isfinite().all()
    assert [tuple(m.shape[2:]) for m in maps] == [(-(-size[0] // 2**i), -(-size[1] // 2**i)) for i in range(2, 8)]


def test_every_parameter_gets_a_gradient() -> None:
    net = make(num_classes=3, in_chans=1)
    net(torch.randn(2, 1, 40, 56)).square().mean().backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_stages_are_the_encoders(net: nn.Module) -> None:
    anatomy, _ = survey(net, torch.randn(2, 3, 64, 96), num_classes=5, dense=True)
    found = [(stage.name, stage.channels, stage.reduction) for stage in anatomy.stages]
    assert found == [(info["module"], info["num_chs"], info["reduction"]) for info in net.feature_info]
    assert [reduction for _, _, reduction in found] == [4, 8, 16, 32]


def test_a_new_classifier(net: nn.Module) -> None:
    other = make(num_classes=5)
    assert other.get_classifier() is other.head.classifier
    other.reset_classifier(7)
    assert other.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 7, 32, 32)


def test_pretrained_is_the_encoder_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    encoder = timm.create_model("tf_efficientnet_b0")

    def create(name: str, pretrained: bool = False, **options: object) -> nn.Module:
        asked.append(pretrained)
        return encoder

    entry = timm.models.model_entrypoint(B0)
    monkeypatch.setattr("attar.zoo.bifpn_efficientnet.timm.create_model", create)
    assert [entry(pretrained=wanted).encoder.blocks is encoder.blocks for wanted in (True, False)] == [True, True]
    assert asked == [True, False]


def test_an_exported_folder_loads_through_timm(net: nn.Module, tmp_path) -> None:
    save_for_hf(net, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(again(images), net(images))


@pytest.mark.parametrize("cut", ["encoder.blocks.1.1", "encoder.blocks.6.0", "pyramid.laterals.0", "neck"])
def test_it_can_be_cut_anywhere(cut: str) -> None:
    """`split` proves that the halves equal the whole, in training and in evaluation mode."""
    images = torch.randn(2, 3, 45, 75)
    halves = split(make(num_classes=5), cut, images)
    logits = halves.tail.train()(*halves.trunk.train()(images))
    logits.square().mean().backward()
    assert logits.shape == (2, 5, 45, 75)
    assert all(p.grad is not None for p in halves.tail.parameters())


def test_export_gives_the_same_at_odd_sizes(net: nn.Module) -> None:
    images = torch.randn(2, 3, 45, 75)
    with torch.no_grad():
        logits = net(images)
        program = torch.export.export(net, (images,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
        torch.testing.assert_close(program.module()(torch.cat([images, images]))[:2], logits)


@pytest.mark.slow
def test_onnx_gives_the_same_at_odd_sizes(net: nn.Module, tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime")
    images = torch.randn(1, 3, 45, 75)
    file = str(tmp_path / "net.onnx")
    torch.onnx.export(net, (images,), dynamo=True, verbose=False).save(file)
    session = ort.InferenceSession(file)
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), net(images), rtol=1e-4, atol=1e-5)


def test_what_it_cannot_be_is_refused() -> None:
    with pytest.raises(AttarError, match="take timm's 'tf_efficientnet_b0"):
        timm.create_model(B0, features_only=True)
    with pytest.raises(AttarError, match="ResNet is no EfficientNet with seven stages"):
        attar.zoo.BiFPNEfficientNet("resnet18")
