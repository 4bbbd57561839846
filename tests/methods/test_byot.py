from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
import attar.zoo
from architectures import ARCHITECTURES, Architecture
from attar.anatomy.heads import ExitOutput
from attar.errors import AttarError
from attar.methods import BYOT, ONE, Supervised
from networks import IMAGES, LABELS, Net


class Deep(nn.Module):
    """Three stages and a head, without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Tanh())
        self.two = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.Tanh())
        self.three = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.three(self.two(self.one(images))).mean(dim=(2, 3)))


def built(method: BYOT, *others: attar.Method, seed: int = 0) -> attar.Distiller:
    torch.manual_seed(seed)
    distiller = attar.Distiller(Deep().double(), [method, *others], attar.Classification(3))
    return distiller.build(IMAGES).train()


class Given(nn.Module):
    """A layer that returns what it was given."""

    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> object:
        return self.value[: len(x)] if isinstance(self.value, Tensor) else self.value


class Stored(nn.Module):
    """A network with a shallow stage, stored deep features and stored logits."""

    def __init__(self, features: Tensor, logits: Tensor) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 4, 3, 2, 1).double(), Given(features[:, :, None, None])
        self.head = Given(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.high(self.low(images)).mean(dim=(2, 3)))


def on_values(
    method: BYOT, exit_logits: Tensor, exit_features: Tensor, logits: Tensor, features: Tensor, labels: Tensor
) -> attar.Terms:
    """The method's terms for one exit whose answer is stored."""
    student = Stored(features, logits)
    images = IMAGES[: len(logits)]
    distiller = attar.Distiller(student, [method], attar.Classification(logits.shape[1]), stages=["low", "high"]).build(
        images
    )
    method.exits[0] = Given(ExitOutput(exit_features[:, :, None, None], exit_features, exit_logits))
    return distiller((images, labels), 0.5)


LOW_LOGITS = torch.tensor([[1.0, 0, 0]] * 2, dtype=torch.float64)
DEEP_LOGITS = torch.tensor([[3.0, 0, 0]] * 2, dtype=torch.float64)
LOW_FEATURES = torch.tensor([[1.0, 2], [0, 0]], dtype=torch.float64)
DEEP_FEATURES = torch.tensor([[1.0, 0], [0, 1]], dtype=torch.float64)


def worked(**options: object) -> attar.Terms:
    method = BYOT(**options)  # type: ignore[arg-type]
    return on_values(method, LOW_LOGITS, LOW_FEATURES, DEEP_LOGITS, DEEP_FEATURES, torch.tensor([0, 0]))


@pytest.mark.parametrize(
    ("options", "kd", "shallow"),
    [
        ({"alpha": 0.1}, 0.496056, 0.545906),
        ({"alpha": 0.3}, 0.496056, 0.534828),
        ({"alpha": 0.1, "squared_temperature": False}, 0.055117, None),
        ({"form": "journal", "adapt": False}, 1.030445, 0.695145),
    ],
)
def test_worked_predictions(options: dict[str, object], kd: float, shallow: float | None) -> None:
    terms = worked(**options)
    assert terms.losses["task"].item() == pytest.approx(0.094923, abs=1e-6)
    assert terms.losses["BYOT.ce_exits"].item() == pytest.approx(0.551445, abs=1e-6)
    assert terms.losses["BYOT.kd"].item() == pytest.approx(kd, abs=1e-6)
    if shallow is not None:
        found = sum(terms.weights[f"BYOT.{name}"] * terms.losses[f"BYOT.{name}"] for name in ("ce_exits", "kd"))
        assert float(found) == pytest.approx(shallow, abs=1e-6)


@pytest.mark.parametrize(
    ("hint", "expected"), [("squared", 2.5), ("masked-sum", 5.0), ("norm", 2.236068), ("map", 1.25)]
)
def test_worked_hints(hint: str, expected: float) -> None:
    assert worked(hint=hint).losses["BYOT.hint"].item() == pytest.approx(expected, abs=1e-6)


def test_the_released_code_leaves_out_the_exit_next_to_the_deepest() -> None:
    assert worked(form="journal").losses["BYOT.hint"] == 0.0
    journal = built(BYOT(form="journal"))
    assert len(journal.methods["BYOT"].adapters) == 1
    (hint,) = [journal((IMAGES, LABELS), 0.5).losses["BYOT.hint"]]
    parameters = list(journal.methods["BYOT"].exits[1].parameters())
    assert all(g is None for g in torch.autograd.grad(hint, parameters, allow_unused=True, retain_graph=True))
    shallow = list(journal.methods["BYOT"].exits[0].neck.parameters())
    assert all(g is not None for g in torch.autograd.grad(hint, shallow, allow_unused=True))


