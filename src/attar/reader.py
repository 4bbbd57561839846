"""What methods read of a frozen teacher besides its answer: its stages, its embedding, and which stage is which."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, compiler, nn

from attar.anatomy import Anatomy, Recorder, Stage, Tap, overwritten, survey
from attar.errors import AttarError
from attar.functional import average_pool
from attar.tasks import Task
from attar.teacher import Normalization, Teacher

__all__ = [
    "Reading",
    "TeacherStages",
    "adapt_teacher",
    "as_teachers",
    "chosen_stages",
    "paired_stages",
    "teacher_anatomy",
]


def as_teachers(teachers: Teacher | nn.Module | Sequence[Teacher | nn.Module] | None, method: str) -> list[Teacher]:
    """Return one trained network or several as teachers.

    Raises:
        AttarError: there is none; the sentence names the method that needs one.
    """
    given = [teachers] if isinstance(teachers, Teacher | nn.Module) else list(teachers or ())
    if not given:
        raise AttarError(f"{method} needs at least one trained teacher.")
    return [teacher if isinstance(teacher, Teacher) else Teacher(teacher) for teacher in given]


def adapt_teacher(
    teacher: Teacher,
    student: nn.Module,
    normalization: Normalization | None,
    images: Tensor,
    method: str,
    stages: Sequence[str] | None = None,
    *,
    task: Task | None = None,
) -> Anatomy:
    """Adapt a teacher to the student's images and return its own stages (see `teacher_anatomy`).

    Raises:
        AttarError: the teacher is the student itself, or refuses the images.
    """
    if teacher.network is student:
        raise AttarError(f"{method}'s teacher is the student itself: give it another, trained network.")
    teacher.adapt(normalization, images, task)
    return teacher_anatomy(teacher, images, stages, dense=task is not None and task.dense)


def teacher_anatomy(
    teacher: Teacher, images: Tensor, stages: Sequence[str] | None = None, *, dense: bool = False
) -> Anatomy:
    """Return the stages of an adapted teacher as it sees these images, which are normalised for the student.

    Args:
        teacher: knows how the student's images are normalised.
        images: an example batch [N, C, H, W].
        stages: modules to use as stages, where the user has named some.
        dense: the teacher answers for every pixel (see `survey`).

    Raises:
        AttarError: the teacher refuses the images, a name does not exist, or no stage could be found.
    """
    seen: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Done

    handle = teacher.network.register_forward_pre_hook(catch)
    try:
        teacher(images)
    except _Done:
        pass
    finally:
        handle.remove()
    return survey(teacher.network, seen[0], stages, dense=dense)[0]


def chosen_stages(
    anatomy: Anatomy, names: Sequence[str] | None, layers: Literal["last", "middle", "all"]
) -> tuple[Stage, ...]:
    """Return the stages of these names, else the last one, the middle one (the second of three and of four) or all.

    Raises:
        AttarError: a name that does not exist; the sentence has the nearest.
    """
    if names is not None:
        return tuple(anatomy.find(name) for name in names)
    if layers == "all":
        return anatomy.stages
    return (anatomy.stages[-1 if layers == "last" else (len(anatomy.stages) - 1) // 2],)


def paired_stages(
    ours: Sequence[Stage], theirs: Sequence[Stage], *, method: str, teacher: str = "teacher", named: bool = False
) -> list[tuple[Stage, Stage]]:
    """Return which stage of the student belongs to which of the teacher, shallow to deep.

    Equally many are paired in order. Otherwise every stage of the shorter list gets one of the longer, in order, so
    that `sum |log2(H W / (H' W'))|` is smallest, the deeper where that does not decide; the rest is left out.

    Args:
        ours: stages of the student, shallow to deep.
        theirs: stages of the teacher.
        method: who asks, for the sentence.
        teacher: how the sentence calls the teacher.
        named: the user chose stages, so that leaving one out would go against it.

    Raises:
        AttarError: stages that are named and not as many; the sentence has both lists.
    """
    if len(ours) == len(theirs):
        return list(zip(ours, theirs, strict=True))
    if named:
        lists = [", ".join(stage.name for stage in stages) for stages in (ours, theirs)]
        raise AttarError(
            f"{method} cannot pair the student's layers ({lists[0]}) with the {teacher}'s ({lists[1]}): "
            "name as many with stages= and teacher_stages=."
        )
    short, long = sorted((ours, theirs), key=len)
    # Deepest first, since the minimum is the first of equals.
    choices = itertools.combinations(reversed(long), len(short))
    best = min(choices, key=lambda choice: round(sum(map(_apart, reversed(short), choice)), 9))
    pairs = list(zip(short, reversed(best), strict=True))
    return pairs if short is ours else [(one, other) for other, one in pairs]


def _apart(one: Stage, other: Stage) -> float:
    return abs(math.log2(one.height * one.width / (other.height * other.width)))


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a teacher showed in one pass.

    Args:
        stages: the map of every chosen stage, [N, C_i, H_i, W_i].
        embedding: the pooled embedding [N, D] that its classifier reads (the pooled last stage where there is none).
        logits: [N, K].
    """

    stages: list[Tensor]
    _embedding: Tensor | None
    _logits: Tensor | None

    @property
    def embedding(self) -> Tensor:
        """[N, D]."""
        if self._embedding is None:
            raise TypeError("Ask for the embedding beforehand: TeacherStages(..., embedding=True).")
        return self._embedding

    @property
    def logits(self) -> Tensor:
        """[N, K]."""
        if self._logits is None:
            raise TypeError("Ask for the logits beforehand: TeacherStages(..., logits=True).")
        return self._logits


