from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attar
from architectures import HandWritten
from attar.errors import AttarError
from attar.functional import kl_divergence
from attar.functional.sparse import atom_usage, decoded, similarities, sparsified
from attar.methods import SRM
from attar.methods.srm import Dictionary
from attar.teacher import Teacher
from attar.testing import MethodContract
from networks import IMAGES, LABELS, Net


def other(seed: int = 5, **options: object) -> nn.Module:
    torch.manual_seed(seed)
    return Net(batch_norm=True, **options).double()


def built(*methods: attar.Method, student: nn.Module | None = None) -> attar.Distiller:
    torch.manual_seed(0)
    student = student or Net(batch_norm=True).double()
    return attar.Distiller(student, methods, attar.Classification(3)).build(IMAGES).train()


def step(distiller: attar.Distiller) -> attar.Terms:
    distiller.zero_grad(set_to_none=True)
    terms = distiller((IMAGES, LABELS), 0.5)
    terms.total().backward()
    return terms


def trained(distiller: attar.Distiller) -> set[str]:
    return {name for name, parameter in distiller.named_parameters() if parameter.grad is not None}


def test_worked_example() -> None:
    centers = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 2, 1, 1)
    s = similarities(x, centers, torch.zeros(1, dtype=torch.float64)).sigmoid()
    assert s.flatten().tolist() == pytest.approx([0.731059, 0.268941, 0.5], abs=1e-6)
    one, two = sparsified(s, 1), sparsified(s, 2)
    assert one.flatten().tolist() == pytest.approx([0.731059, 0, 0], abs=1e-6)
    assert two.flatten().tolist() == pytest.approx([0.731059, 0, 0.5], abs=1e-6)
    assert decoded(one, centers).flatten().tolist() == pytest.approx([0.731059, 0], abs=1e-6)
    assert decoded(two, centers).flatten().tolist() == pytest.approx([1.231059, 0.5], abs=1e-6)
    errors = [(x - decoded(codes, centers)).square().mean().item() for codes in (one, two)]
    assert errors == pytest.approx([0.536165, 1.151694], abs=1e-6)
    assert s.argmax(dim=1).item() == 0


