"""A neck of stacked, cheap BiFPN layers over a pyramid of one width, and the head that answers for every pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BiFPNLayer", "BiFPNNeck", "DenseHead", "Node", "enlarged"]


def enlarged(x: Tensor, like: Tensor) -> Tensor:
    """Bring a map [N, C, h, w] bilinearly to the height and width of another."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class Node(nn.Sequential):
    """Depth-wise 1x1 convolution with bias, batch norm and ReLU: [N, C, H, W] -> the same, 4 C parameters."""

    def __init__(self, channels: int, *, batch_norm: bool = True) -> None:
        norm = nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
        super().__init__(nn.Conv2d(channels, channels, 1, groups=channels), norm, nn.ReLU())


class BiFPNLayer(nn.Module):
    """One layer of a neck: n >= 2 maps of one width, from deep to fine and back to deep.

    Definition, fine to deep, with NODE a `Node` of its own for every index, up bilinear and down nearest neighbours to
    the size of what they are added to:
        P_n = NODE_n(F_n);  P_i = NODE_i(F_i + up(P_i+1)) from n - 1 down to 1
        T_1 = P_1;  T_i = NODE'_i(F_i + P_i + down(T_i-1)) for i >= 2
    A layer that `ends_fine` has no second half: T = P, so that what reads T_1 alone trains all of it.

    Shapes: maps [N, C, h_i, w_i] -> as many of the same shapes, after ReLU. Any sizes that do not grow with depth.

    Args:
        channels: C.
        levels: n.
        ends_fine: leave out the way back to the deepest map.
        batch_norm: whether nodes normalise.

    Source: Tan, Pang, Le, "EfficientDet", CVPR 2020, as FRSKD's released segmentation code simplifies it: sums without
    weights and nodes without any mixing of channels or positions.
    """

    def __init__(self, channels: int, levels: int, *, ends_fine: bool = False, batch_norm: bool = True) -> None:
        super().__init__()
        # Position i makes level i + 1: P_1 .. P_n.
        self.up = nn.ModuleList(Node(channels, batch_norm=batch_norm) for _ in range(levels))
        # Position i makes level i + 2: T_2 .. T_n.
        self.down = nn.ModuleList(Node(channels, batch_norm=batch_norm) for _ in range(0 if ends_fine else levels - 1))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return T_1 .. T_n."""
        last = len(self.up) - 1
        found = [self.up[last](maps[last])]
        for i in range(last - 1, -1, -1):
            found.insert(0, self.up[i](maps[i] + enlarged(found[0], maps[i])))
        for i, node in enumerate(self.down, start=1):
            lower = F.interpolate(found[i - 1], size=maps[i].shape[-2:], mode="nearest")
            found[i] = node(maps[i] + found[i] + lower)
        return found


class BiFPNNeck(nn.Module):
    """Several `BiFPNLayer` in a row: maps [N, C, h_i, w_i], fine to deep -> refined maps of the same shapes.

    Args:
        channels: C.
        levels: how many maps.
        layers: how many layers.
        ends_fine: whether the last layer ends at the finest map.
        batch_norm: whether nodes normalise.
    """

    def __init__(
        self, channels: int, levels: int, layers: int, *, ends_fine: bool = False, batch_norm: bool = True
    ) -> None:
        super().__init__()
        self.channels, self.levels = channels, levels
        self.layers = nn.Sequential(
            *(
                BiFPNLayer(channels, levels, ends_fine=ends_fine and i == layers - 1, batch_norm=batch_norm)
                for i in range(layers)
            )
        )

    @property
    def ends(self) -> list[str]:
        """The paths, from here, of the nodes that return the refined maps, fine to deep."""
        last = f"layers.{len(self.layers) - 1}"
        layer = self.layers[-1]
        assert isinstance(layer, BiFPNLayer)
        ups = [f"{last}.up.{i}" for i in range(self.levels)]
        return [ups[0], *(f"{last}.down.{i}" for i in range(self.levels - 1))] if len(layer.down) else ups

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the refined maps, after ReLU."""
        refined: list[Tensor] = self.layers(maps)
        return refined


class DenseHead(nn.Module):
    """Logits for every pixel from one map: conv 3x3, batch norm, ReLU, conv 3x3, then bilinear to the pixels.

    Shapes: [N, C, h, w] and a size (H, W) -> [N, K, H, W]. Convolutions have biases; the batch norm's eps is 1e-4.

    Args:
        inputs: C.
        hidden: channels between the convolutions.
        classes: K.
        batch_norm: whether it normalises.
        momentum: weight of the newest batch in the running statistics, as torch means it.

    Source: FRSKD's released segmentation code, where `hidden` is 256 and `momentum` 0.997.
    """

    def __init__(
        self, inputs: int, hidden: int, classes: int, *, batch_norm: bool = True, momentum: float = 0.997
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.bn = nn.BatchNorm2d(hidden, eps=1e-4, momentum=momentum) if batch_norm else nn.Identity()
        self.act = nn.ReLU(inplace=True)
        self.classifier = nn.Conv2d(hidden, classes, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Return the logits at that height and width."""
        logits: Tensor = self.classifier(self.act(self.bn(self.conv(x))))
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
