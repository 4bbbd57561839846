from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
from architectures import HandWritten
from attar.errors import AttarError
from attar.functional import attention_transfer
from attar.methods import AT, KD
from attar.testing import MethodContract
from networks import IMAGES, LABELS, Net

FULL = torch.tensor(1.0, dtype=torch.float64)


def built(*methods: attar.Method, student: nn.Module | None = None) -> attar.Distiller:
    torch.manual_seed(0)
    return attar.Distiller(student or Net().double(), methods, attar.Classification(3)).build(IMAGES)


def other(seed: int = 5) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def features(net: nn.Module) -> tuple[Tensor, Tensor]:
    low = net.low(IMAGES)
    return low, net.high(low)


def attention(distiller: attar.Distiller) -> Tensor:
    return distiller((IMAGES, LABELS), FULL).losses["AT.attention"]


def test_worked_example() -> None:
    """frskd.md: maps (.894427, 0, 0, .447214) and (.707107, 0, 0, .707107) are at distance .0256584."""

    class Fixed(nn.Module):
        def __init__(self, *channels: list[list[float]]) -> None:
            super().__init__()
            self.stage, self.head = nn.Conv2d(1, len(channels), 1), nn.Linear(len(channels), 3)
            self.value = torch.tensor(channels, dtype=torch.float64)
            self.stage.register_forward_hook(lambda module, args, output: 0 * output + self.value)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.stage(images).mean(dim=(2, 3)))

    student = Fixed([[1, 0], [0, 1]], [[1, 0], [0, 0]]).double()
    teacher = Fixed([[2, 0], [0, 0]], [[0, 0], [0, 2]]).double()
    images = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    for form, weight, expected in (("code", None, 0.0256584), ("paper", 1.0, (4 * 0.0256584) ** 0.5)):
        method = AT(teacher, form=form, weight=weight, stages=("stage",), teacher_stages=("stage",))
        distiller = attar.Distiller(student, [method], attar.Classification(3), stages=["stage"]).build(images)
        terms = distiller((images, LABELS[:1]), FULL)
        assert terms.losses["AT.attention"].item() == pytest.approx(expected, abs=1e-6)
        assert terms.weights["AT.attention"] == (weight or 1000)


@settings(deadline=None, max_examples=30)
@given(st.tuples(st.integers(0, 9999), *[st.integers(1, 5)] * 4), st.floats(0.01, 100))
def test_properties(drawn: tuple[int, ...], scale: float) -> None:
    seed, n, c, h, w = drawn
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(n, c, h, w, dtype=torch.float64, generator=generator).requires_grad_()
    teacher = torch.randn(n, c + 1, h, w, dtype=torch.float64, generator=generator)
    method = AT(other())
    loss = method.distance(student, teacher)
    assert 0 <= loss <= 2 / (h * w) + 1e-12
    torch.testing.assert_close(method.distance(scale * student, teacher.flip(1)), loss)
    torch.testing.assert_close(method.distance(student.flip(1), scale * teacher), loss)
    assert method.distance(student, scale * student) < 1e-20


def test_an_empty_map_is_a_constant_without_gradient() -> None:
    empty = torch.zeros(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    loss = AT(other()).distance(empty, torch.ones(2, 5, 4, 4, dtype=torch.float64))
    loss.backward()
    assert loss.item() == pytest.approx(1 / 16)
    assert not empty.grad.any()


def test_the_larger_map_is_pooled() -> None:
    large, small = torch.rand(2, 3, 8, 8), torch.rand(2, 5, 4, 4)
    pooled = nn.functional.avg_pool2d(large, 2)
    for found in (AT(other()).distance(large, small), AT(other()).distance(small, large)):
        torch.testing.assert_close(found, attention_transfer(pooled, small))


def test_stages_are_summed_and_teachers_averaged() -> None:
    first, second = other(5), other(6)
    distiller = built(AT([first, second]))
    own = features(distiller.student)
    sums = [sum(attention_transfer(*pair) for pair in zip(own, features(net), strict=True)) for net in (first, second)]
    torch.testing.assert_close(attention(distiller), (sums[0] + sums[1]) / 2)
    last = built(AT(first, layers="last", power=3.0, reduce="max"))
    expected = attention_transfer(features(last.student)[1], features(first)[1], power=3, reduce="max")
    torch.testing.assert_close(attention(last), expected)


def test_the_teacher_gets_no_gradient_and_the_student_does() -> None:
    teacher = other()
    distiller = built(AT(teacher))
    attention(distiller).backward()
    assert all(p.grad is None for p in teacher.parameters())
    student = distiller.student
    assert all(p.grad.abs().max() > 0 for p in (*student.low.parameters(), *student.high.parameters()))
    assert all(p.grad is None for p in student.head.parameters())


def test_an_equal_teacher_has_nothing_to_teach() -> None:
    assert attention(built(AT(other(0)))) < 1e-25


def test_weight_zero_is_plain_training() -> None:
    plain, with_at = built(), built(AT(other(), weight=0.0))
    for distiller in (plain, with_at):
        distiller((IMAGES, LABELS), FULL).total().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, dict(with_at.named_parameters())[name].grad), name


