from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
from attar.errors import AttarError
from attar.method import Batch
from attar.methods import KD, Supervised, TfKD
from networks import IMAGES, LABELS, Net


class Logits(nn.Module):
    """A student whose logits are given."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.stage = nn.Conv2d(1, 1, 1, dtype=torch.float64)
        self.logits = nn.Parameter(logits.double())

    def forward(self, images: Tensor) -> Tensor:
        self.stage(images)
        return self.logits[: len(images)]


def on_logits(method: TfKD, logits: Tensor, labels: Tensor) -> tuple[attar.Terms, Tensor]:
    student = Logits(logits)
    images = torch.zeros(len(logits), 1, 4, 4, dtype=torch.float64)
    task = attar.Classification(logits.shape[1])
    terms = attar.Distiller(student, [method], task, stages=["stage"]).build(images)((images, labels), 0.5)
    (gradient,) = torch.autograd.grad(terms.total(), [student.logits])
    return terms, gradient


def built(*methods: attar.Method, seed: int = 0) -> attar.Distiller:
    torch.manual_seed(seed)
    return attar.Distiller(Net().double(), methods, attar.Classification(3)).build(IMAGES).train()


def test_worked_example() -> None:
    z, y = torch.tensor([[2.0, 0, 0, 0]], dtype=torch.float64), torch.tensor([0])
    p = TfKD().virtual_teacher(Batch(torch.zeros(1), y, labels=y), z)
    target = torch.softmax(p / 20, 1)
    torch.testing.assert_close(target[0], torch.tensor([0.259364, *[0.246879] * 3]).double(), atol=1e-6, rtol=0)
    for temperature, expected in ((20.0, 0.435963), (1.0, 0.125064)):
        terms, _ = on_logits(TfKD(temperature=temperature), z, y)
        assert terms.losses["TfKD.kl"].item() == pytest.approx(expected, abs=1e-6)


def test_published_targets_of_a_hundred_classes() -> None:
    y = torch.tensor([7])
    p = TfKD().virtual_teacher(Batch(torch.zeros(1), y, labels=y), torch.zeros(1, 100).double())
    target = torch.softmax(p / 20, 1)[0]
    assert target[7].item() == pytest.approx(0.010502, abs=1e-6)
    assert target[8].item() == pytest.approx(0.009995, abs=1e-6)


def test_published_weights() -> None:
    """(1 - alpha, alpha m / K) of ResNet-18 on CIFAR-100: reg (0.1, m 100) and self (0.95, m 50, T 6)."""
    reg = built(TfKD())((IMAGES, LABELS), 0.5)
    assert reg.weights == {"task": 0.9, "TfKD.kl": pytest.approx(0.1 * 100 / 100)}
    taught = TfKD(Net().double())
    found = built(taught)((IMAGES, LABELS), 0.5)
    assert found.weights == {"task": pytest.approx(1 - 0.95), "TfKD.kl": pytest.approx(0.95 * 50 / 100)}
    assert taught.weight * taught.temperature**2 == pytest.approx(17.1)


def test_without_weight_it_is_cross_entropy() -> None:
    terms = built(TfKD(weight=0.0, task_weight=1.0))((IMAGES, LABELS), 0.5)
    torch.testing.assert_close(terms.total(), F.cross_entropy(terms.logits, LABELS))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 12), st.integers(1, 5), st.floats(0.5, 40.0), st.sampled_from(["code", "paper"]), st.integers(0, 9)
)
def test_targets_are_distributions_with_the_true_class_on_top(
    classes: int, rows: int, temperature: float, variant: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (rows,), generator=generator)
    p = TfKD().virtual_teacher(Batch(torch.zeros(1), y, labels=y), torch.zeros(rows, classes).double())
    torch.testing.assert_close(p.sum(1), torch.ones(rows).double())
    assert torch.equal(p.argmax(1), y)
    # Seen from outside: the total is least where the student answers with the target, and there KL is zero.
    target = torch.softmax((p if variant == "code" else p.log()) / temperature, 1)
    torch.testing.assert_close(target.sum(1), torch.ones(rows).double())
    assert torch.equal(target.argmax(1), y)
    scale = 1.0 if variant == "code" else temperature
    method = TfKD(variant=variant, temperature=temperature, weight=1.0, task_weight=0.0)  # type: ignore[arg-type]
    terms, gradient = on_logits(method, target.log() * scale, y)
    assert terms.losses["TfKD.kl"].item() == pytest.approx(0.0, abs=1e-12)
    assert gradient.abs().max() < 1e-12
    other, gradient = on_logits(method, torch.randn(rows, classes, generator=generator), y)
    assert other.losses["TfKD.kl"] > 0
    torch.testing.assert_close(gradient.sum(1), torch.zeros(rows).double())


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.floats(0.0, 1.0), st.floats(0.6, 0.999), st.integers(0, 9))
def test_the_papers_form_at_one_is_label_smoothing_plus_a_constant(
    classes: int, alpha: float, a: float, seed: int
) -> None:
    """Epsilon = alpha (1 - a), spread over the other K - 1 classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (4,), generator=generator)
    method = TfKD(variant="paper", temperature=1.0, weight=alpha, task_weight=1 - alpha, true_class=a)
    smoothed = torch.full((4, classes), alpha * (1 - a) / (classes - 1), dtype=torch.float64)
    smoothed[range(4), y] = 1 - alpha * (1 - a)
    gaps = []
    for _ in range(2):
        z = torch.randn(4, classes, generator=generator).double().requires_grad_()
        terms, gradient = on_logits(method, z.detach(), y)
        smooth = F.cross_entropy(z, smoothed)
        torch.testing.assert_close(gradient, *torch.autograd.grad(smooth, [z]))
        gaps.append((terms.total() - smooth).item())
    assert gaps[0] == pytest.approx(gaps[1], abs=1e-9)
    entropy = -(a * torch.log(torch.tensor(a)) + (1 - a) * torch.log(torch.tensor((1 - a) / (classes - 1))))
    assert gaps[0] == pytest.approx(-alpha * float(entropy), abs=1e-5)


