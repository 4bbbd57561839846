"""The papers' networks, most for small images; importing this package registers them with timm.

`timm.create_model("cifar_resnet32", num_classes=10)` and `attar.zoo.cifar_resnet32(num_classes=10)` are the same
network. All take timm's `num_classes`, `in_chans`, `global_pool`, `drop_rate`, `features_only`, `width`, which
multiplies every layer's channels, and `cheap`, a cheap convolution for the 3x3 ones inside the blocks ("G8B2"; see
`cheapen`). The networks for segmentation take what `BiFPNEfficientNet` says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models import resolve_pretrained_cfg as resolve_cfg

from attar.errors import AttarError
from attar.zoo.bifpn_efficientnet import BiFPNEfficientNet, segmentation_names
from attar.zoo.cheap import cheap_convolution, cheapen
from attar.zoo.cnn import CifarCNN
from attar.zoo.densenet import CifarDenseNet, cifar_densenet
from attar.zoo.resnet import CifarNet, CifarResNet, cifar_resnet
from attar.zoo.resnext import CifarResNeXt, cifar_resnext
from attar.zoo.wide_resnet import WideResNet, wide_resnet

__all__ = [
    "BiFPNEfficientNet",
    "CifarCNN",
    "CifarDenseNet",
    "CifarNet",
    "CifarResNeXt",
    "CifarResNet",
    "WideResNet",
    "cheap_convolution",
    "cheapen",
    "cifar_densenet",
    "cifar_resnet",
    "cifar_resnext",
    "names",
    "segmentation_names",
    "wide_resnet",
]

_NETWORKS: dict[str, Callable[..., CifarNet]] = {
    "cifar_resnet20": partial(cifar_resnet, 20),
    "cifar_resnet32": partial(cifar_resnet, 32),
    "cifar_resnet44": partial(cifar_resnet, 44),
    "cifar_resnet56": partial(cifar_resnet, 56),
    "cifar_resnet110": partial(cifar_resnet, 110),
    # ONE's code: a bottleneck wherever the paper has a basic block, so these have more layers than their names say.
    "cifar_resnet20_bottleneck": partial(cifar_resnet, 20, bottleneck=True),
    "cifar_resnet44_bottleneck": partial(cifar_resnet, 44, bottleneck=True),
    "cifar_resnet56_bottleneck": partial(cifar_resnet, 56, bottleneck=True),
    # "ResNet-110" of OKDDip and PCL: 12 bottlenecks per stage, which do make 110 layers.
    "cifar_resnet74_bottleneck": partial(cifar_resnet, 74, bottleneck=True),
    "cifar_resnet110_bottleneck": partial(cifar_resnet, 110, bottleneck=True),
    "cifar_resnet18": partial(CifarResNet, (2, 2, 2, 2), (64, 128, 256, 512)),
    "cifar_resnet50": partial(CifarResNet, (3, 4, 6, 3), (64, 128, 256, 512), bottleneck=True),
    "cifar_wrn_16_1": partial(WideResNet, 16, 1),
    "cifar_wrn_16_2": partial(WideResNet, 16, 2),
    "cifar_wrn_16_4": partial(WideResNet, 16, 4),
    "cifar_wrn_28_2": partial(WideResNet, 28, 2),
    "cifar_wrn_28_4": partial(WideResNet, 28, 4),
    "cifar_wrn_28_10": partial(WideResNet, 28, 10),
    "cifar_wrn_40_1": partial(WideResNet, 40, 1),
    "cifar_wrn_40_2": partial(WideResNet, 40, 2),
    "cifar_wrn_40_4": partial(WideResNet, 40, 4),
    # 20 is not 6n + 4: the "WRN-20-8" of online distillation is a ResNet of 3 x 2 bottlenecks, 8 times as wide inside.
    "cifar_wrn_20_8": partial(CifarResNet, (2, 2, 2), bottleneck=True, widen=8),
    "cifar_resnext29_8x64d": partial(CifarResNeXt, 29, 8, 64),
    "cifar_densenet_40_12": partial(CifarDenseNet, 40, 12, False),
    # "DenseNet-40-12" of OKDDip and PCL: its embedding of 132 numbers is that of the BC form.
    "cifar_densenet_bc_40_12": partial(CifarDenseNet, 40, 12),
    "cifar_densenet_bc_100_12": partial(CifarDenseNet, 100, 12),
    "cifar_densenet_bc_190_40": partial(CifarDenseNet, 190, 40),
    # Teacher ("auxiliary") and student of InDistill and of PKT's retrieval experiments.
    "cifar_cnn_16_32_64": partial(CifarCNN, (16, 32, 64)),
    "cifar_cnn_8_16_32": partial(CifarCNN, (8, 16, 32)),
}

_FOUR_STAGES = {"cifar_resnet18", "cifar_resnet50"}
_PLAIN = {"cifar_cnn_16_32_64", "cifar_cnn_8_16_32"}


def _pool_size(name: str) -> tuple[int, int]:
    side = 2 if name in _PLAIN else 4 if name in _FOUR_STAGES else 8
    return side, side


# timm looks this name up in the module of a registered function.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "min_input_size": (3, 22, 22) if name in _PLAIN else (3, 8, 8),
            "pool_size": _pool_size(name),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2023, 0.1994, 0.2010),
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for name in _NETWORKS
    }
)


def names() -> list[str]:
    """Return the names of the networks for small images that are registered with timm, sorted."""
    return sorted(_NETWORKS)


def _made(network: Callable[..., CifarNet]) -> Callable[..., CifarNet]:
    def make(cheap: str | None = None, **kwargs: Any) -> CifarNet:
        made = network(**kwargs)
        return made if cheap is None else cheapen(made, cheap)

    return make


def _entry_point(name: str, network: Callable[..., CifarNet]) -> Callable[..., CifarNet]:
    def create(pretrained: bool = False, **kwargs: Any) -> CifarNet:
        cfg = resolve_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if pretrained and not (cfg.has_weights or cfg.state_dict):  # a user's own exported folder does have weights
            raise AttarError(f"There are no pretrained weights for '{name}': pass pretrained=False and train it.")
        feature_cfg = {"out_indices": tuple(range(4 if name in _FOUR_STAGES else 3))}  # features_only: every stage
        model: CifarNet = build_model_with_cfg(_made(network), name, pretrained, feature_cfg=feature_cfg, **kwargs)
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"Build `{name}`; keyword arguments are its class's."
    return create


for _name, _network in _NETWORKS.items():
    globals()[_name] = register_model(_entry_point(_name, _network))
