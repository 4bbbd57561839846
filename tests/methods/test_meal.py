from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attar
from architectures import HandWritten
from attar.draws import drawn
from attar.errors import AttarError
from attar.functional.adversarial import activation_bins
from attar.methods import KD, MEAL
from attar.methods.meal import Discriminator
from attar.reader import Reading
from attar.testing import MethodContract
from networks import IMAGES, LABELS, Net

SMALL = {"out_dims": (12, 7)}


def other(seed: int = 5) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def built(*methods: attar.Method, student: nn.Module | None = None) -> attar.Distiller:
    torch.manual_seed(0)
    student = student if student is not None else Net().double()
    return attar.Distiller(student, methods, attar.Classification(3)).build(IMAGES).train()


def gradients(distiller: attar.Distiller, part: str = "") -> dict[str, Tensor]:
    distiller.zero_grad(set_to_none=True)
    distiller((IMAGES, LABELS), 0.5).total().backward()
    return {name: p.grad for name, p in distiller.named_parameters() if name.startswith(part)}


def assert_equal_gradients(one: dict[str, Tensor], two: dict[str, Tensor], factor: float = 1.0) -> None:
    assert one.keys() == two.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], factor * gradient, msg=lambda m, name=name: f"{name}: {m}")


def answered(student: tuple[float, ...], teacher: tuple[float, ...], **options: object) -> tuple[Tensor, Tensor]:
    """Return the similarity between these logits, and the gradient of the student's."""
    method = MEAL(other(), last_stages=0, adversarial="off", **options)
    distiller = built(method)
    given = torch.tensor([student], dtype=torch.float64, requires_grad=True)
    reading = Reading([], None, torch.tensor([teacher], dtype=torch.float64))
    method._readers = (lambda images: reading,)
    outputs = distiller._pass(IMAGES[:1])
    outputs = attar.Outputs(
        outputs.images, given, {}, outputs.anatomy, outputs.task_loss, outputs.student
    )  # fmt: skip
    loss = method.losses(outputs, attar.Batch(IMAGES[:1], LABELS[:1]), torch.tensor(0.5))["similarity"]
    loss.backward()
    return loss, given.grad


def test_worked_similarities() -> None:
    """meal.md, property 2."""
    assert answered((1, 0, -1), (2, 0, 0))[0].item() == pytest.approx(0.727127, abs=1e-6)
    loss, gradient = answered((2, 0, 0), (2, 0, 0))
    assert loss.item() == pytest.approx(0.665573, abs=1e-6)
    assert gradient.abs().max() < 1e-12
    assert answered((1, 0, -1), (2, 0, 0), similarity="l1")[0].item() == pytest.approx(2 / 3)
    assert answered((1, 0, -1), (2, 0, 0), similarity="l2")[0].item() == pytest.approx(2 / 3)
    s, t = torch.softmax(torch.tensor([[1.0, 0, -1], [2, 0, 0]]), dim=1)
    assert answered((1, 0, -1), (2, 0, 0), similarity="l1_soft")[0].item() == pytest.approx(F.l1_loss(s, t).item())
    assert answered((1, 0, -1), (2, 0, 0), similarity="l2_soft")[0].item() == pytest.approx(F.mse_loss(s, t).item())


@pytest.mark.parametrize(
    ("width", "shrink", "parameters"), [(10, 2, 73), (1000, 2, 626_252), (10_000, 2, 62_512_502), (1000, 8, 127_047)]
)
def test_discriminators_have_the_published_sizes(width: int, shrink: int, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Discriminator(width, shrink).parameters()) == parameters


def test_a_final_relu_keeps_the_answers_above_zero() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(50, 6)
    plain = Discriminator(6)
    released = Discriminator(6, final_relu=True)
    released.load_state_dict(plain.state_dict())
    assert plain(vectors).min() < 0
    assert torch.equal(released(vectors), plain(vectors).relu())


def test_the_terms_are_sums_over_depths() -> None:
    teacher = other()
    method = MEAL(teacher, gamma=(0.3, 0.5, 2.0), eta=(0.7, 1.5, 3.0), **SMALL)
    distiller = built(method)
    terms = distiller((IMAGES, LABELS), 0.5)

    def vectors(net: Net) -> list[Tensor]:
        low = net.low(IMAGES)
        return [activation_bins(low, 12), activation_bins(net.high(low), 7), net(IMAGES)]

    similarity, mistakes = torch.zeros(()), torch.zeros(())
    for number, (s, t) in enumerate(zip(vectors(distiller.student), vectors(teacher), strict=True)):
        ce = -(t.softmax(1) * s.log_softmax(1)).sum(1).mean()
        similarity = similarity + (0.3, 0.5, 2.0)[number] * ce
        truth = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 6, dtype=torch.float64)
        told = method.discriminators[number](torch.cat([s, t]))
        mistakes = mistakes + (0.7, 1.5, 3.0)[number] * F.binary_cross_entropy_with_logits(told, truth)
    torch.testing.assert_close(terms.losses["MEAL.similarity"], similarity)
    torch.testing.assert_close(terms.losses["MEAL.discriminator"], mistakes)
    torch.testing.assert_close(terms.total(), similarity + mistakes)
    assert float(terms.weights["task"]) == 0


