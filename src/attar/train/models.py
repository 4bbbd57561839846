"""Networks by name, and weights from files."""

from __future__ import annotations

from collections.abc import Mapping
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
# With these timm reads files of its own choice: a saved student's config.json may come from a stranger.
_READ_FILES = ("cache_dir", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")


def make_model(name: str, num_classes: int, options: Mapping[str, Any] | None = None, in_chans: int = 3) -> nn.Module:
    """Make a network by name: any timm model (attar's CIFAR networks included), or `torchvision:NAME`.

    Its weights are drawn from torch's global generator.

    Raises:
        AttarError: no such model (with the nearest name), or options that it does not take.
    """
    options = dict(options or {})
    for option in _READ_FILES:
        if option in options:
            raise AttarError(f"Model option '{option}' would read a file unchecked: give its weights instead.")
    if name.startswith(_TORCHVISION):
        known = torchvision.models.list_models(module=torchvision.models)
        short, make, settings = name.removeprefix(_TORCHVISION), torchvision.models.get_model, {}
    else:
        known = timm.list_models()
        short, make, settings = name, timm.create_model, {"in_chans": in_chans}
    if short.partition(".")[0] not in known:
        prefix = _TORCHVISION if name.startswith(_TORCHVISION) else ""
        raise unknown_name("model", name, [prefix + candidate for candidate in known])
    try:
        network = make(short, **{"num_classes": num_classes, **settings, **options})
    except AttarError:
        raise
    except Exception as error:  # constructors raise many kinds for arguments they do not take
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise AttarError(
            f"Model '{name}' cannot be made with these options ({said[0]}): correct model_options."
        ) from error
    assert isinstance(network, nn.Module)
    return network


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
