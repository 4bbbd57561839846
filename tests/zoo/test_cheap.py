"""Cheap convolutions: what is replaced and what is not, how many weights they have, and that maps keep their shapes."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torchvision
from timm.models import save_for_hf
from torch import nn

from attar.errors import AttarError
from attar.train.models import make_model
from attar.zoo import cheap_convolution, cheapen, cifar_wrn_16_2, cifar_wrn_40_2

N = 64
WEIGHTS = {
    "Conv": 36_864,
    "Conv2x2": 16_384,
    "DConv": 4_672,
    "DConvG8": 9 * 8 * N + N**2,
    "DConvA8": 9 * N**2 // 8 + N**2,
    "ConvB2": 13_312,
    "DConvB2": 2 * N**2 // 2 + 9 * N // 2,
    "G8B2": 6_400,
    "A8B2": 5_248,
    "G4B4": 2 * N**2 // 4 + 9 * 4 * N // 4,
}


def weights(module: nn.Module) -> int:
    return sum(conv.weight.numel() for conv in module.modules() if isinstance(conv, nn.Conv2d))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_of_the_papers_table(kind):
    assert weights(cheap_convolution(nn.Conv2d(N, N, 3, padding=1, bias=False), kind)) == WEIGHTS[kind]


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_substitute_has_the_shapes_of_what_it_replaces(kind):
    for conv in (
        nn.Conv2d(16, 64, 3, padding=1, bias=False),
        nn.Conv2d(16, 64, 3, stride=2, padding=1),
        nn.Conv2d(16, 64, 3, padding=2, dilation=2, padding_mode="reflect"),
        nn.Conv2d(16, 64, 3, stride=(2, 1)),
    ):
        cheap = cheap_convolution(conv, kind)
        images = torch.randn(2, 16, 9, 12)
        assert cheap(images).shape == conv(images).shape
        layers = [cheap] if isinstance(cheap, nn.Conv2d) else list(cheap)
        convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        assert [layer.stride for layer in convolutions if layer.kernel_size != (1, 1)] == [conv.stride]
        # A bias at the end alone, where the replaced one had one: batch norm follows the others.
        assert [layer.bias is not None for layer in convolutions][-1] == (conv.bias is not None)
        assert all(layer.bias is None for layer in convolutions[:-1])
        kinds = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
        assert [type(layer) for layer in layers] == [kinds[i % 3] for i in range(len(layers))]
        assert isinstance(layers[-1], nn.Conv2d)


def test_a_number_is_channels_per_group_after_g_and_groups_after_a():
    conv = nn.Conv2d(64, 64, 3, padding=1)
    assert cheap_convolution(conv, "DConvG16")[0].groups == 4
    assert cheap_convolution(conv, "DConvA16")[0].groups == 16
    assert cheap_convolution(conv, "G16B2")[3].groups == 2
    assert cheap_convolution(conv, "A16B2")[3].groups == 16
    assert cheap_convolution(conv, "DConvB4")[3].groups == 16


def test_initialisation_is_the_specified_one():
    torch.manual_seed(0)
    first, middle, last = (cheap_convolution(nn.Conv2d(256, 512, 3), "G64B2")[i].weight for i in (0, 3, 6))
    assert first.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.03)
    assert middle.std().item() == pytest.approx(math.sqrt(2 / (9 * 256)), rel=0.03)
    assert last.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.03)
    assert abs(last.mean().item()) < 1e-3


def shapes(network: nn.Module, names: list[str]) -> list[torch.Size]:
    seen = []
    for name in names:
        network.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    network(torch.randn(2, 3, 32, 32))
    return seen


def test_the_teachers_count_and_maps():
    with torch.device("meta"):
        counts = {kind: sum(p.numel() for p in cifar_wrn_40_2(cheap=kind).parameters()) for kind in ("Conv", "G8B2")}
        plain = cifar_wrn_40_2()
    assert counts["Conv"] == sum(p.numel() for p in plain.parameters()) == 2_243_546
    assert counts["G8B2"] < counts["Conv"] / 4
    stages = ["layer1", "layer2", "act"]
    assert shapes(cifar_wrn_16_2(cheap="G8B2"), stages) == shapes(cifar_wrn_16_2(), stages)


def test_only_the_3x3_convolutions_inside_blocks_are_replaced():
    plain, cheap = cifar_wrn_16_2(), cifar_wrn_16_2(cheap="DConv")
    changed = set()
    for name, module in plain.named_modules():
        if isinstance(module, nn.Conv2d) and isinstance(cheap.get_submodule(name), nn.Sequential):
            changed.add(name)
    assert changed == {
        f"layer{stage}.{block}.conv{number}" for stage in (1, 2, 3) for block in (0, 1) for number in (1, 2)
    }
    assert cheap.conv1.kernel_size == (3, 3)
    assert cheap.layer2[0].downsample.kernel_size == (1, 1)


@pytest.mark.parametrize(
    ("make", "replaced", "kept"),
    [
        (lambda: timm.create_model("resnet18"), "layer1.0.conv2", "conv1"),
        (lambda: timm.create_model("resnet26d"), "layer1.0.conv2", "conv1.3"),  # a stem of three 3x3
        (lambda: torchvision.models.resnet18(), "layer2.0.conv1", "layer2.0.downsample.0"),
        (lambda: timm.create_model("cifar_resnet20_bottleneck"), "layer3.1.conv2", "layer3.1.conv1"),
    ],
)
def test_any_residual_network(make, replaced, kept):
    with torch.device("meta"):
        network = make()
        before = dict(network.named_modules())
        assert cheapen(network, "G8B2") is network
    assert isinstance(network.get_submodule(replaced), nn.Sequential)
    assert network.get_submodule(kept) is before[kept]
    convolutions = {name: module for name, module in before.items() if isinstance(module, nn.Conv2d)}
    for name, module in convolutions.items():
        inside = name.startswith("layer") and module.kernel_size == (3, 3)
        assert (network.get_submodule(name) is not module) == inside, name


def test_a_cheap_timm_network_trains():
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=4, layers=(1, 1, 1, 1), channels=(16, 16, 32, 32))
    network = cheapen(network, "A2B2")
    network(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_modes_and_precision_stay():
    network = cifar_wrn_16_2().double().eval()
    network = cheapen(network, "G8B2")
    assert not any(module.training for module in network.modules())
    assert {p.dtype for p in network.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("make", "kind", "sentence"),
    [
        (cifar_wrn_16_2, "G8B3", r"^G8B3 cannot replace 'layer1\.0\.conv1': its 32 channels are not divisible by 3, "),
        (cifar_wrn_16_2, "G32B2", r"'layer1\.0\.conv1': its 16 channels are not divisible by 32, so choose another "),
        (cifar_wrn_16_2, "DConvA64", r"'layer1\.0\.conv1': its 16 channels are not divisible by 64"),
        (cifar_wrn_16_2, "G8B", r"^There is no cheap convolution 'G8B': did you mean 'G8B2'\?$"),
        (cifar_wrn_16_2, "G0B2", r"^There is no cheap convolution 'G0B2'"),
        (cifar_wrn_16_2, "Conv3x3", r"^There is no cheap convolution 'Conv3x3': did you mean 'Conv"),
        (lambda: torchvision.models.vgg11(), "DConv", r"^VGG has no 3x3 convolution inside a block, so nothing "),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_changes_nothing(make, kind, sentence):
    with torch.device("meta"):
        network = make()
        before = [id(module) for module in network.modules()]
        with pytest.raises(AttarError, match=sentence):
            cheapen(network, kind)
    assert [id(module) for module in network.modules()] == before


def test_the_option_of_a_run_survives_export(tmp_path):
    options = {"cheap": "G8B2", "width": 0.5}
    network = make_model("cifar_wrn_16_2", 6, options).eval()
    assert isinstance(network.layer1[0].conv1, nn.Sequential)
    save_for_hf(network, str(tmp_path), model_args=options, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(images), network(images))
    maps = timm.create_model("cifar_wrn_16_2", features_only=True, **options)(images)
    assert [m.shape[1] for m in maps] == [16, 32, 64]
    with pytest.raises(AttarError, match=r"^G3B2 cannot replace 'layer1"):
        make_model("cifar_wrn_16_2", 6, {"cheap": "G3B2"})
