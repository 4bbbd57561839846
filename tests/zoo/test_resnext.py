"""ResNeXt against its paper's counts, and against what timm, torch.fx, export and compile ask of a model."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

import attar.zoo
from attar.errors import AttarError

NAME = "cifar_resnext29_8x64d"


def narrow(**kwargs) -> nn.Module:
    """Build the registered network a sixteenth as wide, its batch norms away from their trivial start."""
    torch.manual_seed(0)
    net = timm.create_model(NAME, **{"width": 1 / 16, **kwargs})
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def expected(depth: int, groups: int, base: int, classes: int) -> int:
    """The paper's table by hand: convolutions, two numbers of batch norm per channel, classifier."""
    count, channels = 3 * 64 * 9 + 2 * 64, 64
    for stage in range(3):
        inner, outputs = groups * base * 2**stage, 256 * 2**stage
        for block in range((depth - 2) // 9):
            count += channels * inner + inner * (inner // groups) * 9 + inner * outputs + 2 * (2 * inner + outputs)
            count += channels * outputs + 2 * outputs if block == 0 else 0
            channels = outputs
    return count + (channels + 1) * classes


@pytest.mark.parametrize(("classes", "millions"), [(10, 34.4), (100, 34.5)])
def test_parameters_are_the_papers(classes, millions):
    with torch.device("meta"):
        net = timm.create_model(NAME, num_classes=classes)
    assert parameters(net) / 1e6 == pytest.approx(millions, abs=0.05)
    assert parameters(net) == expected(29, 8, 64, classes)


@pytest.mark.parametrize(("depth", "groups", "base"), [(29, 16, 64), (29, 1, 64), (20, 4, 8)])
def test_other_members_of_the_family_follow_the_formula(depth, groups, base):
    with torch.device("meta"):
        assert parameters(attar.zoo.cifar_resnext(depth, groups, base)) == expected(depth, groups, base, 10)


def test_29_layers_of_weights_and_8_groups_of_64_channels():
    with torch.device("meta"):
        net = timm.create_model(NAME)
    path = [m for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in name]
    assert len(path) + 1 == 29
    grouped = [m for m in path if m.groups > 1]
    assert {m.groups for m in grouped} == {8}
    assert [m.in_channels // m.groups for m in grouped] == [64] * 3 + [128] * 3 + [256] * 3


def test_width_keeps_the_cardinality():
    net = narrow(width=0.25)
    assert [info["num_chs"] for info in net.feature_info] == [64, 128, 256]
    assert net.conv1.out_channels == 16
    assert (net.layer1[0].conv2.groups, net.layer1[0].conv2.in_channels) == (8, 8 * 16)
    with pytest.raises(AttarError, match=r"width=0.01 leaves none of 64 channels: choose at least 0\.015625"):
        narrow(width=0.01)


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (32, 32)])
def test_every_parameter_gets_a_gradient_at_any_size(size):
    net = narrow(in_chans=1, num_classes=7)
    logits = net(torch.randn(2, 1, *size))
    assert logits.shape == (2, 7)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_an_exported_folder_loads_through_timm(tmp_path):
    net = narrow(num_classes=6).eval()
    save_for_hf(net, str(tmp_path), model_args={"width": 1 / 16}, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(images), net(images))


def test_fx_export_and_compile_give_the_same():
    net = narrow().eval()
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
        ((28, 8, 64), r"has depth 9n \+ 2, which 28 is not: the nearest is 29\."),
        ((2, 8, 64), r"the nearest is 11\."),
        ((29, 0, 64), r"cardinality of at least 1, not 0\."),
    ],
)
def test_what_is_no_resnext_is_refused(arguments, message):
    with pytest.raises(AttarError, match=message):
        attar.zoo.cifar_resnext(*arguments)
