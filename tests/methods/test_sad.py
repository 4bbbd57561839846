from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
from attar.errors import AttarError
from attar.methods import ONE, SAD
from networks import IMAGES, LABELS, Net

SHALLOW = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]]], dtype=torch.float64)
DEEP = torch.full((1, 3, 1, 1), 0.7, dtype=torch.float64)


def built(*methods: attar.Method, batch_norm: bool = False) -> attar.Distiller:
    torch.manual_seed(0)
    distiller = attar.Distiller(Net(batch_norm=batch_norm), methods, attar.Classification(3))
    return distiller.double().build(IMAGES)


def features(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_worked_example() -> None:
    method = SAD(variant="lane")
    map_ = method.attention(SHALLOW, (2, 2))[0].tolist()
    assert map_ == pytest.approx([0.196612, 0.196612, 0.072329, 0.534447], abs=1e-6)
    assert method.attention(DEEP, (2, 2)).tolist() == [[0.25] * 4]
    assert method.distance(SHALLOW, DEEP).item() == pytest.approx(0.029544, abs=1e-6)
    assert SAD(variant="lane", reduction="sum_per_sample").distance(SHALLOW, DEEP).item() == pytest.approx(
        0.118177, abs=1e-6
    )


def test_square_then_resize_is_not_resize_then_square() -> None:
    """sad.md: at (1, 1) of [0 1; 2 3] doubled, squaring first gives 1.5 and resizing first 0.5625."""
    deep = torch.tensor([[[[0.0, 1.0], [2.0, 3.0]]]], dtype=torch.float64)
    defined = SAD(variant="lane").attention(deep, (4, 4)).log().view(4, 4)
    library = SAD(variant="lane", upsample="features").attention(deep, (4, 4)).log().view(4, 4)
    # Logarithms of a softmax differ by what went in: the corner holds 0 in both.
    assert (defined[1, 1] - defined[0, 0]).item() == pytest.approx(1.5)
    assert (library[1, 1] - library[0, 0]).item() == pytest.approx(0.5625)


def test_weight_zero_is_plain_training() -> None:
    plain, sad = built(), built(SAD(weight=0.0))
    for distiller in (plain, sad):
        distiller((IMAGES, LABELS), 1.0).total().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, dict(sad.named_parameters())[name].grad), name


shapes = st.tuples(st.integers(0, 9999), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(2, 6))


@settings(deadline=None, max_examples=40)
@given(shapes, st.sampled_from(["sum", "mean", "max"]), st.integers(1, 5), st.integers(1, 5))
def test_properties_of_a_pair(drawn: tuple[int, ...], reduce: str, low: int, wide: int) -> None:
    seed, n, c, h, w = drawn
    method = SAD(reduce=reduce, reduction="sum_per_sample")
    shallow = features(seed, n, c, h, w).requires_grad_()
    deep = features(seed + 1, n, c + 2, low, wide).requires_grad_()
    for maps in (method.attention(shallow, (h, w)), method.attention(deep, (h, w))):
        assert maps.shape == (n, h * w)
        torch.testing.assert_close(maps.sum(1), torch.ones(n, dtype=torch.float64))
    loss = method.distance(shallow, deep)
    assert 0 <= loss <= 2
    torch.testing.assert_close(loss, SAD(reduce=reduce).distance(shallow, deep) * h * w)
    # Channels may be permuted and change their signs; identical maps are at distance zero.
    torch.testing.assert_close(method.distance(-shallow.flip(1), deep.roll(1, 1)), loss)
    assert method.distance(shallow, shallow) == 0
    # One way: shallow imitates deep.
    loss.backward()
    assert deep.grad is None
    assert torch.isfinite(shallow.grad).all()


def test_a_constant_deeper_map_is_a_uniform_target() -> None:
    for size in ((1, 1), (2, 3)):
        target = SAD().attention(torch.full((2, 4, *size), 1.3), (4, 6))
        torch.testing.assert_close(target, torch.full((2, 24), 1 / 24))


def test_gradients_reach_the_shallow_side_only() -> None:
    distiller = built(SAD())
    distiller((IMAGES, LABELS), 1.0).losses["SAD.attention"].backward()
    assert all(p.grad is None for p in distiller.student.high.parameters())
    assert all(p.grad.abs().max() > 0 for p in distiller.student.low.parameters())
    both = built(SAD(stop_gradient=False))
    both((IMAGES, LABELS), 1.0).losses["SAD.attention"].backward()
    assert all(p.grad.abs().max() > 0 for p in both.student.high.parameters())


