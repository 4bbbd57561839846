from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import attar
from attar.errors import AttarError
from attar.functional import kl_divergence
from attar.method import Batch
from attar.methods import DDGSD, KD, ONE
from networks import IMAGES, LABELS, Net


def views(*images: torch.Tensor) -> Batch:
    labels = LABELS.repeat(len(images))
    return Batch(torch.cat(images), labels, None, labels, views=len(images))


PAIR = views(IMAGES, IMAGES.flip(-1))


def built(*methods: attar.Method) -> attar.Distiller:
    torch.manual_seed(0)
    return attar.Distiller(Net().double(), methods, attar.Classification(3)).build(IMAGES).train()


@pytest.mark.parametrize(
    ("temperature", "b_to_a", "a_to_b"), [(1, 0.377550, 0.302929), (3, 0.040453, 0.039571), (4, 0.022357, 0.022091)]
)
def test_worked_divergences(temperature: float, b_to_a: float, a_to_b: float) -> None:
    z_a, z_b = torch.tensor([[2.0, 0, 0]]).double(), torch.tensor([[1.0, 1, 0]]).double()
    plain = {"temperature": temperature, "squared_temperature": False}
    assert kl_divergence(z_a, z_b, **plain).item() == pytest.approx(b_to_a, abs=1e-6)
    assert kl_divergence(z_b, z_a, **plain).item() == pytest.approx(a_to_b, abs=1e-6)


def test_terms_by_hand() -> None:
    distiller = built(DDGSD())
    terms = distiller(PAIR, 0.5)
    z_a, z_b = terms.logits.chunk(2)
    f_a, f_b = (distiller.student.high(distiller.student.low(x)).mean(dim=(2, 3)) for x in PAIR.images.chunk(2))
    p_a, p_b = ((z / 3).softmax(1) for z in (z_a, z_b))
    kl = (p_b * (p_b / p_a).log()).sum(1).mean() + (p_a * (p_a / p_b).log()).sum(1).mean()
    mmd = (f_a.mean(0) - f_b.mean(0)).square().sum()
    torch.testing.assert_close(terms.losses["DDGSD.kl"], 9 * kl)
    torch.testing.assert_close(terms.losses["DDGSD.mmd"], mmd)
    cross = F.cross_entropy(z_a, LABELS) + F.cross_entropy(z_b, LABELS)
    torch.testing.assert_close(terms.total(), cross + 9 * kl + 5e-4 * mmd)


def test_without_weights_it_is_training_on_two_views() -> None:
    terms = built(DDGSD(kl_weight=0.0, mmd_weight=0.0))(PAIR, 0.5)
    z_a, z_b = terms.logits.chunk(2)
    torch.testing.assert_close(terms.total(), F.cross_entropy(z_a, LABELS) + F.cross_entropy(z_b, LABELS))


def test_equal_views_have_nothing_to_teach() -> None:
    terms = built(DDGSD())(views(IMAGES, IMAGES), 0.5)
    assert terms.losses["DDGSD.kl"].item() == pytest.approx(0.0, abs=1e-14)
    assert terms.losses["DDGSD.mmd"].item() == 0.0


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999))
def test_swapping_views_changes_nothing(seed: int) -> None:
    other = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    distiller = built(DDGSD())
    before, after = distiller(views(IMAGES, other), 0.5), distiller(views(other, IMAGES), 0.5)
    for name, loss in before.losses.items():
        torch.testing.assert_close(after.losses[name], loss)
    assert before.losses["DDGSD.kl"] > 0


def test_each_view_learns_from_the_other_as_a_constant() -> None:
    """With a constant target the gradient of T^2 KL is T (p - target) / N; without it, z_b would enter KL_a too."""
    distiller = built(DDGSD())
    terms = distiller(PAIR, 0.5)
    (gradient,) = torch.autograd.grad(terms.losses["DDGSD.kl"], [terms.logits])
    p_a, p_b = ((z / 3).softmax(1) for z in terms.logits.detach().chunk(2))
    torch.testing.assert_close(gradient, 3 * torch.cat([p_a - p_b, p_b - p_a]) / len(IMAGES))


def test_mmd_compares_distributions() -> None:
    """Permuting one view leaves it, unlike the divergence; it reaches the features of both views, not the head."""
    distiller = built(DDGSD())
    before = distiller(PAIR, 0.5)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    after = distiller(views(IMAGES, IMAGES.flip(-1)[order]), 0.5)
    torch.testing.assert_close(after.losses["DDGSD.mmd"], before.losses["DDGSD.mmd"])
    assert not torch.allclose(after.losses["DDGSD.kl"], before.losses["DDGSD.kl"])
    head = torch.autograd.grad(
        before.losses["DDGSD.mmd"], list(distiller.student.head.parameters()), allow_unused=True, retain_graph=True
    )
    assert head == (None, None)
    for part in (distiller.student.low, distiller.student.high):
        weights = [p for p in part.parameters() if p.ndim > 1]
        for gradient in torch.autograd.grad(before.losses["DDGSD.mmd"], weights, retain_graph=True):
            assert gradient.abs().max() > 0


def test_the_scalar_quirk_is_much_weaker() -> None:
    vector, scalar = (built(DDGSD(mmd=mmd))(PAIR, 0.5).losses["DDGSD.mmd"] for mmd in ("vector", "scalar"))  # type: ignore[arg-type]
    assert 0 <= scalar <= vector / 8  # Cauchy-Schwarz: 8 channels


def test_both_views_pass_in_one_batch() -> None:
    """One batch normalisation over both views: one update of its statistics a step."""
    distiller = attar.Distiller(Net(batch_norm=True).double(), [DDGSD()], attar.Classification(3)).build(IMAGES)
    norm = distiller.train().student.low[1]
    distiller(PAIR, 0.5)
    assert norm.num_batches_tracked == 1
    expected = 0.1 * distiller.student.low[0](PAIR.images).mean(dim=(0, 2, 3))
    torch.testing.assert_close(norm.running_mean, expected)


def test_works_beside_a_method_of_the_logits() -> None:
    terms = built(DDGSD(), ONE(branches=2))(PAIR, 1.0)
    terms.total().backward()
    assert {"DDGSD.kl", "DDGSD.mmd", "ONE.kl"} <= terms.losses.keys()


def test_refusals() -> None:
    with pytest.raises(AttarError, match="temperature must be positive"):
        DDGSD(temperature=0.0)
    with pytest.raises(AttarError, match="'vector' or 'scalar'"):
        DDGSD(mmd="matrix")  # type: ignore[arg-type]
    with pytest.raises(AttarError, match="'rank' or 'world'"):
        DDGSD(scope="galaxy")  # type: ignore[arg-type]
    with pytest.raises(AttarError, match="need 2 views of every image, but the batch holds 1"):
        built(DDGSD())((IMAGES, LABELS), 0.5)
    with pytest.raises(AttarError, match="both set the task weight"):
        built(DDGSD(), KD(Net()))
