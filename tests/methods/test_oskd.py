from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
from attar.errors import AttarError
from attar.functional import nearest, squared_distances
from attar.methods import OSKD
from attar.sampling import Balanced
from networks import IMAGES, LABELS, Answers, Net

Z = torch.tensor([[2, 0, 0], [1, 1, 0], [3, 0, 1], [0, 2, 0], [0, 1, 1], [0, 0, 2]], dtype=torch.float64)
Y = torch.tensor([0, 0, 0, 1, 1, 2])


def terms(z: Tensor, labels: Tensor, progress: float = 0.5, **options: Any) -> attar.Terms:
    distiller = attar.Distiller(Answers(), [OSKD(**options)], attar.Classification(z.shape[1]), stages=["stage"]).build(
        z.detach()[:, None, None, :]
    )
    return distiller(attar.Batch(z[:, None, None, :], labels, labels=labels), progress)


def subclass(z: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return terms(z, labels, **options).losses["OSKD.subclass"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"k": 1, "temperature": 1.0}, 0.279553),
        ({"k": 1, "temperature": 4.0}, 0.303600),
        ({"k": 1, "divergence": "mse"}, 0.189574),
        ({"k": 2, "temperature": 1.0}, 0.285556),
        ({"k": 2, "temperature": 4.0}, 0.325878),
        ({"k": 2, "divergence": "mse"}, 0.179021),
    ],
)
def test_worked_example(options: dict[str, Any], expected: float) -> None:
    assert subclass(Z, Y, **options).item() == pytest.approx(expected, abs=1e-6)


def test_neighbours_of_the_worked_example() -> None:
    distances = squared_distances(Z, Z)
    assert distances[0, 1] == distances[0, 2] == distances[3, 4] == distances[1, 3] == pytest.approx(2)
    assert distances[1, 2] == pytest.approx(6)
    mates = (Y[:, None] == Y) & ~torch.eye(6, dtype=torch.bool)
    members = [row.nonzero().flatten().tolist() for row in nearest(distances, mates, 1)]
    assert members == [[1], [0], [0], [4], [3], []], "the tie of sample 0 goes to the lower number"
    assert [row.nonzero().flatten().tolist() for row in nearest(distances, mates, 2)][:3] == [[1, 2], [0, 2], [0, 1]]


def test_mse_of_logits_by_hand() -> None:
    each = [(Z[i] - Z[j]).square().sum() for i, j in ((0, 1), (1, 0), (2, 0), (3, 4), (4, 3))]
    torch.testing.assert_close(subclass(Z, Y, k=1, divergence="mse_logits"), torch.stack(each).mean())


BATCHES = (
    st.integers(0, 10_000)
    .map(lambda seed: torch.Generator().manual_seed(seed))
    .map(
        lambda generator: (
            2 * torch.randn(10, 4, dtype=torch.float64, generator=generator),
            torch.randint(4, (10,), generator=generator),
            torch.randperm(10, generator=generator),
        )
    )
)
OPTIONS = st.fixed_dictionaries(
    {
        "k": st.integers(1, 5),
        "divergence": st.sampled_from(["kl", "mse", "mse_logits"]),
        "space": st.sampled_from(["logits", "probs"]),
        "averaging": st.sampled_from(["probs", "logits"]),
    }
)


