"""bf16 only where it is asked for, or native and faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attar.train import precision
from attar.train.precision import autocast, resolved

CPU = torch.device("cpu")


PLAIN = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2))
DEPTHWISE = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)))


def test_auto_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "computes_bf16", lambda device: True)
    assert resolved("auto", CPU, PLAIN) == "bf16"
    monkeypatch.setattr(precision, "computes_bf16", lambda device: False)
    assert resolved("auto", CPU, PLAIN) == "fp32"


def test_auto_spares_processors_depthwise_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "computes_bf16", lambda device: True)
    assert resolved("auto", CPU, DEPTHWISE) == "fp32"
    assert resolved("auto", torch.device("cuda"), DEPTHWISE) == "bf16"
    one_channel = nn.Conv2d(1, 8, 3, groups=1)
    assert resolved("auto", CPU, one_channel) == "bf16"


@pytest.mark.parametrize("asked", ["bf16", "fp32"])
def test_what_is_asked_for_holds(asked: str) -> None:
    assert resolved(asked, CPU, PLAIN) == resolved(asked, CPU, DEPTHWISE) == asked


def test_autocast() -> None:
    layer, images = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with autocast("bf16", CPU):
        assert layer(images).dtype == torch.bfloat16
    with autocast("fp32", CPU):
        assert layer(images).dtype == torch.float32
