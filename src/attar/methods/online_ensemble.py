"""Online ensemble compression: one run trains a network together with narrower versions of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.anatomy import Anatomy, Recorder, Split, Stage, Tap, overwritten, split
from attar.anatomy.branches import BranchEnsemble, BranchNetwork, Spread, same_tensors
from attar.anatomy.narrow import narrow_replicas
from attar.errors import AttarError
from attar.functional import full_precision, kl_divergence
from attar.method import Batch, Method, Outputs, Probe

__all__ = ["CompressedStudent", "OnlineEnsemble"]


class OnlineEnsemble(Method):
    """Online ensemble compression: one run trains a network together with narrower versions of it.

    Idea: a small base block is shared by S students of one depth. The first is the network itself, called the pseudo
    teacher, since it teaches while it trains from scratch; student j has (S - j + 1) / S of the channels of every
    layer behind the base. All learn from labels and from the mean of their logits, the narrower ones also from the
    pseudo teacher's maps behind every block. Afterwards choose the student that fits, or keep the ensemble.

    Definition, with logits z_j, maps f_bj behind block b, 1x1 convolutions A_bj, z_T = (1/S) sum_j z_j, temperature T:
        L = alpha sum_j CE(z_j, y) + beta sum_b sum_{j>1} mean[(stopgrad f_b1 - A_bj(f_bj))^2]
            + gamma T^2 sum_j KL(stopgrad softmax(z_T / T) || softmax(z_j / T))
    Terms: `task` is CE(z_1, y), `ce_students` the other CE summed, `inter` the second sum (means over all elements),
    `kl` the third, T^2 included. The ensemble has no cross-entropy of its own. Weights are constant. With S = 1 it is
    plain training with alpha times the loss.

    Widths: floor(w (S - j + 1) / S) of w channels, one at least; with S = 5, 16, 32, 64 become 12, 25, 51; 9, 19, 38;
    6, 12, 25; 3, 6, 12. In grouped convolutions the number of groups stays and widths are rounded down to multiples of
    it (the paper does not say). The base and the logits keep their widths. Where the first block behind the base has an
    identity shortcut, narrower students have a projection there. Networks with attention behind the base, and others
    whose maps cannot be narrowed, are refused.

    Shapes: logits [N, K], maps [N, C, H, W]; A_bj from w_bj to w_b1 channels with bias. Unit: nats, squared units of a
    map (`inter`). Data: one view, labels, any sampler.

    Cost: one narrower tail a student (CIFAR ResNets, S = 5: 2.17 times the parameters of the network alone) and the
    A_bj, which are gone after training. Deployed: the network itself, or any other student, or the mean of all.

    When it helps: several sizes of one network are wanted, trained from scratch, for less than training each. The
    published gains are largest for the narrowest student (relative to a weak one alone); some students lose.

    Args:
        students: S, the network itself included.
        alpha: weight of the labels, for every student.
        beta: weight of `inter`.
        gamma: weight of `kl`.
        temperature: T.
        base_gradient: whose losses train the shared base, "all_students" or "pseudo_teacher" alone.
        adapter_lr: learning rate of the A_bj as a share of the run's.
        cut: stage (or module) that ends the base. Default: with three stages of which the first has the images' own
            resolution (CIFAR ResNets, wide ResNets, DenseNets), what is before the first, as published; else the first
            stage.
        tail: for networks that torch.fx cannot cut: a module of the student's own layers from the output of `cut` to
            the logits.

    Raises:
        AttarError: no student, a temperature or rate that is not positive, an unknown stage, a cut that is not exact
            or has no stage behind it, or a network that cannot be made narrower there.

    Source: Walawalkar, Shen, Savvides, "Online Ensemble Model Compression using Knowledge Distillation", ECCV 2020
    (arXiv 2011.07449), by the reductions of its code, Devwalkar/BOC-KD: the paper sums `inter` over the map, which
    would drown every other term, and prints no T^2. Differences from the code: all students are registered modules, so
    that their batch norms are evaluated as such; the A_bj train from the first step instead of the second epoch; in
    the code's ResNets and EfficientNets all students train the base, in its DenseNets the pseudo teacher alone;
    DenseNets scale their growth and everything that follows from it there, here every layer's own width (the growth
    comes out equal, inner layers and transitions differ by a few channels).
    """

    not_dense = "it narrows what lies behind its base for classifiers only, not decoders with skips"

    def __init__(
        self,
        *,
        students: int = 5,
        alpha: float = 0.7,
        beta: float = 0.15,
        gamma: float = 0.15,
        temperature: float = 2.0,
        base_gradient: Literal["all_students", "pseudo_teacher"] = "all_students",
        adapter_lr: float = 0.5,
        cut: str | None = None,
        tail: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if students < 1:
            raise AttarError(f"OnlineEnsemble needs at least one student, the network itself, not {students}.")
        if temperature <= 0:
            raise AttarError(f"OnlineEnsemble's temperature must be positive, not {temperature}.")
        if base_gradient not in ("all_students", "pseudo_teacher"):
            raise AttarError(
                f"OnlineEnsemble's base_gradient is 'all_students' or 'pseudo_teacher', not '{base_gradient}'."
            )
        if adapter_lr <= 0:
            raise AttarError(f"OnlineEnsemble's adapter_lr must be positive, not {adapter_lr}.")
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.temperature = temperature
        self.base_gradient = base_gradient
        self.adapter_lr = adapter_lr
        self.cut = cut
        if alpha != 1.0:
            self.claims = {"task weight": f"OnlineEnsemble gives the labels weight {alpha:g}"}
        self._shares = [Fraction(students - j + 1, students) for j in range(2, students + 1)]
        # Wrapped, so that the student's own layers do not become children of the method.
        self._given_tail = (tail,)
        self._split: tuple[Split, ...] = ()
        self._blocks: tuple[Stage, ...] = ()

    def build(self, probe: Probe) -> None:
        """Cut the network behind the base, make the narrower students and the A_bj."""
        self.students, self.adapters = nn.ModuleList(), nn.ModuleList()
        if not self._shares:
            return
        anatomy, student = probe.anatomy, probe.student
        cut = anatomy.find(self.cut).name if self.cut is not None else _end_of_base(anatomy)
        halves = split(student, cut, probe.images, self._given_tail[0])
        where = f"{type(student).__name__} behind '{cut}'"
        blocks = _blocks(student, anatomy, halves)
        if not blocks:
            raise AttarError(f"OnlineEnsemble finds no stage of {where}: cut at an earlier one.")
        carried = _at_cut(student, halves, probe.images)
        if not all(isinstance(value, Tensor) and value.is_floating_point() for value in carried):
            raise AttarError(f"What reaches {where} is not made of tensors alone: choose another cut.")
        last = [_channels_last(anatomy, tap, value) for tap, value in zip(halves.carried, carried, strict=True)]
        for tail in narrow_replicas(halves.tail, carried, self._shares, last=last, where=where):
            compressed = CompressedStudent(tail, [tap for _, tap in blocks], carried)
            maps = zip(blocks, _shapes(compressed, carried), strict=True)
            widths = [(_checked_width(stage, shape, where), stage.channels) for (stage, _), shape in maps]
            self.adapters.append(nn.ModuleList(nn.Conv2d(own, whole, 1) for own, whole in widths))
            self.students.append(compressed.train(student.training))
        self._split, self._blocks = (halves,), tuple(stage for stage, _ in blocks)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """What the base gives to all students, and the map behind every block."""
        carried = [tap for halves in self._split for tap in halves.carried if tap is not None]
        return [*carried, *(stage.tap for stage in self._blocks)]

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `ce_students`, `inter` and `kl`."""
        carried = [outputs.images if tap is None else outputs[tap] for half in self._split for tap in half.carried]
        if self.base_gradient == "pseudo_teacher":
            carried = [value.detach() for value in carried]
        taught = [full_precision(outputs[stage.tap].detach()) for stage in self._blocks]
        logits, ce, inter = [outputs.logits], [], []
        for student, adapters in zip(self.students, self.adapters, strict=True):
            answer, maps = student(*carried)
            logits.append(answer)
            ce.append(outputs.task_loss(answer, batch.targets))
            inter += [
                F.mse_loss(full_precision(adapter(own)), teacher)
                for adapter, own, teacher in zip(adapters, maps, taught, strict=True)  # type: ignore[call-overload]
            ]
        ensemble = self.ensemble(logits)
        nothing = full_precision(outputs.logits).new_zeros(())
        return {
            "ce_students": torch.stack(ce).sum() if ce else nothing,
            "inter": torch.stack(inter).sum() if inter else nothing,
            "kl": torch.stack([kl_divergence(z, ensemble, self.temperature) for z in logits]).sum(),
        }

    @staticmethod
    def ensemble(logits: Sequence[Tensor]) -> Tensor:
        """Return the ensemble teacher's logits z_T [N, K], the plain mean."""
        return torch.stack([full_precision(z) for z in logits]).mean(dim=0)

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        return {"ce_students": self.alpha, "inter": self.beta, "kl": self.gamma}

    def task_weight(self, progress: Tensor) -> float | Tensor:
        """Every student's labels count alpha, the pseudo teacher's too."""
        return self.alpha

    def lr_scale(self, parameter: str) -> float:
        """The A_bj learn more slowly."""
        return self.adapter_lr if parameter.startswith("adapters.") else 1.0

    def deployables(self, student: nn.Module) -> dict[str, nn.Module]:
        """Every narrower student with the base in front of it, and the mean of all logits."""
        found: dict[str, nn.Module] = {}
        for halves in self._split:
            tails = [student.plain() for student in self.students if isinstance(student, CompressedStudent)]
            found |= {f"student{j}": BranchNetwork(halves.trunk, tail) for j, tail in enumerate(tails, 2)}
            found["ensemble"] = BranchEnsemble(halves.trunk, [halves.tail, *tails])
        return found


