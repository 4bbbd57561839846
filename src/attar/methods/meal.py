"""MEAL: one of several frozen teachers per step, imitated at several depths before judges that tell who is who."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.anatomy import Anatomy, Stage, Tap
from attar.draws import Draws
from attar.errors import AttarError
from attar.functional import ensemble_log_probs, full_precision
from attar.functional.adversarial import activation_bins, discriminator_loss, reverse_gradient
from attar.method import Batch, Method, Outputs, Probe
from attar.reader import TeacherStages, adapt_teacher, as_teachers
from attar.teacher import Teacher

__all__ = ["MEAL", "Discriminator"]

Similarity = Literal["ce", "l1", "l2", "l1_soft", "l2_soft"]
Adversarial = Literal["reverse", "joint", "detach", "off"]
_T = TypeVar("_T")


class Discriminator(nn.Module):
    """Tells a student's vector from a teacher's: linear layers o -> o / K -> o / K^2 -> 2 with ReLUs between them.

    Shapes: [N, o] -> logits [N, 2], (1, 0) for the student. Widths are rounded down, to 1 at least.
    """

    def __init__(self, width: int, shrink: int = 2, final_relu: bool = False) -> None:
        super().__init__()
        first, second = max(1, width // shrink), max(1, width // shrink**2)
        self.linear1, self.linear2, self.linear3 = (
            nn.Linear(width, first),
            nn.Linear(first, second),
            nn.Linear(second, 2),
        )
        self.final_relu = final_relu

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the two logits of every row."""
        verdict = self.linear3(torch.relu(self.linear2(torch.relu(self.linear1(vectors)))))
        return torch.relu(verdict) if self.final_relu else verdict


