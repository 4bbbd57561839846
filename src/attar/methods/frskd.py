"""FRSKD: a feature pyramid on the student refines its maps and teaches them back to it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from attar.anatomy import Anatomy, Stage, Tap
from attar.anatomy.bifpn import BiFPN, MirroredBiFPN, PointwiseBlock
from attar.anatomy.neck import BiFPNNeck, DenseHead
from attar.anatomy.self_teacher import DenseSelfTeacher, SelfTeacher, pooled
from attar.errors import AttarError
from attar.functional import attention_transfer, full_precision, kl_divergence, sigmoid_ramp
from attar.functional.label_augmentation import aggregated_logits, joint_labels, transformed
from attar.method import Batch, Method, Outputs, Probe
from attar.methods.sla import check_transform

__all__ = ["FRSKD", "DenseSelfTeacher", "SelfTeacher"]

# What was published for classification, and for segmentation: 40 of 60 epochs without distillation.
_ALPHA, _BETA, _TEMPERATURE, _START = (2.0, 1.0), (100.0, 50.0), (4.0, 1.0), (0.0, 40 / 60)
# Deep maps of dense networks are large: their strides are often replaced by dilation.
_MAX_CHANNELS = (1024, 256)
# Of the published segmentation head.
_HEAD_CHANNELS = 256


class FRSKD(Method):
    """FRSKD, Feature Refinement via Self-Knowledge Distillation: a pyramid on the student's maps is its teacher.

    Idea: an auxiliary self-teacher (a BiFPN and a linear classifier) takes the student's stage outputs, mixes them
    from deep to shallow and back, and learns the labels itself; so its maps and logits are the student's own,
    refined. The student learns from the labels, from the self-teacher's softened logits and from where its maps look.
    One view, one optimiser; at deployment the self-teacher is dropped.

    Definition, with stage outputs F_i, refined maps T_i, logits z and z_t, temperature T, A the channel mean of
    squares normalised per sample over positions (L2), and sg = stop-gradient:
        L = CE(z, y) + CE(z_t, y) + alpha T^2 KL(softmax(sg z_t / T) || softmax(z / T)) + beta L_F
        L_F = sum_i mean_{n, positions} (A(F_i) - A(sg T_i))^2
    Terms: `task` is CE(z, y), `ce_teacher` CE(z_t, y), `kl` the T^2-scaled KL, `features` L_F. KL and L_F never reach
    the self-teacher; F_i enters it with its gradient, so `ce_teacher` also trains the student's stages.
    Other L_F: "fit" is sum_i mean (relu(bn(conv F_i)) - sg T_i)^2; "od" is the overhaul's partial L2 on maps before
    ReLU, sum_i 2^(i-n) (1/N) sum [s > t or t > 0] (s - t)^2, s = bn(conv F_i), t = max(sg T_i, margin).
    With `joint_labels` (the paper's FRSKD+SLA) both networks also pass four rotations, have joint heads as in `SLA`
    with aggregates u and u_t, and `joint` is their two cross-entropies, `joint_kl` KL(u || z) + KL(u_t || z_t) as in
    `kl`; `kl` is then the mean over (z, z_t) and (u, u_t), L_F over plain and rotated maps.

    Dense tasks: the same L, with CE and KL as means over the pixels that are not void. What the student is decides what
    the self-teacher stands on:
    - a neck, the published form: F_i are the maps S of the student's `BiFPNNeck` (the network `bifpn_efficientnet_b0`
      has one) or those that `maps` names, T_i those of `layers` more layers of the same kind on top, the last of which
      ends at the finest map; a head of its own there gives z_t.
    - any other network: F_i are the stages of its encoder, and the pyramid is the one above, mirrored (from shallow to
      deep and back), so that it ends at T_1, where the same kind of head gives z_t and trains all of it.

    Shapes: maps [N, c_i, h_i, w_i] -> [N, d_i, h_i, w_i], d_i = max(8, round(w c_i)), on a neck c; logits [N, K], in
    dense tasks [N, K, H, W], bilinear from the finest map. Unit: nats (kl, cross-entropies), none (features).
    Data: one view, labels or soft targets (mixing applies to both networks alike). Together with the method `SLA`,
    that one teaches the student alone.

    Cost: parameters and multiply-adds of the self-teacher while training: on CIFAR ResNet-18 0.57 and 0.71 times the
    student's; five times everything with `joint_labels`. In dense tasks, most of it in the head at the finest
    resolution, 0.61 times the multiply-adds of `bifpn_efficientnet_b0` (180 x 240 pixels), 1.4 times those of
    lraspp_mobilenet_v3_large, 0.12 times those of fcn_resnet50. Deployed: nothing.

    When it helps: networks with several resolutions, most on fine-grained images; much of the published gain on
    CIFAR-100 is over a weak baseline (73.8 %); against a stronger one (76.2 %) a re-run gained 0.4. Little to refine
    in networks of constant resolution or where the last maps are a few pixels wide. Published for segmentation: 79.07
    -> 80.55 % mIoU on VOC, for the network that `bifpn_efficientnet_b0` is.

    Args:
        alpha: weight of `kl`; the paper searched 1, 2, 3. Default: 2; in dense tasks, as published, 1.
        beta: weight of `features`; the paper searched 100, 200. Default: 100; in dense tasks 50. The released code's
            default of 0 trains FRSKD without features. For "od", a sum over positions and channels, choose it smaller
            by orders of magnitude.
        temperature: T. Default: 4; in dense tasks 1.
        features: what is learned from the maps: "at" (attention, as published), "fit", "od" or "none".
        pyramid: "bifpnc" as published, or "bifpn": one width for all levels, no convolution after resampling.
        width: w, lowered where the widest level would pass `max_channels`.
        max_channels: the most channels of any level, what makes the self-teacher of a bottleneck network affordable.
            Default: 1024; in dense tasks 256, to which only the levels that pass it are lowered.
        min_channels: the fewest.
        channels: of every level of "bifpn".
        depth: separable convolutions of every node.
        levels: how many of the last stages are used; default: all.
        detach_teacher_input: stop the gradient of `ce_teacher` at the maps; the released code does not.
        joint_labels: rotations and joint labels for student and self-teacher.
        joint_weight: multiplies `joint_kl`.
        start: share of the run before `kl` and `features` are switched on. Default: 0; in dense tasks two thirds (40
            of 60 epochs).
        ramp: share of the run over which they then grow by exp(-5 (1 - t)^2), t from 0 to 1; 0: at once. Default: 0;
            in dense tasks what is left of the run, and, as published, a whole epoch has the value of its end.
        batch_norm: in the self-teacher, as published; without it the loss is a mean over samples and does not depend
            on how a batch is spread over processes.
        maps: dense tasks: modules whose outputs are the maps of a neck, fine to deep, of one width (published: six).
        layers: dense tasks, on a neck: BiFPN layers of the self-teacher.
        head_channels: dense tasks: hidden channels of the self-teacher's head. Default: 256; over an encoder twice
            those of T_1, where these are fewer.
        count_void: dense tasks: average `kl` over void pixels too, as the released code does.

    Raises:
        AttarError: a value out of range, a student with fewer than two stages, or maps that are no neck's.

    Source: Ji, Shin, Hwang, Park, Moon, "Refine Myself by Teaching Myself", CVPR 2021 (arXiv 2103.08273), and its
    released code, which is followed where they differ: KL from teacher to student with T^2 (printed: the other order,
    without), the squared mean in L_F (printed: an L2 norm), nearest upsampling (printed: bilinear). Differences from
    the code: any number of stages and any sizes; stage outputs are taken as the student has them, so in
    pre-activation networks (to which the authors add a batch norm and ReLU per group) they are not activated: name
    the next block's activation as stage where that matters. For segmentation only the form on a neck is published;
    `kl` there counts void pixels (`count_void`), and the form over an encoder is ours.
    """

    not_dense = ""

    def __init__(
        self,
        *,
        alpha: float | None = None,
        beta: float | None = None,
        temperature: float | None = None,
        features: Literal["at", "fit", "od", "none"] = "at",
        pyramid: Literal["bifpnc", "bifpn"] = "bifpnc",
        width: float = 2.0,
        max_channels: int | None = None,
        min_channels: int = 8,
        channels: int = 256,
        depth: int = 2,
        levels: int | None = None,
        detach_teacher_input: bool = False,
        joint_labels: bool = False,
        joint_weight: float = 1.0,
        start: float | None = None,
        ramp: float | None = None,
        batch_norm: bool = True,
        maps: tuple[str, ...] | None = None,
        layers: int = 2,
        head_channels: int | None = None,
        count_void: bool = False,
    ) -> None:
        super().__init__()
        if temperature is not None and temperature <= 0:
            raise AttarError(f"FRSKD's temperature must be positive, not {temperature}.")
        if features not in ("at", "fit", "od", "none"):
            raise AttarError(f"FRSKD's features are 'at', 'fit', 'od' or 'none', not '{features}'.")
        if pyramid not in ("bifpnc", "bifpn"):
            raise AttarError(f"FRSKD's pyramid is 'bifpnc' or 'bifpn', not '{pyramid}'.")
        if features == "od" and not batch_norm:
            raise AttarError("FRSKD's features 'od' take their margins from batch norm: leave batch_norm on.")
        if width <= 0:
            raise AttarError(f"FRSKD's width must be positive, not {width}.")
        self._given = (alpha, beta, temperature, max_channels, start, ramp)
        self._settle(dense=False)
        if min(depth, channels, min_channels) < 1 or self.max_channels < min_channels:
            raise AttarError(
                "FRSKD needs depth, channels and min_channels of at least 1 and max_channels of at least min_channels, "
                f"not {depth}, {channels}, {min_channels} and {self.max_channels}."
            )
        if layers < 1 or (head_channels is not None and head_channels < 1):
            raise AttarError(f"FRSKD needs layers and head_channels of at least 1, not {layers} and {head_channels}.")
        if levels is not None and levels < 2:
            raise AttarError(f"FRSKD's pyramid needs at least two levels, not {levels}.")
        self.features, self.pyramid = features, pyramid
        self.width, self.min_channels = width, min_channels
        self.channels, self.depth, self.levels = channels, depth, levels
        self.maps, self.layers, self.head_channels, self.count_void = maps, layers, head_channels, count_void
        self.detach_teacher_input = detach_teacher_input
        self.joint_labels, self.joint_weight = joint_labels, joint_weight
        if joint_labels:
            self.needs = frozenset({"labels"})  # a need of this option alone
            self.claims = {"joint labels": "FRSKD with joint_labels contains SLA"}
            self.not_dense = "joint_labels name the rotation of a whole image (leave them off)"
        self.batch_norm = batch_norm
        self._maps: tuple[Tap, ...] = ()
        self._before_relu: tuple[Tap, ...] = ()
        # The share of the run that is done when this epoch ends; 0 where nobody counts epochs.
        self.register_buffer("_epoch_end", torch.zeros(()), persistent=False)

    def _settle(self, *, dense: bool) -> None:
        """Take the values that were published for the task where none are given."""
        alpha, beta, temperature, max_channels, start, ramp = self._given
        self.dense = dense
        self.alpha = _ALPHA[dense] if alpha is None else alpha
        self.beta = _BETA[dense] if beta is None else beta
        self.temperature = _TEMPERATURE[dense] if temperature is None else temperature
        self.max_channels = _MAX_CHANNELS[dense] if max_channels is None else max_channels
        self.start = _START[dense] if start is None else start
        self.ramp = (1 - self.start if dense else 0.0) if ramp is None else ramp
        if self.start < 0 or self.ramp < 0 or self.start + self.ramp > 1:
            raise AttarError(
                "FRSKD's start and ramp are shares of the run, together at most 1, "
                f"not {self.start:g} and {self.ramp:g}."
            )

    def build(self, probe: Probe) -> None:
        """Make the self-teacher in the student's shapes, and what the feature loss needs."""
        self._settle(dense=probe.task.dense)
        if self.maps is not None and not self.dense:
            raise AttarError("FRSKD's maps are those of a dense network's neck: name stages=[...] in this task.")
        neck = self._neck(probe) if self.dense else None
        if neck is None:
            self._build_on_stages(probe)
        else:
            self._build_on_neck(neck, probe)

    def _neck(self, probe: Probe) -> tuple[list[Tap], list[int]] | None:
        """Find the maps of the student's neck and their channels; None: it has none."""
        if self.maps is not None:
            named = [probe.anatomy.find(name) for name in self.maps]
            return [stage.tap for stage in named], [stage.channels for stage in named]
        for path, module in probe.student.named_modules():
            if isinstance(module, BiFPNNeck):
                return [Tap(f"{path}.{end}") for end in module.ends], [module.channels] * module.levels
        return None

    def _build_on_neck(self, neck: tuple[list[Tap], list[int]], probe: Probe) -> None:
        taps, widths = neck
        if len(widths) < 2 or len(set(widths)) > 1:
            raise AttarError(f"FRSKD's neck needs two maps or more of one width, but these have {widths} channels.")
        if self.features == "od":
            raise AttarError("FRSKD's features 'od' compare maps before ReLU, which a neck has not: use 'at' or 'fit'.")
        self._maps, width = tuple(taps), widths[0]
        pyramid = BiFPNNeck(width, len(widths), self.layers, ends_fine=True, batch_norm=self.batch_norm)
        hidden = self.head_channels or _HEAD_CHANNELS
        head = DenseHead(width, hidden, probe.task.num_classes, batch_norm=self.batch_norm)
        self.self_teacher: nn.Module = DenseSelfTeacher(pyramid, head)
        self._build_regressors(widths, widths)

    def _build_on_stages(self, probe: Probe) -> None:
        stages = probe.anatomy.stages
        wanted = self.levels or max(len(stages), 2)
        if len(stages) < wanted:
            raise AttarError(
                f"FRSKD's pyramid of {wanted} levels needs as many stages, but {type(probe.student).__name__} has "
                f"{len(stages)} (name more with stages=[...])."
            )
        stages = stages[-wanted:]
        self._maps = tuple(stage.tap for stage in stages)
        inputs = [stage.channels for stage in stages]
        widths = self._widths(inputs)
        pyramid = (MirroredBiFPN if self.dense else BiFPN)(
            inputs, widths, depth=self.depth, convolved=self.pyramid == "bifpnc", batch_norm=self.batch_norm
        )
        if self.dense:
            hidden = self.head_channels or min(_HEAD_CHANNELS, 2 * widths[0])
            head = DenseHead(widths[0], hidden, probe.task.num_classes, batch_norm=self.batch_norm)
            self.self_teacher = DenseSelfTeacher(pyramid, head)
        else:
            self.self_teacher = SelfTeacher(pyramid, widths[-1], probe.task.num_classes)
        if self.joint_labels:
            check_transform("FRSKD with joint_labels", "rotation", *probe.anatomy.input_shape)
            self.student_joint = nn.Linear(probe.anatomy.embedding_dim, 4 * probe.task.num_classes)
            self.teacher_joint = nn.Linear(widths[-1], 4 * probe.task.num_classes)
        self._build_regressors(inputs, widths)
        if self.features == "od":
            self._before_relu = tuple(_before_relu(probe, stage) for stage in stages)
            for i, end in enumerate(pyramid.ends):
                self.register_buffer(f"margin_{i}", _margin(cast(nn.BatchNorm2d, end[-1])))

    def _build_regressors(self, inputs: Sequence[int], widths: Sequence[int]) -> None:
        if self.features in ("fit", "od"):
            self.regressors = nn.ModuleList(
                PointwiseBlock(c, d, activated=self.features == "fit", batch_norm=self.batch_norm)
                for c, d in zip(inputs, widths, strict=True)
            )

    def _widths(self, inputs: Sequence[int]) -> list[int]:
        if self.pyramid == "bifpn":
            return [self.channels] * len(inputs)
        if self.dense:
            return [max(self.min_channels, min(self.max_channels, round(self.width * c))) for c in inputs]
        width = min(self.width, self.max_channels / max(inputs))
        return [max(self.min_channels, round(width * c)) for c in inputs]

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The maps that the pyramid takes; for "od" what their last ReLU took, for joint labels the embedding."""
        own = [*self._maps, *self._before_relu]
        return [*own, *super().taps(anatomy)] if self.joint_labels else own

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `ce_teacher`, `kl`, unless they are "none" `features`, and with joint labels `joint`, `joint_kl`."""
        maps, refined, logits = self._refine(outputs)
        losses = {"ce_teacher": outputs.task_loss(logits, batch.targets)}
        student, teacher = outputs.logits, logits
        if self.joint_labels:
            turned = outputs.student(transformed(outputs.images, "rotation").flatten(0, 1))
            turned_maps, turned_refined, _ = self._refine(turned)
            joint = self.student_joint(turned.embedding), self.teacher_joint(pooled(turned_refined))
            losses["joint"] = torch.stack([_joint_loss(u, batch) for u in joint]).sum()
            u, u_t = (aggregated_logits(x, 4) for x in joint)
            kl = [kl_divergence(student, u, self.temperature), kl_divergence(teacher, u_t, self.temperature)]
            losses["joint_kl"] = torch.stack(kl).sum()
            student, teacher = torch.cat([student, u]), torch.cat([teacher, u_t])
            maps = [torch.cat(pair) for pair in zip(maps, turned_maps, strict=True)]
            refined = [torch.cat(pair) for pair in zip(refined, turned_refined, strict=True)]
        valid = None if self.count_void else batch.valid
        losses["kl"] = kl_divergence(student, teacher, self.temperature, valid=valid)
        if self.features != "none":
            losses["features"] = self._feature_loss(maps, [t.detach() for t in refined])
        return losses

    def _refine(self, outputs: Outputs) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Return the student's maps that the feature loss reads, the refined ones and the self-teacher's logits."""
        maps = [outputs[tap] for tap in self._maps]
        size = outputs.logits.shape[2:]
        refined, logits = self.self_teacher([m.detach() for m in maps] if self.detach_teacher_input else maps, size)
        return [outputs[tap] for tap in self._before_relu] or maps, refined, logits

    def _feature_loss(self, maps: Sequence[Tensor], refined: Sequence[Tensor]) -> Tensor:
        if self.features == "at":
            levels = [attention_transfer(f, t.relu()) for f, t in zip(maps, refined, strict=True)]
            return torch.stack(levels).sum()
        guided = [regress(f) for regress, f in zip(self.regressors, maps, strict=True)]
        if self.features == "fit":
            levels = [_difference(s, t.relu()).square().mean() for s, t in zip(guided, refined, strict=True)]
            return torch.stack(levels).sum()
        levels = []
        for i, (s, t) in enumerate(zip(guided, refined, strict=True)):
            t = torch.maximum(t, getattr(self, f"margin_{i}").to(t.dtype))
            difference = _difference(s, t)
            counted = difference.square() * ((difference > 0) | (t > 0))
            levels.append(counted.sum() / (len(t) * 2 ** (len(refined) - 1 - i)))
        return torch.stack(levels).sum()

    def epoch_start(self, epoch: int, epochs: int) -> None:
        """Remember where the epoch ends: in dense tasks the ramp is as far as that all through it."""
        self._epoch_end.fill_((epoch + 1) / epochs)

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant as published for classification, or switched on at `start` and ramped."""
        reached = torch.maximum(progress, self._epoch_end.to(progress.dtype)) if self.dense else progress
        on = (progress >= self.start) * sigmoid_ramp(reached - self.start, self.ramp)
        weights: dict[str, float | Tensor] = {"kl": self.alpha * on}
        if self.features != "none":
            weights["features"] = self.beta * on
        if self.joint_labels:
            weights["joint_kl"] = self.joint_weight
        return weights