def test_equal_predictions_leave_nothing_but_the_entropy() -> None:
    common = (LOW_LOGITS, LOW_FEATURES, LOW_LOGITS, DEEP_FEATURES, torch.tensor([0, 1]))
    assert on_values(BYOT(), *common).losses["BYOT.kd"].item() == pytest.approx(0.0, abs=1e-15)
    p = (LOW_LOGITS[0] / 3).softmax(0)
    journal = on_values(BYOT(form="journal"), *common)
    assert journal.losses["BYOT.kd"].item() == pytest.approx(-(p * p.log()).sum().item())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.sampled_from([1, 2, 3, 5, 6]), st.floats(0.5, 6.0), st.integers(0, 99))
def test_forms_are_related(rows: int, width: int, temperature: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, deep = torch.randn(2, rows, 4, generator=generator, dtype=torch.float64)
    f, deepest = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    z.requires_grad_(), deep.requires_grad_(), f.requires_grad_(), deepest.requires_grad_()
    found: dict[str, Tensor] = {}
    gradients = []
    for options in (
        {"soft": "kl"},
        {"soft": "cross-entropy", "hint": "masked-sum"},
        {"hint": "norm"},
        {"hint": "map"},
    ):
        method = BYOT(temperature=temperature, **options)  # type: ignore[arg-type]
        terms = on_values(method, z, f, deep, deepest, torch.zeros(rows, dtype=torch.long))
        found[method.hint] = terms.losses["BYOT.hint"]
        imitation = terms.losses["BYOT.kd"] + terms.losses["BYOT.hint"]
        assert torch.autograd.grad(imitation, [deep, deepest], allow_unused=True, retain_graph=True) == (None, None)
        gradients += torch.autograd.grad(terms.losses["BYOT.kd"], [z], retain_graph=True)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])
    squared = (f - deepest).square()
    torch.testing.assert_close(found["squared"] * rows, squared.sum())
    torch.testing.assert_close(found["norm"] ** 2, squared.sum())
    torch.testing.assert_close(found["map"] * rows * width, squared.sum())
    torch.testing.assert_close(found["masked-sum"], squared[(f > 0) | (deepest > 0)].sum())


def test_without_imitation_it_is_deep_supervision() -> None:
    distiller = built(BYOT(alpha=0.0, hint_weight=0.0))
    terms = distiller((IMAGES, LABELS), 0.5)
    student, (first, second) = distiller.student, distiller.methods["BYOT"].exits
    one = student.one(IMAGES)
    expected = F.cross_entropy(student(IMAGES), LABELS) + F.cross_entropy(first(one).logits, LABELS)
    expected = expected + F.cross_entropy(second(student.two(one)).logits, LABELS)
    torch.testing.assert_close(terms.total(), expected)


@pytest.mark.parametrize("form", ["conference", "journal"])
def test_imitation_stops_at_the_deepest_exit(form: str) -> None:
    """KD_i and HINT_i reach stages up to i and head i, never the stages behind nor the network's own classifier."""
    distiller = built(BYOT(form=form, hint_last=True))  # type: ignore[arg-type]
    terms, student = distiller((IMAGES, LABELS), 0.5), distiller.student
    for name in ("BYOT.kd", "BYOT.hint"):
        for part in (student.three, student.head):
            found = torch.autograd.grad(
                terms.losses[name], list(part.parameters()), allow_unused=True, retain_graph=True
            )
            assert all(g is None for g in found)
        for part in (student.one, student.two, *(e.neck for e in distiller.methods["BYOT"].exits)):
            weights = [p for p in part.parameters() if p.ndim > 1]
            for g in torch.autograd.grad(terms.losses[name], weights, retain_graph=True):
                assert g.abs().max() > 0
    ce = torch.autograd.grad(terms.losses["BYOT.ce_exits"], list(student.three.parameters()), allow_unused=True)
    assert all(g is None for g in ce)


def test_all_exits_may_imitate_one_another() -> None:
    """The deepest exit learns from the shallow ones too, and no exit is trained as a teacher."""
    synergy, ordinary = built(BYOT(imitate="all")), built(BYOT())
    ordinary.load_state_dict(synergy.state_dict())
    deep = {}
    for name, distiller in (("all", synergy), ("deepest", ordinary)):
        terms = distiller((IMAGES, LABELS), 0.5)
        terms.losses["BYOT.kd"].backward()
        deep[name] = distiller.student.head.weight.grad
    assert deep["deepest"] is None
    assert deep["all"].abs().max() > 0
    logits = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    method = synergy.methods["BYOT"]
    both = method._imitation(logits[0], logits[1]) + method._imitation(logits[2], logits[1])
    both.backward()
    assert logits[1].grad is None
    assert logits[0].grad is not None


def test_weights_of_the_forms() -> None:
    conference, journal = (built(BYOT(form=f))((IMAGES, LABELS), 0.5).weights for f in ("conference", "journal"))  # type: ignore[arg-type]
    assert conference == {"task": 1.0, "BYOT.ce_exits": 0.9, "BYOT.kd": 0.1, "BYOT.hint": 1.28e-4}
    assert journal == {"task": 1.0, "BYOT.ce_exits": 0.7, "BYOT.kd": 0.3, "BYOT.hint": 0.03}
    luan = BYOT(soft="cross-entropy", hint="masked-sum", hint_weight=1e-6, task_weight=0.9)
    terms = built(luan)((IMAGES, LABELS), 0.5)
    assert (terms.weights["task"], terms.weights["BYOT.hint"]) == (0.9, 1e-6)


