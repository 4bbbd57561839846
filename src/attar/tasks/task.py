"""What every task says: what a network returns, what labels and the supervised loss mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

__all__ = ["Task"]


class Task(ABC):
    """What a network's answer, the labels and the supervised loss mean.

    Attributes:
        name: how the command line calls it.
        dense: whether there is one answer per pixel, [N, K, H, W], instead of one per image, [N, K].
        num_classes: K.
    """

    name: ClassVar[str]
    dense: ClassVar[bool]
    num_classes: int

    @abstractmethod
    def logits(self, output: object, network: str = "student") -> Tensor:
        """Return the logits among all that a network returns.

        Raises:
            AttarError: there are none.
        """

    def auxiliary(self, output: object) -> Mapping[str, Tensor]:
        """Return further logits that a network returns, by name, each brought to the size of its logits."""
        return {}

    @property
    def auxiliary_weight(self) -> float:
        """What multiplies the supervised loss of every auxiliary answer."""
        return 0.0

    @abstractmethod
    def loss(self, logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the supervised loss of a batch, a scalar in nats, computed in at least float32."""

    @abstractmethod
    def check_logits(self, output: object, network: str = "student", *, size: tuple[int, int] | None = None) -> None:
        """Refuse a network whose output is not what the task asks for.

        Args:
            output: all that the network returned.
            network: who it is, for the sentence.
            size: (height, width) of the images; None: not known.
        """

    @abstractmethod
    def check_targets(self, targets: Tensor) -> None:
        """Refuse labels that are none of the classes (synchronises with the device: not for the step)."""

    def valid(self, targets: Tensor) -> Tensor | None:
        """Return which answers count, a mask of the targets' shape; None: all of them."""
        return None
