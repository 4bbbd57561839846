"""KD: a frozen teacher's, or several teachers', softened predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from attar.anatomy import Anatomy, Tap
from attar.errors import AttarError
from attar.functional import ensemble_log_probs, kl_divergence
from attar.method import Batch, Method, Outputs, Probe
from attar.teacher import Teacher

__all__ = ["KD"]


class KD(Method):
    """KD, knowledge distillation: the student learns a teacher's softened class probabilities beside the labels.

    Idea: how a trained network ranks the wrong classes tells more about an image than its label alone.

    Definition: `L = w_task CE(z_s, y) + w T^2 KL(t || softmax(z_s / T))` with `t = softmax(z_t / T)`; of several
    teachers t is the mean of their probabilities at T. KL is summed over classes and averaged over the batch.
    Terms: `kl`, T^2 included.

    Shapes: logits [N, K] of student and teachers; in dense tasks [N, K, H, W], and KL is averaged over the valid pixels
    of the batch. Unit: nats. Data: one view, seen by student and teachers alike.

    Cost: one forward of every teacher per step; with the run's options `augment_cycle` and `cache_teachers` none once
    every augmentation has been seen. Deployed: nothing.

    When it helps: a teacher clearly better than the student, trained without label smoothing. Not when the teacher
    is hardly better, or so large that the student cannot follow.

    Args:
        teachers: one trained network or several; wrap one in `attar.Teacher` when it was trained with another
            normalisation or image size.
        temperature: T, usually 1 to 20.
        weight: w.
        task_weight: w_task; 0.1 beside weight 0.9 is the usual convention, 1.0 the one of FRSKD.

    Raises:
        AttarError: no teacher, the student itself as teacher, or a teacher of another class count.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv 1503.02531). There is no
    official code; weights follow HobbitLong/RepDistiller.
    """

    asks_logits_only = True
    not_dense = ""

    def __init__(
        self,
        teachers: Teacher | nn.Module | Sequence[Teacher | nn.Module],
        *,
        temperature: float = 4.0,
        weight: float = 0.9,
        task_weight: float = 0.1,
    ) -> None:
        super().__init__()
        given = [teachers] if isinstance(teachers, Teacher | nn.Module) else list(teachers)
        if not given:
            raise AttarError("KD needs at least one trained teacher.")
        if temperature <= 0:
            raise AttarError(f"KD's temperature must be positive, not {temperature}.")
        self._teachers = tuple(t if isinstance(t, Teacher) else Teacher(t) for t in given)
        self.temperature = temperature
        self.weight = weight
        self._task_weight = task_weight
        self.claims = {"task weight": f"KD gives the labels weight {task_weight}"} if task_weight != 1.0 else {}

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The frozen networks."""
        return self._teachers

    def build(self, probe: Probe) -> None:
        """Adapt every teacher to the student's images and check its output."""
        for teacher in self._teachers:
            if teacher.network is probe.student:
                raise AttarError("KD's teacher is the student itself: give it another, trained network.")
            teacher.adapt(probe.normalization, probe.images, probe.task)
            probe.check_logits(teacher(probe.images), network=teacher.name)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """None: only logits are compared."""
        return ()

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `kl`."""
        answers = [teacher.answer(outputs.images, batch.index, batch.views) for teacher in self._teachers]
        target = ensemble_log_probs(answers, self.temperature)
        kl = kl_divergence(outputs.logits, temperature=self.temperature, target_log_probs=target, valid=batch.valid)
        return {"kl": kl}

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        return {"kl": self.weight}

    def task_weight(self, progress: Tensor) -> float | Tensor:
        """Constant."""
        return self._task_weight
