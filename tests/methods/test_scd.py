from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
from attar.errors import AttarError
from attar.functional import batch_similarity, similarity_distance
from attar.methods import CSKD, FRSKD, ONE, SCD
from networks import IMAGES, LABELS, Net

FULL = torch.tensor(1.0, dtype=torch.float64)
PARTNERS = IMAGES.flip(-1)

# scd.md, worked example: layer s has two channels of 2 x 2, layer t one of 1 x 2.
SHALLOW = torch.tensor(
    [[[[1, 0], [0, 0]], [[1, 0], [0, 0]]], [[[1, 1], [0, 0]], [[0, 1], [0, 0]]], [[[0, 0], [1, 0]], [[0, 0], [0, 2]]]],
    dtype=torch.float64,
)
DEEP = torch.tensor([[[[2, 0]]], [[[2, 1]]], [[[0, 1]]]], dtype=torch.float64)


def built(*methods: attar.Method) -> attar.Distiller:
    torch.manual_seed(0)
    return attar.Distiller(Net().double(), methods, attar.Classification(3)).build(IMAGES)


def similarity_of(distiller: attar.Distiller) -> Tensor:
    return distiller((IMAGES, LABELS), FULL).losses["SCD.similarity"]


def distance(method: SCD, shallow: Tensor, deep: Tensor) -> Tensor:
    return similarity_distance(method.similarity(shallow), method.similarity(deep))


def random_features(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("norm", "squares", "expected"),
    [("none", 0.828816, 0.092091), ("l2", 0.326299, 0.036255), ("softmax", 0.386544, 0.042949)],
)
def test_worked_example(norm: str, squares: float, expected: float) -> None:
    d = distance(SCD(attn_norm=norm), SHALLOW, DEEP)
    assert d.item() == pytest.approx(expected, abs=1e-6)
    assert 9 * d.item() == pytest.approx(squares, abs=2e-6)


def test_cosines_of_the_worked_example() -> None:
    g = torch.tensor([[1, 0.447214, 0], [0.447214, 1, 0], [0, 0, 1]], dtype=torch.float64)
    expected = g / g.norm(dim=1, keepdim=True)
    torch.testing.assert_close(SCD().similarity(SHALLOW), expected, atol=1e-6, rtol=0)


def test_weight_zero_is_plain_training() -> None:
    plain, scd = built(), built(SCD(weight=0.0))
    for distiller in (plain, scd):
        distiller((IMAGES, LABELS), FULL).total().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, dict(scd.named_parameters())[name].grad), name


shapes = st.tuples(st.integers(0, 9999), st.integers(1, 5), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))


@settings(deadline=None, max_examples=50)
@given(shapes, st.sampled_from(["l2", "softmax", "none"]), st.sampled_from(["sum", "mean", "max"]))
def test_properties_of_a_pair(drawn: tuple[int, ...], norm: str, reduce: str) -> None:
    seed, b, c, h, w = drawn
    method = SCD(attn_norm=norm, reduce=reduce)
    shallow = random_features(seed, b, c, h, w).requires_grad_()
    deep = random_features(seed + 1, b, c + 2, w, 2).requires_grad_()
    d = distance(method, shallow, deep)
    assert 0 <= d <= 2 / b + 1e-12
    assert distance(method, shallow, shallow) == 0
    if b == 1:
        assert d == 0
    # Samples permuted together; channels of a layer, or its positions in all samples alike.
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(b, generator=generator)
    torch.testing.assert_close(distance(method, shallow[order], deep[order]), d)
    torch.testing.assert_close(distance(method, shallow.flip(1, 3), deep.flip(2)), d)
    positions = torch.randperm(h * w, generator=generator)
    shuffled = shallow.flatten(2)[:, :, positions].view_as(shallow)
    torch.testing.assert_close(distance(method, shuffled, deep), d)
    # One way.
    d.backward()
    assert deep.grad is None
    assert torch.isfinite(shallow.grad).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 9999), st.floats(0.05, 20), st.booleans())
