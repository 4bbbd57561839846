"""SRM: a teacher's features as sparse codes over learned atoms; the student first learns to name the atoms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.anatomy import Anatomy, Stage, Tap
from attar.errors import AttarError
from attar.functional import full_precision, kl_divergence
from attar.functional.pooling import pooled
from attar.functional.sparse import decoded, similarities, sparsified
from attar.method import Batch, Method, Outputs, Phase, Probe
from attar.reader import TeacherStages, adapt_teacher, as_teachers, chosen_stages, paired_stages
from attar.teacher import Teacher

__all__ = ["SRM", "Dictionary"]

_RECIPE = 100 + 160 + 200  # epochs of the three stages on CIFAR-100
_EDGE = 1e-7


class Dictionary(nn.Module):
    """M atoms in D channels and one intercept, all learned.

    Shapes: features [N, D, H, W] -> similarities before the sigmoid [N, M, H, W] (see `functional.sparse`).
    """

    def __init__(self, channels: int, atoms: int) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.empty(channels, atoms))
        self.intercept = nn.Parameter(torch.empty(1))
        nn.init.kaiming_uniform_(self.centers)
        nn.init.uniform_(self.intercept, -1.0, 1.0)

    def forward(self, features: Tensor) -> Tensor:
        """Return `<x, v_m> + c` at every pixel."""
        return similarities(features, self.centers, self.intercept)


class Labels(NamedTuple):
    """What a teacher's sparse codes at one tap ask of the student.

    Args:
        pixel: the strongest atom of every pixel, [N, H, W].
        image: the mean sparse code, [N, M], in [0, 1).
    """

    pixel: Tensor
    image: Tensor


class SRM(Method):
    """SRM, sparse representation matching: the student names the atoms of the teacher's features, then learns by KD.

    Idea: feature values are hard to imitate and their widths differ. So an over-complete dictionary is learned on the
    trained teacher's features at every tap, which turns each pixel into a sparse code; from the codes come a class for
    every pixel (its strongest atom) and a histogram for every image (the mean code). A student that has learnt to
    predict both is well initialised; then it is trained as usual, with KD.

    Definition, with s_m(x) = sigmoid(<x, v_m> + c), top_k keeping a pixel's k largest, V and c the teacher's, u the
    student's dense similarities over its own dictionary, ubar their mean over pixels:
        phase "dictionary":     L = sum over taps of (1 / N D H W) || x - V top_k(s(x)) ||^2
        phase "initialisation": L = sum over taps of  CE(u, argmax_m s_m) + BCE(ubar, mean_hw top_k(s))
        main training:          L = (1 - alpha) CE(z, y) + alpha T^2 KL(softmax(z_t / T) || softmax(z / T))
    Terms: `reconstruction`; `pixel` and `image`; `kl`, T^2 included. CE is averaged over N H W, BCE over N M.
    M = int(codewords D), k = max(1, int(D sparsity codewords)), D the teacher's channels.

    Shapes: maps [N, C, H, W] of student and teacher, any C; both are averaged to the smaller resolution where they
    differ (our extension). The pooled embeddings are a tap too. Unit: `pixel`, `image` and `kl` in nats. With
    `pixel_logits` "sigmoid" the `pixel` term of a tap never falls below log(e + M - 1) - 1 and starts near log M.
    Data: one view; labels in the main training only.

    Cost: two phases before the main training. In the first only the teacher runs, up to its last tap; in the second
    both do. M D numbers for each tap of the teacher and M D_student for each of the student. Training FLOPs and step
    time, where they are reported, are those of the main training: one teacher forward, no head. Deployed: nothing.

    When it helps: teachers of another kind than the student; ResNet-18 taught by ResNet-34 on ImageNet reaches
    71.21 % (plain: about 69.8). Watch `attar.functional.sparse.atom_usage` of `labels(images)`: with all similarities
    near 0.5 or 1 the strongest atom is noise.

    Args:
        teachers: the trained network, exactly one.
        codewords: mu, atoms for every channel of the teacher.
        sparsity: lambda, the share of atoms that a pixel keeps.
        variant: "local" (pixels only), "global" (images only) or both.
        pixel_logits: what the pixels' cross-entropy reads: "sigmoid" similarities in (0, 1) as in the official code,
            whose softmax is almost flat, or "raw" ones.
        alpha: weight of the teacher in the main training; the labels have the rest.
        temperature: T.
        embedding: tap the pooled embeddings too, as on ImageNet; off on CIFAR-100.
        dictionary: share of the run for the first phase; 100 of 460 epochs on CIFAR-100.
        initialisation: share for the second; 160 of 460.
        stages: modules of the student to use as taps.
        teacher_stages: modules of the teacher to pair them with.

    Raises:
        AttarError: no teacher or several, the student itself, values out of range, phases as long as the run, or
            stages that cannot be paired.

    Source: Tran, Gabbouj, Iosifidis, "Knowledge Distillation By Sparse Representation Matching", 2021 (arXiv
    2103.17012), by the official viebboy/SRM, since the body of the paper was not read. Differences: the teacher is in
    evaluation mode throughout (the official first stage trains its batch norms' statistics); one tensor is tapped in
    both phases (official ImageNet code taps before the first max-pooling in one and behind it in the other); each of
    the three stages runs through the whole learning-rate schedule, but one optimiser keeps its state over all of them,
    where the official code makes a new one for each and after each step of the rate; probabilities are clamped to
    [1e-7, 1 - 1e-7] in the binary cross-entropy.
    """

    not_dense = "the embedding that classifiers read is one of its taps, and a dense network has none"

    def __init__(
        self,
        teachers: Teacher | nn.Module | Sequence[Teacher | nn.Module],
        *,
        codewords: float = 2.0,
        sparsity: float = 0.02,
        variant: Literal["global-local", "local", "global"] = "global-local",
        pixel_logits: Literal["sigmoid", "raw"] = "sigmoid",
        alpha: float = 0.5,
        temperature: float = 4.0,
        embedding: bool = True,
        dictionary: float = 100 / _RECIPE,
        initialisation: float = 160 / _RECIPE,
        stages: tuple[str, ...] | None = None,
        teacher_stages: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__()
        given = as_teachers(teachers, "SRM")
        if len(given) > 1:
            raise AttarError(f"SRM learns the dictionaries of one teacher, not of {len(given)}: give one.")
        if codewords <= 0:
            raise AttarError(f"SRM's codewords must be positive, not {codewords}.")
        if not 0.0 < sparsity <= 1.0:
            raise AttarError(f"SRM's sparsity is a share of the atoms, above 0 and at most 1, not {sparsity}.")
        if variant not in ("global-local", "local", "global"):
            raise AttarError(f"SRM's variant is 'global-local', 'local' or 'global', not '{variant}'.")
        if pixel_logits not in ("sigmoid", "raw"):
            raise AttarError(f"SRM's pixel_logits are 'sigmoid' or 'raw', not '{pixel_logits}'.")
        if not 0.0 <= alpha <= 1.0:
            raise AttarError(f"SRM's alpha is the teacher's part of the main training in [0, 1], not {alpha}.")
        if temperature <= 0:
            raise AttarError(f"SRM's temperature must be positive, not {temperature}.")
        if dictionary <= 0 or initialisation <= 0 or dictionary + initialisation >= 1:
            raise AttarError(
                f"SRM's phases take shares of {dictionary:g} and {initialisation:g} of the run: let both be positive "
                "and leave something for the main training."
            )
        self._teacher = (given[0],)
        self.codewords, self.sparsity = codewords, sparsity
        self.variant = variant
        self.pixel_logits = pixel_logits
        self.alpha, self.temperature = alpha, temperature
        self.embedding = embedding
        self.shares = (dictionary, initialisation)
        self.stages, self.teacher_stages = stages, teacher_stages
        self.claims = {"task weight": f"SRM gives the labels weight {1 - alpha:g}"} if alpha else {}
        self._reader: tuple[TeacherStages, ...] = ()
        self._pairs: list[tuple[Stage, Stage]] = []
        self._taps: tuple[Tap, ...] = ()

    @property
    def teachers(self) -> Sequence[Teacher]:
        """The frozen network."""
        return self._teacher

    def build(self, probe: Probe) -> None:
        """Pair the taps and make a dictionary for each side of every pair."""
        (teacher,) = self._teacher
        theirs = adapt_teacher(teacher, probe.student, probe.normalization, probe.images, "SRM")
        probe.task.check_logits(teacher(probe.images), network=teacher.name)
        ours = probe.anatomy
        self._pairs = paired_stages(
            chosen_stages(ours, self.stages, "all"),
            chosen_stages(theirs, self.teacher_stages, "all"),
            method="SRM",
            teacher=teacher.name,
            named=self.stages is not None or self.teacher_stages is not None,
        )
        channels = [(one.channels, other.channels) for one, other in self._pairs]
        taps = [one.tap for one, _ in self._pairs]
        if self.embedding:
            channels.append((ours.embedding_dim, theirs.embedding_dim))
            taps += [ours.embedding] if ours.embedding is not None else [stage.tap for stage in ours.stages]
        self._taps = tuple(dict.fromkeys(taps))
        atoms = [int(self.codewords * width) for _, width in channels]
        if not all(atoms):
            raise AttarError(
                f"SRM's codewords of {self.codewords:g} leave no atom for {min(w for _, w in channels)} channels of "
                f"the {teacher.name}: give more."
            )
        self.kept = [max(1, int(width * self.sparsity * self.codewords)) for _, width in channels]
        self.dictionaries = nn.ModuleList(Dictionary(w, m) for (_, w), m in zip(channels, atoms, strict=True))
        self.heads = nn.ModuleList(Dictionary(w, m) for (w, _), m in zip(channels, atoms, strict=True))
        stages = [stage for _, stage in self._pairs]
        self._reader = (TeacherStages(teacher, probe.images, theirs, stages, embedding=self.embedding),)

    def taps(self, anatomy: Anatomy) -> Sequence[Tap]:
        """Every stage that is paired, and the embedding."""
        return self._taps

    @property
    def phases(self) -> Sequence[Phase]:
        """The dictionaries, then the student up to its last tap, each like a run of its own."""
        return (
            Phase("dictionary", self.shares[0], (), own_schedule=True),
            Phase("initialisation", self.shares[1], self._taps, own_schedule=True),
        )

    def phase_losses(self, phase: Phase, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return `reconstruction`, then `pixel` and `image`."""
        if phase.name == "dictionary":
            return {"reconstruction": self._reconstruction(outputs.images)}
        own = self._smaller([outputs[one.tap] for one, _ in self._pairs])
        if self.embedding:
            own.append(full_precision(outputs.embedding)[:, :, None, None])
        pixel, image = [], []
        for features, head, target in zip(own, self.heads, self.labels(outputs.images), strict=True):
            raw = head(features)
            similar = torch.sigmoid(raw)
            pixel.append(F.cross_entropy(raw if self.pixel_logits == "raw" else similar, target.pixel))
            image.append(_binary_cross_entropy(similar.mean(dim=(2, 3)), target.image))
        terms = {"pixel": torch.stack(pixel).sum(), "image": torch.stack(image).sum()}
        left_out = {"local": "image", "global": "pixel"}.get(self.variant)
        return {name: term for name, term in terms.items() if name != left_out}

    def _reconstruction(self, images: Tensor) -> Tensor:
        errors = []
        for features, dictionary, k in zip(self._read(images), self.dictionaries, self.kept, strict=True):
            assert isinstance(dictionary, Dictionary)
            codes = sparsified(torch.sigmoid(dictionary(features)), k)
            errors.append((features - decoded(codes, dictionary.centers)).square().mean())
        return torch.stack(errors).sum()

    @torch.no_grad()
    def labels(self, images: Tensor) -> list[Labels]:
        """Return what the teacher's codes ask of the student, for every tap."""
        found = []
        for features, dictionary, k in zip(self._read(images), self.dictionaries, self.kept, strict=True):
            codes = torch.sigmoid(dictionary(features))
            found.append(Labels(codes.argmax(dim=1), sparsified(codes, k).mean(dim=(2, 3))))
        return found

    def _read(self, images: Tensor) -> list[Tensor]:
        """The teacher's features at every tap; vectors are maps of one pixel."""
        reading = self._reader[0](images)
        features = self._smaller(reading.stages)
        return [*features, full_precision(reading.embedding)[:, :, None, None]] if self.embedding else features

    def _smaller(self, maps: Sequence[Tensor]) -> list[Tensor]:
        sizes = [(min(a.height, b.height), min(a.width, b.width)) for a, b in self._pairs]
        return [pooled(full_precision(features), size) for features, size in zip(maps, sizes, strict=True)]

    def losses(self, outputs: Outputs, batch: Batch, progress: Tensor) -> dict[str, Tensor]:
        """Return `kl`."""
        answer = self._teacher[0](outputs.images)
        return {"kl": kl_divergence(outputs.logits, answer, self.temperature)}

    def weights(self, progress: Tensor) -> Mapping[str, float | Tensor]:
        """Constant."""
        return {"kl": self.alpha}

    def task_weight(self, progress: Tensor) -> float | Tensor:
        """Constant."""
        return 1.0 - self.alpha


def _binary_cross_entropy(probabilities: Tensor, target: Tensor) -> Tensor:
    # torch's own refuses to run under autocast.
    p = probabilities.clamp(_EDGE, 1.0 - _EDGE)
    return -(target * p.log() + (1.0 - target) * torch.log1p(-p)).mean()
