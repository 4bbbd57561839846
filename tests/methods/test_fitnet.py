from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attar
from architectures import HandWritten
from attar.errors import AttarError
from attar.methods import KD, FitNet
from attar.testing import MethodContract
from networks import IMAGES, LABELS, Net

FULL = torch.tensor(1.0, dtype=torch.float64)


class Wide(nn.Module):
    """Two stages of which the first can have any size."""

    def __init__(self, first: nn.Module, channels: int) -> None:
        super().__init__()
        self.low = nn.Sequential(first, nn.Tanh())
        self.high = nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.high(self.low(images)).mean(dim=(2, 3)))


def built(*methods: attar.Method, student: nn.Module | None = None) -> attar.Distiller:
    torch.manual_seed(0)
    return attar.Distiller(student or Net().double(), methods, attar.Classification(3)).double().build(IMAGES)


def other(seed: int = 5) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def hint(distiller: attar.Distiller) -> Tensor:
    return distiller((IMAGES, LABELS), FULL).losses["FitNet.hint"]


def test_the_identity_has_nothing_to_learn_from_an_equal_teacher() -> None:
    distiller = built(FitNet(other(0), relu=False, batch_norm=False))
    conv = distiller.methods["FitNet"].regressors[0][0].conv
    with torch.no_grad():
        conv.weight.copy_(torch.eye(6)[:, :, None, None])
        conv.bias.zero_()
    assert hint(distiller) == 0


@pytest.mark.parametrize(
    ("first", "kernel", "stride", "transposed"),
    [
        (nn.Conv2d(3, 7, 3, 2, 1), (1, 1), (1, 1), False),  # 8 x 8 against 8 x 8
        (nn.Conv2d(3, 7, 3, 1, 1), (3, 3), (2, 2), False),  # twice the hint
        (nn.Conv2d(3, 7, 4, 4), (4, 4), (2, 2), True),  # half of it
        (nn.Conv2d(3, 7, 3, 1, 0), (7, 7), (1, 1), False),  # 14 x 14
    ],
)
def test_regressors(first: nn.Module, kernel: tuple[int, int], stride: tuple[int, int], transposed: bool) -> None:
    teacher = other()
    distiller = built(FitNet(teacher), student=Wide(first, 7).double())
    (regressor,) = distiller.methods["FitNet"].regressors[0]
    conv = regressor.conv
    assert (conv.kernel_size, conv.stride, isinstance(conv, nn.ConvTranspose2d)) == (kernel, stride, transposed)
    expected = torch.relu(regressor.bn(conv(distiller.student.low(IMAGES)))) - teacher.low(IMAGES)
    torch.testing.assert_close(hint(distiller), expected.square().mean())


def test_a_pointwise_regressor_resizes_the_map() -> None:
    student = Wide(nn.Conv2d(3, 7, 3, 2, 1), 7).double()
    teacher = Wide(nn.Conv2d(3, 6, 3, 1, 0), 6).double()
    with pytest.raises(AttarError, match=r"'low' \(8 x 8\) to the larger hint 'low' \(14 x 14\)"):
        built(FitNet(teacher), student=student)
    distiller = built(FitNet(teacher, regressor="pointwise"), student=student)
    (regressor,) = distiller.methods["FitNet"].regressors[0]
    resized = nn.functional.interpolate(student.low(IMAGES), size=(14, 14), mode="bilinear")
    expected = torch.relu(regressor.bn(regressor.conv(resized))) - teacher.low(IMAGES)
    torch.testing.assert_close(hint(distiller), expected.square().mean())


def test_layers_are_summed_and_teachers_averaged() -> None:
    teachers = [other(5), other(6)]
    distiller = built(FitNet(teachers, layers="all", relu=False))
    low = distiller.student.low(IMAGES)
    own = (low, distiller.student.high(low))
    sums = []
    for teacher, regressors in zip(teachers, distiller.methods["FitNet"].regressors, strict=True):
        low = teacher.low(IMAGES)
        maps = zip(own, (low, teacher.high(low)), regressors, strict=True)
        sums.append(sum((r.bn(r.conv(f)) - t).square().mean() for f, t, r in maps))
    torch.testing.assert_close(hint(distiller), (sums[0] + sums[1]) / 2)


