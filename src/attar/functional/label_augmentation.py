"""Label augmentation: transformed copies of images, joint labels (class, transformation), and their aggregate."""

from __future__ import annotations

from itertools import product
from typing import Literal

import torch
from torch import Tensor

from attar.functional.logits import full_precision

__all__ = ["Transform", "aggregated_logits", "joint_labels", "transformed", "versions_of"]

Transform = Literal[
    "rotation", "rotation2", "color_perm", "color_perm3", "rot_color_perm6", "rot_color_perm12", "rot_color_perm24"
]

_RGB = (0, 1, 2)
_TURNS4, _TURNS2 = (0, 1, 2, 3), (0, 2)
_ORDERS6 = (_RGB, (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
_ORDERS3 = (_RGB, (1, 2, 0), (2, 0, 1))

# Every version of an image: by how many quarter turns, in which order of channels. The first is the image itself.
_VERSIONS: dict[Transform, tuple[tuple[int, tuple[int, int, int]], ...]] = {
    "rotation": tuple((turns, _RGB) for turns in _TURNS4),
    "rotation2": tuple((turns, _RGB) for turns in _TURNS2),
    "color_perm": tuple((0, order) for order in _ORDERS6),
    "color_perm3": tuple((0, order) for order in _ORDERS3),
    "rot_color_perm6": tuple(product(_TURNS2, _ORDERS3)),
    "rot_color_perm12": tuple(product(_TURNS4, _ORDERS3)),
    "rot_color_perm24": tuple(product(_TURNS4, _ORDERS6)),
}


def versions_of(transform: Transform) -> int:
    """Return M, how many versions of an image a transformation makes, the image itself included."""
    return len(_VERSIONS[transform])


def transformed(images: Tensor, transform: Transform) -> Tensor:
    """Return all M versions of every image, the image itself first.

    Definition: "rotation" turns by 0, 90, 180, 270 degrees counter-clockwise, "rotation2" by 0 and 180; "color_perm"
    reads the channels as RGB, RBG, GRB, GBR, BRG, BGR, "color_perm3" as RGB, GBR, BRG; the others combine both, for
    each turn all orders of channels (6 = 2 x 3, 12 = 4 x 3, 24 = 4 x 6).

    Shapes: [N, C, H, W] -> [N, M, C, H, W]; H = W where quarter turns are made, C = 3 where channels are permuted.

    Source: Lee, Hwang, Shin, "Self-supervised Label Augmentation via Input Transformations", ICML 2020, in the order
    of its released code.
    """

    def version(turns: int, order: tuple[int, int, int]) -> Tensor:
        permuted = images if order == _RGB else torch.cat([images[:, c : c + 1] for c in order], dim=1)
        return torch.rot90(permuted, turns, (2, 3)) if turns else permuted

    return torch.stack([version(turns, order) for turns, order in _VERSIONS[transform]], dim=1)


def joint_labels(labels: Tensor, versions: int) -> Tensor:
    """Return the joint label `M y + j` of every version j of every image: [N] -> [N M], image after image."""
    return (labels.unsqueeze(1) * versions + torch.arange(versions, device=labels.device)).flatten()


def aggregated_logits(joint: Tensor, versions: int) -> Tensor:
    """Average the class logits of an image's versions, each read at its own transformation.

    Definition: `s[n, i] = (1/M) sum_j joint[n M + j, i M + j]`: of logits, not of probabilities.

    Shapes: joint logits [N M, K M], image after image and class after class -> [N, K], in at least float32.
    """
    own = full_precision(joint).reshape(len(joint) // versions, versions, -1, versions).diagonal(0, 1, 3)
    return own.mean(dim=-1)
