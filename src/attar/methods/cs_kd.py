"""CS-KD, class-wise self-knowledge distillation: two images of a class should be answered alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attar.anatomy import Anatomy, Tap
from attar.errors import AttarError
from attar.functional import kl_divergence
from attar.method import Batch, Method, Outputs
from attar.sampling import ClassPairs

__all__ = ["CSKD"]


class CSKD(Method):
    """CS-KD, class-wise self-knowledge distillation: every image learns from another image of its class.

    Idea: two images of one class should be given similar distributions, on the wrong classes too. Every image comes
    with another of its class, drawn from the whole training set; the student answers that one without a gradient, and
    its softened answer is the target. This holds over-confidence and the spread within classes down.

    Definition, with logits z of an image, z' of its partner and temperature T:
        L = CE(z, y) + w T^2 KL(stopgrad softmax(z' / T) || softmax(z / T))
    Terms: `task` is CE(z, y) on the images alone, `kl` the T^2-scaled mean over them. The partners have no
    cross-entropy. They pass through the student on their own, in training mode: batch norm takes their own statistics
    and its running ones move twice a step, as in the released code.

    Shapes: logits [N, K]. Unit: nats. Data: one view, labels, and pairs of one class (`attar.sampling.ClassPairs`): a
    batch of N shows 2 N images.

    Cost: one more forward pass without gradient, about a third of a step, and twice the images read. Deployed: nothing.

    When it helps: CIFAR-size ResNet-18 and fine-grained classes with few images each, and calibration with it. Others
    found it neutral or harmful on large networks. Where a class has one image, its partner is itself and only the
    augmentation differs. In a short training of ResNet-20 it cost 2 points, its sampler alone nothing
    (benchmarks/self_distillation.md).

    Args:
        temperature: T.
        weight: w; the paper's code has 1, and 3 for fine-grained birds.

    Raises:
        AttarError: a temperature that is not positive, or another method that draws batches its own way.

    Source: Yun, Park, Lee, Shin, "Regularizing Class-wise Predictions via Self-knowledge Distillation", CVPR 2020
    (arXiv 2003.13964). Nothing differs from the released code.
    """

    sampling = ClassPairs()
    needs = frozenset({"labels"})
    not_dense = "it pairs images of one class, and an image of a dense task has several"

    def __init__(self, *, temperature: float = 4.0, weight: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise AttarError(f"CSKD's temperature must be positive, not {temperature}.")
        self.temperature = temperature
        self.weight = weight
        self.claims = {"sampler": "CSKD draws pairs of one class"}

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """None: only logits are compared."""
        return ()

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `kl`."""
        assert batch.partners is not None
        with torch.no_grad():
            partners = outputs.student(batch.partners.images)
        return {"kl": kl_divergence(outputs.logits, partners.logits, self.temperature)}

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        return {"kl": self.weight}