def test_the_last_bins_and_weights_are_those_of_fewer_depths() -> None:
    method = MEAL(other())
    built(method)
    assert [d.linear1.in_features for d in method.discriminators] == [500, 200, 3]
    assert method._gamma == (0.05, 0.1, 1.0)
    logits = MEAL(other(), last_stages=0)
    distiller = built(logits)
    assert [d.linear1.in_features for d in logits.discriminators] == [3]
    assert logits.taps(distiller.anatomy) == []


def test_logits_without_judges_are_plain_kd() -> None:
    """meal.md, property 4: alpha 1, T 1."""
    meal = built(MEAL(other(), last_stages=0, adversarial="off"))
    kd = built(KD(other(), temperature=1.0, weight=1.0, task_weight=0.0))
    assert meal((IMAGES, LABELS), 0.5).losses.keys() == {"task", "MEAL.similarity"}
    assert_equal_gradients(gradients(kd, "student."), gradients(meal, "student."))


def test_what_the_student_learns_from_the_judges() -> None:
    found = {
        mode: gradients(built(MEAL(other(), adversarial=mode, **SMALL))) for mode in ("reverse", "joint", "detach")
    }
    off = gradients(built(MEAL(other(), adversarial="off", **SMALL)))
    student = {
        mode: {name: g for name, g in each.items() if name.startswith("student.")} for mode, each in found.items()
    }
    judges = {mode: {name: g for name, g in each.items() if "discriminators" in name} for mode, each in found.items()}
    assert_equal_gradients(off, student["detach"])
    part = {mode: {name: g - off[name] for name, g in student[mode].items()} for mode in ("reverse", "joint")}
    assert any(g.abs().max() > 1e-6 for g in part["joint"].values())
    assert_equal_gradients(part["joint"], part["reverse"], factor=-1.0)
    assert all(g.abs().max() > 0 for name, g in judges["joint"].items() if "linear3.bias" in name)
    for mode in ("reverse", "detach"):
        assert_equal_gradients(judges["joint"], judges[mode])


def test_judges_learn_at_their_own_rate() -> None:
    assert MEAL(other()).lr_scale("discriminators.0.linear1.weight") == 0.01
    assert MEAL(other(), variant="v2").lr_scale("discriminators.0.linear1.weight") == 1.0
    assert MEAL(other(), discriminator_lr=0.5).lr_scale("discriminators.0.linear1.weight") == 0.5


class Counted(Net):
    def __init__(self, number: int, seen: list[int]) -> None:
        super().__init__()
        self.number, self.seen = number, seen

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(self.number)
        return super().forward(images)


def panel(seen: list[int], count: int = 3, **options: object) -> tuple[MEAL, attar.Distiller]:
    torch.manual_seed(11)
    method = MEAL([Counted(number, seen).double() for number in range(count)], **{"last_stages": 1, **options})
    distiller = built(method)
    seen.clear()
    return method, distiller


def test_one_teacher_a_step_drawn_uniformly_and_seeded() -> None:
    seen: list[int] = []
    _, distiller = panel(seen)
    with torch.no_grad():
        for _ in range(300):
            distiller((IMAGES[:1], LABELS[:1]), 0.5)
    assert seen == [drawn(0, step, 3) for step in range(300)]
    assert all(abs(count - 100) < 4 * (300 * 2 / 9) ** 0.5 for count in Counter(seen).values())
    _, distiller = panel(seen, seed=1)
    for _ in range(20):
        distiller((IMAGES[:1], LABELS[:1]), 0.5)
    assert seen == [drawn(1, step, 3) for step in range(20)]


def test_global_randomness_has_no_part_in_it_and_evaluation_draws_nothing() -> None:
    seen: list[int] = []
    _, distiller = panel(seen)
    state = torch.get_rng_state()
    for step in range(8):
        torch.manual_seed(step % 2)
        distiller((IMAGES[:1], LABELS[:1]), 0.5)
        distiller.eval()
        distiller((IMAGES[:1], LABELS[:1]), 0.5)
        distiller.train()
    assert seen[::2] == [drawn(0, step, 3) for step in range(8)]
    torch.set_rng_state(state)
    distiller((IMAGES[:1], LABELS[:1]), 0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_run_draws_on() -> None:
    seen: list[int] = []
    _, first = panel(seen)
    for _ in range(7):
        first((IMAGES[:1], LABELS[:1]), 0.5)
    state = copy.deepcopy(first.state_dict())
    _, second = panel(seen)
    second.load_state_dict(state)
    for _ in range(7):
        second((IMAGES[:1], LABELS[:1]), 0.5)
    assert seen == [drawn(0, step, 3) for step in range(7, 14)]


def test_v2_learns_from_the_mean_of_all() -> None:
    teachers = [other(5), other(6)]
    method = MEAL(teachers, variant="v2", adversarial="joint")
    distiller = built(method)
    terms = distiller((IMAGES, LABELS), 0.5)
    answers = [teacher(IMAGES) for teacher in teachers]
    mean = torch.stack([answer.softmax(1) for answer in answers]).mean(0)
    z = distiller.student(IMAGES)
    torch.testing.assert_close(terms.losses["MEAL.similarity"], -(mean * z.log_softmax(1)).sum(1).mean())
    told = method.discriminators[0](torch.cat([z, torch.stack(answers).mean(0)]))
    truth = torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 6, dtype=torch.float64)
    torch.testing.assert_close(
        terms.losses["MEAL.discriminator"], F.binary_cross_entropy_with_logits(told, truth)
    )  # fmt: skip


