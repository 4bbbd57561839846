from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attar
from architectures import HandWritten
from attar.errors import AttarError
from attar.functional import batch_similarity, similarity_distance
from attar.methods import KD, ONE, SPKD
from attar.teacher import Teacher
from attar.testing import MethodContract
from networks import IMAGES, LABELS, Net

FULL = torch.tensor(1.0, dtype=torch.float64)


def built(*methods: attar.Method, images: Tensor = IMAGES) -> attar.Distiller:
    torch.manual_seed(0)
    return attar.Distiller(Net().double(), methods, attar.Classification(3)).build(images)


def other(seed: int = 5) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def features(net: nn.Module, images: Tensor = IMAGES) -> tuple[Tensor, Tensor]:
    low = net.low(images)
    return low, net.high(low)


def distance(a: Tensor, b: Tensor) -> Tensor:
    return similarity_distance(batch_similarity(a), batch_similarity(b))


def test_worked_example_through_the_method() -> None:
    """spkd.md: rows [1 0; 1 1; 0 1] against [1 0; 1 0; 0 1] are at distance 0.094860."""

    class Rows(nn.Module):
        """Its layers keep their first two input channels, the deeper one a mixture of them."""

        def __init__(self) -> None:
            super().__init__()
            self.shallow, self.deep, self.head = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1), nn.Linear(2, 3)
            with torch.no_grad():
                for layer, first in ((self.shallow, 0), (self.deep, 2)):
                    layer.bias.zero_()
                    layer.weight.zero_()
                    layer.weight[0, first], layer.weight[1, first + 1] = 1, 1

        def forward(self, images: Tensor) -> Tensor:
            self.shallow(images)
            return self.head(self.deep(images).sum(dim=(2, 3)))

    rows = torch.tensor([[1, 0, 1, 0], [1, 1, 1, 0], [0, 1, 0, 1]], dtype=torch.float64)
    images = torch.zeros(3, 4, 4, 4, dtype=torch.float64)
    images[:, :, 0, 0] = rows
    distiller = attar.Distiller(Rows().double(), [SPKD()], attar.Classification(3), stages=["shallow", "deep"])
    terms = distiller.build(images)((images, LABELS[:3]), FULL)
    assert terms.losses["SPKD.similarity"].item() == pytest.approx(0.094860, abs=1e-6)
    assert float(terms.weights["SPKD.similarity"]) == 3000


def test_weight_zero_is_plain_training() -> None:
    plain, with_spkd = built(), built(SPKD(weight=0.0))
    for distiller in (plain, with_spkd):
        distiller((IMAGES, LABELS), FULL).total().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, dict(with_spkd.named_parameters())[name].grad), name


def test_the_deeper_layer_teaches_and_does_not_learn() -> None:
    distiller = built(SPKD())
    loss = distiller((IMAGES, LABELS), FULL).losses["SPKD.similarity"]
    torch.testing.assert_close(loss, distance(*features(distiller.student)))
    loss.backward()
    assert all(p.grad is None for p in (*distiller.student.high.parameters(), *distiller.student.head.parameters()))
    assert all(p.grad.abs().max() > 0 for p in distiller.student.low.parameters())


def test_every_shallower_stage_learns_from_the_deepest() -> None:
    names = ("low.0", "low.2", "high.2")
    summed, averaged = built(SPKD(stages=names)), built(SPKD(stages=names, average=True))
    low, high = features(summed.student)
    expected = distance(summed.student.low[0](IMAGES), high) + distance(low, high)
    losses = [d((IMAGES, LABELS), FULL).losses["SPKD.similarity"] for d in (summed, averaged)]
    torch.testing.assert_close(losses[0], expected)
    torch.testing.assert_close(losses[1], expected / 2)


def test_a_frozen_teacher() -> None:
    teacher = other()
    distiller = built(SPKD(teacher))
    loss = distiller((IMAGES, LABELS), 0.0).losses["SPKD.similarity"]
    torch.testing.assert_close(loss, distance(features(distiller.student)[1], features(teacher)[1]))
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad.abs().max() > 0 for p in distiller.student.high.parameters())
    assert not any("teacher" in name or "network" in name for name, _ in distiller.named_parameters())


def test_an_equal_teacher_has_nothing_to_teach() -> None:
    distiller = built(SPKD(other(0)))
    assert distiller((IMAGES, LABELS), FULL).losses["SPKD.similarity"] < 1e-20