def test_pairs_of_chosen_stages() -> None:
    def total(**options: object) -> Tensor:
        return built(SAD(**options))((IMAGES, LABELS), 1.0).losses["SAD.attention"]

    method = SAD()
    x, taps = IMAGES, []
    student = built().student
    for layer in (*student.low, *student.high):
        x = layer(x)
        taps.append(x)
    names = ("low.0", "low.2", "high.2")
    maps = [taps[0], taps[2], taps[5]]
    d = {(a, b): method.distance(maps[a], maps[b]) for a in range(3) for b in range(a + 1, 3)}
    torch.testing.assert_close(total(stages=names), d[0, 1] + d[1, 2])
    torch.testing.assert_close(total(stages=names, pairing="deepest"), d[0, 2] + d[1, 2])
    torch.testing.assert_close(total(stages=names, pairing="all"), d[0, 1] + d[0, 2] + d[1, 2])
    torch.testing.assert_close(total(), d[1, 2])


@pytest.mark.parametrize(
    ("options", "progress", "expected"),
    [
        ({}, 0.0, 1000.0),
        ({"variant": "lane"}, 0.66, 0.0),
        ({"variant": "lane"}, 0.67, 0.1),
        ({"variant": "lane", "ramp": 0.2}, 40 / 60 + 0.1, 0.05),
        ({"variant": "lane", "weight": 3.0, "start": 0.5}, 0.5, 3.0),
        ({"ramp": 0.5}, 0.25, 500.0),
    ],
)
def test_schedule(options: dict[str, object], progress: float, expected: float) -> None:
    weight = SAD(**options).weights(torch.tensor(progress, dtype=torch.float64))["attention"]
    assert float(weight) == pytest.approx(expected)


def test_sums_over_many_channels_saturate() -> None:
    wide = features(0, 2, 256, 4, 4)
    by_sum, by_mean = (SAD(reduce=reduce).attention(wide, (4, 4)) for reduce in ("sum", "mean"))
    assert by_sum.amax(1).min() > 0.5
    assert by_mean.amax(1).max() < 0.1
    warm = SAD(reduce="sum", temperature=256.0).attention(wide, (4, 4))
    torch.testing.assert_close(warm, by_mean)


def test_beside_one_on_one_student_pass() -> None:
    """The student runs once; ONE's terms are what they are without SAD."""
    passes = []
    both, alone = built(SAD(), ONE(gate_norm=False)), built(ONE(gate_norm=False))
    both.student.register_forward_hook(lambda *_: passes.append(1))
    terms, expected = both((IMAGES, LABELS), 0.5), alone((IMAGES, LABELS), 0.5)
    assert len(passes) == 1
    for name, loss in expected.losses.items():
        torch.testing.assert_close(terms.losses[name], loss)
    terms.total().backward()
    assert all(p.grad is not None for p in both.parameters())


def test_one_stage_is_refused() -> None:
    with pytest.raises(AttarError, match=r"SAD needs two stages with an attention map.* but finds 1"):
        built(SAD(stages=("low",)))


def test_a_stage_without_extent_cannot_imitate() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 16), nn.Conv2d(4, 4, 1)
            self.head = nn.Linear(4, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.b(self.a(images)).flatten(1))

    distiller = attar.Distiller(Flat().double(), [SAD()], attar.Classification(3), stages=["a", "b"])
    with pytest.raises(AttarError, match=r"stage 'a', which would imitate 'b', has a single position"):
        distiller.build(IMAGES)


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
        methods = [SAD(stages=stages)]
        return attar.Distiller(Normed().double(), methods, attar.Classification(3)).build(IMAGES)

    with pytest.raises(AttarError, match=r"Stage 'norm' has no attention map, since a layer norm over channels"):
        build("norm", "high")
    assert build("low", "high")((IMAGES, LABELS), 1.0).total() > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"variant": "road"}, "SAD's variant is one of 'classification', 'lane', not 'road'"),
        ({"reduce": "median"}, "SAD's reduce is one of 'sum', 'mean', 'max', not 'median'"),
        ({"pairing": "none"}, "SAD's pairing is one of"),
        ({"reduction": "sum"}, "SAD's reduction is one of"),
        ({"upsample": "logits"}, "SAD's upsample is one of"),
        ({"softmax_over": "channels"}, "SAD's softmax_over is one of"),
        ({"start": 1.5}, "shares of the run"),
        ({"ramp": -0.1}, "shares of the run"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"power": 0.5}, "power at least 1"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        SAD(**options)


def test_autocast_and_unequal_sizes() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for upsample in ("map", "features"):
            loss = SAD(upsample=upsample).distance(
                torch.randn(2, 3, 7, 5).bfloat16(), torch.randn(2, 8, 3, 2).bfloat16()
            )
            assert loss.dtype == torch.float32
