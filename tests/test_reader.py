"""Reading a frozen teacher: values, what runs, and which stage belongs to which."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from attar.anatomy import Stage, Tap, survey
from attar.errors import AttarError
from attar.reader import TeacherStages, as_teachers, chosen_stages, paired_stages, teacher_anatomy
from attar.teacher import Normalization, Teacher
from networks import IMAGES, Net


def teacher(**options: object) -> Teacher:
    torch.manual_seed(3)
    return Teacher(Net(batch_norm=True).double(), **options)


def test_everything_is_read_from_one_forward() -> None:
    given = teacher()
    anatomy = teacher_anatomy(given, IMAGES)
    reader = TeacherStages(given, IMAGES, anatomy, anatomy.stages, embedding=True, logits=True)
    passes = []
    given.network.register_forward_hook(lambda *_: passes.append(1))
    reading = reader(IMAGES)
    assert len(passes) == 1
    low = given.network.low(IMAGES)
    high = given.network.high(low)
    torch.testing.assert_close(reading.stages, [low, high])
    torch.testing.assert_close(reading.embedding, high.mean(dim=(2, 3)))
    torch.testing.assert_close(reading.logits, given.network(IMAGES))
    assert not any(value.requires_grad for value in (*reading.stages, reading.embedding, reading.logits))


@pytest.mark.parametrize(
    ("names", "embedding", "ran"),
    [
        (("low",), False, {"low"}),
        (("high.0", "low"), False, {"low", "high"}),
        (("low", "high"), False, {"low", "high", "high.2"}),
        (("low",), True, {"low", "high", "high.2"}),
    ],
)
def test_the_pass_ends_behind_what_is_read(names: tuple[str, ...], embedding: bool, ran: set[str]) -> None:
    given = teacher()
    anatomy = teacher_anatomy(given, IMAGES)
    stages = chosen_stages(anatomy, names, "all")
    reader = TeacherStages(given, IMAGES, anatomy, stages, embedding=embedding)
    seen = set()
    for name in ("low", "high", "high.2", "head"):
        given.network.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: seen.add(name))
    first, second = reader(IMAGES), reader(IMAGES.flip(0))
    assert seen == ran
    torch.testing.assert_close(first.stages[0].flip(0), second.stages[0])
    # Others who ask the same teacher get its whole answer.
    assert given(IMAGES).shape == (6, 3)
    assert "head" in seen


def test_a_module_that_runs_twice_does_not_end_the_pass() -> None:
    class Twice(Net):
        def forward(self, images: Tensor) -> Tensor:
            low = self.low(images)
            self.low(images.flip(0))
            return self.head(self.high(low).mean(dim=(2, 3)))

    given = Teacher(Twice().double())
    anatomy = teacher_anatomy(given, IMAGES)
    reading = TeacherStages(given, IMAGES, anatomy, [anatomy.find("low")])(IMAGES)
    torch.testing.assert_close(reading.stages, [given.network.low(IMAGES.flip(0))])


def test_what_was_not_asked_for_is_not_there() -> None:
    given = teacher()
    anatomy = teacher_anatomy(given, IMAGES)
    reading = TeacherStages(given, IMAGES, anatomy, anatomy.stages)(IMAGES)
    with pytest.raises(TypeError, match="embedding=True"):
        _ = reading.embedding
    with pytest.raises(TypeError, match="logits=True"):
        _ = reading.logits


def test_it_follows_the_teacher_in_normalisation_size_and_precision() -> None:
    given = teacher(normalization=((0.1,) * 3, (2.0,) * 3), image_size=24)
    given.adapt(Normalization((0.5,) * 3, (0.25,) * 3), IMAGES)
    anatomy = teacher_anatomy(given, IMAGES)
    assert anatomy.input_shape == (3, 24, 24)
    reader = TeacherStages(given, IMAGES, anatomy, anatomy.stages, logits=True)
    reading = reader(IMAGES)
    torch.testing.assert_close(reading.logits, given(IMAGES))
    assert reading.stages[0].shape[2:] == (12, 12)
    given.apply(lambda tensor: tensor.float())
    assert reader(IMAGES.float()).stages[0].dtype == torch.float32


def test_tokens_become_maps_and_without_a_classifier_the_last_stage_is_pooled() -> None:
    given = Teacher(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=5))
    images = torch.randn(2, 3, 32, 32)
    anatomy = teacher_anatomy(given, images)
    reading = TeacherStages(given, images, anatomy, anatomy.stages, embedding=True)(images)
    assert [tuple(map_.shape) for map_ in reading.stages] == [(2, 192, 4, 4)] * 4
    assert reading.embedding.shape == (2, 192)

    torch.manual_seed(0)
    headless = Teacher(nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 6, 3, 2), nn.AdaptiveAvgPool2d(1)))
    anatomy = teacher_anatomy(headless, images)
    reading = TeacherStages(headless, images, anatomy, anatomy.stages[:1], embedding=True)(images)
    torch.testing.assert_close(reading.embedding, headless.network(images).flatten(1))


def test_a_refused_image_size_is_a_sentence() -> None:
    given = Teacher(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=5))
    with pytest.raises(AttarError, match=r"VisionTransformer refuses images of shape \[3, 32, 32\]"):
        teacher_anatomy(given, torch.randn(2, 3, 32, 32))


def test_a_method_that_needs_a_teacher_says_so() -> None:
    net = Net()
    assert [given.network for given in as_teachers([net, Teacher(net)], "AT")] == [net, net]
    with pytest.raises(AttarError, match="AT needs at least one trained teacher"):
        as_teachers([], "AT")


def stages(*sides: int, prefix: str = "s") -> list[Stage]:
    return [Stage(f"{prefix}{i}", 4, side, side, 1.0, Tap(f"{prefix}{i}")) for i, side in enumerate(sides)]


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ((8, 4, 2), (32, 16, 8), [(0, 0), (1, 1), (2, 2)]),  # equally many: in order
        ((32, 16, 8, 4), (16, 8, 4), [(1, 0), (2, 1), (3, 2)]),
        ((32, 16, 8), (56, 28, 14, 7), [(0, 1), (1, 2), (2, 3)]),
        ((32, 16, 8), (32, 16, 8, 4), [(0, 0), (1, 1), (2, 2)]),
        ((8, 8, 8, 8), (16, 8, 4), [(1, 0), (2, 1), (3, 2)]),  # nothing decides: the deeper ones
        ((7,), (56, 28, 14, 7), [(0, 3)]),
    ],
)
def test_pairs(ours: tuple[int, ...], theirs: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    found = paired_stages(stages(*ours), stages(*theirs, prefix="t"), method="AT")
    assert [(a.name, b.name) for a, b in found] == [(f"s{i}", f"t{j}") for i, j in expected]


def test_named_stages_are_never_left_out() -> None:
    sentence = r"AT cannot pair the student's layers \(s0, s1\) with the teacher's \(t0\): name as many"
    with pytest.raises(AttarError, match=sentence):
        paired_stages(stages(8, 4), stages(4, prefix="t"), method="AT", named=True)


def test_last_middle_and_all() -> None:
    anatomy, _ = survey(Net().double(), IMAGES)
    assert [stage.name for stage in chosen_stages(anatomy, None, "last")] == ["high"]
    assert [stage.name for stage in chosen_stages(anatomy, None, "middle")] == ["low"]
    assert [stage.name for stage in chosen_stages(anatomy, ("high.0", "low"), "last")] == ["high.0", "low"]
