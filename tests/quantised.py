"""Small networks trained on digits that the tests of int8 share, once a process, and their ONNX files."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from attar.data import Loader, Normalization, Source, augmentation, make_sampler, open_source
from attar.deploy.artefact import Candidate
from attar.train.models import make_model
from attar.train.student import Student

SIZE = (8, 8)


class Chain(nn.Module):
    """Four convolutions in a row: without shortcuts, what one activation loses is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        # With a bias of its own, and an epsilon that is not torch's default.
        self.conv3, self.bn3 = nn.Conv2d(16, 16, 3, 2, padding=1), nn.BatchNorm2d(16, eps=1e-3)
        self.conv4, self.bn4 = nn.Conv2d(16, 24, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(24)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = torch.relu(self.bn3(self.conv3(x)))
        x = F.relu6(self.bn4(self.conv4(x)))
        return self.fc(x.mean((2, 3)))


@functools.cache
def digits() -> Source:
    return open_source("digits")


def normalization() -> Normalization:
    return Normalization(digits().mean, digits().std)


def _trained(network: nn.Module, name: str, epochs: int) -> Candidate:
    source = digits()
    sampler = make_sampler(None, source.train.targets, 32, 0)
    loader = Loader(source.train, sampler, augmentation("none"), normalization())
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, nesterov=True)
    network.train()
    for epoch in range(epochs):
        for sample in loader.epoch(epoch):
            loss = F.cross_entropy(network(sample.images.contiguous()), sample.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network = network.eval().requires_grad_(False)
    student = Student(network, name, {}, source.classes, source.mean, source.std, SIZE)
    return Candidate(network, student, source, {}, Path("nowhere"))


@functools.cache
def resnet() -> Candidate:
    torch.manual_seed(0)
    return _trained(make_model("cifar_resnet20", 10, {"width": 0.25}), "cifar_resnet20", 3)


@functools.cache
def chain() -> Candidate:
    torch.manual_seed(0)
    return _trained(Chain(), "chain", 4)


def harden(network: nn.Module, factor: float) -> nn.Module:
    """Make one channel behind the second convolution of a `Chain` `factor` times as large, and the same network of it.

    A power of two changes no bit of the logits, but the step of that activation's int8 is `factor` times as coarse.
    """
    network = copy.deepcopy(network)
    with torch.no_grad():
        network.bn2.weight[0] = abs(network.bn2.weight[0]) * factor
        network.bn2.bias[0] = (abs(network.bn2.bias[0]) + 1) * factor
        network.conv3.weight[:, 0] /= factor
    return network


def write_onnx(network: nn.Module, path: Path, batch: int | None = None) -> Path:
    images = torch.zeros(batch or 2, 3, *SIZE)
    free = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network.eval(), (images,), dynamic_shapes=free)
        torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False).save(str(path))
    return path
