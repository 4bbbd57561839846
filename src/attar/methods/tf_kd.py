"""TfKD, teacher-free distillation: a hand-made teacher, or an earlier training of the same network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.anatomy import Anatomy, Tap
from attar.errors import AttarError
from attar.functional import full_precision, kl_divergence, masked_mean
from attar.method import Batch, Method, Outputs, Probe
from attar.teacher import Teacher

__all__ = ["TfKD"]

Variant = Literal["code", "paper", "self-kd-lib"]

# Temperature, weight, task weight and the true class's probability of each form.
_DEFAULTS = {
    "self": (6.0, 0.475, 0.05, 1.0),
    "code": (20.0, 0.1, 0.9, 0.99),
    "paper": (20.0, 0.1, 0.9, 0.99),
    "self-kd-lib": (20.0, 1.0, 1.0, 0.9),
}


class TfKD(Method):
    """TfKD, teacher-free distillation: the teacher is made by hand, or is an earlier training of the same network.

    Idea: weak and half-trained teachers help too, so much of distillation is a learned smoothing of the labels, and a
    teacher that anyone can write down does as well. Without `teachers` it is Tf-KD_reg, whose teacher gives the true
    class the probability a and every other class the same rest; with `teachers`, a finished run of the same network,
    it is Tf-KD_self.

    Definition, with p_y = a, p_c = (1 - a) / (K - 1) for c != y, and KL summed over classes, averaged over the batch:
        self:        L = w_task CE(z, y) + w T^2 KL(softmax(z_teacher / T) || softmax(z / T))
        code:        L = w_task CE(z, y) + w KL(softmax(p / T) || softmax(z))
        paper:       L = w_task CE(z, y) + w KL(p^(1/T) / sum p^(1/T) || softmax(z / T))
        self-kd-lib: L = w_task CE(z, y) + w (1 / T) H(p, softmax(z / T)), H the cross-entropy
    Terms: `kl`, T^2 included in the self form; of self-kd-lib `cross_entropy`, 1 / T included.
    The published code has weights alpha and multiplier m and averages KL over the classes too: here w_task = 1 - alpha
    and w = alpha m / K. Its softmax is taken of probabilities, so that the target is nearly uniform (K = 100, T = 20:
    0.010502 for the true class, 0.009995 for the others): less label smoothing than a pull to the uniform.

    Shapes: logits [N, K]; in dense tasks [N, K, H, W] with a p for every pixel, KL and H averaged over the valid
    pixels of the batch. Unit: nats. Data: one view, labels; where Mixup or CutMix leave none, p is mixed as the
    targets are.

    Cost: none for the regularised forms; the self form takes an earlier training and one forward of it per step.
    Deployed: nothing.

    When it helps: where label smoothing does, by about as much (ResNet-18 on CIFAR-100: 77.36 % against 77.26 %). The
    form self-kd-lib has nearly no effect (76.24 % to 76.61 %).

    Args:
        teachers: an earlier, finished training of the same network, for the self form; none for the regularised one.
        variant: which regularised form: that of the released code, of the paper, or of winycg/Self-KD-Lib.
        temperature: T; default 6 for self, else 20. The code also has 40 (most networks) and 10 (ShuffleNetV2).
        weight: w; default 0.475 for self, 0.1 for code and paper, 1 for self-kd-lib.
        task_weight: w_task; default 0.05 for self, 0.9 for code and paper, 1 for self-kd-lib.
        true_class: a, more than 1 / K; default 0.99, of self-kd-lib 0.9.

    Raises:
        AttarError: a value out of range, more than one teacher, or a teacher that is another network.

    Source: Yuan, Tay, Li, Wang, Feng, "Revisiting Knowledge Distillation via Label Smoothing Regularization", CVPR
    2020 (arXiv 1909.11723); defaults are ResNet-18's on CIFAR-100 in yuanli2333/Teacher-free-Knowledge-Distillation.
    Unknown: the settings of its ImageNet runs, where the authors say that T divides both distributions.
    """

    asks_logits_only = True
    not_dense = ""

    def __init__(
        self,
        teachers: Teacher | nn.Module | Sequence[Teacher | nn.Module] | None = None,
        *,
        variant: Variant = "code",
        temperature: float | None = None,
        weight: float | None = None,
        task_weight: float | None = None,
        true_class: float | None = None,
    ) -> None:
        super().__init__()
        if variant not in ("code", "paper", "self-kd-lib"):
            raise AttarError(f"TfKD's variant is 'code', 'paper' or 'self-kd-lib', not '{variant}'.")
        given = [teachers] if isinstance(teachers, Teacher | nn.Module) else list(teachers or ())
        if len(given) > 1:
            raise AttarError(f"TfKD takes one earlier training as its teacher, not {len(given)}: use KD for several.")
        if given and (variant != "code" or true_class is not None):
            raise AttarError("TfKD with a teacher has neither variant nor true_class: leave them or the teacher out.")
        defaults = _DEFAULTS["self" if given else variant]
        chosen = (temperature, weight, task_weight, true_class)
        values = [default if value is None else value for value, default in zip(chosen, defaults, strict=True)]
        self.variant = variant
        self.temperature, self.weight, self._task_weight, self.true_class = values
        if self.temperature <= 0:
            raise AttarError(f"TfKD's temperature must be positive, not {self.temperature}.")
        if not given and not 0.0 < self.true_class < 1.0:
            raise AttarError(f"TfKD's true_class is a probability between 0 and 1, not {self.true_class}.")
        self._teachers = tuple(t if isinstance(t, Teacher) else Teacher(t) for t in given)
        if self._task_weight != 1.0:
            self.claims = {"task weight": f"TfKD gives the labels weight {self._task_weight}"}

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The earlier training, where there is one."""
        return self._teachers

    def build(self, probe: Probe) -> None:
        """Check the hand-made teacher against the number of classes, or adapt the earlier training to the images."""
        if not self._teachers and self.true_class * probe.task.num_classes <= 1.0:
            raise AttarError(
                f"TfKD's true_class {self.true_class} is no more than an even share of {probe.task.num_classes} "
                "classes: give the true class more."
            )
        for teacher in self._teachers:
            if teacher.network is probe.student:
                raise AttarError("TfKD's teacher is the student itself: give it an earlier, finished training.")
            if _shapes(teacher.network) != _shapes(probe.student):
                raise AttarError(
                    f"TfKD's {teacher.name} is another network than the student: give an earlier training of the same "
                    "network, or use KD."
                )
            teacher.adapt(probe.normalization, probe.images, probe.task)
            probe.check_logits(teacher(probe.images), network=teacher.name)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """None: only logits are compared."""
        return ()

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `kl`, or `cross_entropy` for self-kd-lib."""
        logits, temperature = outputs.logits, self.temperature
        if self._teachers:
            answer = self._teachers[0].answer(outputs.images, batch.index, batch.views)
            return {"kl": kl_divergence(logits, answer, temperature, valid=batch.valid)}
        p = self.virtual_teacher(batch, logits)
        if self.variant == "self-kd-lib":
            log_q = torch.log_softmax(full_precision(logits) / temperature, dim=1)
            return {"cross_entropy": -masked_mean((p * log_q).sum(dim=1), batch.valid) / temperature}
        if self.variant == "paper":
            target = torch.log_softmax(p.log() / temperature, dim=1)
        else:
            target, temperature = torch.log_softmax(p / temperature, dim=1), 1.0
        kl = kl_divergence(
            logits, None, temperature, target_log_probs=target, squared_temperature=False, valid=batch.valid
        )
        return {"kl": kl}

    def virtual_teacher(self, batch: Batch, logits: Tensor) -> Tensor:
        """Return p, shaped as the logits: the hand-made teacher's probabilities; of void pixels any."""
        classes = logits.shape[1]
        q = batch.targets
        if batch.labels is not None:
            labels = batch.labels if batch.valid is None else batch.labels.where(batch.valid, 0)
            q = F.one_hot(labels, classes).movedim(-1, 1)
        q = q.to(full_precision(logits).dtype)
        return self.true_class * q + (1.0 - self.true_class) / (classes - 1) * (1.0 - q)

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        return {"cross_entropy" if self.variant == "self-kd-lib" else "kl": self.weight}

    def task_weight(self, progress: Tensor) -> float | Tensor:
        """Constant."""
        return self._task_weight


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in network.state_dict().items()}
