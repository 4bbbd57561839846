"""bf16 only where it is asked for or native."""

from __future__ import annotations

import torch

from attar.train.precision import autocast, computes_bf16, resolved

CPU = torch.device("cpu")


def test_auto_follows_the_hardware() -> None:
    assert resolved("auto", CPU) == ("bf16" if computes_bf16(CPU) else "fp32")
    assert resolved("fp32", CPU) == "fp32"
    assert resolved("bf16", CPU) == "bf16"


def test_autocast() -> None:
    layer, images = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with autocast("bf16", CPU):
        assert layer(images).dtype == torch.bfloat16
    with autocast("fp32", CPU):
        assert layer(images).dtype == torch.float32
