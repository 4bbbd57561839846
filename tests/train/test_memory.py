"""Channels-last, except where the CPU's library computes wrong gradients from it."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest
import torch

from attar.train.memory import keep_freed_memory, memory_format
from attar.train.models import make_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("convolution", "safe"),
    [
        (torch.nn.Conv2d(4, 8, 1, stride=2), False),
        (torch.nn.Conv2d(32, 64, 1, stride=2, groups=16), False),
        (torch.nn.Conv2d(4, 8, 1), True),
        (torch.nn.Conv2d(4, 8, 3, stride=2), True),
        (torch.nn.Conv2d(16, 8, 1, stride=2), True),
    ],
)
def test_which_convolutions_are_unsafe(convolution: torch.nn.Conv2d, safe: bool) -> None:
    network = torch.nn.Sequential(convolution)
    assert memory_format(network, CPU) == (torch.channels_last if safe else torch.contiguous_format)
    assert memory_format(network, torch.device("cuda")) == torch.channels_last
    assert memory_format(network, CPU, channels_last=False) == torch.contiguous_format


@pytest.mark.parametrize("width", [0.25, 0.5, 1.0])
def test_gradients_in_the_chosen_format_are_right(width: float) -> None:
    torch.manual_seed(0)
    network = make_model("cifar_resnet20", 10, {"width": width})
    memory = memory_format(network, CPU)
    exact = make_model("cifar_resnet20", 10, {"width": width}).double()
    exact.load_state_dict(network.state_dict())
    network.to(memory_format=memory)  # type: ignore[call-overload]
    images, labels = torch.randn(32, 3, 8, 8), torch.arange(32) % 10
    for _ in range(10):
        network.zero_grad()
        torch.nn.functional.cross_entropy(network(images.contiguous(memory_format=memory)), labels).backward()
    torch.nn.functional.cross_entropy(exact(images.double()), labels).backward()
    for (name, one), other in zip(network.named_parameters(), exact.parameters(), strict=True):
        assert torch.allclose(one.grad.double(), other.grad, atol=1e-3), name


FAULTS = """
import resource, sys, torch
from attar.train.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return [torch.ones(1 << 20) for _ in range(50)]  # 200 MiB
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is told")
def test_freed_memory_is_taken_again_without_page_faults() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    pages = 50 * (4 << 20) // resource.getpagesize()
    assert faults("leave") > pages // 2
    assert faults("keep") < pages // 10


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