COMMON = [a for a in ARCHITECTURES if a.common and a.name != "convnext_atto"]


@pytest.mark.parametrize("architecture", COMMON, ids=lambda a: a.name)
def test_features_of_every_backbone_have_the_embeddings_shape(architecture: Architecture) -> None:
    images = torch.randn(2, 3, architecture.size, architecture.size)
    method = BYOT()
    distiller = attar.Distiller(architecture.make(5), [method], attar.Classification(5)).build(images).eval()
    with torch.no_grad():
        outputs = distiller._pass(images)
        assert len(method.exits) == len(distiller.anatomy.stages) - 1
        for head, stage in zip(method.exits, distiller.anatomy.stages, strict=False):
            assert head(outputs[stage.tap]).features.shape == outputs.embedding.shape


def test_dropping_the_heads_leaves_the_network() -> None:
    distiller = built(BYOT())
    distiller((IMAGES, LABELS), 0.5).total().backward()
    stripped = distiller.strip()
    assert type(stripped) is Deep
    torch.testing.assert_close(stripped(IMAGES), distiller.eval().student(IMAGES), rtol=0, atol=0)


def test_exits_to_keep() -> None:
    torch.manual_seed(0)
    distiller = attar.Distiller(Net(batch_norm=True).double(), [BYOT()], attar.Classification(3)).build(IMAGES).train()
    distiller((IMAGES, LABELS), 0.5).total().backward()
    assert list(distiller.deployables()) == ["BYOT.exit1", "BYOT.ensemble"]
    early, ensemble = (distiller.strip(f"BYOT.{name}") for name in ("exit1", "ensemble"))
    distiller.eval()
    own = distiller.methods["BYOT"].exits[0](distiller.student.low(IMAGES)).logits
    torch.testing.assert_close(early(IMAGES), own)
    torch.testing.assert_close(ensemble(IMAGES), (own + distiller.student(IMAGES)) / 2)
    assert not any("high" in name for name, _ in early.named_parameters())


def test_published_sizes_of_the_exits() -> None:
    """Deep Feature Surgery's README: 0.43, 0.96, 3.11 and 11.17 M parameters for ResNet-18 on 10 classes."""
    student = timm.create_model("cifar_resnet18", num_classes=10)
    distiller = attar.Distiller(student, [BYOT(form="journal")], attar.Classification(10))
    networks = distiller.build(torch.zeros(2, 3, 32, 32)).deployables()
    sizes = [sum(p.numel() for p in networks[f"BYOT.exit{i}"].parameters()) / 1e6 for i in (1, 2, 3)]
    assert sizes == pytest.approx([0.43, 0.96, 3.11], abs=0.015)
    assert sum(p.numel() for p in student.parameters()) / 1e6 == pytest.approx(11.17, abs=0.005)


def test_named_exits_and_composition() -> None:
    distiller = built(BYOT(exits=("two",)), ONE(branches=2), Supervised(label_smoothing=0.1))
    assert len(distiller.methods["BYOT"].exits) == 1
    terms = distiller((IMAGES, LABELS), 1.0)
    terms.total().backward()
    assert all(p.grad is not None for p in distiller.parameters())
    assert {"BYOT.kd", "ONE.kl"} <= terms.losses.keys()


def test_equal_features_give_a_finite_gradient() -> None:
    features = DEEP_FEATURES.clone().requires_grad_()
    labels = torch.tensor([0, 0])
    terms = on_values(BYOT(hint="norm"), LOW_LOGITS, features, DEEP_LOGITS, features, labels)
    (gradient,) = torch.autograd.grad(terms.losses["BYOT.hint"], [features])
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"form": "thesis"}, "form is one of conference, journal"),
        ({"soft": "hard"}, "soft is one of kl, cross-entropy"),
        ({"hint": "cosine"}, "hint is one of squared"),
        ({"heads": "linear"}, "heads is one of bottleneck, attention"),
        ({"scope": "galaxy"}, "scope is one of rank, world"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"alpha": 1.5}, "between 0 and 1"),
        ({"form": "journal", "hint": "map"}, "adapts pooled features, not maps"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        BYOT(**options)  # type: ignore[arg-type]


def test_networks_without_a_place_for_exits_are_refused() -> None:
    with pytest.raises(AttarError, match="leave 'three' out of exits"):
        built(BYOT(exits=("one", "three")))
    with pytest.raises(AttarError, match="did you mean 'two'"):
        built(BYOT(exits=("twoo",)))
    single = attar.Distiller(Deep().double(), [BYOT()], attar.Classification(3), stages=["three"])
    with pytest.raises(AttarError, match="only one stage"):
        single.build(IMAGES)
