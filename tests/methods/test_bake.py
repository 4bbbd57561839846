from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import attar
from attar.errors import AttarError
from attar.methods import BAKE
from attar.sampling import Balanced
from networks import IMAGES, LABELS, Net

BATCHES = (
    st.integers(0, 10_000)
    .map(lambda seed: torch.Generator().manual_seed(seed))
    .map(
        lambda generator: (
            torch.randn(7, 4, dtype=torch.float64, generator=generator),
            torch.randn(7, 5, dtype=torch.float64, generator=generator),
            torch.randperm(7, generator=generator),
        )
    )
)


@given(BATCHES, st.floats(0.0, 0.95))
def test_targets_are_distributions_that_the_walk_leaves_alone(batch: tuple[Tensor, ...], omega: float) -> None:
    z, features, order = batch
    method = BAKE(omega=omega)
    q = method.ensemble(z, features)
    torch.testing.assert_close(q.sum(1), torch.ones(7, dtype=torch.float64))
    assert (q > 0).all()
    # Q = omega W Q + (1 - omega) p: what one more step of spreading changes nothing of.
    g = torch.nn.functional.normalize(features, dim=1)
    affinity = (g @ g.T).fill_diagonal_(-torch.inf).softmax(1)
    torch.testing.assert_close(omega * affinity @ q + (1 - omega) * (z / 4).softmax(1), q)
    torch.testing.assert_close(method.ensemble(z[order], features[order]), q[order])
    torch.testing.assert_close(method.ensemble(z, 3.0 * features), q)


def test_without_the_others_there_is_nothing_to_learn() -> None:
    torch.manual_seed(0)
    distiller = attar.Distiller(Net().double(), [BAKE(omega=0.0)], attar.Classification(3)).build(IMAGES).train()
    terms = distiller((IMAGES, LABELS), 0.5)
    assert terms.losses["BAKE.kl"].abs() < 1e-12
    distiller = attar.Distiller(Net().double(), [BAKE(weight=0.0)], attar.Classification(3)).build(IMAGES).train()
    terms = distiller((IMAGES, LABELS), 0.5)
    assert terms.losses["BAKE.kl"] > 0
    torch.testing.assert_close(terms.total(), terms.losses["task"])


def test_what_it_asks_for() -> None:
    distiller = attar.Distiller(Net().double(), [BAKE()], attar.Classification(3)).build(IMAGES)
    assert distiller.sampling == Balanced(4)
    with pytest.raises(AttarError, match="share in"):
        BAKE(omega=1.0)
    with pytest.raises(AttarError, match="must be positive"):
        BAKE(temperature=0.0)
