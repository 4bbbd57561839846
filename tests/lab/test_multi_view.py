"""Multi-view data against their definition, the activation's values, ensembles, and a student's own answers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import Tensor

import attar
from attar.errors import AttarError
from attar.lab import Ensemble, MultiView, MultiViewNetwork, MultiViewSamples, SmoothedReLU

SILENT = MultiView(noise=0.0, seed=7)


def responses(samples: MultiViewSamples, features: Tensor) -> Tensor:
    """<x_p, v>: [N, P, 2k]."""
    return samples.patches @ features.T


def own_views(samples: MultiViewSamples) -> Tensor:
    """Z of the label's two views: [N, 2]."""
    return samples.coefficients.unflatten(1, (-1, 2))[torch.arange(len(samples)), samples.labels]


def test_features_are_orthonormal_and_shared_by_all_samples() -> None:
    features = MultiView(seed=7).features()
    assert features.shape == (20, 600)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features @ features.T, torch.eye(20), atol=1e-5, rtol=0)
    assert not torch.allclose(features, MultiView(seed=8).features())
    for seed in (1, 2):
        samples = SILENT.sample(50, 0.5, seed=seed)
        # Without noise everything lies in their span.
        torch.testing.assert_close(responses(samples, features) @ features, samples.patches, atol=1e-5, rtol=0)


def test_every_feature_has_one_patch_and_no_patch_has_two() -> None:
    samples = SILENT.sample(400, 0.5, seed=1)
    found = responses(samples, SILENT.features())
    there = found.abs() > 1e-4
    assert (there.sum(dim=2) <= 1).all()
    assert torch.equal(there.sum(dim=1), (samples.coefficients > 0).long())
    torch.testing.assert_close(found.sum(dim=1), samples.coefficients, atol=1e-5, rtol=0)


def test_coefficients_lie_in_their_ranges() -> None:
    samples = SILENT.sample(4000, 0.4, seed=1)
    own, single = own_views(samples), samples.single_view
    strong = own >= 1.0
    assert (strong[single].sum(dim=1) == 1).all()
    assert strong[~single].all()
    assert own.max() <= 2.0
    weak = own[single][~strong[single]]
    assert 0.05 <= weak.min() < weak.max() <= 0.1
    others = samples.coefficients.clone().unflatten(1, (-1, 2))
    others[torch.arange(4000), samples.labels] = 0.0
    present = others[others > 0]
    assert 0.2 <= present.min() < 0.21
    assert 0.39 < present.max() <= 0.4
    shifted = MultiView(noise=0.0, rho=0.2, gamma=0.1).sample(500, 1.0, seed=1)
    own = own_views(shifted)
    assert 0.2 <= own[own < 1].min() < own[own < 1].max() <= 0.4
    rest = shifted.coefficients[(shifted.coefficients > 0) & (shifted.coefficients < 0.2)]
    assert 0.05 <= rest.min() < rest.max() <= 0.1


def test_labels_views_and_shares_are_balanced() -> None:
    samples = SILENT.sample(20_000, 0.3, seed=1)
    assert samples.single_view.double().mean().item() == pytest.approx(0.3, abs=0.02)
    counts = samples.labels.bincount(minlength=10) / 20_000
    assert (counts - 0.1).abs().max() < 0.01
    main = own_views(samples)[samples.single_view].argmax(dim=1)
    assert main.double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert not SILENT.sample(100, 0.0, seed=1).single_view.any()
    assert SILENT.sample(100, 1.0, seed=1).single_view.all()


def test_other_features_are_as_many_as_their_probability_and_the_cap_say() -> None:
    samples = SILENT.sample(20_000, 0.5, seed=1)
    others = (samples.coefficients > 0).sum(dim=1) - 2
    assert others.max() == 6  # P - 2
    expected = sum(min(n, 6) * binom.pmf(n, 18, 0.2) for n in range(19))
    assert 3.4 < expected < 3.6
    assert others.double().mean().item() == pytest.approx(expected, abs=0.03)
    # Where more are drawn than fit, which stay is chance: no feature is favoured.
    rate = (samples.coefficients > 0).double().mean(dim=0)
    assert rate.max() - rate.min() < 0.03


def test_no_class_has_a_place_of_its_own() -> None:
    samples = SILENT.sample(20_000, 0.5, seed=1)
    used = (samples.patches.abs().amax(dim=2) > 0).double()
    by_class = torch.stack([used[samples.labels == label].mean(dim=0) for label in range(10)])
    assert (by_class - by_class.mean()).abs().max() < 0.05


def test_noise_has_its_size_on_every_patch() -> None:
    noisy, silent = (MultiView(noise=noise, seed=7).sample(300, 0.5, seed=1) for noise in (1.2, 0.0))
    assert torch.equal(noisy.coefficients, silent.coefficients)
    difference = noisy.patches - silent.patches
    assert difference.std().item() == pytest.approx(1.2 / math.sqrt(600), rel=0.01)
    assert difference.std(dim=2).min() > 0.8 * 1.2 / math.sqrt(600)


