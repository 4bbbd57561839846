from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import attar
from architectures import HandWritten
from attar.errors import AttarError
from attar.functional import attention_transfer, kl_divergence
from attar.methods import KD, Moonshine
from attar.testing import MethodContract
from networks import IMAGES, LABELS, Net


def other(seed: int = 5) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def built(*methods: attar.Method, images: Tensor = IMAGES, student: nn.Module | None = None) -> attar.Distiller:
    torch.manual_seed(0)
    student = student if student is not None else Net().double()
    return attar.Distiller(student, methods, attar.Classification(3)).build(images).train()


def transfers(student: Net, teacher: Net) -> list[Tensor]:
    low, low_t = student.low(IMAGES), teacher.low(IMAGES)
    return [attention_transfer(low, low_t), attention_transfer(student.high(low), teacher.high(low_t))]


def test_the_whole_objective() -> None:
    teacher = other()
    distiller = built(Moonshine(teacher, alpha=0.25, beta=50.0, temperature=2.0))
    terms = distiller((IMAGES, LABELS), 0.5)
    z = distiller.student(IMAGES)
    ce = nn.functional.cross_entropy(z, LABELS)
    kl = nn.functional.kl_div((z / 2).log_softmax(1), (teacher(IMAGES) / 2).softmax(1), reduction="batchmean")
    at = sum(transfers(distiller.student, teacher))
    torch.testing.assert_close(terms.total(), 0.75 * ce + 2 * 0.25 * 4 * kl + (3 * 50.0 / 2) * at)
    torch.testing.assert_close(terms.losses["Moonshine.kl"], kl_divergence(z, teacher(IMAGES), 2.0))


def test_the_released_mean_over_elements() -> None:
    batch, elements = (
        built(Moonshine(other(), alpha=0.5, kl_mean=mean))((IMAGES, LABELS), 0.5).losses["Moonshine.kl"]
        for mean in ("batch", "elements")
    )
    torch.testing.assert_close(elements, batch / 3)


def test_without_alpha_and_beta_it_is_plain_training() -> None:
    plain, with_it = built(), built(Moonshine(other(), beta=0.0))
    for distiller in (plain, with_it):
        distiller((IMAGES, LABELS), 0.5).total().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, dict(with_it.named_parameters())[name].grad), name
    assert Moonshine(other()).claims == {}


def test_six_equal_stages_weigh_as_much_as_three() -> None:
    totals = []
    for count in (3, 6):
        names = ("low",) * count
        terms = built(Moonshine(other(), stages=names, teacher_stages=names))((IMAGES, LABELS), 0.5)
        totals.append(terms.total() - terms.losses["task"])
    torch.testing.assert_close(totals[0], totals[1])
    distiller = built()
    torch.testing.assert_close(totals[0], 3 * 1000.0 * transfers(distiller.student, other())[0])


