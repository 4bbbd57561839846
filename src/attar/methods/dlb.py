"""DLB, self-distillation from the last mini-batch: half of every batch repeats, and recalls what was just answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attar.anatomy import Anatomy, Tap
from attar.errors import AttarError
from attar.functional import full_precision, gathered, rank_and_world
from attar.method import Batch, Method, Outputs, Probe
from attar.sampling import Overlapping

__all__ = ["DLB"]


class DLB(Method):
    """DLB, self-distillation from the last mini-batch: the teacher is the student itself, one update ago.

    Idea: half of every batch repeats half of the one before, under another augmentation. What was answered then for
    those images is the target now: as fresh a teacher as there can be, at the price of a batch's answers.

    Definition, with logits z, those of the last step z', temperature T, and R the samples of this batch that were in
    the last one:
        L = CE(z, y) + alpha T^2 / |R| sum_{n in R} KL(stopgrad softmax(z'_n / T) || softmax(z_n / T))
    Terms: `task` is the CE of all predictions, new and repeated, `kl` the rest. In the very first step R is empty.

    Shapes: logits [N, K]. Unit: nats. Data: one view, stable sample numbers, overlapping batches
    (`attar.sampling.Overlapping`): a batch of N has N / 2 new images, and an epoch shows every image twice.

    Cost: two passes per image and epoch; compare at half the epochs. The answers of one batch are remembered, and saved
    with checkpoints. Deployed: nothing.

    When it helps: reported on CIFAR with VGG, ResNets, WRN and DenseNet, also on top of CutMix; no figure of the
    CIFAR-100 tables could be checked.

    Args:
        temperature: T.
        alpha: weight of the KL.

    Raises:
        AttarError: a temperature that is not positive, a batch without sample numbers, or another method that draws
            batches its own way.

    Source: Shen, Xu, Yang, Li, Guo, "Self-Distillation from the Last Mini-Batch for Consistency Regularization", CVPR
    2022 (arXiv 2203.16172). Differences from the released code: new and repeated images pass in one forward, as the
    paper's words have it (the code makes two, with batch statistics of their own); the first step trains on the
    repeated half too.
    """

    sampling = Overlapping()
    not_dense = "it compares answers under two augmentations, whose pixels do not correspond"

    def __init__(self, *, temperature: float = 3.0, alpha: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise AttarError(f"DLB's temperature must be positive, not {temperature}.")
        self.temperature = temperature
        self.alpha = alpha
        self.claims = {"sampler": "DLB repeats half of every batch"}
        # The last batch of all processes: answers [M, K] and sample numbers [M].
        self._last: tuple[Tensor, Tensor] | None = None

    def build(self, probe: Probe) -> None:
        """Begin without a memory."""
        nothing = probe.images.new_zeros(0, probe.task.num_classes)
        self._last = nothing, torch.zeros(0, dtype=torch.int64, device=nothing.device)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """None: only logits are compared."""
        return ()

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `kl`, and remember this step's answers."""
        if batch.index is None:
            raise AttarError("DLB recognises repeated images: give batches with their sample numbers, Batch.index.")
        assert self._last is not None
        z = full_precision(outputs.logits)
        before, numbers = self._last
        same = batch.index[:, None] == numbers[None, :]  # [N, M]
        repeated = same.any(dim=1)
        recalled = same.to(z.dtype) @ before.to(z.dtype) / same.sum(dim=1, keepdim=True).clamp(min=1)
        log_t = torch.log_softmax(recalled / self.temperature, dim=1)
        log_p = torch.log_softmax(z / self.temperature, dim=1)
        each = torch.where(repeated, (log_t.exp() * (log_t - log_p)).sum(dim=1), 0.0)
        # A mean over the repeated samples of all processes, whose mean over processes it is to be.
        count = gathered(repeated.sum()[None]).sum().clamp(min=1)
        _, world = rank_and_world()
        if self.training:
            self._last = gathered(outputs.logits.detach()), gathered(batch.index)
        return {"kl": world * self.temperature**2 * each.sum() / count}

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        return {"kl": self.alpha}

    def get_extra_state(self) -> dict[str, Tensor]:
        """The memory belongs to a checkpoint; its size is the batch's, so it is no buffer."""
        assert self._last is not None
        return {"answers": self._last[0], "numbers": self._last[1]}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        """Recall the memory of a checkpoint."""
        assert self._last is not None
        device = self._last[0].device
        self._last = state["answers"].to(device), state["numbers"].to(device)
