"""DenseNet against its paper's counts, and against what timm, torch.fx, export and compile ask of a model."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

import attar.zoo
from attar.errors import AttarError

SMALL = ["cifar_densenet_40_12", "cifar_densenet_bc_40_12"]


def narrow(name: str, **kwargs) -> nn.Module:
    """Build a network a third as wide, its batch norms away from their trivial start."""
    torch.manual_seed(0)
    return shifted(timm.create_model(name, **{"width": 0.34, **kwargs}))


def shifted(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def expected(depth: int, k: int, bottleneck: bool, classes: int) -> int:
    """The paper's table by hand: convolutions, two numbers of batch norm per channel, classifier."""
    n = (depth - 4) // (6 if bottleneck else 3)
    channels = 2 * k if bottleneck else 16
    count = 3 * channels * 9
    for block in range(3):
        if block > 0:
            kept = channels // 2 if bottleneck else channels
            count += 2 * channels + channels * kept
            channels = kept
        for _ in range(n):
            inner = 4 * k if bottleneck else channels
            count += 2 * channels + channels * inner if bottleneck else 0
            count += 2 * inner + inner * k * 9
            channels += k
    return count + 2 * channels + (channels + 1) * classes


@pytest.mark.parametrize(
    ("name", "shape", "millions"),
    [
        ("cifar_densenet_40_12", (40, 12, False), 1.0),
        ("cifar_densenet_bc_100_12", (100, 12, True), 0.8),
        ("cifar_densenet_bc_190_40", (190, 40, True), 25.6),
    ],
)
def test_parameters_are_the_papers(name, shape, millions):
    with torch.device("meta"):
        ten, hundred = (timm.create_model(name, num_classes=classes) for classes in (10, 100))
    assert parameters(ten) / 1e6 == pytest.approx(millions, abs=0.05)
    assert parameters(ten) == expected(*shape, 10)
    assert parameters(hundred) == expected(*shape, 100)


def test_online_distillations_40_12_is_the_bc_form():
    with torch.device("meta"):
        net = timm.create_model("cifar_densenet_bc_40_12", num_classes=100)
    assert net.num_features == 132  # OKDDip's attention reads 132 numbers; the plain form would give 448
    assert parameters(net) == expected(40, 12, True, 100)


@pytest.mark.parametrize("name", [*SMALL, "cifar_densenet_bc_100_12", "cifar_densenet_bc_190_40"])
def test_depth_counts_the_weighted_layers(name):
    with torch.device("meta"):
        net = timm.create_model(name)
    depth = int(name.split("_")[-2])
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in net.modules()) == depth


def test_width_scales_stem_and_growth():
    net = narrow("cifar_densenet_bc_40_12", width=0.5)
    assert net.conv1.out_channels == 12
    assert [info["num_chs"] for info in net.feature_info] == [12 + 36, 24 + 36, 30 + 36]
    plain = narrow("cifar_densenet_40_12", width=0.5)
    assert [info["num_chs"] for info in plain.feature_info] == [8 + 72, 80 + 72, 152 + 72]
    with pytest.raises(AttarError, match=r"width=0.05 leaves none of 12 channels"):
        narrow("cifar_densenet_40_12", width=0.05)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(8, 8), (9, 13), (32, 32)])
def test_every_parameter_gets_a_gradient_at_any_size(name, size):
    net = narrow(name, in_chans=1, num_classes=7)
    logits = net(torch.randn(2, 1, *size))
    assert logits.shape == (2, 7)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_a_layer_keeps_what_it_was_given(name):
    layer = narrow(name).layer1[0]
    images = torch.randn(2, next(m for m in layer.modules() if isinstance(m, nn.BatchNorm2d)).num_features, 4, 4)
    before = images.clone()
    output = layer(images)
    assert torch.equal(output[:, : before.shape[1]], before)
    assert torch.equal(images, before)
    assert not torch.equal(layer(images + 1)[:, before.shape[1] :], output[:, before.shape[1] :])


@pytest.mark.parametrize("name", SMALL)
def test_an_exported_folder_loads_through_timm(name, tmp_path):
    net = narrow(name, num_classes=6).eval()
    save_for_hf(net, str(tmp_path), model_args={"width": 0.34}, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(images), net(images))


@pytest.mark.parametrize("bottleneck", [False, True])
def test_fx_export_and_compile_give_the_same(bottleneck):
    torch.manual_seed(0)
    # Two layers a block.
    net = shifted(attar.zoo.cifar_densenet(16 if bottleneck else 10, 4, bottleneck)).eval()
    images = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        logits = net(images)
        assert torch.equal(torch.fx.symbolic_trace(net)(images), logits)
        assert torch.equal(torch.compile(net, fullgraph=True, backend="eager")(images), logits)
    batch = torch.export.Dim("batch")
    program = torch.export.export(net, (torch.randn(2, 3, 16, 16),), dynamic_shapes={"x": {0: batch}})
    torch.testing.assert_close(program.module()(images), logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((41, 12), r"A DenseNet-BC has depth 6n \+ 4, which 41 is not: the nearest is 40\."),
        ((42, 12, False), r"A plain DenseNet has depth 3n \+ 4, which 42 is not: the nearest is 43\."),
        ((40, 0), r"growth of at least 1 channel a layer, not 0\."),
    ],
)
def test_what_is_no_densenet_is_refused(arguments, message):
    with pytest.raises(AttarError, match=message):
        attar.zoo.cifar_densenet(*arguments)
