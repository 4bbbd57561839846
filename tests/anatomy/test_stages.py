from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from architectures import ARCHITECTURES, Architecture, HandWritten
from attar.anatomy import Recorder, survey
from attar.errors import AttarError


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_stages_are_what_the_taps_return(architecture: Architecture) -> None:
    """Every stage's tap gives a map of the stated size; resolutions fall or, in isotropic networks, stay."""
    network = architecture.make(7)
    images = torch.randn(2, 3, architecture.size, architecture.size)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    anatomy, output = survey(network, images, num_classes=7)
    assert output.shape == (2, 7)
    assert len(anatomy.stages) >= 2
    taps = [stage.tap for stage in anatomy.stages]
    with torch.no_grad():
        _, values = Recorder(network.eval(), taps).run(images)
    sizes = []
    for stage in anatomy.stages:
        assert values[stage.tap].shape == (2, stage.channels, stage.height, stage.width), stage
        sizes.append(stage.height * stage.width)
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) in (1, len(sizes))
    assert sizes[0] > 1
    assert anatomy.embedding_dim > 0
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def _names(network: nn.Module, size: int = 64) -> list[str]:
    anatomy, _ = survey(network, torch.randn(2, 3, size, size))
    return [stage.name for stage in anatomy.stages]


def test_known_answers() -> None:
    assert _names(timm.create_model("resnet18")) == ["layer1", "layer2", "layer3", "layer4"]
    assert _names(torchvision.models.resnet18()) == ["layer1", "layer2", "layer3", "layer4"]
    assert _names(timm.create_model("convnext_atto")) == ["stages.0", "stages.1", "stages.2", "stages.3"]
    assert _names(timm.create_model("cifar_resnet20"), 32) == ["layer1", "layer2", "layer3"]
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=8)
    assert _names(vit, 32) == ["blocks.1", "blocks.3", "blocks.5", "blocks.7"]
    mobile = _names(timm.create_model("mobilenetv2_050"))
    assert mobile == ["blocks.0", "blocks.1", "blocks.2", "blocks.4", "blocks.6"]


def test_embedding_is_the_classifiers_input() -> None:
    for name, path, dim in (("resnet18", "fc", 512), ("mobilenetv3_small_050", "classifier", 1024)):
        anatomy, _ = survey(timm.create_model(name, num_classes=9), torch.randn(2, 3, 64, 64))
        assert (anatomy.classifier, anatomy.embedding_dim) == (path, dim)
    anatomy, _ = survey(torchvision.models.squeezenet1_1(num_classes=9), torch.randn(2, 3, 96, 96))
    assert anatomy.embedding is None
    assert anatomy.embedding_dim == 512


def test_non_square_images() -> None:
    anatomy, _ = survey(timm.create_model("resnet18"), torch.randn(2, 3, 64, 96))
    assert [(s.height, s.width) for s in anatomy.stages] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    swin = torchvision.models.swin_t(num_classes=5)
    anatomy, _ = survey(swin, torch.randn(2, 3, 64, 96))
    first = anatomy.stages[0]
    assert (first.channels, first.height, first.width) == (96, 16, 24)


def test_named_stages() -> None:
    net = HandWritten(5)
    anatomy, _ = survey(net, torch.randn(2, 3, 32, 32), stages=["first", "third"])
    assert [(s.name, s.channels, s.height) for s in anatomy.stages] == [("first", 16, 16), ("third", 32, 4)]
    with pytest.raises(AttarError, match="did you mean 'first'"):
        survey(net, torch.randn(2, 3, 32, 32), stages=["frist"])
    with pytest.raises(AttarError, match="no feature map"):
        survey(net, torch.randn(2, 3, 32, 32), stages=["leave"])


def test_refused_images_and_networks_without_maps() -> None:
    with pytest.raises(AttarError, match="refuses images of shape \\[1, 32, 32\\]"):
        survey(HandWritten(5), torch.randn(2, 1, 32, 32))
    with pytest.raises(AttarError, match="No stage was found"):
        survey(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), torch.randn(2, 3, 4, 4))
