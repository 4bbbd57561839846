"""The networks against their papers' counts, and against what timm, torch.fx, export and compile ask of a model."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import attar.zoo
from attar.anatomy import survey
from attar.errors import AttarError

NAMES = attar.zoo.names()
PLAIN = ["cifar_cnn_16_32_64", "cifar_cnn_8_16_32"]  # without padding: maps of 15, 6 and 2
SMALL = ["cifar_resnet20", "cifar_resnet44_bottleneck", "cifar_wrn_16_2"]  # one of each kind of block


def create(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def narrow(name: str, **kwargs) -> nn.Module:
    """Build a network that is narrow enough to run quickly, with its batch norms away from their trivial start."""
    return shifted(create(name, width=0.25, **kwargs))


def shifted(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return net


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def multiply_adds(net: nn.Module) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.zeros(1, 3, 32, 32))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("cifar_resnet32", 100, 472_756),
        ("cifar_resnet110_bottleneck", 100, 1_727_284),
        ("cifar_resnet18", 100, 11_220_132),
        ("cifar_wrn_40_2", 10, 2_243_546),
        ("cifar_wrn_28_10", 10, 36_479_194),
    ],
)
def test_parameter_counts_are_the_papers(name, classes, count):
    with torch.device("meta"):
        assert parameters(timm.create_model(name, num_classes=classes)) == count


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [
        ("cifar_resnet32", 69.13, 0.005),  # ONE's 1.38e8 FLOPs
        ("cifar_resnet110_bottleneck", 4.953e2 / 2, 0.03),
        ("cifar_resnet110", 5.06e2 / 2, 0.3),
        ("cifar_resnet18", 555.5, 0.05),
    ],
)
def test_multiply_adds_are_the_papers(name, millions, tolerance):
    assert multiply_adds(create(name, num_classes=100)) / 1e6 == pytest.approx(millions, abs=tolerance)


def convolution(inputs: int, outputs: int, size: int) -> int:
    return inputs * outputs * size * size


@pytest.mark.parametrize(("depth", "k"), [(16, 1), (16, 4), (28, 2), (28, 4), (40, 1), (40, 4)])
def test_wide_resnet_counts_follow_the_formula(depth, k):
    n, channels, count = (depth - 4) // 6, 16, convolution(3, 16, 3)
    for out in (16 * k, 32 * k, 64 * k):
        for block in range(n):
            inputs = channels if block == 0 else out
            count += 2 * inputs + convolution(inputs, out, 3) + 2 * out + convolution(out, out, 3)
            count += convolution(inputs, out, 1) if block == 0 and (inputs != out or out != 16 * k) else 0
        channels = out
    count += 2 * channels + channels * 10 + 10
    assert parameters(attar.zoo.wide_resnet(depth, k, num_classes=10)) == count
    assert parameters(create(f"cifar_wrn_{depth}_{k}", num_classes=10)) == count


def test_other_papers_110_layer_bottleneck_network():
    net = attar.zoo.CifarResNet((12, 12, 12), bottleneck=True, num_classes=100)
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in net.modules()) == 1 + 36
    assert parameters(net) / 1e6 == pytest.approx(1.17, abs=0.005)


def test_wrn_20_8_is_wide_only_inside_its_bottlenecks():
    net = create("cifar_wrn_20_8")
    assert net.num_features == 256
    assert [net.layer1[0].conv2.out_channels, net.layer3[1].conv2.out_channels] == [128, 512]


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_depth_counts_the_weighted_layers(depth):
    net = create(f"cifar_resnet{depth}")
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in net.modules()) + 1 == depth


@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds_and_its_feature_info_is_true(name):
    net = narrow(name, num_classes=7).eval()
    seen: dict[str, torch.Tensor] = {}
    copies: dict[str, torch.Tensor] = {}

    def record(key):
        def hook(module, args, output):
            seen[key], copies[key] = output, output.clone()

        return hook

    for info in net.feature_info:
        net.get_submodule(info["module"]).register_forward_hook(record(info["module"]))
    images = torch.randn(2, 3, 32, 32)
    logits = net(images)
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    for info in net.feature_info:
        side = {2: 15, 4: 6, 8: 2}[info["reduction"]] if name in PLAIN else 32 // info["reduction"]
        assert seen[info["module"]].shape == (2, info["num_chs"], side, side)
        assert torch.equal(seen[info["module"]], copies[info["module"]])  # nothing modified it later
    features = net.forward_features(images)
    assert torch.equal(features, seen[net.feature_info[-1]["module"]])
    assert features.shape[1] == net.num_features == net.feature_info[-1]["num_chs"]
    assert torch.equal(net.forward_head(features), logits)
    assert net.forward_head(features, pre_logits=True).shape == (2, net.head_hidden_size)
    pool = net.default_cfg["pool_size"]
    assert features.shape[2:] == pool


@pytest.mark.parametrize("name", NAMES)
def test_features_only_returns_every_stage(name):
    net = narrow(name, features_only=True).eval()
    maps = net(torch.randn(1, 3, 32, 32))
    assert [m.shape[1] for m in maps] == net.feature_info.channels()
    assert name in PLAIN or [32 // m.shape[2] for m in maps] == net.feature_info.reduction()
    assert maps[-1].min() >= 0


def test_timm_lists_exactly_these_names():
    assert set(NAMES) == set(timm.list_models("cifar_*"))
    assert len(NAMES) == len(set(NAMES)) == 29
    assert all(name in attar.zoo.__all__ and callable(getattr(attar.zoo, name)) for name in NAMES)


@pytest.mark.parametrize(("name", "widths"), [("cifar_cnn_16_32_64", (16, 32, 64)), ("cifar_cnn_8_16_32", (8, 16, 32))])
def test_plain_networks_are_those_of_the_retrieval_experiments(name, widths):
    net = create(name)
    inputs, count = 3, 0
    for outputs in widths:
        count += convolution(inputs, outputs, 3) + outputs + 2 * outputs
        inputs = outputs
    hidden = 2 * inputs
    assert parameters(net) == count + (4 * inputs + 1) * hidden + (hidden + 1) * 10
    images = torch.randn(4, 3, 32, 32)
    maps = net.forward_features(images)
    assert torch.equal(net.forward_head(maps, pre_logits=True), net.fc1(maps.flatten(1)).relu())
    stages = survey(net, images, num_classes=10)[0].stages
    assert [(stage.channels, stage.height) for stage in stages] == list(zip(widths, (15, 6, 2), strict=True))
    assert net(torch.randn(2, 3, 22, 22)).shape == net(torch.randn(2, 3, 40, 28)).shape == (2, 10)
    net.reset_classifier(0)
    assert net(images).shape == (4, hidden)
    with pytest.raises(AttarError, match="flattens its last map"):
        net.reset_classifier(4, "max")


@pytest.mark.parametrize("name", SMALL)
def test_entry_point_and_create_model_are_the_same_network(name):
    theirs = create(name, num_classes=5)
    torch.manual_seed(0)
    ours = getattr(attar.zoo, name)(num_classes=5).state_dict()
    assert list(ours) == list(theirs.state_dict())
    assert all(torch.equal(ours[key], value) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("name", [*SMALL, "cifar_resnet18"])
@pytest.mark.parametrize("size", [(8, 8), (9, 13), (40, 24)])
def test_any_size_from_8_up_and_one_channel(name, size):
    net = narrow(name, in_chans=1, num_classes=10)
    loss = net(torch.randn(3, 1, *size)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_classifier_pooling_and_dropout_follow_timm(name):
    net = narrow(name, num_classes=3, drop_rate=0.5)
    head = net.get_classifier()
    assert isinstance(head, nn.Linear)
    images = torch.randn(2, 3, 16, 16)
    assert not torch.equal(net.head_drop(torch.ones(100)), torch.ones(100))
    net.eval()
    net.reset_classifier(5)
    assert net.num_classes == 5
    assert net(images).shape == (2, 5)
    net.reset_classifier(4, "max")
    features = net.forward_features(images)
    assert torch.equal(net(images), net.fc(features.amax((2, 3))))
    net.reset_classifier(0)
    assert net(images).shape == (2, net.num_features)
    net.reset_classifier(0, "")
    assert torch.equal(net(images), features)


def test_initialisation_is_the_specified_one():
    net = create("cifar_resnet32")
    weight = net.layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)
    projection = net.layer3[0].downsample[0].weight  # 1x1, 32 -> 64: fan-out, not fan-in
    assert projection.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert net.fc.weight.abs().max() <= 1 / math.sqrt(64)


def test_width_scales_every_layer_and_rounds_down():
    net = create("cifar_resnet20", width=0.8)
    assert [info["num_chs"] for info in net.feature_info] == [12, 25, 51]
    assert net.conv1.out_channels == 12
    assert isinstance(net.layer1[0].downsample, nn.Identity)
    wide = create("cifar_resnet44_bottleneck", width=2)
    assert [info["num_chs"] for info in wide.feature_info] == [128, 256, 512]
    assert [info["num_chs"] for info in create("cifar_wrn_16_2", width=0.5).feature_info] == [16, 32, 64]
    assert attar.zoo.resnet.scaled(100, 0.29) == 29
    with pytest.raises(AttarError, match=r"width=0.05 leaves none of 16 channels: choose at least 0\.0625"):
        create("cifar_resnet20", width=0.05)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: attar.zoo.cifar_resnet(33), r"33 is not: the nearest is 32\."),
        (lambda: attar.zoo.cifar_resnet(2), r"the nearest is 8\."),
        (lambda: attar.zoo.cifar_resnet(-40), r"the nearest is 8\."),
        (lambda: attar.zoo.wide_resnet(20, 8, 10), r"20 is not: the nearest is 22\."),
    ],
)
def test_unknown_depth_is_refused(build, message):
    with pytest.raises(AttarError, match=message):
        build()


def test_pretrained_is_one_sentence():
    with pytest.raises(AttarError, match=r"^There are no pretrained weights for 'cifar_resnet32': [^.]*\.$"):
        timm.create_model("cifar_resnet32", pretrained=True)


def test_an_exported_folder_loads_through_timm(tmp_path):
    net = narrow("cifar_wrn_16_1", num_classes=6).eval()
    save_for_hf(net, str(tmp_path), model_args={"width": 0.25}, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(images), net(images))
    assert tuple(again.pretrained_cfg["mean"]) == net.default_cfg["mean"]


def test_default_cfg_describes_cifar():
    cfg = create("cifar_resnet56").default_cfg
    assert tuple(cfg["input_size"]) == (3, 32, 32)
    assert tuple(cfg["mean"]) == (0.4914, 0.4822, 0.4465)
    assert tuple(cfg["std"]) == (0.2023, 0.1994, 0.2010)
    net = create("cifar_resnet56")
    assert isinstance(net.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert net.get_submodule(cfg["classifier"]) is net.get_classifier()


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("training", [False, True])
def test_fx_trace_is_exact(name, training):
    net = narrow(name, drop_rate=0.5).train(training)
    traced = torch.fx.symbolic_trace(net)
    images = torch.randn(4, 3, 16, 16)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    torch.manual_seed(1)
    expected = net(images)
    net.load_state_dict(state)
    torch.manual_seed(1)
    assert torch.equal(traced(images), expected)
    assert torch.equal(traced.eval()(images), net.eval()(images))  # the trace has not frozen dropout


@pytest.mark.parametrize("name", [*SMALL, "cifar_resnet18", "cifar_cnn_8_16_32"])
def test_export_with_a_dynamic_batch(name):
    net = narrow(name).eval()
    program = torch.export.export(
        net, (torch.randn(2, 3, 32, 32),), dynamic_shapes={"x": {0: torch.export.Dim("batch")}}
    )
    images = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program.module()(images), net(images))


# One block of each kind a stage.
SHALLOW = {
    "basic": lambda: attar.zoo.CifarResNet((1, 1, 1), width=0.25),
    "bottleneck": lambda: attar.zoo.CifarResNet((1, 1, 1), bottleneck=True, width=0.25),
    "wide": lambda: attar.zoo.wide_resnet(10, 2),
}


@pytest.mark.parametrize("make", SHALLOW.values(), ids=SHALLOW.keys())
def test_compiles_as_one_graph(make):
    net = shifted(make())
    images = torch.randn(4, 3, 16, 16)
    net(images).sum().backward()
    expected = {key: p.grad for key, p in net.named_parameters()}
    net.zero_grad()
    torch.compile(net, fullgraph=True, backend="aot_eager")(images).sum().backward()
    for key, p in net.named_parameters():
        torch.testing.assert_close(p.grad, expected[key])


@pytest.mark.parametrize("name", [*SMALL, "cifar_resnet18", "cifar_wrn_20_8"])
def test_channels_last_gives_the_same_and_stays(name):
    net = narrow(name).eval().double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = net(images)
    net.to(memory_format=torch.channels_last)
    last = images.to(memory_format=torch.channels_last)
    assert net.forward_features(last).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(net(last), expected)
