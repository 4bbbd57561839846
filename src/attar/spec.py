"""Specs: the complete, typed, frozen description of a run; one source for the command line, recipes and Python."""

from __future__ import annotations

import hashlib
import inspect
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from attar.errors import AttarError, unknown_name

__all__ = ["FREE", "MethodSpec", "TrainSpec", "method_options", "parse", "peer_options", "teacher_options"]


S = TypeVar("S", bound=BaseModel)

# Fields that may differ between the beginning of a run and its continuation: they change no number of the result.
FREE = frozenset({"log_every", "checkpoint_seconds"})

_COLUMNS = ("image_column", "label_column", "mask_column")


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MethodSpec(_Spec):
    """One method and the options that differ from its defaults.

    Args:
        name: as listed by `attar methods`.
        options: keyword arguments of the method; a teacher is given as the run folder that trained it, or as
            MODEL=FILE with a weights file; peers as their number, or as the names of their models.
    """

    name: str
    options: dict[str, Any] = Field(default_factory=dict)


class TrainSpec(_Spec):
    """One training run. Two runs with equal specs on equal data give bit-identical students on one CPU."""

    methods: Annotated[tuple[MethodSpec, ...], Field(description="What trains the student; none is plain training.")]
    model: Annotated[str, Field(description="Any timm model (attar's own included) or torchvision:NAME.")]
    data: Annotated[
        str,
        Field(description="digits, a torchvision data set, a folder of class folders, parquet:DIR or hf:OWNER/NAME."),
    ]
    image_column: Annotated[
        str | None, Field(description="Column of the images in Hugging Face or parquet data, when it cannot be told.")
    ] = None
    label_column: Annotated[str | None, Field(description="Column of the labels, likewise (coarse_label).")] = None
    mask_column: Annotated[str | None, Field(description="Segmentation: column of the masks, likewise.")] = None
    ignore_index: Annotated[
        int | None,
        Field(ge=0, description="Segmentation: value of void pixels; default: what classes.json says, else 255."),
    ] = None
    task: Annotated[
        Literal["classification", "segmentation"],
        Field(description="What the labels are: classes of images, or of pixels."),
    ] = "classification"
    model_options: Annotated[
        dict[str, Any], Field(default_factory=dict, description="Further keyword arguments of the model.")
    ]
    weights: Annotated[str | None, Field(description="Start from this safetensors or weights-only file.")] = None
    stages: Annotated[tuple[str, ...] | None, Field(description="Modules to use as stages.")] = None

    image_size: Annotated[int | None, Field(ge=4, description="Side of the images; default: the data's own.")] = None
    augment: Annotated[str | None, Field(description="Augmentation preset; default: what suits the data.")] = None
    augment_cycle: Annotated[
        int | None, Field(ge=1, description="Draw the augmentations of so many epochs, then repeat them.")
    ] = None
    cache_teachers: Annotated[
        bool, Field(description="Ask teachers once about every image and augmentation, and remember what they say.")
    ] = False
    holdout: Annotated[float, Field(gt=0, lt=1, description="Share of the training data held out for selection.")] = 0.1
    split_seed: Annotated[int, Field(ge=0, description="Seed of the hold-out split; keep it when seeds vary.")] = 0
    skip_bad_images: Annotated[bool, Field(description="Count and skip unreadable images instead of stopping.")] = False
    train_limit: Annotated[
        int | None, Field(ge=2, description="Use only this many training images, stratified over classes.")
    ] = None

    class_weights: Annotated[
        tuple[float, ...] | None, Field(description="Segmentation: a weight for every class in the loss.")
    ] = None
    dice_weight: Annotated[float, Field(ge=0, description="Segmentation: weight of the Dice loss.")] = 0.0

    epochs: Annotated[int, Field(ge=1, description="Passes over the training data.")] = 100
    batch: Annotated[int, Field(ge=1, description="Images per step over all processes together.")] = 128
    keep_last: Annotated[bool, Field(description="Train on the last, smaller batch of an epoch too.")] = False
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0, description="Peak learning rate; 0.001 by default for adamw.")] = 0.1
    weight_decay: Annotated[float, Field(ge=0, description="0.05 by default for adamw.")] = 5e-4
    momentum: Annotated[float, Field(ge=0, lt=1, description="Of SGD.")] = 0.9
    nesterov: Annotated[bool, Field(description="Nesterov momentum in SGD.")] = True
    schedule: Annotated[Literal["cosine", "step", "constant"], Field(description="How the rate falls.")] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1, description="Share of the run over which the rate rises.")] = 0.05
    milestones: Annotated[tuple[float, ...], Field(description="Shares of the run where the step schedule falls.")] = (
        0.5,
        0.75,
    )
    gamma: Annotated[float, Field(gt=0, le=1, description="Factor of each fall of the step schedule.")] = 0.1
    clip_grad: Annotated[float | None, Field(gt=0, description="Clip the gradient norm to this.")] = None
    select: Annotated[
        Literal["holdout", "last"],
        Field(description="Which epoch is kept: the best on hold-out images (top-1, mean IoU), or the last one."),
    ] = "holdout"
    ema: Annotated[
        float | None, Field(gt=0, lt=1, description="Also keep an exponential moving average with this decay.")
    ] = None
    progress: Annotated[
        Literal["step", "epoch"],
        Field(description="Methods' schedules move by the step, or once per epoch as most released code does."),
    ] = "step"

    precision: Annotated[
        Literal["auto", "fp32", "bf16"], Field(description="auto: bf16 where the network trains faster in it.")
    ] = "auto"
    channels_last: bool = True
    compile: Annotated[Literal["auto", "on", "off"], Field(description="auto: on GPUs, in runs that repay it.")] = (
        "auto"
    )
    seed: Annotated[int, Field(ge=0, description="Of weights, order and augmentation.")] = 0

    log_every: Annotated[int, Field(ge=1, description="Steps between two lines of metrics.jsonl.")] = 50
    checkpoint_seconds: Annotated[
        float, Field(ge=0, description="Seconds between checkpoints inside an epoch; each epoch ends with one anyway.")
    ] = 60.0

    @model_validator(mode="before")
    @classmethod
    def _suit_the_optimizer(cls, values: Any) -> Any:
        """AdamW's usual rate and decay are not SGD's: with SGD's defaults it diverges."""
        if isinstance(values, Mapping) and values.get("optimizer") == "adamw":
            return {"lr": 1e-3, "weight_decay": 0.05, **values}
        return values

    def opening(self) -> dict[str, Any]:
        """Return how the images are to be opened: arguments of `attar.data.open_source`, but name, size and task."""
        names = ("holdout", "split_seed", "skip_bad_images", *_COLUMNS, "ignore_index")
        return {name: getattr(self, name) for name in names}

    def on(self, data: str | None) -> TrainSpec:
        """Return the spec with other images (None: the same), without columns where those are no table."""
        if data is None or data == self.data:
            return self
        table = data.startswith(("parquet:", "hf:"))
        return self.model_copy(update={"data": data, **({} if table else dict.fromkeys(_COLUMNS))})

    def fingerprint(self) -> str:
        """A short name for everything in the spec that the result depends on.

        Only what differs from the defaults counts, so that a field added later, whose default is what was done before,
        renames no run.
        """
        values = self.model_dump(mode="json", exclude=set(FREE), exclude_defaults=True)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write the resolved spec as JSON."""
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> TrainSpec:
        """Read a saved spec.

        Raises:
            AttarError: the file is missing, no JSON, or no spec of this version.
        """
        try:
            return parse(cls, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            if isinstance(error, AttarError):
                raise AttarError(f"{path} is no spec of this version of attar: {error}") from error
            raise AttarError(f"{path} cannot be read as a spec: {error}") from error


def parse(kind: type[S], values: Mapping[str, Any]) -> S:
    """Validate values into a spec; the first mistake becomes one sentence with the nearest valid name."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise _sentence(error, kind) from error