def test_pairs_of_equal_depth_and_several_teachers() -> None:
    first, second = other(5), other(6)
    distiller = built(SPKD([first, second], layers="all"))
    loss = distiller((IMAGES, LABELS), FULL).losses["SPKD.similarity"]
    own = features(distiller.student)
    each = [sum(distance(a, b) for a, b in zip(own, features(net), strict=True)) for net in (first, second)]
    torch.testing.assert_close(loss, (each[0] + each[1]) / 2)


def test_a_teacher_of_other_channels_sizes_normalisation_and_in_place_activations() -> None:
    torch.manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(3, 5, 3, 2), nn.Sequential(nn.Conv2d(5, 7, 3, 2), nn.Identity()), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 3),
    ).double()  # fmt: skip
    given = Teacher(network, ((0.1,) * 3, (2.0,) * 3), image_size=24)
    torch.manual_seed(0)
    methods = [SPKD(given, teacher_stages=("1",))]
    mine = ((0.5,) * 3, (0.25,) * 3)
    distiller = attar.Distiller(Net().double(), methods, attar.Classification(3), normalization=mine).build(IMAGES)
    loss = distiller((IMAGES, LABELS), FULL).losses["SPKD.similarity"]
    seen = ((IMAGES * 0.25 + 0.5) - 0.1) / 2.0
    seen = nn.functional.interpolate(seen, size=(24, 24), mode="bilinear", antialias=True)
    torch.testing.assert_close(loss, distance(features(distiller.student)[1], network[1](network[0](seen))))


@pytest.mark.parametrize(
    ("options", "progress", "expected"),
    [({}, 0.0, 0.0), ({}, 0.05, 1500.0), ({}, 0.1, 3000.0), ({"ramp": 0.0}, 0.0, 3000.0),
     ({"start": 0.5, "ramp": 0.0}, 0.4, 0.0), ({"weight": 7.0, "start": 0.5, "ramp": 0.2}, 0.6, 3.5)],
)  # fmt: skip
def test_schedule(options: dict[str, object], progress: float, expected: float) -> None:
    weight = SPKD(**options).weights(torch.tensor(progress, dtype=torch.float64))["similarity"]
    assert float(weight) == pytest.approx(expected)


def test_with_a_teacher_there_is_no_ramp() -> None:
    assert float(SPKD(other()).weights(torch.tensor(0.0))["similarity"]) == 3000


def test_a_batch_of_one_is_silent() -> None:
    assert built(SPKD())((IMAGES[:1], LABELS[:1]), FULL).losses["SPKD.similarity"] == 0


def test_beside_one_and_kd_on_one_student_pass() -> None:
    passes = []
    distiller = built(SPKD(), ONE(), KD(other(), task_weight=1.0))
    distiller.student.register_forward_hook(lambda *_: passes.append(1))
    terms = distiller((IMAGES, LABELS), FULL)
    terms.total().backward()
    assert len(passes) == 1
    assert {"SPKD.similarity", "ONE.kl", "KD.kl"} < terms.losses.keys()
    assert all(p.grad is not None for p in distiller.parameters())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SPKD(stages=("low",)), r"only one stage \('low'\), so no layer has a deeper one"),
        (lambda: SPKD(other(), stages=("low", "high")), r"student's layers \(low, high\) with the teacher's \(high\)"),
        (lambda: SPKD(layers="all"), "without a teacher has neither layers nor teacher_stages"),
        (lambda: SPKD(layers="first"), "'last' or 'all', not 'first'"),
        (lambda: SPKD(scope="planet"), "'rank' or 'world', not 'planet'"),
        (lambda: SPKD(start=2.0), "shares of the run"),
        (lambda: SPKD(other(), teacher_stages=("hihg",)), "did you mean 'high'"),
    ],
)
def test_what_cannot_work_is_refused(make: object, sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        built(make())


def test_the_student_is_not_its_own_teacher() -> None:
    net = other()
    with pytest.raises(AttarError, match="the student itself: give an earlier training, or no teacher"):
        attar.Distiller(net, [SPKD(net)], attar.Classification(3)).build(IMAGES)


class TestWithATeacher(MethodContract):
    """The deeper-layer form is under contract with all methods; this is the form with a teacher."""

    def method(self) -> attar.Method:
        torch.manual_seed(9)
        return SPKD(HandWritten(self.num_classes), layers="all")

    def student(self) -> nn.Module:
        return HandWritten(self.num_classes)