def test_with_kd_the_weights_are_the_papers() -> None:
    """(1 - alpha) CE + alpha T^2 KL + beta AT with alpha .9, T 4 and beta 1000."""
    teacher = other()
    terms = built(AT(teacher), KD(teacher))((IMAGES, LABELS), FULL)
    assert terms.weights == {"task": pytest.approx(0.1), "AT.attention": 1000.0, "KD.kl": 0.9}


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Deeper(Net):
    """A third stage behind a layer norm, and a fourth of one position."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Sequential(nn.Conv2d(8, 9, 3, 2, 1), LayerNorm2d(9))
        self.fourth = nn.Conv2d(9, 9, 2)
        self.head = nn.Linear(9, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.fourth(self.third(self.high(self.low(images)))).mean(dim=(2, 3)))


def test_stages_without_a_map_are_left_out() -> None:
    torch.manual_seed(5)
    teacher = Deeper().double()
    distiller = built(AT(teacher), student=Deeper().double())
    assert [stage.name for stage in distiller.anatomy.stages] == ["low", "high", "third"]
    expected = sum(map(attention_transfer, features(distiller.student), features(teacher)))
    torch.testing.assert_close(attention(distiller), expected)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layers": "last"}, r"no attention map in the student's 'third' \(2 x 2\) and the teacher's 'third'"),
        ({"stages": ("low", "third"), "teacher_stages": ("low", "high")}, r"in the student's 'third' \(2 x 2\)"),
        ({"stages": ("low", "fourth"), "teacher_stages": ("low", "high")}, r"in the student's 'fourth' \(1 x 1\)"),
    ],
)
def test_named_stages_without_a_map_are_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        built(AT(Deeper().double(), **options), student=Deeper().double())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: AT([]), "AT needs at least one trained teacher"),
        (lambda: AT(other(), form="thesis"), "form is 'code' or 'paper', not 'thesis'"),
        (lambda: AT(other(), reduce="median"), "reduce is 'mean' or 'max', not 'median'"),
        (lambda: AT(other(), layers="first"), "layers is 'last' or 'all', not 'first'"),
        (lambda: AT(other(), power=0.5), "power is at least 1, not 0.5"),
        (lambda: AT(other(), form="paper"), "'paper' has no known weight: give one"),
        (lambda: AT(other(), stages=("low",)), r"layers \(low\) with the teacher's \(low, high\)"),
        (lambda: AT(other(), teacher_stages=("hihg",)), "did you mean 'high'"),
    ],
)
def test_what_cannot_work_is_refused(make: object, sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        built(make())


def test_the_student_is_not_its_own_teacher() -> None:
    net = other()
    with pytest.raises(AttarError, match="the student itself"):
        built(AT(net), student=net)


class TestFromAVisionTransformer(MethodContract):
    """CNN from ViT; AT on all networks with a small CNN as teacher is in test_contract.py."""

    def method(self) -> attar.Method:
        torch.manual_seed(9)
        return AT(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=4, num_classes=5))

    def student(self) -> nn.Module:
        return HandWritten(self.num_classes)
