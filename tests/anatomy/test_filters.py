"""The convolution whose filters are a stage's channels, in networks of many kinds."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import attar.zoo  # noqa: F401 - registers the CIFAR networks
from architectures import HandWritten
from attar.anatomy import survey
from attar.anatomy.filters import last_convolution, layers_behind


def found(network: nn.Module, size: int = 32) -> dict[str, str | None]:
    network.eval()
    anatomy, _ = survey(network, torch.randn(2, 3, size, size))
    return {stage.name: last_convolution(network, anatomy, stage) for stage in anatomy.stages}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # Not the shortcut's, though it runs later; not even where that pools first.
        ("cifar_resnet20", {"width": 0.25}, {f"layer{i}": f"layer{i}.2.conv2" for i in (1, 2, 3)}),
        (
            "resnet18d",
            {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]},
            {f"layer{i}": f"layer{i}.0.conv2" for i in (1, 2, 3, 4)},
        ),
        # No gate's.
        (
            "seresnet18",
            {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]},
            {f"layer{i}": f"layer{i}.0.conv2" for i in (1, 2, 3, 4)},
        ),
        # The last stage ends in an activation of its own.
        (
            "cifar_wrn_16_1",
            {"width": 0.5},
            {"layer1": "layer1.1.conv2", "layer2": "layer2.1.conv2", "act": "layer3.1.conv2"},
        ),
        ("cifar_cnn_8_16_32", {}, {"pool1": "conv1", "pool2": "conv2", "pool3": "conv3"}),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "depth": 4}, None),
    ],
)
def test_the_convolution_of_every_stage(name: str, options: dict[str, object], expected: dict[str, str] | None) -> None:
    paths = found(timm.create_model(name, num_classes=5, **options), 64 if name == "seresnet18" else 32)
    if expected is None:  # the first quarter has the patches' convolution, the others none
        assert list(paths.values())[1:] == [None] * 3
    else:
        assert paths == expected


def test_networks_without_metadata_and_a_frozen_one() -> None:
    network = HandWritten(5).requires_grad_(False)
    assert found(network) == {"enter": "enter", "first": "first.0", "shortcut": "shortcut", "third": "third.0"}
    assert not any(module._forward_hooks for module in network.modules())


def test_what_stands_behind_it() -> None:
    network = timm.create_model("cifar_cnn_8_16_32")
    anatomy, _ = survey(network, torch.randn(2, 3, 32, 32))
    assert layers_behind(anatomy, "conv2", anatomy.find("pool2")) == ("bn2", "act2", "pool2")
    assert layers_behind(anatomy, "conv2", anatomy.find("conv2")) == ()