def _sentence(error: ValidationError, kind: type[BaseModel]) -> AttarError:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown_name("option", name, kind.model_fields)
    if first["type"] == "missing":
        return AttarError(f"Option '{name}' must be given.")
    return AttarError(f"Option '{name}' cannot be {first['input']!r}: {first['msg'].lower()}.")


def method_options(method: type) -> type[BaseModel]:
    """Derive the options of a method from its constructor: names, types and defaults in one place.

    Arguments that are trained networks (teachers) become strings: a run folder, or MODEL=FILE. Networks that train
    beside the student (peers) become their number or the names of their models. Arguments that only make sense in
    Python (a module of the student's own layers) are left out.
    """
    fields: dict[str, Any] = {}
    hints = typing.get_type_hints(method.__init__)  # type: ignore[misc]
    teachers, peers = teacher_options(method), peer_options(method)
    for name, parameter in inspect.signature(method).parameters.items():
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue  # a method without a constructor of its own has nn.Module's
        kind = hints.get(name, Any)
        if name in teachers:
            kind = Annotated[
                tuple[str, ...], BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)
            ]
        elif name in peers:
            kind = Annotated[int | tuple[str, ...], BeforeValidator(_peers)]
        elif _mentions(kind, "Module"):
            continue
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[name] = (kind, default)
    return create_model(f"{method.__name__}Options", __config__=ConfigDict(frozen=True, extra="forbid"), **fields)


def teacher_options(method: type) -> frozenset[str]:
    """Return the constructor arguments of a method that are trained networks."""
    hints = typing.get_type_hints(method.__init__)  # type: ignore[misc]
    return frozenset(name for name in inspect.signature(method).parameters if _mentions(hints.get(name), "Teacher"))


def peer_options(method: type) -> frozenset[str]:
    """Return the constructor arguments of a method that are a number of networks or untrained networks."""
    hints = typing.get_type_hints(method.__init__)  # type: ignore[misc]
    kinds = {name: hints.get(name) for name in inspect.signature(method).parameters}
    return frozenset(name for name, kind in kinds.items() if _mentions(kind, "Module") and _mentions(kind, "int"))


def _peers(given: Any) -> int | tuple[str, ...]:
    """Read peers as they are typed: `2`, `resnet18`, or several names, which a comparison's labels put in brackets."""
    words = list(given) if isinstance(given, list | tuple) else [given]
    if len(words) == 1:
        if isinstance(words[0], int):
            return words[0]
        if isinstance(words[0], str):
            if words[0].strip().lstrip("+-").isdecimal():
                return int(words[0])
            words = [name.strip() for name in words[0].strip().removeprefix("[").removesuffix("]").split(",")]
    if not words or not all(isinstance(word, str) and word for word in words):
        raise PydanticCustomError("peers", "give how many, or the names of their models")
    return tuple(words)


def _mentions(kind: Any, name: str) -> bool:
    if isinstance(kind, type) and not isinstance(kind, types.GenericAlias):
        return kind.__name__ == name
    return any(_mentions(part, name) for part in typing.get_args(kind))
