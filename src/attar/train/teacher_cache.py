"""Teachers' answers, asked once and remembered: on the device while a run trains, on disk for when it goes on."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from attar.data.augment import Augmentation
from attar.data.joint import JointAugmentation
from attar.distiller import Distiller
from attar.errors import AttarError
from attar.method import Method
from attar.teacher import Teacher
from attar.train.distributed import Ranks
from attar.train.files import storage_errors, write_atomically

__all__ = ["TeacherCache", "TeacherMemory", "refuse_cache", "slots"]

_FORMAT = "1"

Numbers = NDArray[np.int64]


def slots(augmentation: Augmentation | JointAugmentation, cycle: int | None) -> int | None:
    """Return in how many ways an image and view may look in the course of a run; None: without end."""
    return cycle if augmentation.random else 1


def refuse_cache(distiller: Distiller, augmentation: Augmentation | JointAugmentation, cycle: int | None) -> None:
    """Raise where what teachers say cannot be remembered.

    Raises:
        AttarError: there is no teacher, one is asked for more than logits, it never sees the same image twice, or it
            answers for every pixel.
    """
    if distiller.task.dense:
        raise AttarError(
            "cache_teachers remembers one answer for an image, and in segmentation there is one for every pixel: "
            "leave it out."
        )
    methods = [method for method in distiller.methods.values() if isinstance(method, Method)]
    taught = [method for method in methods if method.teachers]
    if not taught:
        raise AttarError("cache_teachers remembers what teachers say, and no method of this run has one: leave it out.")
    for method in taught:
        if not method.asks_logits_only:
            raise AttarError(
                f"{method.name} does not learn from its teachers' logits alone, which is all that cache_teachers "
                "remembers: leave it out."
            )
    for method in methods:
        if "labels" in method.breaks:
            raise AttarError(
                f"cache_teachers cannot remember answers about the images that {method.name} mixes anew in every step: "
                "leave one of the two out."
            )
    if slots(augmentation, cycle) is None:
        raise AttarError(
            f"cache_teachers needs images that come again, and the augmentation '{augmentation.name}' draws new ones "
            "in every epoch: set augment_cycle to the number of epochs after which it repeats itself."
        )


class TeacherMemory:
    """What one teacher has answered about every image in each of its augmentations.

    Logits lie on the device, float32 [slots * views * samples, K]; epoch e has slot e mod slots. Which of them are
    known is the host's knowledge, as is which images every step brings, so no step waits for the device.

    Args:
        teacher: whom to ask.
        slots: after so many epochs the augmentations come again.
        views: of every image in a batch.
        samples: one more than the largest image number.
        classes: K.
        device: where the run computes.

    Raises:
        AttarError: the device has not enough memory.
    """

    def __init__(
        self, teacher: Teacher, *, slots: int, views: int, samples: int, classes: int, device: torch.device
    ) -> None:
        self.teacher = teacher
        self.slots, self.views, self.samples = slots, views, samples
        rows = views * samples
        try:
            self.logits = torch.zeros(slots * rows, classes, device=device)
        except RuntimeError as error:  # out of memory
            raise AttarError(
                f"What the {teacher.name} says about {samples} images in {slots * views} augmentations takes "
                f"{4e-9 * slots * rows * classes:.1f} GB, which cannot be had: choose a smaller augment_cycle."
            ) from error
        self.known = np.zeros((slots, rows), dtype=bool)
        self.slot = 0
        self.fresh = False
        self._begin = torch.zeros((), dtype=torch.int64, device=device)
        self._plan: deque[tuple[Numbers, Numbers]] = deque()

    def read(self, index: Tensor, views: int) -> Tensor:
        """Return the logits [V*N, K] for the images `index` [V*N] of a batch of this epoch."""
        first = self._begin + self.samples * torch.arange(views, device=index.device)
        return self.logits.index_select(0, (index.view(views, -1) + first[:, None]).flatten())

    def begin(self, epoch: int, steps: Sequence[Numbers]) -> None:
        """Learn which images [N] every step that is left of the epoch brings."""
        self.slot = epoch % self.slots
        self._begin.fill_(self.slot * self.views * self.samples)
        known = self.known[self.slot].copy()
        self._plan.clear()
        for index in steps:
            rows = (self.samples * np.arange(self.views)[:, None] + index).reshape(-1)
            self._plan.append((rows, np.flatnonzero(~known[rows])))
            known[rows] = True

    def fill(self, images: Tensor) -> None:
        """Ask the teacher about those of the next step's images [V*N, C, H, W] that it has not been asked about."""
        rows, unknown = self._plan.popleft()
        if len(unknown) == 0:
            return
        asked = images if len(unknown) == len(rows) else images.index_select(0, _moved(unknown, images.device))
        # The same image may stand in a batch twice.
        places, first = np.unique(rows[unknown], return_index=True)
        answers = self.teacher(asked).float().index_select(0, _moved(first, images.device))
        self.logits.index_copy_(0, self._begin + _moved(places, images.device), answers)
        self.known[self.slot, places] = True
        self.fresh = True

    def part(self, slot: int) -> Tensor:
        """Return the rows [views * samples, K] of one slot, to read or to write."""
        return self.logits.view(self.slots, self.views * self.samples, -1)[slot]

    def merged(self, ranks: Ranks) -> tuple[Tensor, NDArray[np.bool_]]:
        """Return this epoch's slot with what all processes know; the first that knows a row has its say."""
        part, known = self.part(self.slot), torch.from_numpy(self.known[self.slot])
        if ranks.world == 1:
            return part, self.known[self.slot]
        owner = ranks.minimum(torch.where(known, ranks.rank, ranks.world))
        mine = (owner == ranks.rank).to(part.device)
        return ranks.sum(torch.where(mine[:, None], part, 0.0)), (owner < ranks.world).numpy()


