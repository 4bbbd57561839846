from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
from attar.errors import AttarError
from attar.methods import CSKD
from attar.sampling import ClassPairs
from networks import IMAGES, LABELS, Answers, Net


def step(z: Tensor, partner: Tensor, labels: Tensor, **options: float) -> attar.Terms:
    def images(logits: Tensor) -> Tensor:
        return logits[:, None, None, :]

    method = CSKD(**options)  # type: ignore[arg-type]
    distiller = attar.Distiller(Answers(), [method], attar.Classification(z.shape[1]), stages=["stage"])
    distiller.build(images(z.detach()))
    batch = attar.Batch(images(z), labels, labels=labels)
    return distiller(dataclasses.replace(batch, partners=dataclasses.replace(batch, images=images(partner))), 0.5)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_worked_example() -> None:
    terms = step(row(2, 0, 0), row(1, 1, 0), torch.tensor([0]))
    assert terms.losses["task"].item() == pytest.approx(0.239545, abs=1e-6)
    assert terms.losses["CSKD.kl"].item() == pytest.approx(0.357717, abs=1e-6)
    assert terms.losses["CSKD.kl"].item() / 16 == pytest.approx(0.022357, abs=1e-6)
    assert terms.total().item() == pytest.approx(0.597262, abs=1e-6)


LOGITS = st.integers(0, 10_000).map(
    lambda seed: torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
)


@given(LOGITS, st.floats(0.5, 10.0))
def test_the_gradient_is_that_of_the_image_alone(logits: Tensor, temperature: float) -> None:
    z, partner = (values.clone().requires_grad_() for values in logits)
    terms = step(z, partner, torch.arange(5) % 4, temperature=temperature)
    terms.losses["CSKD.kl"].backward()
    p, q = (z.detach() / temperature).softmax(1), (partner.detach() / temperature).softmax(1)
    torch.testing.assert_close(z.grad, temperature / 5 * (p - q))
    assert partner.grad is None


@given(LOGITS)
def test_a_hot_temperature_compares_centred_logits(logits: Tensor) -> None:
    z, partner = logits
    found = step(z, partner, torch.zeros(5, dtype=torch.long), temperature=1e4).losses["CSKD.kl"]
    centred = [values - values.mean(dim=1, keepdim=True) for values in logits]
    torch.testing.assert_close(found, (centred[0] - centred[1]).square().sum(1).mean() / 8, rtol=1e-2, atol=1e-6)


def test_weight_zero_is_plain_training_and_only_images_have_a_cross_entropy() -> None:
    z, partner, labels = row(2, 0, 0), row(-9, 9, 0), torch.tensor([0])
    terms = step(z, partner, labels, weight=0.0)
    torch.testing.assert_close(terms.total(), nn.functional.cross_entropy(z, labels))


def test_an_image_that_is_its_own_partner_learns_nothing_from_it() -> None:
    torch.manual_seed(0)
    distiller = attar.Distiller(Net().double(), [CSKD()], attar.Classification(3)).build(IMAGES).train()
    batch = attar.Batch(IMAGES, LABELS, labels=LABELS)
    terms = distiller(dataclasses.replace(batch, partners=batch), 0.5)
    assert terms.losses["CSKD.kl"].abs() < 1e-12
    flipped = dataclasses.replace(batch, images=IMAGES.flip(-1))
    assert distiller(dataclasses.replace(batch, partners=flipped), 0.5).losses["CSKD.kl"] > 1e-6


def test_partners_have_their_own_batch_statistics_and_move_the_running_ones() -> None:
    torch.manual_seed(0)
    net = Net(batch_norm=True).double()
    distiller = attar.Distiller(net, [CSKD(weight=0.0)], attar.Classification(3)).build(IMAGES).train()
    batch = attar.Batch(IMAGES, LABELS, labels=LABELS)
    distiller(dataclasses.replace(batch, partners=dataclasses.replace(batch, images=IMAGES + 1.0)), 0.5)
    moved = net.low[1].running_mean.clone()
    features = [net.low[0](images).mean(dim=(0, 2, 3)) for images in (IMAGES, IMAGES + 1.0)]
    torch.testing.assert_close(moved, 0.9 * (0.1 * features[0]) + 0.1 * features[1])
    assert net.low[1].num_batches_tracked == 2


def test_what_it_asks_for() -> None:
    distiller = attar.Distiller(Net().double(), [CSKD()], attar.Classification(3)).build(IMAGES)
    assert distiller.sampling == ClassPairs()
    with pytest.raises(AttarError, match=r"need a partner of the same class for every image: give Batch.partners"):
        distiller((IMAGES, LABELS), 0.5)
    with pytest.raises(AttarError, match="temperature must be positive"):
        CSKD(temperature=0.0)
