"""Self-teachers: pyramids on a student's maps with an answer of their own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from attar.anatomy.bifpn import BiFPN
from attar.anatomy.neck import BiFPNNeck, DenseHead
from attar.functional import average_pool

__all__ = ["DenseSelfTeacher", "SelfTeacher", "pooled"]


class SelfTeacher(nn.Module):
    """A pyramid with a classifier on its deepest refined map: maps [N, c_i, h_i, w_i] -> (T_i before ReLU, [N, K])."""

    def __init__(self, pyramid: BiFPN, width: int, num_classes: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, maps: Sequence[Tensor], size: Sequence[int] = ()) -> tuple[list[Tensor], Tensor]:
        """Return the refined maps before their last ReLU, and the logits, which have no height and width."""
        refined = self.pyramid(maps)
        return refined, self.classifier(pooled(refined))


class DenseSelfTeacher(nn.Module):
    """A pyramid with a head for every pixel on its finest refined map: maps [N, c_i, h_i, w_i] -> (T_i, [N, K, H, W]).

    T_i are as the pyramid gives them: before ReLU from a `MirroredBiFPN`, behind it from a `BiFPNNeck`.
    """

    def __init__(self, pyramid: BiFPN | BiFPNNeck, head: DenseHead) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.head = head

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Return the refined maps, and the logits at that height and width."""
        refined = self.pyramid(maps)
        return refined, self.head(refined[0].relu(), size)


def pooled(refined: Sequence[Tensor]) -> Tensor:
    """Return the mean over positions of the deepest refined map, [N, d_n]."""
    return average_pool(refined[-1].relu())