def test_the_codes_form_softens_probabilities_not_logits() -> None:
    z, y = torch.randn(3, 6, generator=torch.Generator().manual_seed(1)).double(), torch.tensor([0, 3, 5])
    found = {v: on_logits(TfKD(variant=v), z, y)[0].losses["TfKD.kl"].item() for v in ("code", "paper")}  # type: ignore[arg-type]
    p = torch.full((3, 6), 0.01 / 5, dtype=torch.float64)
    p[range(3), y] = 0.99
    code = F.kl_div(z.log_softmax(1), (p / 20).softmax(1), reduction="batchmean").item()
    powered = p ** (1 / 20)
    paper = F.kl_div((z / 20).log_softmax(1), powered / powered.sum(1, keepdim=True), reduction="batchmean").item()
    assert found["code"] == pytest.approx(code, rel=1e-9)
    assert found["paper"] == pytest.approx(paper, rel=1e-9)
    assert abs(code - paper) > 0.01


def test_self_is_kd_from_an_earlier_training() -> None:
    earlier = Net().double()
    own = built(TfKD(earlier))((IMAGES, LABELS), 0.5)
    kd = built(KD(earlier, temperature=6.0, weight=0.475, task_weight=0.05))((IMAGES, LABELS), 0.5)
    torch.testing.assert_close(own.losses["TfKD.kl"], kd.losses["KD.kl"])
    torch.testing.assert_close(own.total(), kd.total())


def test_a_teacher_equal_to_the_student_teaches_nothing() -> None:
    earlier = Net().double()
    distiller = built(TfKD(earlier))
    distiller.student.load_state_dict(earlier.state_dict())
    terms = distiller((IMAGES, LABELS), 0.5)
    assert terms.losses["TfKD.kl"].item() == pytest.approx(0.0, abs=1e-12)
    gradients = torch.autograd.grad(terms.losses["TfKD.kl"], list(distiller.student.parameters()))
    assert max(g.abs().max().item() for g in gradients) < 1e-9


def test_the_teacher_is_frozen_and_no_part_of_the_distiller() -> None:
    earlier = Net(batch_norm=True).double()
    torch.manual_seed(0)
    method = TfKD([earlier])
    distiller = attar.Distiller(Net(batch_norm=True).double(), [method], attar.Classification(3)).build(IMAGES).train()
    before = {name: value.clone() for name, value in earlier.state_dict().items()}
    distiller((IMAGES, LABELS), 0.5).total().backward()
    assert not earlier.training
    assert all(p.grad is None for p in earlier.parameters())
    assert all(torch.equal(value, before[name]) for name, value in earlier.state_dict().items())
    assert not {id(p) for p in earlier.parameters()} & {id(p) for p in distiller.parameters()}


def test_mixed_targets_mix_the_virtual_teacher() -> None:
    mixed = torch.tensor([[0.7, 0.3, 0.0]]).double()
    first, second = (torch.tensor([k]) for k in (0, 1))
    z = torch.zeros(1, 3).double()
    p = [TfKD().virtual_teacher(Batch(torch.zeros(1), y, labels=y), z) for y in (first, second)]
    found = TfKD().virtual_teacher(Batch(torch.zeros(1), mixed), z)
    torch.testing.assert_close(found, 0.7 * p[0] + 0.3 * p[1])
    terms = built(TfKD(), Supervised(mixup=0.4))((IMAGES, LABELS), 0.5)
    assert torch.isfinite(terms.total())


def test_refusals() -> None:
    with pytest.raises(AttarError, match="'code', 'paper' or 'self-kd-lib', not 'thesis'"):
        TfKD(variant="thesis")  # type: ignore[arg-type]
    with pytest.raises(AttarError, match="temperature must be positive"):
        TfKD(temperature=0.0)
    with pytest.raises(AttarError, match="probability between 0 and 1"):
        TfKD(true_class=1.0)
    with pytest.raises(AttarError, match="one earlier training as its teacher, not 2"):
        TfKD([Net(), Net()])
    with pytest.raises(AttarError, match="neither variant nor true_class"):
        TfKD(Net(), variant="paper")
    with pytest.raises(AttarError, match="no more than an even share of 3 classes"):
        built(TfKD(true_class=0.3))
    with pytest.raises(AttarError, match="another network than the student"):
        built(TfKD(Net(batch_norm=True)))
    student = Net().double()
    with pytest.raises(AttarError, match="the student itself"):
        attar.Distiller(student, [TfKD(student)], attar.Classification(3)).build(IMAGES)
    with pytest.raises(AttarError, match="both set the task weight"):
        built(TfKD(), KD(Net()))