@given(BATCHES, OPTIONS)
def test_order_and_names_of_classes_do_not_matter(batch: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    z, labels, order = batch
    expected = subclass(z, labels, **options)
    torch.testing.assert_close(subclass(z[order], labels[order], **options), expected)
    torch.testing.assert_close(subclass(z, (labels + 1) % 4, **options), expected)


@given(BATCHES, st.sampled_from(["kl", "mse"]))
def test_a_constant_for_all_logits_does_not_matter(batch: tuple[Tensor, ...], divergence: str) -> None:
    z, labels, _ = batch
    torch.testing.assert_close(
        subclass(z + 7.0, labels, divergence=divergence), subclass(z, labels, divergence=divergence)
    )


@given(BATCHES, st.integers(1, 3), st.floats(0.5, 8.0))
def test_the_gradient_reaches_the_sample_and_no_neighbour(
    batch: tuple[Tensor, ...], k: int, temperature: float
) -> None:
    z, labels, _ = batch
    z = z.clone().requires_grad_()
    subclass(z, labels, k=k, temperature=temperature).backward()
    p = (z.detach() / temperature).softmax(1)
    mates = (labels[:, None] == labels) & ~torch.eye(10, dtype=torch.bool)
    chosen = nearest(squared_distances(z.detach(), z.detach()), mates, k)
    valid = chosen.any(1)
    target = chosen.double() @ p / chosen.sum(1, keepdim=True).clamp(min=1)
    expected = torch.where(valid[:, None], temperature / valid.sum().clamp(min=1) * (p - target), 0.0)
    torch.testing.assert_close(z.grad, expected)


def test_equal_samples_learn_nothing_and_lone_ones_neither() -> None:
    same = torch.ones(4, 3, dtype=torch.float64).requires_grad_()
    loss = subclass(same, torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert not same.grad.any()
    lone = Z.clone().requires_grad_()
    loss = subclass(torch.cat([lone, lone.flip(1)], dim=1), torch.arange(6))
    loss.backward()
    assert loss == 0
    assert not lone.grad.any()


def test_a_hot_temperature_compares_centred_logits() -> None:
    assert subclass(Z, Y, k=1, temperature=1e4).item() == pytest.approx(0.288889, rel=1e-3)


def test_weight_and_ramp() -> None:
    torch.testing.assert_close(terms(Z, Y, weight=0.0).total(), nn.functional.cross_entropy(Z, Y))
    weights = [
        float(terms(Z, Y, progress, weight=2.0, ramp=0.2).weights["OSKD.subclass"]) for progress in (0.0, 0.1, 0.2, 1.0)
    ]
    assert weights == pytest.approx([0.0, 1.0, 2.0, 2.0])


def test_neighbours_in_the_embedding() -> None:
    torch.manual_seed(0)
    net = Net().double()
    distiller = attar.Distiller(net, [OSKD(k=1, space="penultimate")], attar.Classification(3)).build(IMAGES)
    found = distiller((IMAGES, LABELS), 0.5)
    embedding = nn.functional.normalize(net.high(net.low(IMAGES)).mean(dim=(2, 3)), dim=1)
    mates = (LABELS[:, None] == LABELS) & ~torch.eye(6, dtype=torch.bool)
    target = nearest(squared_distances(embedding, embedding), mates, 1).double() @ (found.logits / 4).softmax(1)
    expected = 16 * (target * (target.log() - (found.logits / 4).log_softmax(1))).sum() / 6
    torch.testing.assert_close(found.losses["OSKD.subclass"], expected)


@pytest.mark.parametrize(
    ("classes", "sampler", "sampling"),
    [(10, "auto", None), (100, "auto", Balanced(8)), (10, "balanced", Balanced(8)), (100, "plain", None)],
)
def test_batches_are_balanced_where_mates_are_rare(classes: int, sampler: Any, sampling: Balanced | None) -> None:
    distiller = attar.Distiller(Net(classes).double(), [OSKD(sampler=sampler)], attar.Classification(classes))
    assert distiller.build(IMAGES).sampling == sampling


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"k": 0}, "at least one neighbour"),
        ({"temperature": 0.0}, "must be positive"),
        ({"ramp": 2.0}, "share of the run"),
    ],
)
def test_mistakes(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        OSKD(**options)


def test_with_one() -> None:
    torch.manual_seed(0)
    methods = [attar.methods.ONE(branches=2), OSKD()]
    distiller = attar.Distiller(Net(batch_norm=True).double(), methods, attar.Classification(3)).build(IMAGES).train()
    found = distiller((IMAGES, LABELS), 0.5)
    assert {"ONE.kl", "OSKD.subclass"} <= found.losses.keys()
    found.total().backward()
    assert all(parameter.grad is not None for parameter in distiller.parameters())
