"""Multi-view data and the two-layer network of Allen-Zhu and Li's theory of ensembles and distillation.

A class shows itself by several features ("views"), each of which suffices. Gradient descent learns whichever view had
the luckier start and stops once the training data are right; other seeds miss other views, so an ensemble misses almost
none, and its soft labels tell a student of views that the labels do not. `examples/multi_view.py` measures it.

Source: Allen-Zhu and Li, "Towards Understanding Ensemble, Knowledge Distillation and Self-Distillation in Deep
Learning", ICLR 2023 (arXiv 2012.09816). The defaults are a finite setting that shows the phenomena in minutes, not the
paper's, which are asymptotic (many patches, vanishing constants). The form of the paper's distribution and network that
this follows was written down from memory and not checked against the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from attar.errors import AttarError

__all__ = ["Ensemble", "MultiView", "MultiViewNetwork", "MultiViewSamples", "SmoothedReLU"]

_FEATURES = 2**32 - 1  # the stream that features are drawn from, apart from those of samples


@dataclass(frozen=True)
class MultiViewSamples:
    """N labelled samples of a `MultiView` distribution.

    Attributes:
        patches: x [N, P, d] float32.
        labels: y [N] int64.
        single_view: [N] bool, whether only one view of the class is strong.
        coefficients: Z [N, 2k] float32, how strongly every feature is present, 0 where it is not; column 2j + l is
            view l of class j.
    """

    patches: Tensor
    labels: Tensor
    single_view: Tensor
    coefficients: Tensor

    @property
    def images(self) -> Tensor:
        """The patches as images [N, d, 1, P]: a patch is a pixel and its coordinates are the channels (no copy)."""
        return self.patches.unsqueeze(1).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class MultiView:
    """The multi-view distribution: k classes, two orthonormal features a class, P patches of d numbers.

    Definition. The label y is uniform. A sample shows both features of y and every other feature with probability
    s / k, at most P - 2 of those (a random part where there are more). Each shown feature v gets a patch of its own,
    chosen at random, and that patch is `z v`; the others are empty. Coefficients are uniform:

    | sample      | a view of y                                | other features |
    |-------------|--------------------------------------------|----------------|
    | multi-view  | both [1, 2]                                | [0.2, 0.4]     |
    | single-view | one, at even odds, [1, 2]; the other [rho, 2 rho] | [Gamma / 2, Gamma] |

    To every coordinate of every patch a Gaussian of standard deviation `noise` / sqrt(d) is added. Everything is a
    function of the seeds; samples of different seeds share their features.

    Args:
        classes: k, at least 2.
        patches: P, at least 2.
        dim: d, at least 2k.
        others: s, at most k.
        rho: strength of the view that a single-view sample hardly shows.
        gamma: Gamma, strength of other classes' features in single-view samples.
        noise: standard deviation times sqrt(d).
        seed: of the features.

    Raises:
        AttarError: a value out of range.

    Source: Allen-Zhu and Li, section 2, as remembered. Theirs has P = k^2 patches of which a constant number carry each
    feature (here one), also feature noise on every patch (here none), and constants that vanish or grow with k.
    """

    classes: int = 10
    patches: int = 8
    dim: int = 600
    others: float = 2.0
    rho: float = 0.05
    gamma: float = 0.4
    noise: float = 1.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise AttarError(f"Multi-view data need at least 2 classes, not {self.classes}.")
        if self.patches < 2:
            raise AttarError(f"Multi-view data need a patch for each of two views, not {self.patches} patches.")
        if self.dim < 2 * self.classes:
            raise AttarError(
                f"{2 * self.classes} orthonormal features do not fit into {self.dim} dimensions: "
                f"let dim be at least {2 * self.classes}."
            )
        if not 0 <= self.others <= self.classes:
            raise AttarError(f"The expected features of others must lie in 0..{self.classes}, not {self.others}.")
        if min(self.rho, self.gamma, self.noise) < 0:
            raise AttarError(f"rho, gamma and noise must not be negative: {self.rho}, {self.gamma}, {self.noise}.")

    def features(self) -> Tensor:
        """Return V [2k, d] float32, orthonormal rows; row 2j + l is view l of class j."""
        normal = torch.randn(self.dim, 2 * self.classes, generator=self._generator(_FEATURES), dtype=torch.float64)
        q, r = torch.linalg.qr(normal)
        # With the signs of R's diagonal in it Q is uniform over all orthonormal sets.
        features: Tensor = (q * r.diagonal().sign()).T.float().contiguous()
        return features

    def sample(self, count: int, single_view: float, seed: int) -> MultiViewSamples:
        """Draw samples.

        Args:
            count: N, at least 1.
            single_view: mu, the probability that a sample shows one view only, in [0, 1].
            seed: training and test samples take different ones.

        Raises:
            AttarError: a value out of range.
        """
        if count < 1:
            raise AttarError(f"At least one sample must be drawn, not {count}.")
        if not 0.0 <= single_view <= 1.0:
            raise AttarError(f"The share of single-view samples must lie in [0, 1], not {single_view}.")
        generator = self._generator(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator)

        k, p, rows = self.classes, self.patches, torch.arange(count)
        labels = torch.randint(k, (count,), generator=generator)
        single = uniform(count) < single_view
        main = 2 * labels + torch.randint(2, (count,), generator=generator)
        minor = main ^ 1

        # A small draw keeps a feature; where more than P - 2 are kept, the smallest stay.
        draw = uniform(count, 2 * k)
        draw[rows, main], draw[rows, minor] = -2.0, -1.0
        order = torch.argsort(draw, dim=1)[:, :p]  # the features that may stand on patches, own views first
        shown = draw.gather(1, order) < self.others / k

        low, high = torch.tensor([0.2, 0.4]).expand(count, 2).clone().unbind(1)
        low[single], high[single] = self.gamma / 2, self.gamma
        low, high = (bound[:, None].repeat(1, 2 * k) for bound in (low, high))
        low[rows, main], high[rows, main] = 1.0, 2.0
        low[rows, minor] = torch.where(single, self.rho, 1.0)
        high[rows, minor] = torch.where(single, 2 * self.rho, 2.0)
        strength = low + (high - low) * uniform(count, 2 * k)
        coefficients = torch.zeros(count, 2 * k).scatter(1, order, strength.gather(1, order) * shown)

        patch = torch.argsort(uniform(count, p), dim=1)[:, : order.shape[1]]  # one for every feature, without return
        signal = coefficients.gather(1, order)[:, :, None] * self.features()[order]
        x = torch.randn(count, p, self.dim, generator=generator) * (self.noise / math.sqrt(self.dim))
        x[rows[:, None], patch] += signal
        return MultiViewSamples(x, labels, single, coefficients)

    def _generator(self, stream: int) -> torch.Generator:
        word = int(np.random.SeedSequence([self.seed, stream]).generate_state(1, np.uint64)[0])
        generator = torch.Generator()
        return generator.manual_seed(word >> 1)


class SmoothedReLU(nn.Module):
    """The smoothed ReLU: a polynomial below c, linear above, with continuous slope.

    Definition: `a(z) = 0` for z <= 0, `z^q / (q c^(q-1))` for 0 <= z <= c, `z - (1 - 1/q) c` for z >= c.
    The polynomial hushes small responses, so that the neuron that responds best at the start learns by far the fastest.

    Shapes: any -> the same.

    Args:
        q: power, at least 2 (the theory wants 3 or more).
        c: where the linear part begins, positive.

    Raises:
        AttarError: a value out of range.
    """

    def __init__(self, q: float = 4.0, c: float = 1.0) -> None:
        super().__init__()
        if q < 2 or c <= 0:
            raise AttarError(f"The smoothed ReLU needs q of at least 2 and a positive c, not {q} and {c}.")
        self.q, self.c = q, c

    def forward(self, z: Tensor) -> Tensor:
        """Return a(z)."""
        beyond = torch.relu(z - self.c)
        bent = torch.relu(z) - beyond  # z between 0 and c
        return bent * (bent / self.c).pow(self.q - 1) / self.q + beyond


class MultiViewNetwork(nn.Module):
    """The theory's network: m neurons a class over every patch, all summed; only the first layer is trained.

    Definition: `F_i(x) = sum_r sum_p a(<w_ir, x_p>)`, r = 1..m, with the smoothed ReLU a and no second-layer weights.
    Initially w ~ N(0, std^2).

    Shapes: patches [N, P, d], or images [N, d, 1, P] as of `MultiViewSamples.images` -> logits F [N, k].

    Args:
        classes: k.
        dim: d.
        neurons: m. Three leave classes without a neuron; 24 and more learn both views by themselves.
        q: power of the activation.
        c: where its linear part begins.
        std: of the initial weights.
        seed: of the initial weights; None draws them from torch's global generator.

    Raises:
        AttarError: a value out of range.

    Source: Allen-Zhu and Li, section 2, as remembered; there m grows and c shrinks with k, and std = k^(-1/2).
    """

    def __init__(
        self,
        classes: int = 10,
        dim: int = 600,
        *,
        neurons: int = 6,
        q: float = 4.0,
        c: float = 1.0,
        std: float = 0.05,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if min(classes, dim, neurons) < 1 or std < 0:
            raise AttarError(
                f"The multi-view network needs positive sizes and no negative std, not {classes} classes, {dim} "
                f"dimensions, {neurons} neurons and std {std}."
            )
        self.classes, self.dim = classes, dim
        self.neurons = nn.Linear(dim, classes * neurons, bias=False)
        self.activation = SmoothedReLU(q, c)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        nn.init.normal_(self.neurons.weight, std=std, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        patches = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        responses = self.activation(self.neurons(patches)).sum(dim=1)
        return responses.unflatten(1, (self.classes, -1)).sum(dim=2)  # type: ignore[no-any-return]


class Ensemble(nn.Module):
    """Networks that answer together by the mean of their logits: `G(x) = (1/K) sum_k F_k(x)`.

    Shapes: whatever the networks take -> [N, C].

    Args:
        networks: at least one; they are kept, not copied.

    Raises:
        AttarError: no network.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if not networks:
            raise AttarError("An ensemble needs at least one network.")
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean logits."""
        return torch.stack([network(x) for network in self.networks]).mean(dim=0)