@given(st.integers(1, 7), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_exactly_k_survive_and_only_they_have_a_gradient(k: int, seed: int) -> None:
    codes = torch.rand(2, 7, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
    codes.requires_grad_()
    kept = sparsified(codes, k)
    assert ((kept != 0).sum(dim=1) == k).all()
    assert torch.equal(kept[kept != 0], codes[kept != 0])
    assert k < 7 or torch.equal(kept, codes)
    kept.sum().backward()
    assert torch.equal(codes.grad != 0, kept != 0)


def test_ties_keep_more() -> None:
    codes = torch.tensor([0.5, 0.9, 0.5, 0.1]).view(1, 4, 1, 1)
    assert sparsified(codes, 2).flatten().tolist() == pytest.approx([0.5, 0.9, 0.5, 0.0])


def test_similarities_are_not_rounded_under_autocast() -> None:
    x, dictionary = torch.randn(2, 5, 3, 3), Dictionary(5, 40)
    expected = dictionary(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dictionary(x), expected)
        assert decoded(expected, dictionary.centers).dtype == torch.float32


def test_usage_of_atoms() -> None:
    assert atom_usage(torch.full((4, 3, 3), 2), 8) == 0
    assert atom_usage(torch.arange(8).repeat(3, 1), 8).item() == pytest.approx(math.log(8))
    assert atom_usage(torch.tensor([0, 0, 5, 5]), 8).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("atoms", "floor", "start"), [(192, 4.2664, 5.2575), (512, 5.2417, 6.2383), (2048, 6.6255, 7.6246)]
)
def test_the_floor_of_flat_logits(atoms: int, floor: float, start: float) -> None:
    best = torch.zeros(1, atoms, dtype=torch.float64)
    best[0, 3] = 1.0
    assert nn.functional.cross_entropy(best, torch.tensor([3])).item() == pytest.approx(floor, abs=1e-4)
    assert math.log(math.e + atoms - 1) - 1 == pytest.approx(floor, abs=1e-4)
    assert math.log(atoms) == pytest.approx(start, abs=1e-4)


def test_the_dictionaries_are_learnt_without_the_student_and_leave_the_teacher_alone() -> None:
    teacher = other()
    before = copy.deepcopy(teacher.state_dict())
    method = SRM(teacher, sparsity=0.2)
    distiller = built(method)
    student = copy.deepcopy(distiller.student.state_dict())
    heads = copy.deepcopy(method.heads.state_dict())
    ran = []
    distiller.student.low.register_forward_hook(lambda *_: ran.append(1))
    optimizer = torch.optim.Adam(distiller.parameters(), 0.02, weight_decay=0.1)
    distiller.enter(0)
    values = []
    for _ in range(30):
        terms = step(distiller)
        assert list(terms.losses) == ["SRM.reconstruction"]
        names = ("centers", "intercept")
        assert trained(distiller) == {f"methods.SRM.dictionaries.{i}.{name}" for i in range(3) for name in names}
        optimizer.step()
        values.append(terms.total().item())
    assert not ran
    assert values[-1] < 0.7 * values[0]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(torch.equal(value, student[name]) for name, value in distiller.student.state_dict().items())
    assert all(torch.equal(value, heads[name]) for name, value in method.heads.state_dict().items())


def test_the_initialisation_trains_the_student_up_to_its_last_tap_and_its_heads() -> None:
    teacher = other()
    before = copy.deepcopy(teacher.state_dict())
    method = SRM(teacher, sparsity=0.2)
    distiller = built(method)
    distiller.enter(1)
    ran = []
    distiller.student.head.register_forward_hook(lambda *_: ran.append(1))
    teacher.head.register_forward_hook(lambda *_: ran.append(1))
    step(distiller)
    ran.clear()
    terms = step(distiller)
    assert not ran
    assert set(terms.losses) == {"SRM.pixel", "SRM.image"}
    missing = {name for name, _ in distiller.named_parameters()} - trained(distiller)
    assert missing == {"student.head.weight", "student.head.bias"} | {
        f"methods.SRM.dictionaries.{i}.{name}" for i in range(3) for name in ("centers", "intercept")
    }
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_terms_are_those_of_the_definition() -> None:
    teacher = other()
    method = SRM(teacher, codewords=2, sparsity=0.2, embedding=False)
    distiller = built(method).eval()
    assert [d.centers.shape for d in method.dictionaries] == [(6, 12), (8, 16)]
    assert [d.centers.shape for d in method.heads] == [(6, 12), (8, 16)]
    assert method.kept == [2, 3]
    theirs, ours = ([m := net.low(IMAGES), net.high(m)] for net in (teacher, distiller.student))
    reconstruction = pixel = image = torch.zeros((), dtype=torch.float64)
    for t, s, dictionary, head, k in zip(theirs, ours, method.dictionaries, method.heads, method.kept, strict=True):
        codes = torch.sigmoid(torch.einsum("ndhw,dm->nmhw", t, dictionary.centers) + dictionary.intercept)
        kth = codes.sort(dim=1, descending=True).values[:, k - 1 : k]
        sparse = codes * (codes >= kth)
        reconstruction = (
            reconstruction + (t - torch.einsum("nmhw,dm->ndhw", sparse, dictionary.centers)).square().mean()
        )
        u = torch.sigmoid(torch.einsum("ndhw,dm->nmhw", s, head.centers) + head.intercept)
        pixel = pixel + nn.functional.cross_entropy(u, codes.argmax(dim=1))
        image = image + nn.functional.binary_cross_entropy(u.mean(dim=(2, 3)), sparse.mean(dim=(2, 3)))
    distiller.enter(0)
    torch.testing.assert_close(distiller((IMAGES, LABELS), 0.0).total(), reconstruction)
    distiller.enter(1)
    terms = distiller((IMAGES, LABELS), 0.0)
    torch.testing.assert_close(terms.losses["SRM.pixel"], pixel)
    torch.testing.assert_close(terms.losses["SRM.image"], image)


def test_local_and_global_add_up_and_raw_logits_are_other_ones() -> None:
    values = {}
    for options in ({}, {"variant": "local"}, {"variant": "global"}, {"pixel_logits": "raw"}):
        distiller = built(SRM(other(), **options)).eval()
        distiller.enter(1)
        values[next(iter(options.values()), "both")] = distiller((IMAGES, LABELS), 0.0)
    assert list(values["local"].losses) == ["SRM.pixel"]
    assert list(values["global"].losses) == ["SRM.image"]
    torch.testing.assert_close(values["local"].total() + values["global"].total(), values["both"].total())
    torch.testing.assert_close(values["raw"].losses["SRM.image"], values["both"].losses["SRM.image"])
    assert values["raw"].losses["SRM.pixel"] != values["both"].losses["SRM.pixel"]


def test_image_labels_do_not_depend_on_where_pixels_are_and_pixel_labels_follow_them() -> None:
    method = SRM(other(), embedding=False)
    built(method)
    dictionary, features = method.dictionaries[0], torch.randn(2, 6, 4, 4, dtype=torch.float64)
    order = torch.randperm(16)
    moved = features.flatten(2)[:, :, order].unflatten(2, (4, 4))
    codes, after = (dictionary(x).sigmoid() for x in (features, moved))
    torch.testing.assert_close(sparsified(codes, 2).mean(dim=(2, 3)), sparsified(after, 2).mean(dim=(2, 3)))
    assert torch.equal(codes.argmax(dim=1).flatten(1)[:, order], after.argmax(dim=1).flatten(1))
    pixel, image = method.labels(IMAGES)[0]
    assert pixel.shape == (6, 8, 8)
    assert image.shape == (6, 12)
    assert not image.requires_grad
    assert 0 <= image.min() <= image.max() < 1


def test_the_main_training_is_kd_and_the_student_keeps_what_it_learnt() -> None:
    teacher = other()
    distiller = built(SRM(teacher, alpha=0.3, temperature=2.0))
    optimizer = torch.optim.SGD(distiller.parameters(), 0.1)
    distiller.enter(1)
    before = distiller.student.low[0].weight.clone()
    step(distiller)
    optimizer.step()
    learnt = distiller.student.low[0].weight.clone()
    assert not torch.equal(before, learnt)
    distiller.enter(None)
    assert torch.equal(distiller.student.low[0].weight, learnt)
    terms = step(distiller)
    ce = nn.functional.cross_entropy(terms.logits, LABELS)
    kl = kl_divergence(terms.logits, teacher(IMAGES), 2.0)
    torch.testing.assert_close(terms.total(), 0.7 * ce + 0.3 * kl)
    assert trained(distiller) == {f"student.{name}" for name, _ in distiller.student.named_parameters()}
    assert not any("SRM" in key for key in distiller.strip(prove_export=False).state_dict())


def test_without_alpha_it_is_plain_cross_entropy() -> None:
    method = SRM(other(), alpha=0.0)
    assert not method.claims
    distiller, plain = built(method), built()
    torch.testing.assert_close(step(distiller).total(), step(plain).total())
    for name, parameter in plain.student.named_parameters():
        torch.testing.assert_close(distiller.student.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize(
    ("options", "channels", "atoms", "kept"),
    [({"codewords": 1.5, "sparsity": 0.01}, 128, 192, 1), ({"codewords": 2.0, "sparsity": 0.02}, 128, 256, 5),
     ({"codewords": 4.0, "sparsity": 0.02}, 64, 256, 5), ({"codewords": 0.5, "sparsity": 1.0}, 9, 4, 4)],
)  # fmt: skip
def test_numbers_of_atoms_and_of_those_kept(options: dict[str, float], channels: int, atoms: int, kept: int) -> None:
    teacher = nn.Sequential(
        nn.Conv2d(3, channels, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)
    ).double()
    method = SRM(teacher, **options, stages=("high",))
    built(method)
    assert method.dictionaries[0].centers.shape == (channels, atoms)
    assert method.heads[0].centers.shape == (8, atoms)
    assert method.kept == [kept, kept]


def test_maps_of_other_sizes_are_pooled_in_both_phases() -> None:
    teacher = Teacher(other(), image_size=32)
    method = SRM(teacher, embedding=False)
    distiller = built(method).eval()
    seen = nn.functional.interpolate(IMAGES, size=(32, 32), mode="bilinear", antialias=True)
    low = nn.functional.adaptive_avg_pool2d(teacher.network.low(seen), 8)
    codes = method.dictionaries[0](low).sigmoid()
    assert torch.equal(method.labels(IMAGES)[0].pixel, codes.argmax(dim=1))
    for number in (0, 1):
        distiller.enter(number)
        assert distiller((IMAGES, LABELS), 0.0).total().isfinite()


def test_phases_take_the_recipes_shares() -> None:
    distiller = built(SRM(other()))

    def lengths(epochs: int) -> tuple[int, int]:
        found = []
        for epoch in range(epochs):
            distiller.epoch_start(epoch, epochs)
            found.append(distiller.phase.name if distiller.phase else "")
        return found.count("dictionary"), found.count("initialisation")

    assert lengths(460) == (100, 160)
    assert lengths(46) == (10, 16)
    assert lengths(3) == (1, 1)


def test_a_teacher_without_classifier_and_a_student_without_one() -> None:
    class Convolutional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
            self.high = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU())
            self.head = nn.Conv2d(8, 3, 1)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.high(self.low(images))).mean(dim=(2, 3))

    torch.manual_seed(1)
    method = SRM(Convolutional().double())
    distiller = built(method, student=Convolutional().double())
    for number in (0, 1, None):
        distiller.enter(number)
        assert step(distiller).total().isfinite()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SRM([]), "SRM needs at least one trained teacher"),
        (lambda: SRM([other(), other()]), "of one teacher, not of 2"),
        (lambda: SRM(other(), codewords=0), "codewords must be positive, not 0"),
        (lambda: SRM(other(), codewords=0.1), "0.1 leave no atom for 6 channels"),
        (lambda: SRM(other(), sparsity=0), "a share of the atoms"),
        (lambda: SRM(other(), variant="both"), "'local' or 'global', not 'both'"),
        (lambda: SRM(other(), pixel_logits="no"), "'sigmoid' or 'raw', not 'no'"),
        (lambda: SRM(other(), alpha=1.5), r"in \[0, 1\], not 1.5"),
        (lambda: SRM(other(), temperature=0), "temperature must be positive"),
        (lambda: SRM(other(), dictionary=0.5, initialisation=0.5), "shares of 0.5 and 0.5 of the run"),
        (lambda: SRM(other(), stages=("low",)), "cannot pair the student's layers"),
        (lambda: SRM(other(classes=4)), "teacher"),
    ],
)
def test_what_cannot_work_is_refused(make: object, sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence):
        built(make())


def test_it_sets_the_task_weight() -> None:
    teacher = other()
    with pytest.raises(AttarError, match="SRM and KD cannot be combined, since both set the task weight"):
        built(SRM(teacher), attar.methods.KD(teacher))


class TestAViTFromACNN(MethodContract):
    def method(self) -> attar.Method:
        torch.manual_seed(9)
        return SRM(HandWritten(self.num_classes))

    def student(self) -> nn.Module:
        return timm.create_model(
            "vit_tiny_patch16_224", num_classes=self.num_classes, img_size=32, patch_size=8, depth=2
        )
