"""Networks by name, and weights from files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

import attar.zoo  # noqa: F401 - registers the CIFAR networks with timm
from attar.errors import AttarError, unknown_name

__all__ = ["load_weights", "make_model"]

_TORCHVISION = "torchvision:"
_SMP = "smp:"
# With these timm reads files of its own choice: a saved student's config.json may come from a stranger.
_READ_FILES = ("cache_dir", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")


def make_model(
    name: str,
    num_classes: int,
    options: Mapping[str, Any] | None = None,
    in_chans: int = 3,
    task: str = "classification",
) -> nn.Module:
    """Make a network by name: any timm model (attar's own included), or `torchvision:NAME`.

    For segmentation: torchvision's segmentation networks with or without that prefix, `smp:NAME` of
    segmentation_models_pytorch, and timm's register (attar's own). Backbones too are drawn, not fetched, unless the
    options name weights.

    Its weights are drawn from torch's global generator.

    Raises:
        AttarError: no such model (with the nearest name), or options that it does not take.
    """
    options = dict(options or {})
    for option in _READ_FILES:
        if option in options:
            raise AttarError(f"Model option '{option}' would read a file unchecked: give its weights instead.")
    family = _family(name, task)
    if family.short.partition(".")[0] not in family.known:
        raise unknown_name("model", name, [family.prefix + candidate for candidate in family.known])
    settings = {family.classes: num_classes, **family.settings}
    if family.channels is not None:
        settings[family.channels] = in_chans
    try:
        network = family.make(family.short, **{**settings, **options})
    except AttarError:
        raise
    except Exception as error:  # constructors raise many kinds for arguments they do not take
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise AttarError(
            f"Model '{name}' cannot be made with these options ({said[0]}): correct model_options."
        ) from error
    assert isinstance(network, nn.Module)
    return network


@dataclass(frozen=True)
class _Family:
    """Where a model's name belongs, and how a model is made there."""

    prefix: str
    short: str
    known: Sequence[str]
    make: Callable[..., Any]
    settings: Mapping[str, Any]
    classes: str = "num_classes"
    channels: str | None = None


def _family(name: str, task: str) -> _Family:
    short = name.removeprefix(_TORCHVISION)
    prefixed = short != name
    if task == "segmentation":
        if name.startswith(_SMP):
            return _segmentation_models(name)
        known = torchvision.models.list_models(module=torchvision.models.segmentation)
        if prefixed or short in known:
            prefix = _TORCHVISION if prefixed else ""
            return _Family(prefix, short, known, torchvision.models.get_model, {"weights_backbone": None})
    elif name.startswith(_SMP) or short in torchvision.models.list_models(module=torchvision.models.segmentation):
        raise AttarError(f"Model '{name}' is a segmentation network: give --task segmentation.")
    elif prefixed:
        known = torchvision.models.list_models(module=torchvision.models)
        return _Family(_TORCHVISION, short, known, torchvision.models.get_model, {})
    return _Family("", name, timm.list_models(), timm.create_model, {}, channels="in_chans")


def _segmentation_models(name: str) -> _Family:
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise AttarError(
            f"Model '{name}' needs the package segmentation-models-pytorch: pip install 'attar[smp]'."
        ) from error
    known = {kind.__name__: kind for kind in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    short = name.removeprefix(_SMP)

    def make(short: str, **settings: Any) -> nn.Module:
        network: nn.Module = known[short](**settings)
        return network

    return _Family(_SMP, short, list(known), make, {"encoder_weights": None}, "classes", "in_channels")


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load weights from a safetensors file, or from any file that `torch.load(weights_only=True)` reads.

    Raises:
        AttarError: the file is missing or unreadable, or its weights are not this network's (the first difference is
            named).
    """
    weights = _read(Path(path))
    own = network.state_dict()
    missing, extra = own.keys() - weights.keys(), weights.keys() - own.keys()
    for key in own:
        if key in weights and weights[key].shape != own[key].shape:
            raise AttarError(
                f"'{path}' holds {key} of shape {list(weights[key].shape)}, but the model's is {list(own[key].shape)}: "
                "are they of the same model and number of classes?"
            )
    if missing or extra:
        said = f"lacks {min(missing)}" if missing else f"holds {min(extra)}, which the model has not"
        raise AttarError(f"'{path}' {said}: are these weights of the same model?")
    network.load_state_dict(weights)


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise AttarError(f"There is no weights file '{path}': check the path.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many kinds
        raise AttarError(
            f"'{path}' cannot be read as weights: give a safetensors file or one that holds tensors only."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(weights, Mapping) and isinstance(weights.get(key), Mapping):
            weights = weights[key]
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise AttarError(f"'{path}' holds no table of tensors: give a state_dict.")
    return weights