def _joint_loss(joint: Tensor, batch: Batch) -> Tensor:
    if batch.labels is None:
        raise AttarError("FRSKD with joint_labels needs class indices, but the batch has soft or mixed targets alone.")
    return nn.functional.cross_entropy(full_precision(joint), joint_labels(batch.labels, 4))


def _difference(student: Tensor, target: Tensor) -> Tensor:
    return full_precision(student) - full_precision(target)


def _before_relu(probe: Probe, stage: Stage) -> Tap:
    """Where a stage's output is found before its last ReLU; the output itself where the stage does not end in one."""
    calls = list(probe.anatomy.calls)
    end = max(i for i, call in enumerate(calls) if call.module == stage.name)
    inside = [c for c in calls[: end + 1] if c.leaf and f"{c.module}.".startswith(f"{stage.name}.")]
    last = inside[-1] if inside else None
    if last is None or last.shape != calls[end].shape:
        return stage.tap
    if not isinstance(probe.student.get_submodule(last.module), nn.ReLU):
        return stage.tap
    return dataclasses.replace(stage.tap, module=last.module, side="input")


@torch.no_grad()
def _margin(norm: nn.BatchNorm2d) -> Tensor:
    """Mean of the negative part of each channel behind a batch norm: E[x | x < 0], x ~ N(bias, weight^2), [1, C, 1, 1].

    Source: Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019; where almost nothing is negative
    (P(x < 0) <= 0.001) the margin is -3 |weight|, as in its code.
    """
    std, mean = norm.weight.double().abs(), norm.bias.double()
    below = torch.special.ndtr(-mean / std)
    density = std * torch.exp(-((mean / std) ** 2) / 2) / math.sqrt(2 * math.pi)
    margin = torch.where(below > 0.001, mean - density / below, -3 * std)
    return margin.to(norm.weight.dtype).view(1, -1, 1, 1)