class TeacherStages:
    """Reads the maps of a frozen teacher at chosen stages, its embedding and its logits, all from one forward.

    It is no module, so that the teacher is nobody's child. The pass has no gradient and ends behind the last thing
    that is read; the teacher follows its method to another device or precision (see `Teacher`). Token and
    channels-last maps become [N, C, H, W] as the student's taps do.

    Args:
        teacher: adapted to the student's images already.
        images: an example batch [N, C, H, W], normalised for the student.
        anatomy: the teacher's own (`adapt_teacher` or `teacher_anatomy` gives it).
        stages: which of its stages are read.
        embedding: the pooled embedding is read too.
        logits: and its answer.

    Example:
        >>> import torch, attar
        >>> network = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        ...     torch.nn.Linear(8, 10))
        >>> images, teacher = torch.randn(2, 3, 9, 9), attar.Teacher(network)
        >>> anatomy = teacher_anatomy(teacher, images)
        >>> reading = TeacherStages(teacher, images, anatomy, anatomy.stages, embedding=True)(images)
        >>> [list(map.shape) for map in reading.stages], list(reading.embedding.shape)
        ([[2, 8, 4, 4]], [2, 8])
    """

    def __init__(
        self,
        teacher: Teacher,
        images: Tensor,
        anatomy: Anatomy,
        stages: Sequence[Stage],
        *,
        embedding: bool = False,
        logits: bool = False,
    ) -> None:
        self.teacher = teacher
        self.stages = tuple(stages)
        self._logits = logits
        self._taps = tuple(map(_inside, (stage.tap for stage in self.stages)))
        # Where no linear layer reads an embedding, it is the mean of the last stage, as the student's.
        self._pooled = anatomy.embedding is None
        source = anatomy.stages[-1].tap if anatomy.embedding is None else anatomy.embedding
        self._embedding = _inside(source) if embedding else None
        taps = (*self._taps, self._embedding) if self._embedding is not None else self._taps
        asked = _Asked(teacher)
        touched, _ = overwritten(asked, taps, images)
        self._recorder = Recorder(asked, taps, touched)
        if not logits:
            asked.stop_behind(taps, anatomy)

    def __call__(self, images: Tensor) -> Reading:
        """Return what the teacher shows for images normalised for the student."""
        answer, values = self._recorder.run(images)
        embedding = None
        if self._embedding is not None:
            embedding = values[self._embedding]
            embedding = average_pool(embedding) if self._pooled else embedding
        return Reading([values[tap] for tap in self._taps], embedding, answer if self._logits else None)


def _inside(tap: Tap) -> Tap:
    """The tap as `_Asked` knows it."""
    return dataclasses.replace(tap, module=f"network.{tap.module}")


class _Done(Exception):  # noqa: N818 - nothing has gone wrong
    """Everything that is wanted of a pass has been read."""


class _Asked(nn.Module):
    """A teacher as a module, so that its features can be recorded while it answers."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.network = teacher.network
        self._teacher = (teacher,)
        self._asking = [False]

    def stop_behind(self, taps: Sequence[Tap], anatomy: Anatomy) -> None:
        """From now on end the pass at the tap that comes last, unless its module runs several times."""
        order = [f"network.{call.module}" for call in anatomy.calls]
        latest = {name: position for position, name in enumerate(order)}
        last = max(taps, key=lambda tap: latest[tap.module])
        if order.count(last.module) > 1:
            return
        module, asking = self.get_submodule(last.module), self._asking

        def stop(*_: Any) -> None:
            # A compiler leaves out by itself what nobody reads, and need not be told by an exception.
            if asking[0] and not compiler.is_compiling():
                raise _Done

        if last.side == "output":
            module.register_forward_hook(stop)
        else:
            module.register_forward_pre_hook(stop)

    def forward(self, images: Tensor) -> Tensor | None:
        self._asking[0] = True
        try:
            return self._teacher[0](images)
        except _Done:
            return None
        finally:
            self._asking[0] = False
