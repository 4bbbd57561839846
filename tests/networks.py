"""Small networks and data that several tests share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Two stages and a head; without batch norm every loss is a mean over samples."""

    def __init__(self, classes: int = 3, batch_norm: bool = False) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if batch_norm else nn.Identity
        self.low = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), norm(6), nn.Tanh())
        self.high = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), norm(8), nn.Tanh())
        self.head = nn.Linear(8, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.high(self.low(images)).mean(dim=(2, 3)))


class Answers(nn.Module):
    """Answers with the flattened image: logits can be chosen, and get a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Conv2d(1, 1, 1, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) + 0.0 * self.stage(images).sum()


IMAGES = torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
