"""BYOT, be your own teacher: classifiers behind the shallow stages imitate the deepest one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.anatomy import Anatomy, Stage, Tap
from attar.anatomy.heads import Exit, ExitOutput, early_exits
from attar.errors import AttarError
from attar.functional import full_precision, gathered, kl_divergence, masked_mean
from attar.method import Batch, Method, Outputs, Probe
from attar.tasks import Task

__all__ = ["BYOT"]

Soft = Literal["kl", "cross-entropy"]
Hint = Literal["squared", "masked-sum", "norm", "map"]

_FORMS: dict[str, dict[str, Any]] = {
    "conference": {
        "alpha": 0.1,
        "soft": "kl",
        "squared_temperature": True,
        "hint": "squared",
        "hint_weight": 1.28e-4,
        "hint_last": True,
        "adapt": False,
        "heads": "bottleneck",
    },
    "journal": {
        "alpha": 0.3,
        "soft": "cross-entropy",
        "squared_temperature": False,
        "hint": "norm",
        "hint_weight": 0.03,
        "hint_last": False,
        "adapt": True,
        "heads": "attention",
    },
}


class BYOT(Method):
    """BYOT, be your own teacher: classifiers behind the shallow stages imitate the deepest one.

    Idea: a neck and a classifier behind every shallow stage make an exit there. All exits learn the labels together,
    and each shallow one also imitates the deepest one's softened prediction and its feature vector. The deepest exit
    gains too. At deployment the heads go, or some stay: see `deployables`.

    Definition, with shallow exits i of logits z_i and features F_i [N, D], deepest z_L and F_L (the pooled embedding):
        L = CE(z_L, y) + sum_i [(1 - alpha) CE(z_i, y) + alpha KD_i + lambda HINT_i]
        conference: KD_i = T^2 KL(stopgrad softmax(z_L / T) || softmax(z_i / T)), averaged over the batch
                    HINT_i = (1/N) sum_n || F_i,n - stopgrad F_L,n ||^2
        journal:    KD_i = cross-entropy of the same, without T^2 (the gradient of KL)
                    HINT_i = || A_i F_i + c_i - stopgrad F_L || over the whole batch, not squared; not for the exit
                    next to the deepest
        synergy:    sum_i KD_i runs over all ordered pairs of exits i, j != i instead, the deepest one among them:
                    every exit imitates every other (`imitate="all"`)
    Terms: `ce_exits`, `kd` and `hint`, each summed over the shallow exits (`kd` with "all": over the pairs).

    Shapes: one map [N, C_i, H_i, W_i] per stage, logits [N, K]. Units: nats; the hint in squared feature units
    (journal: feature units). Data: one view, labels, any sampler.

    Dense tasks: exits stand behind the encoder's shallow stages. Each classifies every position of its neck's map and
    brings the logits bilinearly to the images' size, [N, K, H, W]; CE and KD are averaged over valid pixels, and the
    hint compares pooled features with the encoder's last ones.

    Cost: the heads (ResNet-18 for small images, 100 classes: 1.16 times the parameters and 1.07 times the
    multiply-adds; journal 1.14 and 1.05). Deployed: nothing, or an exit: a network that ends early ("exit1" is the
    shallowest), or the mean of all exits' logits ("ensemble").

    When it helps: deep networks whose shallow stages get little supervision; reported are 0.6 (ResNeXt) to 4 points
    (VGG-19), the ensemble counted. With strong augmentation users found the hint to cost a little.

    Args:
        form: "conference", or "journal" for the authors' released code; it sets every option that is not given.
        alpha: share of imitation beside the labels; 0.1 and 0.3.
        temperature: T.
        imitate: the "deepest" exit, or "all" others (Sun, Yao, Zhou, Zhang, "Deeply-supervised Knowledge Synergy",
            CVPR 2019; with alpha, ce_weight 1 and hint_weight 0 it is Self-KD-Lib's DKS but for the heads).
        hint_weight: lambda; 1.28e-4 (1e-6 times a sum over 128 images) and 0.03.
        ce_weight: of the shallow cross-entropies; default 1 - alpha.
        task_weight: of the deepest cross-entropy; luanyunteng's code has 1 - alpha.
        soft: what compares predictions, "kl" or "cross-entropy", which differ by a constant.
        squared_temperature: whether `kd` has the factor T^2.
        hint: "squared"; "masked-sum" sums squares over the whole batch where either feature is positive
            (luanyunteng); "norm" is the Euclidean norm over the whole batch (released code); "map" is the mean square
            over the unpooled maps (winycg/Self-KD-Lib).
        hint_last: whether the exit next to the deepest gets the hint too.
        adapt: a linear layer between F_i and the hint.
        heads: "bottleneck" or "attention", see `attar.anatomy.heads.Exit`.
        exits: stages (or modules) that get an exit; default: all but the last.
        head_norm: batch norm in the heads, as published; without it the loss does not depend on how a batch is spread
            over processes.
        scope: "world" takes "norm" and "masked-sum" over the batches of all processes, "rank" over each one's own.

    Raises:
        AttarError: a value out of range, a network of one stage, an unknown stage, or an exit at the last one.

    Source: Zhang, Song, Gao, Chen, Bao, Ma, "Be Your Own Teacher: Improve the Performance of Convolutional Neural
    Networks via Self Distillation", ICCV 2019 (arXiv 1905.08094); journal form: ArchipLab-LinfengZhang/
    pytorch-self-distillation-final. The conference paper gives neither its heads nor alpha, lambda and T: here they
    are those of luanyunteng/pytorch-be-your-own-teacher, with KL and a batch mean for the hint. mmrazor's port is the
    journal form with soft="kl", squared_temperature and no adapt. Left out: Self-KD-Lib's heads, which are
    copies of the network's own stages; the released code's second optimiser and its unused adaptation layer.
    """

    not_dense = ""

    def __init__(
        self,
        *,
        form: Literal["conference", "journal"] = "conference",
        alpha: float | None = None,
        temperature: float = 3.0,
        imitate: Literal["deepest", "all"] = "deepest",
        hint_weight: float | None = None,
        ce_weight: float | None = None,
        task_weight: float = 1.0,
        soft: Soft | None = None,
        squared_temperature: bool | None = None,
        hint: Hint | None = None,
        hint_last: bool | None = None,
        adapt: bool | None = None,
        heads: Literal["bottleneck", "attention"] | None = None,
        exits: tuple[str, ...] | None = None,
        head_norm: bool = True,
        scope: Literal["rank", "world"] = "world",
    ) -> None:
        super().__init__()
        _one_of("form", form, tuple(_FORMS))
        given: dict[str, Any] = {"alpha": alpha, "soft": soft, "squared_temperature": squared_temperature, "hint": hint}
        given |= {"hint_weight": hint_weight, "hint_last": hint_last, "adapt": adapt, "heads": heads}
        chosen = {name: _FORMS[form][name] if value is None else value for name, value in given.items()}
        _one_of("soft", chosen["soft"], ("kl", "cross-entropy"))
        _one_of("hint", chosen["hint"], ("squared", "masked-sum", "norm", "map"))
        _one_of("heads", chosen["heads"], ("bottleneck", "attention"))
        _one_of("scope", scope, ("rank", "world"))
        _one_of("imitate", imitate, ("deepest", "all"))
        if temperature <= 0:
            raise AttarError(f"BYOT's temperature must be positive, not {temperature}.")
        if not 0.0 <= chosen["alpha"] <= 1.0:
            raise AttarError(f"BYOT's alpha is a share between 0 and 1, not {chosen['alpha']}.")
        if chosen["hint"] == "map" and chosen["adapt"]:
            raise AttarError("BYOT's linear layer adapts pooled features, not maps: give adapt=False with hint='map'.")
        self.alpha: float = chosen["alpha"]
        self.temperature = temperature
        self.imitate = imitate
        self.hint_weight: float = chosen["hint_weight"]
        self.ce_weight = 1.0 - self.alpha if ce_weight is None else ce_weight
        self.soft: Soft = chosen["soft"]
        self.squared_temperature: bool = chosen["squared_temperature"]
        self.hint: Hint = chosen["hint"]
        self.hint_last: bool = chosen["hint_last"]
        self.adapt: bool = chosen["adapt"]
        self.heads: Literal["bottleneck", "attention"] = chosen["heads"]
        self.exit_names = exits
        self.head_norm = head_norm
        self.scope = scope
        self._task_weight = task_weight
        if task_weight != 1.0:
            self.claims = {"task weight": f"BYOT gives the deepest cross-entropy weight {task_weight}"}
        self._stages: tuple[Stage, ...] = ()
        self._images: tuple[Tensor, ...] = ()
        self._task: Task | None = None

    def build(self, probe: Probe) -> None:
        """Make a head behind every shallow stage, and the hint's linear layers."""
        anatomy, last = probe.anatomy, probe.anatomy.stages[-1]
        names = self.exit_names if self.exit_names is not None else [stage.name for stage in anatomy.stages[:-1]]
        if not names:
            raise AttarError("BYOT finds only one stage, so no exit lies before the last: name modules with exits=.")
        if last.name in names:
            raise AttarError(f"BYOT's deepest exit is the network itself: leave '{last.name}' out of exits.")
        self._stages = tuple(anatomy.find(name) for name in names)
        self._images, self._task = (probe.images,), probe.task
        width = last.channels if self.hint == "map" else anatomy.embedding_dim
        classes, dense = probe.task.num_classes, probe.task.dense
        self.exits = nn.ModuleList(
            Exit(stage, last, width, classes, self.heads, self.head_norm, dense=dense) for stage in self._stages
        )
        self.adapters = nn.ModuleList(nn.Linear(width, width) for _ in self._hinted() if self.adapt)

    def _hinted(self) -> range:
        """The exits that get the hint, by position."""
        return range(len(self._stages) if self.hint_last else len(self._stages) - 1)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The maps at the exits, and what the deepest one is compared with."""
        return [*(stage.tap for stage in self._stages), *super().taps(anatomy)]

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `ce_exits`, `kd` and `hint`."""
        # Only dense heads need to know how large the images are.
        size = [outputs.images.shape[2:]] if self._task is not None and self._task.dense else []
        answers: list[ExitOutput] = [
            exit_(outputs[stage.tap], *size) for exit_, stage in zip(self.exits, self._stages, strict=True)
        ]
        ce = [outputs.task_loss(answer.logits, batch.targets) for answer in answers]
        logits = [*(answer.logits for answer in answers), outputs.logits]
        if self.imitate == "deepest":
            kd = [self._imitation(own, outputs.logits, batch.valid) for own in logits[:-1]]
        else:
            kd = [self._imitation(own, other, batch.valid) for own, other in itertools.permutations(logits, 2)]
        hints = [self._hint(answers[i], i, outputs) for i in self._hinted()]
        return {
            "ce_exits": torch.stack(ce).sum(),
            "kd": torch.stack(kd).sum(),
            "hint": torch.stack(hints).sum() if hints else ce[0].new_zeros(()),
        }

    def _imitation(self, logits: Tensor, deepest: Tensor, valid: Tensor | None = None) -> Tensor:
        if self.soft == "kl":
            squared = self.squared_temperature
            return kl_divergence(logits, deepest, self.temperature, squared_temperature=squared, valid=valid)
        target = torch.softmax(full_precision(deepest.detach()) / self.temperature, dim=1)
        log_p = torch.log_softmax(full_precision(logits) / self.temperature, dim=1)
        return -masked_mean((target * log_p).sum(dim=1), valid) * (
            self.temperature**2 if self.squared_temperature else 1.0
        )

    def _hint(self, answer: ExitOutput, position: int, outputs: Outputs) -> Tensor:
        if self.hint == "map":
            deepest = full_precision(outputs.stages[-1].detach())
            near = F.adaptive_avg_pool2d(full_precision(answer.map), (deepest.shape[2], deepest.shape[3]))
            return (near - deepest).square().mean()
        own = self.adapters[position](answer.features) if self.adapt else answer.features
        own, deepest = full_precision(own), full_precision(outputs.embedding.detach())
        difference = own - deepest
        if self.hint == "squared":
            return difference.square().sum(dim=1).mean()
        if self.hint == "masked-sum":
            total = (difference.square() * ((own > 0) | (deepest > 0))).sum()
            return gathered(total.unsqueeze(0)).sum() if self.scope == "world" else total
        norm: Tensor = torch.linalg.vector_norm(difference)
        if self.scope == "world":
            norm = torch.linalg.vector_norm(gathered(norm.unsqueeze(0)))
        return norm

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        return {"ce_exits": self.ce_weight, "kd": self.alpha, "hint": self.hint_weight}

    def task_weight(self, progress: Tensor) -> float | Tensor:
        """Constant."""
        return self._task_weight

    def deployables(self, student: nn.Module) -> dict[str, nn.Module]:
        """Every exit as a network that ends there, and the mean of all, where torch.fx can cut the student."""
        like = next(student.parameters())
        images = self._images[0].to(device=like.device, dtype=like.dtype)
        heads = [exit_ for exit_ in self.exits if isinstance(exit_, Exit)]
        answer = self._task.logits if self._task is not None else None
        return early_exits(student, self._stages, heads, images, answer)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise AttarError(f"BYOT's {option} is one of {', '.join(known)}, not '{value}'.")
