from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attar
from attar.errors import AttarError
from attar.methods import KD


def net(classes: int = 4, channels: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(channels, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


torch.manual_seed(3)
IMAGES = torch.randn(5, 3, 16, 16)
LABELS = torch.tensor([0, 1, 2, 3, 0])


def built(method: KD, **options: object) -> attar.Distiller:
    torch.manual_seed(0)
    return attar.Distiller(net(), [method], attar.Classification(4), **options).build(IMAGES).train()


def test_terms_and_weights() -> None:
    teacher = net()
    distiller = built(KD(teacher, temperature=4.0))
    terms = distiller((IMAGES, LABELS), 0.5)
    assert terms.weights == {"task": 0.1, "KD.kl": 0.9}
    t = (teacher(IMAGES) / 4).log_softmax(1)
    s = (terms.logits / 4).log_softmax(1)
    expected = 16 * (t.exp() * (t - s)).sum() / 5
    torch.testing.assert_close(terms.losses["KD.kl"], expected)
    torch.testing.assert_close(terms.total(), 0.1 * terms.losses["task"] + 0.9 * terms.losses["KD.kl"])


def test_weight_zero_is_plain_training() -> None:
    distiller = built(KD(net(), weight=0.0, task_weight=1.0))
    torch.testing.assert_close(
        distiller((IMAGES, LABELS), 0.5).total(), distiller((IMAGES, LABELS), 0.5).losses["task"]
    )


def test_a_cold_teacher_is_its_own_arg_max() -> None:
    teacher = net()
    distiller = built(KD(teacher, temperature=1e-3, weight=1.0, task_weight=0.0)).eval()
    terms = distiller((IMAGES, LABELS), 0.5)
    terms.total().backward()
    own = torch.autograd.functional.jacobian(
        lambda z: nn.functional.cross_entropy(z / 1e-3, teacher(IMAGES).argmax(1)) * 1e-6, terms.logits.detach()
    )
    probabilities = torch.softmax(terms.logits / 1e-3, 1) - nn.functional.one_hot(teacher(IMAGES).argmax(1), 4)
    torch.testing.assert_close(own, probabilities.detach() * 1e-3 / 5)


def test_several_teachers_average_their_probabilities() -> None:
    torch.manual_seed(5)
    teachers = [net(), net()]
    with torch.no_grad():
        for teacher in teachers:
            teacher[-1].weight.mul_(20)
    terms = built(KD(teachers, temperature=2.0))((IMAGES, LABELS), 0.5)
    mean = torch.stack([(teacher(IMAGES) / 2).softmax(1) for teacher in teachers]).mean(0)
    s = (terms.logits / 2).log_softmax(1)
    torch.testing.assert_close(terms.losses["KD.kl"], 4 * (mean * (mean.log() - s)).sum() / 5)


def test_the_teacher_sees_its_own_normalisation_and_size() -> None:
    seen: list[Tensor] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return self.inner(images)

    student_norm = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
    teacher_norm = ((0.1, 0.2, 0.3), (1.0, 0.5, 0.25))
    raw = torch.rand(5, 3, 16, 16)
    shape = (1, 3, 1, 1)
    as_student = (raw - torch.tensor(student_norm[0]).view(shape)) / torch.tensor(student_norm[1]).view(shape)
    as_teacher = (raw - torch.tensor(teacher_norm[0]).view(shape)) / torch.tensor(teacher_norm[1]).view(shape)
    distiller = built(KD(attar.Teacher(Watching(), normalization=teacher_norm)), normalization=student_norm)
    seen.clear()
    distiller((as_student, LABELS), 0.5)
    torch.testing.assert_close(seen[0], as_teacher, rtol=1e-4, atol=1e-5)

    distiller = built(KD(attar.Teacher(Watching(), image_size=24)))
    seen.clear()
    distiller((IMAGES, LABELS), 0.5)
    assert seen[0].shape == (5, 3, 24, 24)


def test_teachers_follow_the_precision_of_the_distiller() -> None:
    distiller = built(KD(net()))
    distiller.double()
    terms = distiller((IMAGES.double(), LABELS), 0.5)
    assert terms.losses["KD.kl"].dtype == torch.float64
    assert next(distiller.methods["KD"].teachers[0].network.parameters()).dtype == torch.float64


def test_no_trace_of_the_teacher_in_the_distiller() -> None:
    teacher = net()
    distiller = built(KD(teacher))
    assert not any("teacher" in name for name in distiller.state_dict())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in distiller.parameters()}
    distiller.train()
    assert not teacher.training


def test_refusals() -> None:
    with pytest.raises(AttarError, match="at least one trained teacher"):
        KD([])
    with pytest.raises(AttarError, match="temperature must be positive"):
        KD(net(), temperature=0)
    with pytest.raises(AttarError, match=r"teacher returns \[2, 7\] instead of \[N, 4\]"):
        built(KD(net(classes=7)))
    student = net()
    with pytest.raises(AttarError, match="the student itself"):
        attar.Distiller(student, [KD(student)], attar.Classification(4)).build(IMAGES)
    grey = attar.Teacher(net(channels=1), normalization=((0.5,), (0.5,)))
    with pytest.raises(AttarError, match="channels"):
        built(KD(grey), normalization=((0.5,) * 3, (0.5,) * 3))
