"""BiFPN: a pyramid of feature maps mixed from deep to shallow and back, for any channels and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BiFPN", "Fusion", "MirroredBiFPN", "PointwiseBlock", "SeparableBlock", "halved", "resampled"]


class _Norm(nn.BatchNorm2d):
    """Batch norm that uses its running statistics where a training batch has one value per channel, hence none."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def _norm(channels: int, batch_norm: bool) -> nn.Module:
    return _Norm(channels) if batch_norm else nn.Identity()


class PointwiseBlock(nn.Sequential):
    """1x1 convolution without bias, batch norm and, unless `activated` is False, ReLU: [N, a, H, W] -> [N, b, H, W]."""

    def __init__(self, inputs: int, outputs: int, *, activated: bool = True, batch_norm: bool = True) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 1, bias=False), _norm(outputs, batch_norm))
        if activated:
            self.append(nn.ReLU())


class SeparableBlock(nn.Sequential):
    """Depth-wise 3x3 convolution, 1x1 convolution and batch norm, `depth` times with ReLU in between, none at the end.

    Shapes: [N, C, H, W] -> [N, C, H, W]; no biases.
    """

    def __init__(self, channels: int, depth: int = 2, *, batch_norm: bool = True) -> None:
        super().__init__()
        for unit in range(depth):
            if unit:
                self.append(nn.ReLU())
            self.append(nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False))
            self.append(nn.Conv2d(channels, channels, 1, bias=False))
            self.append(_norm(channels, batch_norm))


class Fusion(nn.Module):
    """Learned mean of m maps of one shape: `sum_k w_k x_k`, `w = relu(v) / (sum relu(v) + 1e-6)`, v ones at first."""

    def __init__(self, maps: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.ones(maps))

    def weights(self) -> Tensor:
        """Return w [m]: not negative, with a sum of (almost) one."""
        positive = torch.relu(self.v)
        return positive / (positive.sum() + 1e-6)

    def forward(self, *maps: Tensor) -> Tensor:
        """Return the weighted mean of the maps."""
        weights = self.weights()
        mixed = weights[0] * maps[0]
        for k in range(1, len(maps)):
            mixed = mixed + weights[k] * maps[k]
        return mixed


def halved(x: Tensor) -> Tensor:
    """Max-pool 3x3 with stride 2 to ceil(size / 2), zero-padded: 1 behind an even side, 1 before and behind an odd one.

    Shapes: [N, C, H, W] -> [N, C, ceil(H/2), ceil(W/2)]. Values below zero would lose against the padding.
    """
    height, width = x.shape[-2:]
    return F.max_pool2d(F.pad(x, (width % 2, 1, height % 2, 1)), 3, 2)


