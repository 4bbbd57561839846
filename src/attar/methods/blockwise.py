"""Blockwise, attar's own reference design: widths are learnt under a budget, the student shrinks and recovers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from attar.anatomy import (
    Anatomy,
    Gate,
    Kept,
    Limit,
    Stage,
    Structure,
    Tap,
    Widths,
    channel_groups,
    refuse_impossible_limits,
    switch_off_,
    within_budget,
)
from attar.errors import AttarError
from attar.functional import full_precision, gathered, kl_divergence
from attar.method import Batch, Method, Outputs, Phase, Probe
from attar.reader import Reading, TeacherStages, adapt_teacher, as_teachers, chosen_stages, paired_stages
from attar.teacher import Teacher

__all__ = ["Blockwise"]

# The strength of a block at most doubles or halves in an epoch.
_FASTEST = 2.0


class Blockwise(Method):
    """Blockwise, attar's own reference design: widths are learnt under a budget, the student shrinks and recovers.

    NOT A PUBLISHED ALGORITHM. Of Ahmed, Zunino, Morerio, Murino, "Compact CNN Structure Learning by Knowledge
    Distillation" nothing but the abstract could be read: block-wise, customisable structure learning under a budget of
    FLOPs or parameters, with the network itself as teacher. Everything below is attar's own design in that spirit, and
    no default is theirs.

    Idea: a trained network begins as its own teacher. First (phase "structure") the scales gamma of its batch norms
    are pressed towards zero, each the harder the more its channel costs, with a strength per block. Then the weakest
    channels are removed until the budget is met, and the network is physically smaller from there on. The rest of the
    run is recovery: labels, the teacher's answer, and the teacher's map behind every block.

    Definition, with student and teacher logits z_s, z_t, blocks b, channels c of groups G (channels that must go
    together: all that write into one residual sum, an expansion with its depth-wise convolution), groups' marginal
    costs m_G at the present widths (a constant), and cost_0 the network's cost before:
        structure: L = (1 - alpha) CE(z_s, y) + alpha T^2 KL(stopgrad softmax(z_t / T) || softmax(z_s / T))
                       + sum_b rho_b R_b,  R_b = (1 / cost_0) sum_{G in b} m_G sum_c max over G's norms of |gamma_c|
        after each of its epochs: rho <- rho clip(exp(eta (cost / cost_0 - r)), 1/2, 2), where channels count whose
            |gamma| exceeds tau times the largest of their group; per block where `block_budgets` are given
        recovery: L = (1 - alpha) CE + alpha T^2 KL + sum_b beta_b mean[(A_b(S_b) - T_b)^2] / mean[T_b^2]
    A_b is a 1x1 convolution where the widths differ, else nothing; T_b is resized where the sizes differ. A block's
    groups are those whose last batch norm stands in it; what is behind the last block counts to it.
    Terms: `ce`, `kl` and `structure.B` per block in the phase; `kl` and `block.B` per block after it.

    Removal: |gamma| / m decides what goes first, in steps of `divisor`; then what still fits the budget is taken back,
    at last channel by channel without regard to the divisor, so that the budget is met to a fraction of a percent (a
    few groups are then no multiples of it). A smaller budget never leaves a larger network. What a removed channel's
    shift said is moved into the next layer where that is exact (no padding behind it).

    Shapes: logits [N, K], maps [N, C, H, W]. Unit: nats; `structure` is a share of cost times a scale, `block` is 1 for
    a map of zeros and 0 for the teacher's. Data: one view, labels. Multiply-adds are counted, FLOPs are twice that.

    Cost: one teacher forward per step, no extra parameters but the A_b. Deployed: the smaller network.

    When it helps: a trained network with batch norm that is too slow or too large. Not for networks without batch norm
    or with grouped convolutions (refused); convolutions without a batch norm of their own keep their widths.

    In a run, give the trained weights to the student too (`--weights`), and the teacher's run folder here. The phase
    keeps the run's own schedule: the design has a constant rate of a tenth there, and weight decay that spares gamma;
    with the usual decay on top, scales shrink somewhat faster. Optimiser state, moving average and the search for the
    best epoch begin anew with the smaller network. In a loop of your own, call `distiller.reshape()` after
    `epoch_start`, and make a new optimiser when it returns True.

    Args:
        teachers: the trained network itself, or another; one.
        budget: r, the share of the cost that is kept, in (0, 1]; 1 keeps every channel.
        resource: what is counted, "macs" or "params".
        blocks: modules whose outputs end the blocks; default: the stages.
        block_budgets: r_b of every block instead of one budget for all; each counts its own layers.
        strength: rho at the start.
        block_strengths: rho_b at the start instead; 0 leaves a block alone in the phase.
        rate: eta.
        structure: share of the run that the phase takes; 0 removes by the scales as they are.
        warmup: share of the phase over which the strength rises to its value.
        threshold: tau.
        min_channels: every group keeps as many, or half of its channels if that is fewer.
        divisor: steps in which groups are narrowed.
        alpha: weight of the teacher's answer; the labels keep 1 - alpha.
        temperature: T.
        match: "joint" compares all blocks from the start of the recovery, "progressive" adds one after another, evenly
            over the recovery, "none" compares logits only.
        block_weight: beta of every block.
        block_weights: beta_b instead.
        scope: "world" normalises a block by the teacher's maps of all processes, "rank" by its own.

    Raises:
        AttarError: several teachers, the student itself as teacher, a network without batch norm or with channels that
            cannot be followed, lists of another length than the blocks, or a budget that cannot be met.

    Source: attar; inspired by Ahmed, Zunino, Morerio, Murino, ICPR 2020 (arXiv 2104.09191), of which the abstract
    alone was read, and by the cost-weighted L1 on scales of MorphNet (Gordon et al., CVPR 2018).
    """

    claims: Mapping[str, str] = {"student's widths": "Blockwise removes channels"}
    not_dense = "its channel removal follows the channels of a classifier, not those of a decoder with skips"

    def __init__(
        self,
        teachers: Teacher | nn.Module | Sequence[Teacher | nn.Module],
        *,
        budget: float = 0.5,
        resource: Literal["macs", "params"] = "macs",
        blocks: tuple[str, ...] | None = None,
        block_budgets: tuple[float, ...] | None = None,
        strength: float = 1.0,
        block_strengths: tuple[float, ...] | None = None,
        rate: float = 5.0,
        structure: float = 0.2,
        warmup: float = 0.125,
        threshold: float = 1e-2,
        min_channels: int = 8,
        divisor: int = 8,
        alpha: float = 0.5,
        temperature: float = 4.0,
        match: Literal["joint", "progressive", "none"] = "joint",
        block_weight: float = 1.0,
        block_weights: tuple[float, ...] | None = None,
        scope: Literal["rank", "world"] = "world",
    ) -> None:
        super().__init__()
        for option, value, choices in (
            ("resource", resource, ("macs", "params")),
            ("match", match, ("joint", "progressive", "none")),
            ("scope", scope, ("rank", "world")),
        ):
            if value not in choices:
                raise AttarError(f"Blockwise's {option} is one of {', '.join(choices)}, not '{value}'.")
        for option, share in (("structure", structure), ("warmup", warmup), ("threshold", threshold), ("alpha", alpha)):
            if not 0.0 <= share <= 1.0:
                raise AttarError(f"Blockwise's {option} is a share between 0 and 1, not {share}.")
        for share in (budget, *(block_budgets or ())):
            if not 0.0 < share <= 1.0:
                raise AttarError(f"Blockwise's budget is the share that is kept, above 0 and at most 1, not {share}.")
        if temperature <= 0:
            raise AttarError(f"Blockwise's temperature must be positive, not {temperature}.")
        if min_channels < 1 or divisor < 1:
            raise AttarError("Blockwise's min_channels and divisor are at least 1.")
        given = as_teachers(teachers, "Blockwise")
        if len(given) > 1:
            raise AttarError(f"Blockwise has one teacher, usually the trained network itself, not {len(given)}.")
        self._teacher = given[0]
        self.budget, self.block_budgets = budget, block_budgets
        self.resource: Literal["macs", "params"] = resource
        self.blocks = blocks
        self.strength, self.block_strengths = strength, block_strengths
        self.rate, self.structure, self.warmup, self.threshold = rate, structure, warmup, threshold
        self.widths = Widths(min_channels, divisor)
        self.alpha, self.temperature = alpha, temperature
        self.match = match
        self.block_weight, self.block_weights = block_weight, block_weights
        self.scope: Literal["rank", "world"] = scope
        if alpha:
            self.claims = {**type(self).claims, "task weight": f"Blockwise gives the labels weight {1 - alpha:g}"}
        self._blocks: tuple[Stage, ...] = ()
        self._pairs: tuple[tuple[Stage, Stage], ...] = ()
        self._reader: TeacherStages | None = None
        self._structure: Structure | None = None
        self._limits: tuple[Limit, ...] = ()
        # The student's batch norms, block by block and group by group, with the places of the group's channels in them.
        # Tuples, so that they are no children of the method.
        self._gates: tuple[tuple[tuple[int, tuple[tuple[nn.BatchNorm2d, Tensor], ...]], ...], ...] = ()
        self._images: tuple[Tensor, ...] = ()

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The frozen network."""
        return (self._teacher,)

    def build(self, probe: Probe) -> None:
        """Pair blocks with the teacher's, make the A_b; the first time, follow channels and price them."""
        # The blocks keep their names when their widths change.
        blocks = tuple(probe.anatomy.find(block.name) for block in self._blocks)
        if self._reader is None:
            blocks = chosen_stages(probe.anatomy, self.blocks, "all")
            self._read_teacher(probe, blocks)
        self._blocks = blocks
        own = {block.name: block for block in blocks}
        self._pairs = tuple((own[block.name], theirs) for block, theirs in self._pairs)
        self.adapters = nn.ModuleList(
            nn.Identity() if block.channels == theirs.channels else _adapter(block.channels, theirs.channels)
            for block, theirs in self._pairs
        )
        if probe.kept is None:
            self._follow_channels(probe)
        else:
            # Nothing is removed twice, and what is known of the wider student is not needed any more.
            self._structure, self._gates = None, ((),) * len(blocks)

    def _read_teacher(self, probe: Probe, blocks: Sequence[Stage]) -> None:
        teacher = self._teacher
        anatomy = adapt_teacher(teacher, probe.student, probe.normalization, probe.images, "Blockwise")
        if self.match != "none":
            theirs = chosen_stages(anatomy, self.blocks, "all")
            self._pairs = tuple(paired_stages(blocks, theirs, method="Blockwise", teacher=teacher.name))
        self._reader = TeacherStages(teacher, probe.images, anatomy, [other for _, other in self._pairs], logits=True)
        probe.task.check_logits(self._reader(probe.images).logits, network=teacher.name)

    def _follow_channels(self, probe: Probe) -> None:
        """Find the groups of every block, what they cost, and whether the budget can be met."""
        count = len(self._blocks)
        lists = (self.block_budgets, self.block_strengths, self.block_weights)
        for option, given in zip(("block_budgets", "block_strengths", "block_weights"), lists, strict=True):
            if given is not None and len(given) != count:
                names = ", ".join(block.name for block in self._blocks)
                raise AttarError(f"Blockwise's {option} has {len(given)} values for {count} blocks ({names}).")
        device = probe.images.device
        budgets = self.block_budgets or (self.budget,)
        strengths = torch.tensor(self.block_strengths or (self.strength,) * count, device=device)
        self.register_buffer("strengths", strengths)
        self.register_buffer("warm", torch.ones((), device=device))
        self._images = (probe.images,)
        if min(budgets) >= 1.0:
            self._structure, self._gates = None, ((),) * count
            self.register_buffer("prices", torch.zeros(0, device=device))
            return
        structure = self._structure = channel_groups(probe.student, probe.images)
        block_of = self._block_of(probe.anatomy)
        homes = [max(block_of[gate.module] for gate in group.gates) for group in structure.groups]
        gates: list[list[tuple[int, tuple[tuple[nn.BatchNorm2d, Tensor], ...]]]] = [[] for _ in range(count)]
        for number, (group, home) in enumerate(zip(structure.groups, homes, strict=True)):
            gates[home].append((number, _norms(probe.student, group.gates, device)))
        self._gates = tuple(map(tuple, gates))
        whole = [group.channels for group in structure.groups]
        if self.block_budgets is None:
            most = self.budget * structure.cost(whole, self.resource)
            self._limits = (Limit(most, tuple(range(len(homes)))),)
        else:
            layers = [
                frozenset(layer.module for layer in structure.layers if block_of[layer.module] == block)
                for block in range(count)
            ]
            self._limits = tuple(
                Limit(
                    share * structure.cost(whole, self.resource, layers[block]),
                    tuple(number for number, home in enumerate(homes) if home == block),
                    layers[block],
                )
                for block, share in enumerate(self.block_budgets)
            )
        self.register_buffer("prices", self._price(whole, device))
        refuse_impossible_limits(structure, self._limits, self.resource, self.widths)

    def _block_of(self, anatomy: Anatomy) -> dict[str, int]:
        """Say in which block every module's last call lies; what is behind the last block belongs to it."""
        last = {call.module: position for position, call in enumerate(anatomy.calls)}
        ends = [last[block.name] for block in self._blocks]
        return {
            module: next((block for block, end in enumerate(ends) if position <= end), len(ends) - 1)
            for module, position in last.items()
        }

    def _price(self, left: Sequence[int], device: torch.device) -> Tensor:
        """Return every group's marginal cost [G] at these widths, as a share of the whole network's cost."""
        assert self._structure is not None
        cost = self._structure.cost([group.channels for group in self._structure.groups], self.resource)
        margins = [self._structure.marginal(left, group, self.resource) for group in range(len(left))]
        return torch.tensor([margin / cost for margin in margins], device=device)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """The output of every block that is compared."""
        return [block.tap for block, _ in self._pairs]

    @property
    def phases(self) -> Sequence[Phase]:
        """Structure learning."""
        return (Phase("structure", self.structure),) if self.structure > 0 else ()

    def phase_losses(self, phase: Phase, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return `ce`, `kl` and the pressure on every block's scales."""
        pressure = {f"structure.{block.name}": self.pressure(number) for number, block in enumerate(self._blocks)}
        return {
            "ce": outputs.task_loss(outputs.logits, batch.targets),
            "kl": self._answer_loss(outputs.logits, self._read(outputs.images).logits),
            **pressure,
        }

    def phase_weights(self, phase: Phase) -> Mapping[str, float | Tensor]:
        """The labels' and the teacher's share, and the strength of every block."""
        strengths = {
            f"structure.{block.name}": self.warm * self.strengths[number] for number, block in enumerate(self._blocks)
        }
        return {"ce": 1.0 - self.alpha, "kl": self.alpha, **strengths}

    def pressure(self, block: int) -> Tensor:
        """Return R_b, the cost-weighted sum of a block's scales, as a share of the network's cost."""
        terms = [self.prices[number] * _scales(norms).sum() for number, norms in self._gates[block]]
        return torch.stack(terms).sum() if terms else self.warm.new_zeros(())

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `kl` and the distance of every block's map from the teacher's."""
        reading = self._read(outputs.images)
        found = {"kl": self._answer_loss(outputs.logits, reading.logits)}
        for (block, _), adapter, theirs in zip(self._pairs, self.adapters, reading.stages, strict=True):
            found[f"block.{block.name}"] = self.distance(adapter(outputs[block.tap]), theirs)
        return found

    def _read(self, images: Tensor) -> Reading:
        assert self._reader is not None
        return self._reader(images)

    def _answer_loss(self, logits: Tensor, theirs: Tensor) -> Tensor:
        return kl_divergence(logits, theirs, self.temperature)

    def distance(self, features: Tensor, target: Tensor) -> Tensor:
        """Return mean[(S - T)^2] / mean[T^2] for maps [N, C, H, W]; T is resized to S and constant."""
        features, target = full_precision(features), full_precision(target.detach())
        if target.shape[2:] != features.shape[2:]:
            target = nn.functional.interpolate(target, features.shape[2:], mode="bilinear", antialias=True)
        energy = target.square().mean()
        if self.scope == "world":
            energy = gathered(energy.reshape(1)).mean()
        return (features - target).square().mean() / energy.clamp_min(torch.finfo(energy.dtype).tiny)

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant; with match "progressive" a block's weight is zero until its turn."""
        betas = self.block_weights or (self.block_weight,) * len(self._blocks)
        beta = {block.name: weight for block, weight in zip(self._blocks, betas, strict=True)}
        found: dict[str, float | Tensor] = {"kl": self.alpha}
        recovered = ((progress - self.structure) / max(1.0 - self.structure, 1e-9)).clamp_min(0.0)
        for number, (block, _) in enumerate(self._pairs):
            turn = (recovered >= number / len(self._pairs)).float() if self.match == "progressive" else 1.0
            found[f"block.{block.name}"] = beta[block.name] * turn
        return found

    def task_weight(self, progress: Tensor) -> float | Tensor:
        """What alpha leaves to the labels."""
        return 1.0 - self.alpha

    def epoch_start(self, epoch: int, epochs: int) -> None:
        """In the phase: price channels at the present widths, and press harder or less as the budget asks."""
        length = max(round(self.structure * epochs), 1)
        if self._structure is None or not self.structure or epoch >= length:
            return
        left = self._left()
        self.prices.copy_(self._price(left, self.prices.device))
        rising = round(self.warmup * length)
        self.warm.fill_(min(1.0, (epoch + 1) / (rising + 1)))
        if epoch:
            whole = [group.channels for group in self._structure.groups]
            budgets = self.block_budgets or (self.budget,)
            excess = [
                self._structure.cost(left, self.resource, limit.layers)
                / max(self._structure.cost(whole, self.resource, limit.layers), 1)
                - share
                for limit, share in zip(self._limits, budgets, strict=True)
            ]
            factors = torch.tensor(excess, device=self.strengths.device).mul(self.rate).exp()
            self.strengths.mul_(factors.clamp(1 / _FASTEST, _FASTEST))

    def _scores(self) -> list[list[float]]:
        """Return |gamma| of every channel of every group, the largest of its batch norms."""
        numbered = {number: norms for block in self._gates for number, norms in block}
        with torch.no_grad():
            return [_scales(numbered[number]).tolist() for number in range(len(numbered))]

    def _left(self) -> list[int]:
        """Count the channels of every group that are still alive."""
        scores = self._scores()
        return [max(sum(score > self.threshold * max(known) for score in known), 1) for known in scores]

    def _choose(self, scores: Sequence[Sequence[float]]) -> list[list[int]]:
        assert self._structure is not None
        return within_budget(
            self._structure, scores, self._limits, self.resource, widths=self.widths, threshold=self.threshold
        )

    def reshape(self, student: nn.Module) -> Kept | None:
        """Choose what stays by the student's scales, and switch off the rest."""
        if self._structure is None:
            return None
        staying = self._choose(self._scores())
        kept = self._structure.kept(staying)
        if not kept:
            return None
        switch_off_(student, self._structure, staying, self._images[0].to(next(student.parameters())))
        return kept


def _adapter(channels: int, wanted: int) -> nn.Module:
    return nn.Conv2d(channels, wanted, 1, bias=False)


def _norms(
    student: nn.Module, gates: Sequence[Gate], device: torch.device
) -> tuple[tuple[nn.BatchNorm2d, Tensor], ...]:
    found = []
    for gate in gates:
        norm = student.get_submodule(gate.module)
        assert isinstance(norm, nn.BatchNorm2d)
        found.append((norm, torch.tensor(gate.indices, device=device)))
    return tuple(found)


def _scales(norms: Sequence[tuple[nn.BatchNorm2d, Tensor]]) -> Tensor:
    """Return for every channel of a group the largest |gamma| [C] of its batch norms."""
    return torch.stack([norm.weight[places].abs() for norm, places in norms]).amax(dim=0)