class CompressedStudent(nn.Module):
    """A narrower tail that also tells the map behind every block: values at the cut -> logits [N, K], maps.

    Args:
        tail: the values at the cut -> logits.
        taps: where the maps are read in it.
        carried: example values at the cut.
    """

    def __init__(self, tail: nn.Module, taps: Sequence[Tap], carried: Sequence[Tensor]) -> None:
        super().__init__()
        self.tail = tail
        self._taps = [replace(tap, module=f"tail.{tap.module}") for tap in taps]
        spread = Spread(tail)
        touched, _ = overwritten(spread, self._taps, carried)  # type: ignore[arg-type]
        self._recorder = Recorder(spread, self._taps, touched)

    def forward(self, *carried: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits and maps."""
        logits, values = self._recorder.run(carried)  # type: ignore[arg-type]
        return logits, [values[tap] for tap in self._taps]

    def plain(self) -> nn.Module:
        """Return the tail without the hooks that read it: the same tensors in modules of their own."""
        copied = same_tensors(self.tail)
        self._recorder.remove_from_copy(copied)
        return copied


def _end_of_base(anatomy: Anatomy) -> str:
    """Choose the cut of the paper: behind the stem of networks for small images, else behind the first stage."""
    first = anatomy.stages[0]
    if len(anatomy.stages) == 3 and first.reduction == 1:
        inside = [call.module == first.name or call.module.startswith(f"{first.name}.") for call in anatomy.calls]
        begin = inside.index(True)
        if begin > 0 and sum(inside) > 1:
            return anatomy.calls[begin - 1].module
    return first.name


def _blocks(student: nn.Module, anatomy: Anatomy, halves: Split) -> list[tuple[Stage, Tap]]:
    """Return the stages that end behind the cut, and where their maps are read by the tail's own names."""
    paths = {id(module): path for path, module in halves.tail.named_modules()}
    modules = [(stage, student.get_submodule(stage.tap.module)) for stage in anatomy.stages]
    return [(stage, replace(stage.tap, module=paths[id(m)])) for stage, m in modules if id(m) in paths]


@torch.no_grad()
def _at_cut(student: nn.Module, halves: Split, images: Tensor) -> list[Any]:
    """Return the values at the cut, in evaluation mode."""
    modes = {module: module.training for module in (*student.modules(), *halves.trunk.modules())}
    student.eval()
    values = list(halves.trunk.eval()(images))
    for module, mode in modes.items():
        module.training = mode
    return values


def _channels_last(anatomy: Anatomy, tap: Tap | None, value: Tensor) -> bool:
    if value.ndim != 4 or tap is None:
        return value.ndim != 4
    try:
        return anatomy.find(tap.module).tap.layout == "nhwc"
    except AttarError:  # no map of the image's shape
        return False


@torch.no_grad()
def _shapes(student: CompressedStudent, carried: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(own.shape) for own in student.eval()(*carried)[1]]


def _checked_width(stage: Stage, shape: tuple[int, ...], where: str) -> int:
    """Return the channels of a narrower student's map, which must be fewer at the same size."""
    if shape[2:] != (stage.height, stage.width):
        raise AttarError(
            f"The map of '{stage.name}' is {shape[2]} x {shape[3]} instead of {stage.height} x {stage.width} when "
            f"{where} is narrower: choose another network for OnlineEnsemble."
        )
    if shape[1] >= stage.channels:
        raise AttarError(
            f"OnlineEnsemble cannot make '{stage.name}' of {where} narrower, since its {shape[1]} channels hang "
            "together with those at the cut or cannot be followed: choose another cut or another network."
        )
    return shape[1]