def resampled(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bring a non-negative map [N, C, h, w] to size (H, W): nearest neighbour up; down `halved`, then adaptive maxima.

    A map that has the size already is returned as it is (networks of constant resolution).
    """
    if tuple(x.shape[-2:]) == size:
        return x
    if x.shape[-2] <= size[0] and x.shape[-1] <= size[1]:
        return F.interpolate(x, size=size, mode="nearest")
    x = halved(x)
    return x if tuple(x.shape[-2:]) == size else F.adaptive_max_pool2d(x, size)


class BiFPN(nn.Module):
    """One bidirectional feature pyramid over n >= 2 maps, shallow to deep.

    Definition, with ONE a `PointwiseBlock`, SEP a `SeparableBlock`, FUSE a `Fusion` and r = ReLU:
        L_i = ONE(r(F_i)) for all i, M_i = ONE'(r(F_i)) for i >= 2
        P_n = L_n;  P_i = SEP_i(FUSE(L_i, UP_i(r(P_i+1)))) from n - 1 down to 1
        T_1 = P_1;  T_i = SEP'_i(FUSE(M_i, r(P_i), DOWN_i(r(T_i-1)))), without P at i = n
    UP and DOWN resample to the size of level i, then ONE to its channels (nothing more where `convolved` is False).

    Shapes: maps [N, c_i, h_i, w_i] -> refined maps T_i [N, d_i, h_i, w_i] before their last ReLU. Any sizes that do
    not grow with depth, odd and equal ones too.

    Args:
        channels: c_i.
        widths: d_i.
        depth: units of every SEP.
        convolved: whether ONE follows every resampling; without it all d_i must be equal.
        batch_norm: whether blocks normalise.

    Source: Tan, Pang, Le, "EfficientDet", CVPR 2020, in the form of FRSKD's released code: two lateral convolutions
    a level and a width of its own for every level.
    """

    def __init__(
        self,
        channels: Sequence[int],
        widths: Sequence[int],
        *,
        depth: int = 2,
        convolved: bool = True,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        n = len(channels)

        def one(inputs: int, outputs: int) -> PointwiseBlock:
            return PointwiseBlock(inputs, outputs, batch_norm=batch_norm)

        def resampler(inputs: int, outputs: int) -> nn.Module:
            return one(inputs, outputs) if convolved else nn.Identity()

        def separable(width: int) -> SeparableBlock:
            return SeparableBlock(width, depth, batch_norm=batch_norm)

        self.laterals = nn.ModuleList(one(c, d) for c, d in zip(channels, widths, strict=True))
        # Top-down: position i makes level i of n - 1.
        self.ups = nn.ModuleList(resampler(widths[i + 1], widths[i]) for i in range(n - 1))
        self.up_fusions = nn.ModuleList(Fusion(2) for _ in range(n - 1))
        self.up_nodes = nn.ModuleList(separable(widths[i]) for i in range(n - 1))
        # Bottom-up: position i makes level i + 1.
        self.second_laterals = nn.ModuleList(one(channels[i], widths[i]) for i in range(1, n))
        self.downs = nn.ModuleList(resampler(widths[i - 1], widths[i]) for i in range(1, n))
        self.down_fusions = nn.ModuleList(Fusion(3 if i < n - 1 else 2) for i in range(1, n))
        self.down_nodes = nn.ModuleList(separable(widths[i]) for i in range(1, n))

    @property
    def ends(self) -> list[SeparableBlock]:
        """The blocks that return T_1 .. T_n."""
        return [self.up_nodes[0], *self.down_nodes]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return T_1 .. T_n before their last ReLU."""
        maps = [torch.relu(m) for m in maps]
        sizes = [(int(m.shape[-2]), int(m.shape[-1])) for m in maps]
        n = len(maps)
        # The laterals end in ReLU: the r(.) around them in the definition changes nothing.
        upper = self.laterals[n - 1](maps[n - 1])
        active = [upper]
        node = upper
        for i in range(n - 2, -1, -1):
            upper = self.ups[i](resampled(upper, sizes[i]))
            node = self.up_nodes[i](self.up_fusions[i](self.laterals[i](maps[i]), upper))
            upper = torch.relu(node)
            active.insert(0, upper)
        refined = [node]
        for i in range(1, n):
            lower = self.downs[i - 1](resampled(torch.relu(refined[-1]), sizes[i]))
            inputs = [self.second_laterals[i - 1](maps[i]), *([active[i]] if i < n - 1 else []), lower]
            refined.append(self.down_nodes[i - 1](self.down_fusions[i - 1](*inputs)))
        return refined


class MirroredBiFPN(BiFPN):
    """The same pyramid from the other side: from fine to deep first, then back, so that it ends at the finest map.

    A head on T_1 trains every part of it, as one on T_n does in `BiFPN`. Maps, widths and T_i stand in the same order,
    shallow to deep.
    """

    def __init__(self, channels: Sequence[int], widths: Sequence[int], **options: Any) -> None:
        super().__init__(channels[::-1], widths[::-1], **options)

    @property
    def ends(self) -> list[SeparableBlock]:
        """The blocks that return T_1 .. T_n."""
        return super().ends[::-1]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return T_1 .. T_n before their last ReLU."""
        return super().forward(maps[::-1])[::-1]
