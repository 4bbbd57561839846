"""PS-KD, progressive self-knowledge distillation: the student's own answers of an epoch ago soften its labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.anatomy import Anatomy, Tap
from attar.errors import AttarError
from attar.functional import full_precision, gathered
from attar.method import Batch, Method, Outputs, Probe

__all__ = ["PSKD"]


class PSKD(Method):
    """PS-KD, progressive self-knowledge distillation: the teacher is the student itself, one epoch ago.

    Idea: what the student answered for a sample when it last saw it is mixed into that sample's label, little at first
    and more as the student can be trusted. Hard samples are stressed, and confidence is held down.

    Definition, with logits z, label y, the sample's remembered answer P and a = alpha p at progress p:
        L = (1 - a) CE(z, y) - a (1 / N) sum_n sum_c P_nc log softmax(z_n)_c
    and afterwards P <- softmax(z): the training-mode answer for the augmented image, before this step's update. A
    sample that has not been seen yet has its label as P. Terms: `task` with weight 1 - a, `past` with weight a.

    Shapes: logits [N, K]; the memory is [samples, K]. Unit: nats. Data: one view, stable sample numbers; any sampler
    that shows every image about once an epoch.

    Cost: the memory (CIFAR-100: 20 MB), which is saved with every checkpoint; no further pass. With very many samples
    times classes (ImageNet: 5 GB) it does not fit. Over several processes answers are gathered, and the memory travels
    with `DistributedDataParallel`'s buffers at every step. Deployed: nothing.

    When it helps: long trainings of networks with capacity to spare; calibration nearly always gains. In short runs the
    remembered answers are poor for most of the time: in 8 epochs on 5,000 images alpha = 0.8 cost ResNet-20 4 points,
    alpha = 0.3 nearly none (benchmarks/self_distillation.md).

    Args:
        alpha: share of the remembered answer at the end of the run.

    Raises:
        AttarError: alpha outside [0, 1], a distiller that was not told how many samples there are, or a batch without
            sample numbers.

    Source: Kim, Ji, Yoon, Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021.
    Differences: a moves by the step instead of by the epoch, with the released code's value at the end of every epoch.
    """

    needs = frozenset({"labels"})
    not_dense = "it remembers one answer per image, and augmentation moves the pixels from epoch to epoch"
    memory: Tensor

    def __init__(self, *, alpha: float = 0.8) -> None:
        super().__init__()
        if not 0.0 <= alpha <= 1.0:
            raise AttarError(f"PSKD's alpha is a share between 0 and 1, not {alpha}.")
        self.alpha = alpha
        self.claims = {"task weight": "PSKD moves it to the remembered answers"}

    def build(self, probe: Probe) -> None:
        """Make room for one answer per sample."""
        if probe.num_samples is None:
            raise AttarError("PSKD remembers every sample: tell build(images, num_samples=...) how many there are.")
        # A row of zeros is a sample that has not been seen.
        self.register_buffer("memory", torch.zeros(probe.num_samples, probe.task.num_classes))

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """None: only logits are used."""
        return ()

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `past`, and remember this step's answers."""
        if batch.index is None:
            raise AttarError("PSKD remembers every sample: give batches with their sample numbers, Batch.index.")
        z = full_precision(outputs.logits)
        targets = batch.targets
        labels = targets if targets.is_floating_point() else F.one_hot(targets, z.shape[1])
        past = self.memory[batch.index].to(z.dtype)
        past = torch.where(past.sum(dim=1, keepdim=True) > 0, past, labels.to(z.dtype))
        loss = F.cross_entropy(z, past)
        if self.training:
            # One answer a sample: that of the first view.
            first = len(z) // batch.views
            answers = torch.softmax(z[:first].detach(), dim=1).to(self.memory.dtype)
            self.memory.index_copy_(0, gathered(batch.index[:first]), gathered(answers))
        return {"past": loss}

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """The remembered answers' share grows in proportion to progress."""
        return {"past": self.alpha * progress}

    def task_weight(self, progress: Tensor) -> float | Tensor:
        """The labels' share is the rest."""
        return 1.0 - self.alpha * progress
