"""SCD, similarity and consistency by self-distillation: batch similarities of attention maps, shallow imitates deep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attar.anatomy import Anatomy, Stage, Tap
from attar.anatomy.energy import stages_with_maps
from attar.errors import AttarError
from attar.functional import (
    attention_map,
    batch_similarity,
    flat_map,
    full_precision,
    layer_pairs,
    linear_ramp,
    similarity_distance,
)
from attar.functional.attention import MapNorm
from attar.functional.layers import Pairing
from attar.functional.similarity import Scope
from attar.method import Batch, Method, Outputs, Probe

__all__ = ["SCD"]


class SCD(Method):
    """SCD, similarity and consistency by self-distillation: layers agree on which samples attract attention alike.

    RECONSTRUCTION. The paper's full text was not available. What is verified, from its abstract: every tapped layer's
    feature map becomes an attention map; the similarities of the attention maps of a mini-batch make one matrix per
    layer; within one network, in one stage, a shallow layer's matrix imitates a deeper layer's, one way. The formulas
    are those of its declared parents, SAD (the attention map) and SPKD (the similarity); every other choice is this
    project's reading, and an option.

    Idea: SAD's "shallow imitates deep", with SPKD's similarity of samples as the thing imitated. Since only B x B
    matrices are compared, layers may differ in channels and resolution, and nothing is resized or projected.

    Definition, for the features A_l [B, C, H, W] of layers l = 1 .. L and pairs (s, t) with s before t:
        q_l[n] = norm(sum_c |A_l[n, c]|^p), flattened;  G_l = q_l q_l^T, each row divided by its L2 norm
        L = CE(z, y) + w(progress) sum over pairs of (1 / B^2) || G_s - stopgrad G_t ||_F^2
    Terms: `similarity`, that sum without w.

    Shapes: features [B, C, H, W], any C, H, W. No unit; each pair lies in [0, 2 / B], and 1e-4 to 1e-3 is usual: hence
    a weight of hundreds or thousands. Data: one view, any sampler, no labels for this term; batches of 16 or more. A
    batch of one gives 0. In dense tasks the layers are stages of the encoder.

    Cost: B H W multiply-adds an image and layer, a thousandth of a forward. Deployed: nothing.

    When it helps: unknown; expect little, 0.1 to 1 point over plain training. The abstract tells averages over
    CIFAR-100 and Tiny-ImageNet only (1.42 points more than SAD and SPKD, 1.13 than BYOT and ONE, 1.23 than DDGSD and
    CS-KD), against baselines of its own.

    Args:
        weight: w after the ramp; with attn_norm "none" begin with 3000.
        attn_norm: how each sample's map is normalised over positions: "l2" (G is then a cosine similarity), "softmax"
            as SAD, or "none" as SPKD.
        pairing: "adjacent" layers as SAD, every layer to the "deepest", or "all" (shallow, deep) pairs.
        power: p.
        reduce: how channels are joined: "sum", "mean" or "max". With "softmax" a sum over hundreds of channels gives
            one-hot maps, all alike, and a loss of 0: take the mean.
        temperature: T of that softmax.
        include_last: whether the last stage is a layer.
        penultimate: also take the pooled embedding as the deepest layer; it has no map, and is brought to unit length
            with attn_norm "l2" only.
        stages: modules to use as layers, shallow to deep; default: the student's own stages, without those that have
            no map since a fresh layer norm over channels gives every position the same energy.
        start: share of the run before which the weight is 0.
        ramp: share of the run over which the weight then grows linearly, since early attention means little.
        scope: "world" relates the samples of all processes, "rank" those of each.

    Raises:
        AttarError: fewer than two layers with a map, or an option out of range.

    Source: Wan, Mao, Wang, Liu, Ping, Computer Science (jsjkx) 50(11), 259-268, 2023, doi 10.11896/jsjkx.221000009, in
    Chinese; the English title is ours. No code is known.
    """

    not_dense = ""

    def __init__(
        self,
        *,
        weight: float = 1000.0,
        attn_norm: MapNorm = "l2",
        pairing: Pairing = "adjacent",
        power: float = 2.0,
        reduce: Literal["sum", "mean", "max"] = "sum",
        temperature: float = 1.0,
        include_last: bool = True,
        penultimate: bool = False,
        stages: tuple[str, ...] | None = None,
        start: float = 0.0,
        ramp: float = 0.1,
        scope: Scope = "world",
    ) -> None:
        super().__init__()
        for option, value, choices in (
            ("attn_norm", attn_norm, ("l2", "softmax", "none")),
            ("pairing", pairing, ("adjacent", "deepest", "all")),
            ("reduce", reduce, ("sum", "mean", "max")),
            ("scope", scope, ("rank", "world")),
        ):
            if value not in choices:
                raise AttarError(f"SCD's {option} is one of {', '.join(map(repr, choices))}, not '{value}'.")
        if not 0.0 <= start <= 1.0 or not 0.0 <= ramp <= 1.0:
            raise AttarError(f"SCD's start and ramp are shares of the run between 0 and 1, not {start} and {ramp}.")
        if temperature <= 0 or power < 1:
            raise AttarError(
                f"SCD's temperature must be positive and its power at least 1, not {temperature}, {power}."
            )
        self.weight = weight
        self.attn_norm: MapNorm = attn_norm
        self.pairing: Pairing = pairing
        self.power = power
        self.reduce: Literal["sum", "mean", "max"] = reduce
        self.temperature = temperature
        self.include_last = include_last
        self.penultimate = penultimate
        self.stages = stages
        self.start = start
        self.ramp = ramp
        self.scope: Scope = scope
        self._stages: tuple[Stage, ...] = ()

    def build(self, probe: Probe) -> None:
        """Choose the layers; there is nothing to train."""
        anatomy = probe.anatomy
        chosen = stages_with_maps(probe.student, anatomy, self.stages, probe.images)
        self._stages = chosen if self.include_last else chosen[:-1]
        if len(self._stages) + self.penultimate < 2:
            raise AttarError(
                f"SCD needs two layers with an attention map, of which one imitates the other, but has "
                f"{len(self._stages)} (behind a layer norm over channels every position has the same energy): name "
                "modules with stages=, or let penultimate=True add the embedding."
            )

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The output of every layer, and the embedding where it is one."""
        taps = [stage.tap for stage in self._stages]
        return [*taps, anatomy.embedding or anatomy.stages[-1].tap] if self.penultimate else taps

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `similarity`."""
        layers = [self.similarity(outputs[stage.tap]) for stage in self._stages]
        if self.penultimate:
            layers.append(self.similarity(outputs.embedding))
        pairs = layer_pairs(len(layers), self.pairing)
        return {"similarity": torch.stack([similarity_distance(layers[s], layers[t]) for s, t in pairs]).sum()}

    def similarity(self, features: Tensor) -> Tensor:
        """Return the row-normalised similarities [B, B] of feature maps [B, C, H, W] or embeddings [B, D]."""
        if features.ndim == 4:
            energy = attention_map(features, power=self.power, reduce=self.reduce)
            q = flat_map(energy, self.attn_norm, temperature=self.temperature)
        else:
            q = full_precision(features)
            q = F.normalize(q, dim=1, eps=1e-12) if self.attn_norm == "l2" else q
        return batch_similarity(q, scope=self.scope)

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Off before `start`, then grown over `ramp`."""
        return {"similarity": self.weight * linear_ramp(progress, self.ramp, self.start)}