def test_attention_moves_what_is_before_the_maps_and_the_teacher_stays() -> None:
    teacher = other()
    before = copy.deepcopy(teacher.state_dict())
    distiller = built(Moonshine(teacher))
    distiller((IMAGES, LABELS), 0.5).losses["Moonshine.attention"].backward()
    assert all(p.grad is None for p in distiller.student.head.parameters())
    assert all(p.grad.abs().max() > 0 for p in distiller.student.low.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_an_equal_teacher_has_nothing_to_teach() -> None:
    losses = built(Moonshine(other(0), alpha=0.5))((IMAGES, LABELS), 0.5).losses
    assert losses["Moonshine.attention"] < 1e-20
    assert losses["Moonshine.kl"].abs() < 1e-12


def test_several_teachers() -> None:
    first, second = other(5), other(6)
    distiller = built(Moonshine([first, second], alpha=0.5, temperature=1.0))
    losses = distiller((IMAGES, LABELS), 0.5).losses
    at = [sum(transfers(distiller.student, teacher)) / 2 for teacher in (first, second)]
    torch.testing.assert_close(losses["Moonshine.attention"], (at[0] + at[1]) / 2)
    mean = (first(IMAGES).softmax(1) + second(IMAGES).softmax(1)) / 2
    z = distiller.student(IMAGES)
    torch.testing.assert_close(losses["Moonshine.kl"], (mean * (mean.log() - z.log_softmax(1))).sum(1).mean())


def test_a_cheap_network_learns_from_the_network_it_was_made_of() -> None:
    torch.manual_seed(0)
    teacher = timm.create_model("cifar_wrn_16_1", num_classes=3)
    student = timm.create_model("cifar_wrn_16_1", num_classes=3, cheap="G8B2")
    images = torch.randn(4, 3, 16, 16)
    distiller = built(Moonshine(teacher, alpha=0.5), images=images, student=student)
    stages = {stage.name: (stage.channels, stage.height) for stage in distiller.anatomy.stages}
    assert stages == {"layer1": (16, 16), "layer2": (32, 8), "act": (64, 4)}
    distiller((images, LABELS[:4]), 0.5).total().backward()
    assert all(p.grad is not None for p in distiller.parameters())
    stripped = distiller.strip(prove_export=False)
    assert sum(p.numel() for p in stripped.parameters()) < sum(p.numel() for p in teacher.parameters()) / 2


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Moonshine([]), "Moonshine needs at least one trained teacher"),
        (lambda: Moonshine(other(), alpha=1.5), r"alpha is a share in \[0, 1\], not 1.5"),
        (lambda: Moonshine(other(), temperature=0.0), "temperature must be positive"),
        (lambda: Moonshine(other(), kl_mean="sum"), "kl_mean is 'batch' or 'elements', not 'sum'"),
        (lambda: Moonshine(other(), stages=("low",)), r"cannot pair the student's layers \(low\) with the teacher's"),
        (lambda: Moonshine(Net(5).double(), alpha=0.5), r"teacher returns \[2, 5\] instead of \[N, 3\]"),
    ],
)
def test_what_cannot_work_is_refused(make, sentence) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AttarError, match=sentence):
        built(make())


def test_a_second_owner_of_the_labels_weight_is_refused() -> None:
    with pytest.raises(AttarError, match="both set the task weight"):
        built(Moonshine(other(), alpha=0.5), KD(other()))
    assert "KD.kl" in built(Moonshine(other()), KD(other()))((IMAGES, LABELS), 0.5).losses


def test_maps_of_one_position_are_left_out_or_refused() -> None:
    teacher, student = (timm.create_model("cifar_resnet18", num_classes=3, width=1 / 16) for _ in range(2))
    images = torch.randn(2, 3, 8, 8)
    method = Moonshine(teacher)
    distiller = built(method, images=images, student=student)
    assert [stage.height for stage in distiller.anatomy.stages] == [8, 4, 2, 1]
    assert [stage.height for stage in method._readers[0][0]] == [8, 4, 2]
    images = IMAGES[:, :, :4, :4]
    with pytest.raises(AttarError, match="no attention map in 'high' of the student, which has a single position"):
        built(Moonshine(other(), stages=("low", "high"), teacher_stages=("low", "high")), images=images)


@pytest.mark.parametrize("transformer_teaches", [True, False])
def test_across_architectures_and_image_sizes(transformer_teaches: bool) -> None:
    torch.manual_seed(1)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32, patch_size=8, depth=4, embed_dim=24)
    pair = [HandWritten(3), vit] if transformer_teaches else [vit, HandWritten(3)]
    size = 24 if transformer_teaches else 32
    images = torch.randn(4, 3, size, size)
    teacher = attar.Teacher(pair[1], image_size=32 if transformer_teaches else 20)
    distiller = attar.Distiller(pair[0], [Moonshine(teacher, alpha=0.5)], attar.Classification(3))
    distiller.build(images).train()((images, LABELS[:4]), 0.5).total().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())


class TestWithSoftLabels(MethodContract):
    """Attention alone is under contract with all methods; this is the form with soft labels."""

    def method(self) -> attar.Method:
        torch.manual_seed(9)
        return Moonshine(HandWritten(self.num_classes), alpha=0.5)

    def student(self) -> nn.Module:
        return HandWritten(self.num_classes)