def test_scaling(seed: int, scale: float, negative: bool) -> None:
    shallow, deep = random_features(seed, 4, 3, 5, 4), random_features(seed + 1, 4, 2, 2, 2)
    one = torch.ones(4, 1, 1, 1, dtype=torch.float64)
    one[seed % 4] = -scale if negative else scale
    cosine, raw = SCD(), SCD(attn_norm="none")
    torch.testing.assert_close(distance(cosine, one * shallow, deep), distance(cosine, shallow, deep))
    torch.testing.assert_close(distance(cosine, shallow, one * deep), distance(cosine, shallow, deep))
    torch.testing.assert_close(distance(raw, scale * shallow, deep), distance(raw, shallow, deep))
    if scale > 1.5:
        assert abs(distance(raw, one * shallow, deep) - distance(raw, shallow, deep)) > 1e-6


def test_an_empty_map_gives_no_nan() -> None:
    for norm in ("l2", "softmax", "none"):
        shallow = random_features(0, 3, 2, 4, 4)
        shallow[1] = 0
        shallow.requires_grad_()
        d = distance(SCD(attn_norm=norm), shallow, random_features(1, 3, 2, 2, 2))
        d.backward()
        assert torch.isfinite(d)
        assert torch.isfinite(shallow.grad).all()


def test_without_attention_it_is_spkd() -> None:
    """With one channel, power 1 and no normalisation q is |A|: SPKD of the absolute activations."""
    shallow, deep = random_features(0, 5, 1, 4, 4), random_features(1, 5, 1, 2, 3)
    expected = similarity_distance(batch_similarity(shallow.abs()), batch_similarity(deep.abs()))
    torch.testing.assert_close(distance(SCD(attn_norm="none", power=1.0), shallow, deep), expected)


def test_saturated_maps_say_nothing() -> None:
    """scd.md: softmax over sums of many channels is one-hot at every layer, and G the identity."""
    generator = torch.Generator().manual_seed(0)
    features = 3 * torch.randn(16, 256, 16, 16, generator=generator)
    saturated = SCD(attn_norm="softmax").similarity(features)
    torch.testing.assert_close(saturated, torch.eye(16), atol=1e-2, rtol=0)
    assert SCD(attn_norm="softmax", reduce="mean").similarity(features)[0, 1] > 0.05
    assert SCD(attn_norm="softmax", temperature=2000.0).similarity(features)[0, 1] > 0.05


def test_gradients_reach_the_shallow_side_only() -> None:
    distiller = built(SCD())
    similarity_of(distiller).backward()
    assert all(p.grad is None for p in (*distiller.student.high.parameters(), *distiller.student.head.parameters()))
    assert all(p.grad.abs().max() > 0 for p in distiller.student.low.parameters())


def test_pairings_and_layers() -> None:
    names = ("low.0", "low.2", "high.2")
    student = built().student
    first, low = student.low[0](IMAGES), student.low(IMAGES)
    high = student.high(low)
    method = SCD()
    g = [method.similarity(x) for x in (first, low, high, high.mean(dim=(2, 3)))]
    d = {(s, t): similarity_distance(g[s], g[t]) for t in range(4) for s in range(t)}
    for options, pairs in (
        ({"pairing": "adjacent"}, [(0, 1), (1, 2)]),
        ({"pairing": "deepest"}, [(0, 2), (1, 2)]),
        ({"pairing": "all"}, [(0, 1), (0, 2), (1, 2)]),
        ({"include_last": False}, [(0, 1)]),
        ({"penultimate": True}, [(0, 1), (1, 2), (2, 3)]),
        ({"penultimate": True, "pairing": "deepest"}, [(0, 3), (1, 3), (2, 3)]),
        ({"penultimate": True, "include_last": False, "pairing": "deepest"}, [(0, 3), (1, 3)]),
    ):
        found = similarity_of(built(SCD(stages=names, **options)))
        torch.testing.assert_close(found, sum(d[pair] for pair in pairs), msg=str(options))
    torch.testing.assert_close(similarity_of(built(SCD())), d[1, 2])


def test_the_embedding_is_taken_as_it_is_without_l2() -> None:
    h = random_features(0, 4, 7)
    torch.testing.assert_close(SCD(attn_norm="none").similarity(h), batch_similarity(h))
    unit = h / h.norm(dim=1, keepdim=True)
    torch.testing.assert_close(SCD().similarity(h), batch_similarity(unit))