def test_samples_are_a_function_of_the_seeds() -> None:
    first, again, other = (MultiView(seed=7).sample(30, 0.5, seed=seed) for seed in (1, 1, 2))
    for name in ("patches", "labels", "single_view", "coefficients"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.labels, other.labels)
    assert first.patches.dtype == first.coefficients.dtype == torch.float32
    assert first.labels.dtype == torch.int64
    assert len(first) == 30
    state = torch.get_rng_state()
    MultiView(seed=7).sample(5, 0.5, seed=3)
    assert torch.equal(state, torch.get_rng_state())


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.integers(2, 9), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(0, 10**6))
def test_any_size_obeys_the_definition(k: int, patches: int, share: float, mu: float, seed: int) -> None:
    distribution = MultiView(classes=k, patches=patches, dim=4 * k, others=share * k, noise=0.0, seed=seed)
    samples = distribution.sample(12, mu, seed=seed + 1)
    shown = samples.coefficients > 0
    assert samples.patches.shape == (12, patches, 4 * k)
    assert shown.sum(dim=1).min() >= 2
    assert shown.sum(dim=1).max() <= min(patches, 2 * k)
    assert torch.equal((own_views(samples) >= 1).sum(dim=1), 2 - samples.single_view.long())
    found = responses(samples, distribution.features())
    torch.testing.assert_close(found.sum(dim=1), samples.coefficients, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"classes": 1}, "at least 2 classes, not 1"),
        ({"patches": 1}, "a patch for each of two views, not 1"),
        ({"dim": 19}, "let dim be at least 20"),
        ({"others": 11.0}, "must lie in 0..10"),
        ({"noise": -1.0}, "must not be negative"),
    ],
)
def test_distributions_that_cannot_be(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        MultiView(**values)


def test_other_mistakes() -> None:
    with pytest.raises(AttarError, match="At least one sample"):
        SILENT.sample(0, 0.5, seed=1)
    with pytest.raises(AttarError, match=r"must lie in \[0, 1\], not 1.5"):
        SILENT.sample(3, 1.5, seed=1)
    with pytest.raises(AttarError, match="at least one network"):
        Ensemble([])
    with pytest.raises(AttarError, match="q of at least 2 and a positive c"):
        SmoothedReLU(q=1.0)
    with pytest.raises(AttarError, match="positive sizes"):
        MultiViewNetwork(neurons=0)


def test_the_activations_values() -> None:
    z = torch.tensor([0.1, 0.2, 0.3, 1.0, 0.0, -1.0], dtype=torch.float64)
    expected = torch.tensor([0.003125, 0.05, 0.15, 0.85, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(SmoothedReLU(q=4, c=0.2)(z), expected)


@pytest.mark.parametrize(("q", "c"), [(4.0, 0.2), (3.0, 1.0), (2.0, 0.7)])
def test_the_activation_and_its_slope_are_continuous(q: float, c: float) -> None:
    activation = SmoothedReLU(q, c)
    tiny = 1e-9
    z = torch.tensor([-tiny, tiny, c - tiny, c, c + tiny, 5.0], dtype=torch.float64, requires_grad=True)
    value = activation(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    torch.testing.assert_close(value[:2], torch.zeros(2, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(value[2:5], torch.full((3,), c / q, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(slope, torch.tensor([0.0, 0, 1, 1, 1, 1], dtype=torch.float64), atol=1e-7, rtol=0)
    inner = torch.linspace(-1, 2, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(activation, inner)


def test_the_network_is_its_definition() -> None:
    network = MultiViewNetwork(classes=3, dim=8, neurons=2, q=3, c=0.5, std=1.0, seed=0)
    samples = MultiView(classes=3, patches=4, dim=8, others=1.0).sample(5, 0.5, seed=1)
    w = network.neurons.weight.unflatten(0, (3, 2))
    expected = torch.zeros(5, 3)
    for n in range(5):
        for i in range(3):
            for r in range(2):
                for p in range(4):
                    expected[n, i] += network.activation(w[i, r] @ samples.patches[n, p])
    torch.testing.assert_close(network(samples.patches), expected)
    assert samples.images.shape == (5, 8, 1, 4)
    assert samples.images.data_ptr() == samples.patches.data_ptr()
    torch.testing.assert_close(network(samples.images), expected)


def test_initial_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (MultiViewNetwork(seed=seed).neurons.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (60, 600)
    assert first.std().item() == pytest.approx(0.05, rel=0.02)
    torch.manual_seed(3)
    drawn = MultiViewNetwork().neurons.weight
    torch.manual_seed(3)
    assert torch.equal(drawn, MultiViewNetwork().neurons.weight)


def test_an_ensemble_is_the_mean_of_logits_and_of_one_it_is_that_one() -> None:
    patches = MultiView().sample(20, 0.5, seed=1).patches
    networks = [MultiViewNetwork(seed=seed) for seed in range(3)]
    assert torch.equal(Ensemble(networks[:1])(patches), networks[0](patches))
    expected = sum(network(patches) for network in networks) / 3
    torch.testing.assert_close(Ensemble(networks)(patches), expected)


def test_the_networks_own_answers_teach_it_nothing() -> None:
    samples = MultiView().sample(40, 0.5, seed=1)

    def largest_gradient(teacher_seed: int) -> float:
        # Large weights, since fresh networks answer nearly the same: nothing.
        student, teacher = (MultiViewNetwork(std=0.5, seed=seed).double() for seed in (0, teacher_seed))
        method = attar.methods.KD(teacher, temperature=4.0, weight=3.0, task_weight=0.1)
        images = samples.images.double()
        distiller = attar.Distiller(student, [method], attar.Classification(10)).build(images)
        distiller((images, samples.labels), torch.tensor(0.5)).losses["KD.kl"].backward()
        assert student.neurons.weight.grad is not None
        return float(student.neurons.weight.grad.abs().max())

    assert largest_gradient(0) < 1e-12
    assert largest_gradient(1) > 1e-3


def test_the_distiller_takes_it_and_gives_it_back_proved() -> None:
    samples = MultiView().sample(20, 0.5, seed=1)
    distiller = attar.Distiller(MultiViewNetwork(seed=0), [], attar.Classification(10)).build(samples.images)
    assert [(stage.channels, stage.height, stage.width) for stage in distiller.anatomy.stages] == [(60, 1, 8)]
    plain = distiller.strip()
    assert isinstance(plain, MultiViewNetwork)
    assert list(plain.state_dict()) == ["neurons.weight"]
