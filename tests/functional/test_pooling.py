"""The average over positions, and how its gradient lies in memory."""

from __future__ import annotations

import pytest
import torch

from attar.functional import average_pool

FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("memory", FORMATS)
def test_values_and_gradients_are_those_of_the_mean(memory: torch.memory_format) -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 5, 4, 6, dtype=torch.float64).contiguous(memory_format=memory).requires_grad_()
    weights = torch.randn(3, 5, dtype=torch.float64)
    found = average_pool(features)
    torch.testing.assert_close(found, features.mean(dim=(2, 3)))
    torch.testing.assert_close(average_pool(features, keepdim=True), found[:, :, None, None])
    (gradient,) = torch.autograd.grad((found * weights).sum(), features)
    torch.testing.assert_close(gradient, weights[:, :, None, None].expand(3, 5, 4, 6) / 24)


@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("keepdim", [False, True])
def test_the_gradient_lies_as_the_map_does(memory: torch.memory_format, keepdim: bool) -> None:
    features = torch.randn(2, 8, 4, 4).contiguous(memory_format=memory).requires_grad_()
    (gradient,) = torch.autograd.grad(average_pool(features, keepdim).square().sum(), features)
    assert gradient.is_contiguous(memory_format=memory)