@pytest.mark.parametrize(
    ("options", "progress", "expected"),
    [({}, 0.0, 0.0), ({}, 0.05, 500.0), ({}, 0.1, 1000.0), ({"start": 0.5}, 0.5, 0.0), ({"start": 0.5}, 0.55, 500.0),
     ({"weight": 3000.0, "ramp": 0.0}, 0.0, 3000.0)],
)  # fmt: skip
def test_schedule(options: dict[str, object], progress: float, expected: float) -> None:
    weight = SCD(**options).weights(torch.tensor(progress, dtype=torch.float64))["similarity"]
    assert float(weight) == pytest.approx(expected)


def test_beside_one_on_one_student_pass() -> None:
    passes: list[int] = []
    both, one, scd = built(ONE(gate_norm=False), SCD()), built(ONE(gate_norm=False)), built(SCD())
    both.student.register_forward_hook(lambda *_: passes.append(1))
    terms = both((IMAGES, LABELS), FULL)
    assert len(passes) == 1
    expected = {**one((IMAGES, LABELS), FULL).losses, **scd((IMAGES, LABELS), FULL).losses}
    assert terms.losses.keys() == expected.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(terms.losses[name], loss, msg=name)
    terms.total().backward()
    assert all(p.grad is not None for p in both.parameters())


def test_beside_cskd_it_compares_the_images_not_their_partners() -> None:
    both, alone = built(CSKD(), SCD()), built(SCD())
    batch = attar.Batch(IMAGES, LABELS, labels=LABELS, partners=attar.Batch(PARTNERS, LABELS, labels=LABELS))
    terms = both(batch, FULL)
    torch.testing.assert_close(terms.losses["SCD.similarity"], similarity_of(alone))
    assert terms.losses["CSKD.kl"] > 0
    # A pass of the partners that replaced the recorded features would change this gradient.
    terms.losses["SCD.similarity"].backward()
    similarity_of(alone).backward()
    for name, parameter in alone.named_parameters():
        other = dict(both.named_parameters())[name].grad
        assert (other is None) == (parameter.grad is None)
        if other is not None:
            torch.testing.assert_close(other, parameter.grad)


def test_beside_frskd_on_one_student_pass() -> None:
    passes: list[int] = []
    both, alone = built(FRSKD(), SCD()), built(SCD())
    both.student.register_forward_hook(lambda *_: passes.append(1))
    terms = both((IMAGES, LABELS), FULL)
    assert len(passes) == 1
    torch.testing.assert_close(terms.losses["SCD.similarity"], similarity_of(alone))
    terms.total().backward()
    assert all(p.grad is not None for p in both.parameters())


@pytest.mark.parametrize("options", [{"stages": ("low",)}, {"include_last": False}])
def test_one_layer_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(AttarError, match=r"SCD needs two layers with an attention map, .* but has 1"):
        built(SCD(**options))
    assert similarity_of(built(SCD(penultimate=True, **options))) > 0


def test_a_map_of_equal_energy_is_refused_and_what_stands_before_it_taken() -> None:
    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(6)

        def forward(self, images: Tensor) -> Tensor:
            low = self.norm(self.low(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.head(self.high(low).mean(dim=(2, 3)))

    def build(*stages: str) -> attar.Distiller:
        torch.manual_seed(0)
        methods = [SCD(stages=stages)]
        return attar.Distiller(Normed().double(), methods, attar.Classification(3)).build(IMAGES)

    with pytest.raises(AttarError, match=r"Stage 'norm' has no attention map, since a layer norm over channels"):
        build("norm", "high")
    assert build("low", "high")((IMAGES, LABELS), 1.0).total() > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"attn_norm": "batch"}, "SCD's attn_norm is one of 'l2', 'softmax', 'none', not 'batch'"),
        ({"pairing": "random"}, "SCD's pairing is one of"),
        ({"reduce": "median"}, "SCD's reduce is one of"),
        ({"scope": "planet"}, "SCD's scope is one of"),
        ({"start": -1.0}, "shares of the run"),
        ({"ramp": 1.1}, "shares of the run"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"power": 0.5}, "power at least 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        SCD(**options)


def test_autocast_leaves_it_in_full_precision() -> None:
    features = nn.functional.relu(torch.randn(4, 8, 6, 6)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for norm in ("l2", "softmax", "none"):
            found = SCD(attn_norm=norm).similarity(features)
            torch.testing.assert_close(found, SCD(attn_norm=norm).similarity(features.float()), atol=1e-6, rtol=1e-5)