def test_v2_with_one_teacher_is_v1_on_the_logits() -> None:
    """meal.md, property 6, with discriminators of one width."""
    second = MEAL(other(), variant="v2", adversarial="joint")
    first = MEAL(other(), last_stages=0, adversarial="joint")
    two, one = built(second), built(first)
    first.discriminators = copy.deepcopy(second.discriminators)
    a, b = (distiller((IMAGES, LABELS), 0.5).losses for distiller in (one, two))
    for name in a:
        torch.testing.assert_close(a[name], b[name])
    assert_equal_gradients(gradients(one), gradients(two))


def test_teachers_stay_as_they_were() -> None:
    torch.manual_seed(5)
    teachers = [Net(batch_norm=True).double(), Net(batch_norm=True).double()]
    before = [copy.deepcopy(teacher.state_dict()) for teacher in teachers]
    distiller = built(MEAL(teachers, **SMALL))
    optimizer = torch.optim.SGD(distiller.parameters(), 0.1)
    for _ in range(6):
        distiller((IMAGES, LABELS), 0.5).total().backward()
        optimizer.step()
    for teacher, state in zip(teachers, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
        assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MEAL([]), "needs at least one trained teacher"),
        (lambda: MEAL(other(), variant="v3"), r"variant is one of v1, v2, not 'v3'"),
        (lambda: MEAL(other(), adversarial="flip"), "adversarial is one of reverse, joint, detach, off"),
        (lambda: MEAL(other(), similarity="kl"), "similarity is one of ce, l1, l2, l1_soft, l2_soft, not 'kl'"),
        (lambda: MEAL(other(), pooling="min"), "pooling is one of avg, max"),
        (lambda: MEAL(other(), variant="v2", last_stages=1), "MEAL V2 compares logits alone: leave out last_stages=1"),
        (lambda: MEAL(other(), variant="v2", similarity="l2"), "similarity is no 'l2': choose ce"),
        (lambda: MEAL(other(), last_stages=-1), "are positive, not -1"),
        (lambda: MEAL(other(), out_dims=(0,)), r"are positive, not None and \(0,\)"),
        (lambda: MEAL(other(), last_stages=3), "cannot read 3 stages of the student, which has 2: choose last_stages"),
        (lambda: MEAL(other(), last_stages=2, out_dims=(9,)), "needs 2 values of out_dims here, not 1"),
        (lambda: MEAL(other(), gamma=(1.0,)), "needs 3 values of gamma here, not 1"),
        (lambda: MEAL(Net(5).double()), r"teacher returns \[2, 5\] instead of \[N, 3\]"),
    ],
)
def test_what_cannot_work_is_refused(make: Callable[[], attar.Method], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        built(make())


def test_another_method_beside_it_must_leave_the_labels_alone() -> None:
    with pytest.raises(AttarError, match="both set the task weight"):
        built(MEAL(other()), KD(other()))
    assert "KD.kl" in built(MEAL(other()), KD(other(), task_weight=1.0))((IMAGES, LABELS), 0.5).losses


def test_the_student_is_not_its_own_teacher() -> None:
    net = other()
    with pytest.raises(AttarError, match="the student itself"):
        built(MEAL(net), student=net)


@pytest.mark.parametrize("transformer_teaches", [True, False])
def test_across_architectures_and_image_sizes(transformer_teaches: bool) -> None:
    torch.manual_seed(1)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, patch_size=8, depth=4, embed_dim=24)
    pair = [HandWritten(3), vit] if transformer_teaches else [vit, HandWritten(3)]
    size = 24 if transformer_teaches else 32
    images = torch.randn(4, 3, size, size)
    teacher = attar.Teacher(pair[1], image_size=32 if transformer_teaches else 20)
    distiller = attar.Distiller(pair[0], [MEAL(teacher, last_stages=2, out_dims=(40, 20))], attar.Classification(3))
    distiller.build(images).train()((images, LABELS[:4]), 0.5).total().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())


class TestSeveralTeachers(MethodContract):
    """Two architectures in turn; the one-teacher form is under contract with all methods."""

    def method(self) -> attar.Method:
        torch.manual_seed(9)
        narrow = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
            nn.Sequential(nn.Conv2d(6, 9, 3, 2), nn.BatchNorm2d(9), nn.ReLU(inplace=True)),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, self.num_classes),
        )  # fmt: skip
        return MEAL([HandWritten(self.num_classes), narrow], last_stages=2, out_dims=(40, 20))

    def student(self) -> nn.Module:
        return HandWritten(self.num_classes)