class MEAL(Method):
    """MEAL, multi-model ensemble via adversarial learning: many teachers in turn make one student, without labels.

    Idea: each step draws one of the teachers at random. The student imitates its activation at several depths and its
    answer, while a small discriminator per depth learns to tell the two apart and the student learns to deceive it. So
    one network takes up an ensemble of any architectures, at the cost of one teacher's forward per step.

    Definition: of the last B - 1 stages each map becomes a vector of o_b bins (`functional.adversarial`), and the
    logits are the B-th; S_b of the student, T_b of the drawn teacher, D_b a discriminator:
        L = sum_b gamma_b l(S_b, stopgrad T_b) + sum_b eta_b BCE(D_b(S_b), (1, 0); D_b(T_b), (0, 1))
        l = -(1/N) sum_n sum_j softmax(T_b)_nj log softmax(S_b)_nj
    Terms: `similarity` and `discriminator`, the two sums. The labels have weight 0.

    Variant "v2", MEAL V2: all teachers at once and logits alone. l takes the mean of their probabilities, one
    discriminator of K = 8 the mean of their logits; meant for a student that is already trained.

    Shapes: maps [N, C, H, W], any C, H, W; logits [N, K]. Unit: nats (l1, l2: the maps' own). Data: one view, seen by
    student and teachers alike; all know the same classes in the same order.

    Cost: one teacher's forward per step, of any number in memory; v2 all of them. A discriminator of o bins has about
    0.6 o^2 parameters: 16 M for four stages as published. A compiled step keeps one graph per teacher, eight at most.
    Deployed: nothing.

    When it helps: several good, different teachers (ImageNet ResNet-50: 23.85 to 21.79 % top-1 error; v2 80.67 %
    accuracy). Wrong teachers cap the student, since it sees no labels. The loss swings from step to step with the
    teacher: smooth it before judging.

    Args:
        teachers: one trained network or several; wrap one in `attar.Teacher` when it was trained with another
            normalisation or image size.
        variant: "v1", or "v2".
        last_stages: B - 1, 0 for the logits alone; default: all that student and teachers have, as many as `out_dims`.
        out_dims: o_b, shallow to deep; fewer stages use the last ones.
        gamma: weight of every l, the logits' last; fewer depths use the last ones.
        eta: weight of every discriminator, likewise.
        similarity: l: "ce", as above; "l1" or "l2", mean absolute or squared difference; "l1_soft", "l2_soft", those
            of softmaxes.
        pooling: "avg", as in the published runs, or "max", the released code's default.
        adversarial: what the student learns from the discriminators. "reverse": to deceive them, by reversed gradients,
            which is the paper's objective. "joint": the same gradient as they have, which makes it easier to tell; the
            released code's default. "detach": nothing. "off": there are none.
        final_relu: a ReLU on the discriminators' answers, as released; their loss is then 0.347 at least, and they may
            die.
        discriminator_lr: what multiplies the learning rate for the discriminators; default: 0.01 as in the published
            runs of v1, 1 for v2.
        task_weight: weight of the labels.
        seed: of the draws, which depend on it and on the number of steps taken alone.

    Raises:
        AttarError: no teacher, the student as its own teacher, another class count, or more stages, bins or weights
            than there are.

    Source: Shen, He, Xue, "MEAL: Multi-Model Ensemble via Adversarial Learning", AAAI 2019 (arXiv 1812.02425), official
    AaronHeee/MEAL; v2: Shen and Savvides, arXiv 2009.08453, szq0214/MEAL-V2. The paper's tables could not be read:
    which l it takes between maps and how many depths on ImageNet is unverified. Differences: teachers are always in
    evaluation mode (the released code leaves them in training mode by default); gamma is that of the published VGG run
    where the code's default is 1; there are at most as many depths as stages.
    """

    not_dense = "its discriminators judge one answer per image"

    def __init__(
        self,
        teachers: Teacher | nn.Module | Sequence[Teacher | nn.Module],
        *,
        variant: Literal["v1", "v2"] = "v1",
        last_stages: int | None = None,
        out_dims: tuple[int, ...] = (5000, 1000, 500, 200),
        gamma: tuple[float, ...] = (0.001, 0.01, 0.05, 0.1, 1.0),
        eta: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0),
        similarity: Similarity = "ce",
        pooling: Literal["avg", "max"] = "avg",
        adversarial: Adversarial = "reverse",
        final_relu: bool = False,
        discriminator_lr: float | None = None,
        task_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._teachers = tuple(as_teachers(teachers, "MEAL"))
        _one_of("variant", variant, ("v1", "v2"))
        _one_of("similarity", similarity, ("ce", "l1", "l2", "l1_soft", "l2_soft"))
        _one_of("pooling", pooling, ("avg", "max"))
        _one_of("adversarial", adversarial, ("reverse", "joint", "detach", "off"))
        if variant == "v2" and last_stages not in (None, 0):
            raise AttarError(f"MEAL V2 compares logits alone: leave out last_stages={last_stages}, or choose v1.")
        if variant == "v2" and similarity in ("l1", "l2"):
            raise AttarError(
                f"MEAL V2 compares with mean probabilities, so similarity is no '{similarity}': choose ce."
            )
        if (last_stages is not None and last_stages < 0) or any(bins < 1 for bins in out_dims):
            raise AttarError(f"MEAL's last_stages and out_dims are positive, not {last_stages} and {out_dims}.")
        self.variant = variant
        self.last_stages = 0 if variant == "v2" else last_stages
        self.out_dims, self.gamma, self.eta = tuple(out_dims), tuple(gamma), tuple(eta)
        self.similarity: Similarity = similarity
        self.pooling: Literal["avg", "max"] = pooling
        self.adversarial: Adversarial = adversarial
        self.final_relu = final_relu
        self.discriminator_lr = discriminator_lr if discriminator_lr is not None else (0.01 if variant == "v1" else 1.0)
        self._task_weight = task_weight
        self.claims = {"task weight": f"MEAL gives the labels weight {task_weight}"} if task_weight != 1.0 else {}
        self.seed = seed
        self._draws: Draws | None = None
        self._stages: tuple[Stage, ...] = ()
        self._readers: tuple[TeacherStages, ...] = ()
        self._widths: tuple[int, ...] = ()
        self._gamma: tuple[float, ...] = ()
        self._eta: tuple[float, ...] = ()

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The frozen networks."""
        return self._teachers

    def build(self, probe: Probe) -> None:
        """Choose as many last stages of student and teachers, and make one discriminator per depth."""
        networks = {"student": probe.anatomy}
        for number, teacher in enumerate(self._teachers, start=1):
            name = teacher.name if len(self._teachers) == 1 else f"{teacher.name} ({number})"
            networks[name] = adapt_teacher(teacher, probe.student, probe.normalization, probe.images, "MEAL")
        wanted = self.last_stages
        depth = wanted if wanted is not None else min(len(self.out_dims), *(len(a.stages) for a in networks.values()))
        for name, anatomy in networks.items():
            if depth > len(anatomy.stages):
                raise AttarError(
                    f"MEAL cannot read {depth} stages of the {name}, which has {len(anatomy.stages)}: choose "
                    "last_stages accordingly."
                )
        self._gamma, self._eta = _last("gamma", self.gamma, depth + 1), _last("eta", self.eta, depth + 1)
        self._widths = (*_last("out_dims", self.out_dims, depth), probe.task.num_classes)
        self._stages = _last("stages", probe.anatomy.stages, depth)
        self._readers = tuple(
            TeacherStages(teacher, probe.images, anatomy, _last("stages", anatomy.stages, depth), logits=True)
            for teacher, anatomy in zip(self._teachers, list(networks.values())[1:], strict=True)
        )
        for reader in self._readers:
            probe.task.check_logits(reader(probe.images).logits, network=reader.teacher.name)
        self._draws = Draws(len(self._readers), self.seed)
        shrink = 2 if self.variant == "v1" else 8
        widths = self._widths if self.adversarial != "off" else ()
        self.discriminators = nn.ModuleList(Discriminator(width, shrink, self.final_relu) for width in widths)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The outputs of the chosen stages."""
        return [stage.tap for stage in self._stages]

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `similarity` and, unless there are no discriminators, `discriminator`."""
        own = self._aligned([outputs[stage.tap] for stage in self._stages], outputs.logits)
        target, judged = self._answers(outputs.images)
        distances = [
            weight * _distance(self.similarity, s, t) for weight, s, t in zip(self._gamma, own, target, strict=True)
        ]
        losses = {"similarity": torch.stack(distances).sum()}
        if self.adversarial != "off":
            mistakes = [
                weight * self._mistake(judge, s, t)
                for weight, judge, s, t in zip(self._eta, self.discriminators, own, judged, strict=True)
            ]
            losses["discriminator"] = torch.stack(mistakes).sum()
        return losses

    def _aligned(self, maps: Sequence[Tensor], logits: Tensor) -> list[Tensor]:
        bins = [activation_bins(m, o, self.pooling) for m, o in zip(maps, self._widths[:-1], strict=True)]
        return [*bins, full_precision(logits)]

    def _answers(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return what the student is compared with, and what the discriminators see of the teachers."""
        if self.variant == "v2":
            logits = [full_precision(reader(images).logits) for reader in self._readers]
            # Their softmax is the mean of the teachers' probabilities.
            return [ensemble_log_probs(logits)], [torch.stack(logits).mean(dim=0)]
        assert self._draws is not None
        reading = self._readers[self._draws.current](images)
        answer = reading.logits
        if self.training and len(self._readers) > 1:
            answer = self._draws.advance(answer)
        aligned = self._aligned(reading.stages, answer)
        return aligned, aligned

    def _mistake(self, judge: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
        if self.adversarial == "reverse":
            student = reverse_gradient(student)
        elif self.adversarial == "detach":
            student = student.detach()
        told_student, told_teacher = judge(torch.cat([student, teacher])).chunk(2)
        return discriminator_loss(told_student, told_teacher)

    def task_weight(self, progress: Tensor) -> float | Tensor:
        """Constant."""
        return self._task_weight

    def lr_scale(self, parameter: str) -> float:
        """Of the discriminators, which are all there is."""
        return self.discriminator_lr

    def get_extra_state(self) -> dict[str, Any]:
        """How many teachers have been drawn."""
        assert self._draws is not None
        return {"step": self._draws.step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on drawing from there."""
        assert self._draws is not None
        self._draws.go_to(int(state["step"]))


def _distance(kind: Similarity, student: Tensor, teacher: Tensor) -> Tensor:
    teacher = teacher.detach()
    if kind == "ce":
        return -(torch.softmax(teacher, dim=1) * torch.log_softmax(student, dim=1)).sum(dim=1).mean()
    if kind.endswith("_soft"):
        student, teacher = torch.softmax(student, dim=1), torch.softmax(teacher, dim=1)
    return F.l1_loss(student, teacher) if kind.startswith("l1") else F.mse_loss(student, teacher)


def _last(name: str, values: Sequence[_T], count: int) -> tuple[_T, ...]:
    if count > len(values):
        raise AttarError(f"MEAL needs {count} values of {name} here, not {len(values)}: give one for every depth.")
    return tuple(values[len(values) - count :])


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise AttarError(f"MEAL's {name} is one of {', '.join(known)}, not '{value}'.")
