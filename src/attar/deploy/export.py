"""Export: the stripped student written, gated, measured in its own runtime, and put into one folder."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attar import __version__
from attar.data import Normalization
from attar.deploy.artefact import Candidate, Format, Images, Runtime, Settings
from attar.deploy.aside import refuse_present, written_aside
from attar.deploy.candidate import crop_of, load_candidate
from attar.deploy.card import write_card, write_inference
from attar.deploy.formats import find_format
from attar.deploy.gate import gate, refuse_drop, refuse_miou_drop
from attar.deploy.latency import measure_latency, measure_memory
from attar.deploy.onnx import ONNX, annotate
from attar.deploy.packaged import package
from attar.deploy.quantize import FEWEST_IMAGES, calibration_images
from attar.deploy.report import Accuracy, Int8, Report, metadata
from attar.deploy.running import PIXELS, as_pixels, load_images, measure_runtime, some_of
from attar.errors import AttarError
from attar.train.files import read_json, storage_errors, write_json
from attar.train.segmentation import PixelPredictions

__all__ = ["Exported", "Progress", "export_run", "load_export"]

# Told what is being done, and the share of it that is done (None: not known).
Progress = Callable[[str, float | None], None]

_GATED = 256  # real images at the gate
_GATED_LOGITS = 1 << 24  # of dense networks at the gate: every pixel answers
_JUDGED = 2000  # hold-out images that tell what quantising a layer costs
_LEAST_AGREEMENT = 0.8
_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "executorch": ("executorch", "torchao"),
    "openvino": ("openvino",),
    "torch": ("timm", "safetensors"),
}


@dataclass(frozen=True)
class Exported:
    """An export.

    Attributes:
        folder: where it is.
        report: what `export.json` says.
        runtime: the loaded artefact.
    """

    folder: Path
    report: Report
    runtime: Runtime


def export_run(
    run: str | Path | Candidate,
    format: str = "onnx",
    *,
    int8: bool = False,
    image_size: tuple[int, int] | None = None,
    batch: int | None = 1,
    deployable: str | None = None,
    packaged: bool = False,
    opset: int | None = None,
    calibration: int = 256,
    most_drop: float = 0.01,
    qat: int | None = None,
    seed: int = 0,
    data: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Export the network of a finished run: write it, gate it, measure it, tell how it is loaded.

    The folder appears when all of that is done, or not at all. A second export of the same run writes the same
    artefact and the same numbers, times apart.

    Args:
        run: a run folder, or a candidate.
        format: `onnx`, `executorch`, `openvino` or `torch`.
        int8: quantise weights and activations, calibrated on training images.
        image_size: (H, W); default: the training's. A candidate has its own, and its own deployable and data.
        batch: images at a time; None: any number, where the format can.
        deployable: another network of the run than the plain student (see `load_candidate`).
        packaged: ONNX alone: the artefact takes uint8 images [N, H, W, 3] and gives probabilities.
        opset: of ONNX.
        calibration: training images that fix the ranges of activations: 32 or more, and one of every class.
        most_drop: share of accuracy that int8 may cost; layers that cost more stay in float32 (onnx, openvino), or the
            artefact is refused (executorch, and where half of the layers are not enough).
        qat: for int8: epochs of quantisation-aware distillation before it, the float32 student teaching its int8 self.
        seed: chooses the calibration images, and the order of `qat`.
        data: the run's images, where they lie elsewhere now.
        out: the folder; default: `export/FORMAT[-int8][-DEPLOYABLE]` in the run's.
        overwrite: replace an export that is there.
        progress: told what is being done.

    Raises:
        AttarError: whatever stands in the way, in one sentence; nothing is left behind.
    """
    tell = progress or (lambda said, share: None)
    kind = find_format(format)
    _check(kind, int8, batch, packaged, opset, calibration, most_drop)
    if qat is not None and (not int8 or qat < 1):
        raise AttarError("Option --qat takes the epochs of training for int8, 1 or more, and needs --int8.")
    if out is not None:
        refuse_present(Path(out), overwrite)
    if isinstance(run, Candidate):
        if deployable is not None or data is not None or image_size is not None:
            raise AttarError("A candidate brings its network, images and their size: give the others to make it.")
        candidate = run
    else:
        tell("reading the run", None)
        candidate = load_candidate(run, deployable, data=data, image_size=image_size)
    if kind.name == "torch" and candidate.deployable is not None:
        raise AttarError(
            f"Format torch holds the plain student, and {candidate.deployable} is none: export it to onnx, executorch "
            "or openvino."
        )
    if candidate.task.dense and (packaged or qat is not None):
        option = "--packaged" if packaged else "--qat"
        raise AttarError(f"Option {option} is for classification: leave it out for segmentation.")
    folder = Path(out) if out is not None else candidate.folder / "export" / _name(kind, int8, packaged, candidate)
    refuse_present(folder, overwrite)
    options: dict[str, Any] = {"crop": crop_of(candidate.source)} if kind.name == "torch" else {}
    if opset is not None:
        options["opset"] = opset
    settings = Settings(
        image_size=candidate.source.image_size,
        batch=batch,
        int8=int8,
        calibration=calibration,
        most_drop=most_drop,
        seed=seed,
        student=candidate.student,
        options=options,
    )
    with written_aside(folder) as aside:
        _Export(candidate, kind, settings, packaged, qat, aside, tell).run()
    return load_export(folder)


