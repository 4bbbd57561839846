from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

import attar
from architectures import HandWritten
from attar.errors import AttarError
from attar.functional.pkt import probabilistic_transfer
from attar.methods import PKT
from attar.testing import MethodContract
from networks import IMAGES, LABELS, Net

FULL = torch.tensor(1.0, dtype=torch.float64)


def built(*methods: attar.Method, student: nn.Module | None = None) -> attar.Distiller:
    torch.manual_seed(0)
    return attar.Distiller(student or Net().double(), methods, attar.Classification(3)).build(IMAGES)


def other(seed: int = 5) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def embedding(net: nn.Module) -> Tensor:
    return net.high(net.low(IMAGES)).mean(dim=(2, 3))


class Fixed(nn.Module):
    """Has the same embedding for whatever it sees."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.stage, self.head = nn.Conv2d(1, 1, 1), nn.Linear(len(rows[0]), 3)
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, images: Tensor) -> Tensor:
        self.stage(images)
        return self.head(self.rows[: len(images)])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.0276264),
        ({"reduction": "batchmean"}, 3 * 0.0276264),
        ({"form": "combined"}, 0.0993785),
        ({"form": "combined", "kernels": ("cosine",)}, 0.0559821),
        ({"form": "combined", "kernels": ("student-t",)}, 0.0433964),
    ],
)
def test_worked_example_through_the_method(options: dict[str, object], expected: float) -> None:
    student, teacher = Fixed([[1.0, 0], [1, 0], [0, 1]]).double(), Fixed([[1.0, 0], [0, 1], [1, 1]]).double()
    images = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    distiller = attar.Distiller(student, [PKT(teacher, **options)], attar.Classification(3)).build(images)
    terms = distiller((images, LABELS[:3]), FULL)
    assert terms.losses["PKT.divergence"].item() == pytest.approx(expected, abs=1e-6)
    assert terms.weights == {"task": 1.0, "PKT.divergence": 30000.0}


def test_embeddings_are_compared_and_teachers_averaged() -> None:
    first, second = other(5), other(6)
    distiller = built(PKT([first, second]))
    loss = distiller((IMAGES, LABELS), FULL).losses["PKT.divergence"]
    own = embedding(distiller.student)
    each = [probabilistic_transfer(own, embedding(net)) for net in (first, second)]
    torch.testing.assert_close(loss, (each[0] + each[1]) / 2)


def test_only_what_makes_the_embedding_learns() -> None:
    teacher = other()
    distiller = built(PKT(teacher))
    distiller((IMAGES, LABELS), FULL).losses["PKT.divergence"].backward()
    student = distiller.student
    assert all(p.grad is None for p in (*teacher.parameters(), *student.head.parameters()))
    assert all(p.grad.abs().max() > 0 for p in (*student.low.parameters(), *student.high.parameters()))


def test_an_equal_teacher_has_nothing_to_teach() -> None:
    for form in ("base", "combined"):
        assert built(PKT(other(0), form=form))((IMAGES, LABELS), FULL).losses["PKT.divergence"].abs() < 1e-12


def test_a_batch_of_one_has_no_neighbours() -> None:
    assert built(PKT(other()))((IMAGES[:1], LABELS[:1]), FULL).losses["PKT.divergence"].abs() < 1e-12


def test_weight_zero_is_plain_training() -> None:
    plain, with_pkt = built(), built(PKT(other(), weight=0.0))
    for distiller in (plain, with_pkt):
        distiller((IMAGES, LABELS), FULL).total().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, dict(with_pkt.named_parameters())[name].grad), name


def test_alone_as_the_authors_train() -> None:
    terms = built(PKT(other(), weight=1.0, task_weight=0.0))((IMAGES, LABELS), FULL)
    assert terms.weights == {"task": 0.0, "PKT.divergence": 1.0}
    torch.testing.assert_close(terms.total(), terms.losses["PKT.divergence"])


def test_the_supervised_term() -> None:
    distiller = built(PKT(other(), supervised=0.001))
    terms = distiller((IMAGES, LABELS), FULL)
    assert terms.weights["PKT.supervised"] == pytest.approx(30.0)
    # The same divergence from a teacher whose samples of one class are equal and of others opposite.
    classes = nn.functional.one_hot(LABELS).double()
    own = embedding(distiller.student)
    cosine = nn.functional.normalize(own, dim=1, eps=0) @ nn.functional.normalize(own, dim=1, eps=0).T
    p, t = (k / k.sum(1, keepdim=True) for k in ((cosine + 1) / 2, classes @ classes.T))
    expected = torch.where(t > 0, t * (t.clamp_min(1e-12) / p).log(), 0).mean()
    torch.testing.assert_close(terms.losses["PKT.supervised"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"form": "joined"}, "form is 'base' or 'combined', not 'joined'"),
        ({"kernels": ("cosine", "linear")}, "kernels is one of 'cosine', .*, not 'linear'"),
        ({"divergence": "kagan"}, "divergence is one of 'kl', .*, not 'kagan'"),
        ({"reduction": "sum"}, "reduction is one of 'official', 'batchmean', not 'sum'"),
        ({"scope": "planet"}, "scope is one of 'rank', 'world', not 'planet'"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"supervised": -1.0}, "at least 0, not -1.0"),
        ({"teachers": []}, "PKT needs at least one trained teacher"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        PKT(**{"teachers": other(), **options})


def test_the_student_is_not_its_own_teacher() -> None:
    net = other()
    with pytest.raises(AttarError, match="the student itself"):
        built(PKT(net), student=net)


class TestFromAVisionTransformer(MethodContract):
    """CNN from ViT, all terms."""

    def method(self) -> attar.Method:
        torch.manual_seed(9)
        teacher = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=4, num_classes=5)
        kernels = ("cosine", "student-t", "adaptive-rbf", "cauchy")
        return PKT(teacher, form="combined", kernels=kernels, supervised=0.1, task_weight=0.5)

    def student(self) -> nn.Module:
        return HandWritten(self.num_classes)
