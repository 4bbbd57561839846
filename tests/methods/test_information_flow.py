from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.errors import AttarError
from attar.functional.pkt import probabilistic_transfer
from attar.methods import PKT, InformationFlow
from networks import IMAGES, LABELS, Net

FULL = torch.tensor(1.0, dtype=torch.float64)


def built(*methods: attar.Method, student: nn.Module | None = None) -> attar.Distiller:
    torch.manual_seed(0)
    return attar.Distiller(student or Net().double(), methods, attar.Classification(3)).build(IMAGES)


def other(seed: int = 5) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def features(net: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    low = net.low(IMAGES)
    high = net.high(low)
    return low, high, high.mean(dim=(2, 3))


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    kernels = ("cosine", "student-t")
    return probabilistic_transfer(student, teacher, kernels=kernels, divergence="jeffreys", eps=1e-6)


def losses(distiller: attar.Distiller) -> dict[str, Tensor]:
    return distiller((IMAGES, LABELS), FULL).losses


def test_the_weight_falls_by_the_epoch_of_a_run_of_50() -> None:
    method = InformationFlow(other())
    epochs = torch.arange(14, dtype=torch.float64)
    found = [float(method.weights(epoch / 50)["stages"]) for epoch in epochs]
    assert found[:4] == pytest.approx([100, 70, 49, 34.3])
    assert found[12] > 1 > found[13] == pytest.approx(0.97, abs=0.005)
    scaled = InformationFlow(other(), weight=2.0, initial=10.0, decay=0.5, interval=0.1).weights(epochs[1] / 10)
    assert (scaled["embedding"], float(scaled["stages"])) == (2.0, pytest.approx(10.0))


def test_every_level_is_compared_and_teachers_averaged() -> None:
    first, second = other(5), other(6)
    distiller = built(InformationFlow([first, second]))
    own = features(distiller.student)
    each = [[divergence(*pair) for pair in zip(own, features(net), strict=True)] for net in (first, second)]
    found = losses(distiller)
    torch.testing.assert_close(found["InformationFlow.stages"], (sum(each[0][:2]) + sum(each[1][:2])) / 2)
    torch.testing.assert_close(found["InformationFlow.embedding"], (each[0][2] + each[1][2]) / 2)


def test_with_initial_weight_0_it_is_pkt_at_the_embedding() -> None:
    gradients = []
    for method in (InformationFlow(other(), initial=0.0), PKT(other(), form="combined", weight=1.0)):
        distiller = built(method)
        terms = distiller((IMAGES, LABELS), FULL)
        terms.total().backward()
        gradients.append((terms.total(), [p.grad for p in distiller.student.parameters()]))
    torch.testing.assert_close(*gradients)


def test_an_equal_teacher_has_nothing_to_teach() -> None:
    assert all(loss.abs() < 1e-12 for name, loss in losses(built(InformationFlow(other(0)))).items() if name != "task")


def test_the_teacher_gets_no_gradient_and_the_student_does() -> None:
    teacher = other()
    distiller = built(InformationFlow(teacher))
    losses(distiller)["InformationFlow.stages"].backward()
    student = distiller.student
    assert all(p.grad is None for p in (*teacher.parameters(), *student.head.parameters()))
    assert all(p.grad.abs().max() > 0 for p in (*student.low.parameters(), *student.high.parameters()))


def test_large_maps_are_pooled() -> None:
    teacher = other()
    distiller = built(InformationFlow(teacher, pool=4))
    (low, high, _), (low_t, high_t, _) = features(distiller.student), features(teacher)
    pool = nn.AvgPool2d(2)
    expected = divergence(pool(low), pool(low_t)) + divergence(high, high_t)
    torch.testing.assert_close(losses(distiller)["InformationFlow.stages"], expected)


def test_without_labels_as_published() -> None:
    terms = built(InformationFlow(other(), task_weight=0.0))((IMAGES, LABELS), 0.0)
    assert terms.weights["task"] == 0
    expected = terms.losses["InformationFlow.embedding"] + 100 * terms.losses["InformationFlow.stages"]
    torch.testing.assert_close(terms.total(), expected)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"teachers": []}, "InformationFlow needs at least one trained teacher"),
        ({"decay": 0.0}, "both above 0 and at most 1, not 0.0 and 0.02"),
        ({"interval": 2.0}, "both above 0 and at most 1, not 0.7 and 2.0"),
        ({"pool": 0}, "pool is a side of at least 1, not 0"),
        ({"kernels": ("linear",)}, "InformationFlow's kernels is one of 'cosine'"),
        ({"stages": ("low",)}, r"layers \(low\) with the teacher's \(low, high\)"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        built(InformationFlow(**{"teachers": other(), **options}))


def test_the_student_is_not_its_own_teacher() -> None:
    net = other()
    with pytest.raises(AttarError, match="the student itself"):
        built(InformationFlow(net), student=net)