def load_export(folder: str | Path, threads: int = 1) -> Exported:
    """Load an export from its folder, with nothing in it trusted but numbers and text.

    Args:
        folder: that `export_run` wrote.
        threads: of the runtime.

    Raises:
        AttarError: no such folder, a damaged artefact, or a package that is missing.
    """
    folder = Path(folder)
    if not (folder / "export.json").is_file():
        raise AttarError(f"'{folder}' holds no export: give a folder that attar export has written.")
    report = read_json(folder / "export.json")
    if not isinstance(report, dict) or not isinstance(report.get("format"), str):
        raise AttarError(f"'{folder / 'export.json'}' was not written by attar: give a folder that attar export wrote.")
    kind = find_format(report["format"])
    # By the format's own name: a report from others must not choose the file.
    return Exported(folder, report, kind.load(folder / kind.file, threads))  # type: ignore[arg-type]


def _check(
    kind: Format, int8: bool, batch: int | None, packaged: bool, opset: int | None, calibration: int, most_drop: float
) -> None:
    """Refuse what cannot be, before anything is loaded."""
    for given, option in ((packaged, "--packaged"), (opset is not None, "--opset")):
        if given and kind.name != "onnx":
            raise AttarError(f"Option {option} is for ONNX: leave it out for format {kind.name}.")
    if int8 and kind.name == "torch":
        raise AttarError("Format torch holds float32 weights: export int8 to onnx, executorch or openvino.")
    if batch is not None and batch < 1:
        raise AttarError(f"An artefact takes at least 1 image at a time, not {batch}.")
    if int8 and calibration < FEWEST_IMAGES:
        raise AttarError(
            f"{calibration} calibration images are too few to know the ranges of activations: give {FEWEST_IMAGES} or "
            "more."
        )
    if not 0 <= most_drop < 1:
        raise AttarError(f"The accuracy that int8 may cost is a share from 0 to below 1, not {most_drop:g}.")


def _name(kind: Format, int8: bool, packaged: bool, candidate: Candidate) -> str:
    parts = [kind.name, "int8" if int8 else None, "packaged" if packaged else None, candidate.deployable]
    return "-".join(part for part in parts if part)


