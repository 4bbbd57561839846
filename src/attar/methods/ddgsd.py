"""DDGSD, data-distortion guided self-distillation: two views of every image teach each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

from attar.anatomy import Anatomy, Tap
from attar.errors import AttarError
from attar.functional import kl_divergence, linear_mmd
from attar.method import Batch, Method, Outputs

__all__ = ["DDGSD"]


class DDGSD(Method):
    """DDGSD, data-distortion guided self-distillation: two views of every image teach each other. A reconstruction.

    Idea: one network sees two independently augmented views of every image. Both must name the label, agree with each
    other's softened prediction, and give features with the same mean over the batch.

    Definition, with logits z_a, z_b and pooled embeddings f_a, f_b of the views, and KL averaged over the batch:
        L = CE(z_a, y) + CE(z_b, y) + lambda T^2 [KL(stopgrad p_b || p_a) + KL(stopgrad p_a || p_b)]
            + mu || mean_n f_a - mean_n f_b ||^2,    p = softmax(z / T)
    Terms: `kl`, both directions and T^2 included; `mmd`, the squared distance of the mean embeddings, summed over
    channels (maximum mean discrepancy, linear kernel). `task` is the mean over both views, weight 2 its sum.

    Shapes: logits [2N, K], embeddings [2N, D], view after view, in one pass with one batch normalisation. Units: nats,
    and squared feature units for `mmd`. Data: two views of every image from one augmentation, labels, any sampler.

    Cost: two forward and backward passes for every image of the batch, no parameters; for equal compute halve the
    batch or the epochs. Deployed: nothing.

    When it helps: reported gains are from 0.4 to 4 points for ResNets on CIFAR-100. Not with augmentation so weak that
    the views hardly differ; two views alone, without KL and MMD, are reported not to help.

    Args:
        temperature: T; 3 and 4 are in use, the paper's is unknown.
        kl_weight: lambda.
        mmd_weight: mu, 0.0001 to 0.0005 in the paper; a large one works against the augmentation.
        mmd: "vector" compares the mean embeddings channel by channel; "scalar" compares their averages over channels,
            as winycg/Self-KD-Lib does, and overlooks differences that cancel.
        task_weight: 2 is the sum of both views' cross-entropies; 0.5 is Self-KD-Lib's.
        scope: "world" takes the mean embeddings over the batches of all processes, "rank" over each one's own.

    Raises:
        AttarError: a value out of range.

    Source: Xu, Liu, "Data-Distortion Guided Self-Distillation for Deep Neural Networks", AAAI 2019. There is no
    official code and the paper's text was not at hand: the form follows its abstract, public notes and third-party
    code. Unknown: T, whether T^2 is a factor, whether targets are constants, and whether mu counts once or once a view.
    """

    views = 2
    not_dense = "its two views of an image are cropped and flipped apart, so that their pixels do not correspond"

    def __init__(
        self,
        *,
        temperature: float = 3.0,
        kl_weight: float = 1.0,
        mmd_weight: float = 5e-4,
        mmd: Literal["vector", "scalar"] = "vector",
        task_weight: float = 2.0,
        scope: Literal["rank", "world"] = "world",
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise AttarError(f"DDGSD's temperature must be positive, not {temperature}.")
        if mmd not in ("vector", "scalar"):
            raise AttarError(f"DDGSD's mmd is 'vector' or 'scalar', not '{mmd}'.")
        if scope not in ("rank", "world"):
            raise AttarError(f"DDGSD's scope is 'rank' or 'world', not '{scope}'.")
        self.temperature = temperature
        self.kl_weight = kl_weight
        self.mmd_weight = mmd_weight
        self.mmd = mmd
        self.scope: Literal["rank", "world"] = scope
        self._task_weight = task_weight
        if task_weight != 1.0:
            self.claims = {"task weight": f"DDGSD gives the mean over its two views weight {task_weight}"}

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The pooled embedding, or the last stage where there is none."""
        return [anatomy.embedding if anatomy.embedding is not None else anatomy.stages[-1].tap]

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `kl` and `mmd` between the first two views."""
        z_a, z_b, *_ = outputs.logits.chunk(batch.views)
        f_a, f_b, *_ = outputs.embedding.chunk(batch.views)
        kl = kl_divergence(z_a, z_b, self.temperature) + kl_divergence(z_b, z_a, self.temperature)
        return {"kl": kl, "mmd": linear_mmd(f_a, f_b, scope=self.scope, per_channel=self.mmd == "vector")}

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        return {"kl": self.kl_weight, "mmd": self.mmd_weight}

    def task_weight(self, progress: Tensor) -> float | Tensor:
        """Constant: the number of views, so that their cross-entropies are summed."""
        return self._task_weight