class TeacherCache:
    """The memories of all teachers of a run, each in a folder of its own with one file per slot.

    Args:
        memories: by name.
        fingerprints: by the same names, of all that the answers depend on.
        folder: where they are kept.
        ranks: the processes of the run; the first one reads and writes.
    """

    def __init__(
        self, memories: dict[str, TeacherMemory], fingerprints: dict[str, str], folder: Path, ranks: Ranks
    ) -> None:
        self.memories = memories
        self.fingerprints = fingerprints
        self.folder = folder
        self.ranks = ranks

    @property
    def slots(self) -> int:
        """For how many epochs teachers are asked."""
        return next(iter(self.memories.values())).slots

    @classmethod
    def open(
        cls,
        distiller: Distiller,
        folder: Path,
        ranks: Ranks,
        *,
        slots: int,
        samples: int,
        depends_on: dict[str, Any],
    ) -> TeacherCache:
        """Give every teacher of a built distiller a memory, with what an earlier sitting has left in the folder.

        Args:
            depends_on: what else the answers depend on, as JSON takes it: the images, how they are changed, precision.
        """
        memories, fingerprints = {}, {}
        for name, teacher in _teachers(distiller).items():
            memory = TeacherMemory(
                teacher,
                slots=slots,
                views=distiller.views,
                samples=samples,
                classes=distiller.task.num_classes,
                device=ranks.device,
            )
            settings = {**depends_on, "slots": slots, "views": distiller.views, "samples": samples}
            memories[name], fingerprints[name] = memory, _fingerprint(teacher, settings)
            teacher.memory = memory
        cache = cls(memories, fingerprints, folder, ranks)
        cache._load()
        return cache

    def begin(self, epoch: int, steps: Sequence[Numbers]) -> None:
        """Learn which images every step that is left of the epoch brings to this process."""
        for memory in self.memories.values():
            memory.begin(epoch, steps)

    def fill(self, images: Tensor) -> None:
        """Before a step, let every teacher answer what it has not been asked yet about its images."""
        for memory in self.memories.values():
            memory.fill(images)

    def save(self, *, epoch_ends: bool) -> None:
        """Write what is new; all processes call it together, and know the same once an epoch has ended."""
        for name, memory in self.memories.items():
            if not self.ranks.any([memory.fresh])[0]:
                continue
            logits, known = memory.merged(self.ranks)
            path = self._path(name, memory.slot)
            print_ = self.fingerprints[name]
            self.ranks.on_first(lambda: _write(path, logits, known, print_))  # noqa: B023  # called at once
            if epoch_ends:
                # Not before: when checkpoints are due depends on the clock, and what a process computes must not.
                memory.part(memory.slot).copy_(logits)
                memory.known[memory.slot] = known
                memory.fresh = False

    @contextmanager
    def forgotten(self) -> Iterator[None]:
        """Let the teachers answer for themselves meanwhile."""
        for memory in self.memories.values():
            memory.teacher.memory = None
        try:
            yield
        finally:
            for memory in self.memories.values():
                memory.teacher.memory = memory

    def _load(self) -> None:
        for name, memory in self.memories.items():
            self.ranks.on_first(lambda: self._read(name, memory))  # noqa: B023  # called at once
            memory.known = self.ranks.on_first(lambda: memory.known)  # noqa: B023
            if memory.known.any():
                self.ranks.share([memory.logits])

    def _read(self, name: str, memory: TeacherMemory) -> None:
        for slot in range(memory.slots):
            path = self._path(name, slot)
            if not path.is_file():
                continue
            found = _read(path, self.fingerprints[name])
            if found is None:
                warnings.warn(
                    f"'{path}' is damaged, or is not what this run's {memory.teacher.name} says: it is asked anew.",
                    stacklevel=2,
                )
                continue
            memory.part(slot).copy_(found[0])
            memory.known[slot] = found[1]

    def _path(self, name: str, slot: int) -> Path:
        return self.folder / name / f"slot_{slot:05d}.safetensors"


def _teachers(distiller: Distiller) -> dict[str, Teacher]:
    """Every teacher once, by its method and number."""
    found: dict[str, Teacher] = {}
    for method in distiller.methods.values():
        assert isinstance(method, Method)
        for number, teacher in enumerate(method.teachers, 1):
            if all(teacher is not other for other in found.values()):
                found[f"{method.name}-{number}"] = teacher
    return found


def _fingerprint(teacher: Teacher, settings: dict[str, Any]) -> str:
    about = [type(teacher.network).__qualname__, teacher.normalization, teacher.image_size, settings]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, value in sorted(teacher.network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(path: Path, logits: Tensor, known: NDArray[np.bool_], fingerprint: str) -> None:
    tensors = {"logits": logits.cpu().contiguous(), "known": torch.from_numpy(known.copy())}
    about = {"format": _FORMAT, "fingerprint": fingerprint, "checksum": _checksum(tensors)}
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.torch.save(tensors, about))


def _read(path: Path, fingerprint: str) -> tuple[Tensor, NDArray[np.bool_]] | None:
    """Return what `_write` has written; None where it is not whole, or answers to other questions."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("format") != _FORMAT or about.get("fingerprint") != fingerprint:
                return None
            tensors = {name: file.get_tensor(name) for name in ("logits", "known")}
    except (OSError, safetensors.SafetensorError):
        return None
    # safetensors has no checksum of its own.
    if about.get("checksum") != _checksum(tensors):
        return None
    return tensors["logits"], tensors["known"].numpy()


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _moved(values: Numbers, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