class _Export:
    """One export into a folder, step by step."""

    def __init__(
        self,
        candidate: Candidate,
        kind: Format,
        settings: Settings,
        packaged: bool,
        qat: int | None,
        folder: Path,
        tell: Progress,
    ) -> None:
        self.candidate, self.kind, self.packaged, self.qat = candidate, kind, packaged, qat
        # What is written; what the artefact is measured against stays the candidate's.
        self.network = candidate.network
        self.folder, self.tell = folder, tell
        self.path = folder / kind.file
        student = candidate.student
        self.normalization = Normalization(student.mean, student.std)
        self.called = f"{kind.name} artefact"
        self.settings = settings
        if settings.int8:
            self.settings = dataclasses.replace(settings, accuracy=self._holdout_accuracy)

    def run(self) -> None:
        """Fill the folder."""
        gated = some_of(self.candidate.source.test, self._gated())
        images = load_images(gated, self.normalization)
        if self.qat is not None:
            from attar.deploy.qat import quantization_aware

            self.tell("quantisation-aware distillation", None)
            self.network = quantization_aware(self.candidate, epochs=self.qat, seed=self.settings.seed)
        parity, written = self._write(images)
        if self.packaged:
            package(self.path, self.normalization)
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        found = self._measured()
        report = self._report(parity, written, size, *found)
        if isinstance(self.kind, ONNX):
            with storage_errors(self.path):
                annotate(self.path, metadata({**report}))
            report["size_bytes"] = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        # Last, so that what is handed out is what has been let through, to the last byte.
        self.tell("gate", None)
        self._gate(images, load_images(gated, PIXELS) if self.packaged else images, final=True)
        report["sha256"] = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self._latency(report)
        self._accompany(report)

    def _gated(self) -> int:
        if not self.candidate.task.dense:
            return _GATED
        height, width = self.settings.image_size
        return max(1, min(_GATED, _GATED_LOGITS // (self.candidate.source.num_classes * height * width)))

    def _write(self, images: Images) -> tuple[dict[str, Any], dict[str, Any]]:
        """Write the artefact; for int8 its float32 twin first, which must pass the gate."""
        network, settings = self.network, self.settings
        self.tell("writing", None)
        with storage_errors(self.path):
            if not settings.int8:
                written = self.kind.write(network, settings, self.path, None)
                return self._gate(images, images), written
            twin = self.folder / ".float32"
            twin.mkdir()
            plain = dataclasses.replace(settings, int8=False)
            self.kind.write(network, plain, twin / self.kind.file, None)
            parity = self._gate(images, images, twin / self.kind.file)
            self.tell("calibrating and quantising", None)
            options = dict(settings.options)
            if isinstance(self.kind, ONNX):
                options["float32"] = twin / self.kind.file
            calibration = calibration_images(
                self.candidate.source,
                settings.calibration,
                settings.seed,
                self.normalization,
                settings.image_size,
            )
            written = self.kind.write(network, dataclasses.replace(settings, options=options), self.path, calibration)
            shutil.rmtree(twin)
        return parity, {"calibration_images": len(calibration), **written}

    def _gate(
        self, images: Images, shown: NDArray[Any], path: Path | None = None, *, final: bool = False
    ) -> dict[str, Any]:
        quantised = self.settings.int8 and path is None
        found = gate(
            self.candidate.network if quantised else self.network,
            self.kind.load(path or self.path, torch.get_num_threads()),
            images,
            shown=as_pixels(shown) if final and self.packaged else shown,
            probabilities=final and self.packaged,
            exact=self.kind.name == "torch",
            least_agreement=_LEAST_AGREEMENT if quantised else None,
            name=self.called,
        )
        return found.as_dict()

    def _holdout_accuracy(self, path: Path) -> float:
        """Tell the accuracy of an artefact on hold-out images; on training images where a source holds none out."""
        source = self.candidate.source
        split = source.holdout if len(source.holdout) else source.train
        runtime = self.kind.load(path, torch.get_num_threads())
        return measure_runtime(runtime, some_of(split, _JUDGED), self.normalization, self.candidate.task).metrics.score

    def _measured(self) -> tuple[Any, Any, float]:
        """Return the metrics of the network and of the artefact on all test images, and how often they agree."""
        split, task = self.candidate.source.test, self.candidate.task
        # As attar evaluate runs it: the same numbers to the last bit.
        network = copy.deepcopy(self.candidate.network).to(memory_format=torch.channels_last)

        def answer(images: NDArray[Any]) -> NDArray[np.float32]:
            tensor = torch.from_numpy(images).contiguous(memory_format=torch.channels_last)
            logits: NDArray[np.float32] = network(tensor).numpy()
            return logits

        one = measure_runtime(
            answer, split, self.normalization, task, told=self._count("accuracy of the network", len(split))
        )
        other = measure_runtime(
            self.kind.load(self.path, torch.get_num_threads()),
            split,
            self.normalization,
            task,
            packaged=self.packaged,
            told=self._count("accuracy of the artefact", len(split)),
        )
        if self.settings.int8:
            bound, meant, answered = self.settings.most_drop, one.predictions, other.predictions
            if isinstance(meant, PixelPredictions) and isinstance(answered, PixelPredictions):
                refuse_miou_drop(answered, meant, bound, name=self.called)
            else:
                right, expected = (measured.found == split.targets for measured in (other, one))
                refuse_drop(right, expected, bound, name=self.called)
        return one.metrics, other.metrics, float((other.found == one.found).mean())

    def _count(self, said: str, images: int) -> Callable[[int], None]:
        done = 0

        def told(more: int) -> None:
            nonlocal done
            done += more
            self.tell(said, done / images)

        self.tell(said, 0.0)
        return told

    def _report(
        self, parity: dict[str, Any], written: dict[str, Any], size: int, one: Any, other: Any, agreement: float
    ) -> Report:
        candidate, student = self.candidate, self.candidate.student
        int8 = None
        if self.settings.int8:
            left = written.get("left_in_float32", [])
            int8 = Int8(
                left_in_float32=left,
                calibration_images=written["calibration_images"],
                drop=one.score - other.score,
                trained=self.qat is not None,
                # Hold-out images may be few, and say too much or too little: whether it is handed out is for all test
                # images to say, by their errors (`refuse_drop`). What the hold-out images said is told.
                bound_held=written.get("holds"),
            )
        packages = ("torch", *_PACKAGES[self.kind.name])
        return Report(
            attar=__version__,
            format=self.kind.name,
            file=self.kind.file,
            size_bytes=size,
            sha256="",
            task=student.task,
            model=student.model,
            parameters=sum(parameter.numel() for parameter in candidate.network.parameters()),
            deployable=candidate.deployable,
            methods=list(candidate.result.get("methods", [])),
            data=str(candidate.result.get("data", candidate.source.name)),
            classes=list(student.classes),
            image_size=list(candidate.source.image_size),
            mean=list(student.mean),
            std=list(student.std),
            crop=crop_of(candidate.source),
            preprocessing_inside=self.packaged,
            batch=self.settings.batch if self.kind.name != "torch" else None,
            opset=written.get("opset"),
            parity=parity,  # type: ignore[typeddict-item]
            accuracy=Accuracy(
                metric=one.primary,
                fp32=one.score,
                artefact=other.score,
                agreement=agreement,
                images=other.images,
                calibration_error=other.calibration_error,
            ),
            int8=int8,
            latency=None,
            memory=None,
            versions={name: importlib.metadata.version(name) for name in packages},
        )

    def _latency(self, report: Report) -> None:
        self.tell("latency", None)
        height, width = self.settings.image_size
        load, shape = partial(_load, self.kind, self.path, self.packaged), (1, 3, height, width)
        report["latency"] = measure_latency(load, shape)
        report["memory"] = measure_memory(load, shape)

    def _accompany(self, report: Report) -> None:
        with storage_errors(self.folder):
            write_json(self.folder / "export.json", report)
            write_card(self.folder, report)
            if isinstance(self.kind, ONNX) and not self.candidate.task.dense:
                write_inference(self.folder)


def _load(kind: Format, path: Path, packaged: bool, threads: int) -> Runtime:
    """Load an artefact that is to be timed: a packaged one is shown blank pixels in place of normalised images."""
    runtime = kind.load(path, threads)
    return partial(_on_pixels, runtime) if packaged else runtime


def _on_pixels(runtime: Runtime, images: Images) -> NDArray[np.float32]:
    n, channels, height, width = images.shape
    return runtime(np.zeros((n, height, width, channels), np.uint8))
