"""Teachers asked once: the same training, their forwards counted, interruptions, several processes, bad files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attar
from attar.data import AUGMENTATIONS, Loader, make_sampler, open_source
from attar.errors import AttarError
from attar.methods import KD
from attar.spec import TrainSpec
from attar.teacher import Teacher
from attar.train import Interrupted, fit
from attar.train.teacher_cache import TeacherMemory
from networks import IMAGES, LABELS, Net
from runs import assert_same_run, lines, quiet, tiny, train_as_rank, two_ranks

One = tuple[Path, TrainSpec, dict[str, Any]]


def spec_of(one_run: One, *more: str | dict[str, Any], **fields: Any) -> TrainSpec:
    taught = {"name": "KD", "options": {"teachers": [str(one_run[0])]}}
    defaults = {"augment": "crop-flip", "augment_cycle": 1, "epochs": 3, "log_every": 1, "lr": 0.002}
    return tiny(taught, *more, **{**defaults, **fields})


def losses(folder: Path) -> list[dict[str, float]]:
    return [line["losses"] for line in lines(folder, "step")]


def assert_alike(folder: Path, reference: Path, exact: int) -> None:
    """The first steps to the last bit; later ones as near as a teacher's answers in other batches are."""
    one, other = losses(folder), losses(reference)
    assert len(one) == len(other) > exact
    assert one[:exact] == other[:exact]
    for here, there in zip(one, other, strict=True):
        assert here == pytest.approx(there, rel=2e-6, abs=1e-6)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each forward of a teacher saw."""
    numbers: list[int] = []
    forward = Teacher.__call__

    def counted(self: Teacher, images: Tensor) -> Tensor:
        numbers.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Teacher, "__call__", counted)
    return numbers


class Sums(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([images.sum(dim=(1, 2, 3)), images[:, 0, 0, 0]], dim=1)


def memory(**sizes: int) -> TeacherMemory:
    shape = {"slots": 2, "views": 2, "samples": 10, "classes": 2, **sizes}
    return TeacherMemory(Teacher(Sums()), device=torch.device("cpu"), **shape)


def test_a_memory_answers_for_image_view_and_slot(asked: list[int]) -> None:
    remembered, generator = memory(), torch.Generator().manual_seed(0)
    looks = torch.randn(2, 2, 10, 1, 2, 2, generator=generator)  # slot, view, sample
    order = [np.array([[3, 1, 4], [9, 0, 2]]), np.array([[0, 9, 3], [5, 1, 1]]), np.array([[4, 3, 9], [0, 1, 2]])]
    for epoch, steps in enumerate(order):
        remembered.begin(epoch, list(steps))
        for index in steps:
            images = torch.cat([looks[epoch % 2, view, index] for view in range(2)])
            remembered.fill(images)
            answer = remembered.read(torch.from_numpy(np.tile(index, 2)), 2)
            torch.testing.assert_close(answer, Sums()(images), rtol=0, atol=0)
    # Epoch 1 has a slot of its own and an image twice in a batch; epoch 2 has the slot of epoch 0.
    assert asked == [6, 6, 6, 6]
    assert remembered.known.sum() == 2 * 6 + 2 * 5
    # A batch of one view only.
    remembered.begin(4, [])
    assert torch.equal(remembered.read(torch.tensor([2, 3]), 1), Sums()(looks[0, 0, [2, 3]]))


def test_only_what_is_unknown_is_asked(asked: list[int]) -> None:
    remembered = memory(slots=1, views=1)
    looks = torch.randn(10, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for epoch, index in enumerate([np.array([0, 1, 2]), np.array([7, 2, 0])]):
        remembered.begin(epoch, [index])
        remembered.fill(looks[index])
        torch.testing.assert_close(remembered.read(torch.from_numpy(index), 1), Sums()(looks[index]))
    assert asked == [3, 1]


def test_a_compiled_step_is_one_graph_for_all_slots() -> None:
    teacher = Teacher(Net().double())
    distiller = attar.Distiller(Net().double(), [KD(teacher)], attar.Classification(3)).build(IMAGES).train()
    remembered = TeacherMemory(teacher, slots=3, views=1, samples=6, classes=3, device=torch.device("cpu"))
    index = np.arange(6)
    graphs, losses = [], []

    def counting(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(distiller, fullgraph=True, backend=counting)
    for slot in range(3):
        images = IMAGES.roll(slot, dims=-1)
        batch = attar.Batch(images, LABELS, torch.from_numpy(index), LABELS)
        asked = distiller(batch, torch.tensor(0.5))
        teacher.memory = remembered
        remembered.begin(slot, [index])
        remembered.fill(images)
        told = compiled(batch, torch.tensor(0.5))
        teacher.memory = None
        losses.append((told.losses["KD.kl"].item(), asked.losses["KD.kl"].item()))
    assert len(graphs) == 1
    assert [one for one, _ in losses] == pytest.approx([other for _, other in losses], abs=1e-6)
    assert min(abs(losses[0][0] - losses[1][0]), abs(losses[1][0] - losses[2][0])) > 1e-5


def test_too_large_a_memory_is_one_sentence() -> None:
    with pytest.raises(AttarError, match=r"in 2000000 augmentations takes 8000000.0 GB.*smaller augment_cycle"):
        memory(samples=10**6, slots=10**6, classes=1000)


def test_augmentations_come_again_in_another_order() -> None:
    source = open_source("digits")
    sampler = make_sampler(None, source.train.targets, 32, 0, True, 1)

    def epoch(number: int, cycle: int | None) -> tuple[list[int], dict[int, Tensor]]:
        loader = Loader(source.train, sampler, AUGMENTATIONS["strong"], (source.mean, source.std), cycle=cycle)
        samples = list(loader.epoch(number))
        index = torch.cat([sample.index for sample in samples]).tolist()
        assert index == np.concatenate(loader.numbers(number)).tolist()
        return index, dict(zip(index, torch.cat([sample.images for sample in samples]), strict=True))

    (order, images), (later, again), (_, between) = epoch(1, 3), epoch(4, 3), epoch(2, 3)
    assert order != later
    both = images.keys() & again.keys() & between.keys()
    assert all(torch.equal(images[number], again[number]) for number in both)
    assert not all(torch.equal(images[number], between[number]) for number in both)
    # Without a cycle epoch 1 is what it was and epoch 4 is new.
    assert all(torch.equal(image, images[number]) for number, image in epoch(1, None)[1].items())
    assert not all(torch.equal(image, again[number]) for number, image in epoch(4, None)[1].items())


@pytest.mark.parametrize("cycle", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_that_remembers_is_the_run_that_asks(cycle: int, tmp_path: Path, one_run: One, asked: list[int]) -> None:
    spec = spec_of(one_run, augment_cycle=cycle)
    uncached = fit(spec, tmp_path / "uncached", console=quiet())
    assert len(asked) == 1 + 24 + 1  # the probe, three epochs, and the step whose operations are counted
    asked.clear()
    cached = fit(spec.model_copy(update={"cache_teachers": True}), tmp_path / "cached", console=quiet())
    assert asked == [2, *[32] * (8 * cycle), 32]
    assert_alike(tmp_path / "cached", tmp_path / "uncached", 8 * cycle + 1)
    assert cached["test"]["nll"] == pytest.approx(uncached["test"]["nll"], rel=1e-3)
    assert len(list((tmp_path / "cached/teacher_logits/KD-1").iterdir())) == cycle
    # Operations are those of a mean epoch.
    teacher = uncached["flops"]["deployed"]
    saved = uncached["flops"]["training"] - cached["flops"]["training"]
    assert saved == pytest.approx(teacher * (1 - cycle / 3), rel=1e-3)
    # Another cycle is another training.
    other = fit(spec_of(one_run, augment_cycle=3 - cycle), tmp_path / "other", console=quiet())
    assert other["terms"] != uncached["terms"]


def test_stopped_inside_an_epoch_it_ends_bit_identical(tmp_path: Path, one_run: One) -> None:
    # 26 images a epoch are left out, so that later epochs ask about a few; partners stand beside the images.
    spec = spec_of(one_run, "CSKD", train_limit=250, cache_teachers=True)
    fit(spec, tmp_path / "whole", console=quiet())
    for stop in (3, 10):
        with pytest.raises(Interrupted):
            fit(spec, tmp_path / f"stopped{stop}", console=quiet(), stop_after=stop)
        fit(spec, tmp_path / f"stopped{stop}", console=quiet())
        assert_same_run(tmp_path / f"stopped{stop}", tmp_path / "whole")


def test_two_processes_share_what_they_were_told(tmp_path: Path, one_run: One) -> None:
    spec = spec_of(one_run, train_limit=250, log_every=2)
    cached = spec.model_copy(update={"cache_teachers": True})
    assert two_ranks(train_as_rank, spec, tmp_path / "uncached", None) == [0, 0]
    assert two_ranks(train_as_rank, cached, tmp_path / "cached", None) == [0, 0]
    assert_alike(tmp_path / "cached", tmp_path / "uncached", 3)
    assert two_ranks(train_as_rank, cached, tmp_path / "stopped", 9) == [130, 130]
    assert two_ranks(train_as_rank, cached, tmp_path / "stopped", None) == [0, 0]
    assert losses(tmp_path / "stopped") == losses(tmp_path / "cached")
    weights = [(tmp_path / name / "student/model.safetensors").read_bytes() for name in ("stopped", "cached")]
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def whole_and_stopped(one_run: One, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one run twice: as it ends, and stopped in its second epoch."""
    folder, spec = tmp_path_factory.mktemp("cached"), spec_of(one_run, cache_teachers=True)
    fit(spec, folder / "whole", console=quiet())
    with pytest.raises(Interrupted):
        fit(spec, folder / "run", console=quiet(), stop_after=10)
    return folder