def test_reductions() -> None:
    mean, paper = built(FitNet(other())), built(FitNet(other(), reduction="paper"))
    torch.testing.assert_close(hint(paper), hint(mean) * 6 * 8 * 8 / 2)


def test_gradients_reach_regressor_and_guided_layer_only() -> None:
    teacher = other()
    distiller = built(FitNet(teacher))
    hint(distiller).backward()
    student = distiller.student
    assert all(p.grad is None for p in (*teacher.parameters(), *student.high.parameters(), *student.head.parameters()))
    learnt = (*student.low.parameters(), *distiller.methods["FitNet"].regressors.parameters())
    assert all(p.grad is not None for p in learnt)
    assert student.low[0].weight.grad.abs().max() > 0


def test_weight_zero_is_plain_training() -> None:
    plain, with_fitnet = built(), built(FitNet(other(), weight=0.0))
    for distiller in (plain, with_fitnet):
        distiller((IMAGES, LABELS), FULL).total().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, dict(with_fitnet.named_parameters())[name].grad), name


def test_two_stages() -> None:
    teacher = other()
    distiller = built(FitNet(teacher, form="two-stage"), KD(teacher))
    ((method, phase),) = distiller.phases
    assert (method.name, phase.name, phase.share) == ("FitNet", "hint", 0.25)
    expected = 100 * hint(built(FitNet(teacher)))
    ran = []
    distiller.student.high.register_forward_hook(lambda *_: ran.append("student"))
    teacher.high.register_forward_hook(lambda *_: ran.append("teacher"))
    distiller.enter(0)
    distiller((IMAGES, LABELS), 0.1)  # the first partial pass counts how often modules run
    ran.clear()
    terms = distiller((IMAGES, LABELS), 0.1)
    torch.testing.assert_close(terms.total(), expected)
    terms.total().backward()
    assert not ran
    trained = {name for name, p in distiller.named_parameters() if p.grad is not None}
    regressor = {name for name, _ in distiller.named_parameters() if name.startswith("methods.FitNet")}
    assert trained == regressor | {"student.low.0.weight", "student.low.0.bias"}
    distiller.enter(None)
    assert distiller((IMAGES, LABELS), 0.5).losses.keys() == {"task", "KD.kl"}


def test_the_middle_layer_is_repdistillers() -> None:
    """Feats [stem, stage 1, stage 2, stage 3, pooled] at index 2 are the second stage's."""
    import timm

    import attar.zoo

    student, teacher = timm.create_model("cifar_resnet20"), timm.create_model("cifar_resnet56")
    distiller = attar.Distiller(student, [FitNet(teacher)], attar.Classification(10)).build(torch.zeros(2, 3, 32, 32))
    ((guided, reader),) = distiller.methods["FitNet"]._readers
    assert ([s.name for s in guided], [s.name for s in reader.stages]) == (["layer2"], ["layer2"])
    assert sum(p.numel() for p in distiller.methods["FitNet"].parameters()) == 32 * 32 + 32 + 2 * 32


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"teachers": ()}, "FitNet needs at least one trained teacher"),
        ({"form": "three-stage"}, "form is one of 'one-stage', 'two-stage', not 'three-stage'"),
        ({"layers": "first"}, "layers is one of 'middle', 'last', 'all', not 'first'"),
        ({"regressor": "linear"}, "regressor is one of 'convolution', 'pointwise', not 'linear'"),
        ({"reduction": "sum"}, "reduction is one of 'mean', 'paper', not 'sum'"),
        ({"phase": 1.0}, "phase is a share of the run between 0 and 1, not 1.0"),
        ({"stages": ("low", "high")}, r"layers \(low, high\) with the teacher's \(low\)"),
        ({"teacher_stages": ("hihg",)}, "did you mean 'high'"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        built(FitNet(**{"teachers": other(), **options}))


def test_the_student_is_not_its_own_teacher() -> None:
    net = other()
    with pytest.raises(AttarError, match="the student itself"):
        built(FitNet(net), student=net)


class TestTwoStages(MethodContract):
    """The form in one stage is under contract with all methods."""

    def method(self) -> attar.Method:
        torch.manual_seed(9)
        return FitNet(HandWritten(self.num_classes), form="two-stage", layers="all")

    def student(self) -> nn.Module:
        return HandWritten(self.num_classes)
