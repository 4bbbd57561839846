"""SAD, Self Attention Distillation: every stage's attention map imitates the next deeper stage's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from attar.anatomy import Anatomy, Stage, Tap
from attar.anatomy.energy import stages_with_maps
from attar.errors import AttarError
from attar.functional import attention_map, flat_map, full_precision, layer_pairs, linear_ramp, resized_map
from attar.functional.layers import Pairing
from attar.method import Batch, Method, Outputs, Probe

__all__ = ["SAD"]


class SAD(Method):
    """SAD, Self Attention Distillation: every stage's attention map imitates the next deeper stage's.

    Idea: where a half-trained network's deep layers look already outlines what matters. Shallower layers learn to look
    there, inside the same network, from no labels or teacher beyond the task's own.

    Definition, for the features A_m of stages m = 1 .. M and a pair (m, m + 1):
        s = softmax_hw(sum_c A_m^2), t = stopgrad softmax_hw(resize(sum_c A_{m+1}^2 to the size of A_m))
        L = sum over pairs of the mean of (s - t)^2 over batch and positions
    Terms: `attention`, that sum. Bilinear resizing of squared maps, then the softmax over positions of each map.

    Shapes: stage maps [N, C_m, H_m, W_m], any sizes. No unit; each pair lies in [0, 2 / (H_m W_m)], and shrinks like
    1 / (H W)^2, so that weights do not transfer between resolutions: segmentation has larger maps and needs larger
    ones than classification. In dense tasks the stages are those of the encoder. Data: one view, any sampler.

    Cost: a sum over channels, a resizing and a softmax per stage: next to nothing. Deployed: nothing.

    When it helps: thin, sparse targets on light networks (lanes). In classification the published gain is small: 0.2
    points for ResNet-18 on CIFAR-100. The weighted term must stay well below the task's; if accuracy falls when it
    sets in, lower `weight` or lengthen `ramp`: on ResNet-20 in a short training weight 1000 cost 2 points, 100 none
    (benchmarks/self_distillation.md).

    Args:
        variant: "classification" is weight 1000, mean over channels, on from the start (the constants of
            winycg/Self-KD-Lib); "lane" the paper's weight 0.1, sum over channels, on after 40 of 60 thousand steps.
            With sums over hundreds of channels the softmax saturates, and weight 0.1 then moves a classifier little.
        weight: of the term; default: the variant's.
        reduce: how channels are joined: "sum", "mean" or "max"; default: the variant's. Change `weight` with it.
        start: share of the run before which the weight is 0; default: the variant's.
        ramp: share of the run over which the weight then grows linearly; 0: at once.
        pairing: "adjacent" stages, as published; every stage to the "deepest"; or "all" (shallow, deep) pairs.
        stages: modules to use as stages, shallow to deep; default: the student's own, without those that have no map
            since a fresh layer norm over channels gives every position the same energy.
        power: p of |A|^p.
        temperature: T of the softmax over positions.
        reduction: "mean" over batch and positions as in all published code, or "sum_per_sample": over positions summed,
            over the batch averaged.
        upsample: "map" is the definition; "features" resizes features and squares them afterwards, as Self-KD-Lib.
        align_corners: of the bilinear resizing; True as in Lua Torch.
        stop_gradient: False lets deep maps be drawn to shallow ones, as InhwanBae/ENet-SAD_Pytorch.
        softmax_over: "batch" is the released Lua code's slip: each position's softmax over the samples of one process.

    Raises:
        AttarError: fewer than two stages with a map, a stage of one position that would have to imitate, an option out
            of range.

    Source: Hou, Ma, Liu, Loy, "Learning Lightweight Lane Detection CNNs by Self Attention Distillation", ICCV 2019
    (arXiv 1908.00821). The paper's text was not at hand: this follows its abstract and figure, the modules of
    cardwing/Codes-for-Lane-Detection (where the loss itself is commented out) and both third-party codes named above.
    """

    not_dense = ""

    def __init__(
        self,
        *,
        variant: Literal["classification", "lane"] = "classification",
        weight: float | None = None,
        reduce: Literal["sum", "mean", "max"] | None = None,
        start: float | None = None,
        ramp: float = 0.0,
        pairing: Pairing = "adjacent",
        stages: tuple[str, ...] | None = None,
        power: float = 2.0,
        temperature: float = 1.0,
        reduction: Literal["mean", "sum_per_sample"] = "mean",
        upsample: Literal["map", "features"] = "map",
        align_corners: bool = False,
        stop_gradient: bool = True,
        softmax_over: Literal["positions", "batch"] = "positions",
    ) -> None:
        super().__init__()
        for option, value, choices in (
            ("variant", variant, ("classification", "lane")),
            ("reduce", reduce, ("sum", "mean", "max", None)),
            ("pairing", pairing, ("adjacent", "deepest", "all")),
            ("reduction", reduction, ("mean", "sum_per_sample")),
            ("upsample", upsample, ("map", "features")),
            ("softmax_over", softmax_over, ("positions", "batch")),
        ):
            if value not in choices:
                known = ", ".join(repr(choice) for choice in choices if choice)
                raise AttarError(f"SAD's {option} is one of {known}, not '{value}'.")
        lane = variant == "lane"
        self.weight = weight if weight is not None else (0.1 if lane else 1000.0)
        self.reduce: Literal["sum", "mean", "max"] = reduce or ("sum" if lane else "mean")
        self.start = start if start is not None else (40 / 60 if lane else 0.0)
        if not 0.0 <= self.start <= 1.0 or not 0.0 <= ramp <= 1.0:
            raise AttarError(
                f"SAD's start and ramp are shares of the run between 0 and 1, not {self.start} and {ramp}."
            )
        if temperature <= 0 or power < 1:
            raise AttarError(
                f"SAD's temperature must be positive and its power at least 1, not {temperature}, {power}."
            )
        self.ramp = ramp
        self.pairing: Pairing = pairing
        self.stages = stages
        self.power = power
        self.temperature = temperature
        self.reduction = reduction
        self.upsample = upsample
        self.align_corners = align_corners
        self.stop_gradient = stop_gradient
        self.softmax_over = softmax_over
        self._stages: tuple[Stage, ...] = ()

    def build(self, probe: Probe) -> None:
        """Choose the stages; there is nothing to train."""
        anatomy = probe.anatomy
        chosen = stages_with_maps(probe.student, anatomy, self.stages, probe.images)
        if len(chosen) < 2:
            raise AttarError(
                f"SAD needs two stages with an attention map, of which the shallower imitates the deeper, but finds "
                f"{len(chosen)} (behind a layer norm over channels every position has the same energy): name modules "
                "with stages=."
            )
        for shallow, deep in layer_pairs(len(chosen), self.pairing):
            if chosen[shallow].height * chosen[shallow].width == 1:
                raise AttarError(
                    f"SAD compares where layers look, but stage '{chosen[shallow].name}', which would imitate "
                    f"'{chosen[deep].name}', has a single position: give larger images or other modules with stages=."
                )
        self._stages = chosen

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The output of every chosen stage."""
        return [stage.tap for stage in self._stages]

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `attention`."""
        features = [outputs[stage.tap] for stage in self._stages]
        pairs = layer_pairs(len(features), self.pairing)
        return {"attention": torch.stack([self.distance(features[s], features[d]) for s, d in pairs]).sum()}

    def distance(self, shallow: Tensor, deep: Tensor) -> Tensor:
        """Return the loss of one pair: features [N, C, H, W] that imitate, [N, C', H', W'] that are imitated."""
        size = (shallow.shape[2], shallow.shape[3])
        if self.stop_gradient:
            deep = deep.detach()
        squared = (self.attention(shallow, size) - self.attention(deep, size)).square()
        return squared.mean() if self.reduction == "mean" else squared.sum(dim=1).mean()

    def attention(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the attention [N, H W] of features [N, C, h, w] at the resolution size = (H, W)."""
        if self.upsample == "features":
            resized = resized_map(full_precision(features).flatten(0, 1), size, align_corners=self.align_corners)
            energy = attention_map(resized.view(*features.shape[:2], *size), power=self.power, reduce=self.reduce)
        else:
            energy = attention_map(features, power=self.power, reduce=self.reduce)
            energy = resized_map(energy, size, align_corners=self.align_corners)
        if self.softmax_over == "batch":
            return torch.softmax(flat_map(energy, "none") / self.temperature, dim=0)
        return flat_map(energy, "softmax", temperature=self.temperature)

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Off before `start`, then grown over `ramp`."""
        return {"attention": self.weight * linear_ramp(progress, self.ramp, self.start)}