@pytest.mark.parametrize("harm", ["cut", "bit", "teacher"])
def test_what_is_damaged_or_of_another_teacher_is_asked_anew(
    harm: str, tmp_path: Path, one_run: One, whole_and_stopped: Path, asked: list[int]
) -> None:
    spec = spec_of(one_run, cache_teachers=True)
    shutil.copytree(whole_and_stopped, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "run/teacher_logits/KD-1/slot_00000.safetensors"
    content = bytearray(path.read_bytes())
    if harm == "cut":
        path.write_bytes(content[:-100])
    elif harm == "bit":
        content[-2000] ^= 64
        path.write_bytes(content)
    else:
        other = fit(tiny("ONE", seed=1), tmp_path / "other", console=quiet())
        assert other["seed"] == 1
        spec_other = tiny({"name": "KD", "options": {"teachers": [str(tmp_path / "other")]}}, **_fields(spec))
        with pytest.raises(Interrupted):
            fit(spec_other, tmp_path / "run2", console=quiet(), stop_after=10)
        path.write_bytes((tmp_path / "run2/teacher_logits/KD-1/slot_00000.safetensors").read_bytes())
    asked.clear()
    with pytest.warns(UserWarning, match="is damaged, or is not what this run's teacher .* says: it is asked anew"):
        fit(spec, tmp_path / "run", console=quiet())
    # Two steps of the second epoch are done: the six that are left are asked, and in the third what the two had.
    assert asked[:7] == [2, *[32] * 6]
    assert sum(asked) == 2 + 256 + 32
    assert_alike(tmp_path / "run", tmp_path / "whole", 10)


def _fields(spec: TrainSpec) -> dict[str, Any]:
    return {name: value for name, value in spec.model_dump(exclude_defaults=True).items() if name != "methods"}


def test_without_random_augmentation_no_cycle_is_needed(tmp_path: Path, one_run: One, asked: list[int]) -> None:
    spec = spec_of(one_run, augment="none", augment_cycle=None, cache_teachers=True, epochs=2)
    fit(spec, tmp_path / "run", console=quiet())
    assert asked == [2, *[32] * 8, 32]


def test_overwriting_begins_with_nothing(tmp_path: Path, one_run: One, asked: list[int]) -> None:
    spec = spec_of(one_run, epochs=1, cache_teachers=True)
    for overwrite in (False, True):
        asked.clear()
        fit(spec, tmp_path / "run", overwrite=overwrite, console=quiet())
        assert len(asked) == 1 + 8 + 1


@pytest.mark.parametrize(
    ("methods", "fields", "said"),
    [
        ([], {}, "no method of this run has one"),
        (["KD"], {"augment_cycle": None}, "'crop-flip' draws new ones in every epoch: set augment_cycle"),
        (["KD", {"name": "Supervised", "options": {"mixup": 0.2}}], {}, "that Supervised mixes anew in every step"),
        (["PKT"], {}, "PKT does not learn from its teachers' logits alone"),
        (["KD", "AT"], {}, "AT does not learn from its teachers' logits alone"),
    ],
)
def test_refusals(methods: list[Any], fields: dict[str, Any], said: str, tmp_path: Path, one_run: One) -> None:
    taught = [
        {"name": method, "options": {"teachers": [str(one_run[0])]}} if isinstance(method, str) else method
        for method in methods
    ]
    chosen = {"augment": "crop-flip", "augment_cycle": 1, "cache_teachers": True, **fields}
    with pytest.raises(AttarError, match=said):
        fit(tiny(*taught, **chosen), tmp_path / "run", console=quiet())
    assert not (tmp_path / "run").exists()


def test_earlier_runs_keep_their_names() -> None:
    assert "augment_cycle" not in json.dumps(tiny().model_dump(mode="json", exclude_defaults=True))
    assert tiny().fingerprint() == tiny(augment_cycle=None, cache_teachers=False).fingerprint()
    assert len({tiny().fingerprint(), tiny(augment_cycle=1).fingerprint()}) == 2
