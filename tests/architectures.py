"""The networks that anatomy and methods are proved on, with the image size each one wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torchvision
from torch import Tensor, nn

import attar.zoo  # noqa: F401 - registers the CIFAR networks


@dataclass(frozen=True)
class Architecture:
    name: str
    size: int
    make: Callable[[int], nn.Module]
    common: bool = False  # also compiled in the default run


def _timm(name: str, size: int = 64, common: bool = False, **options: object) -> Architecture:
    return Architecture(name, size, lambda classes: timm.create_model(name, num_classes=classes, **options), common)


def _torchvision(name: str, size: int = 64) -> Architecture:
    return Architecture(
        f"torchvision:{name}", size, lambda classes: torchvision.models.get_model(name, num_classes=classes)
    )


class HandWritten(nn.Module):
    """A network without any metadata: functional activations, pooling and a residual sum at its top level."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24))
        self.shortcut = nn.Conv2d(16, 24, 1, 2)
        self.third = nn.Sequential(nn.Conv2d(24, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
        self.leave = nn.Linear(32, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(torch.relu(self.enter(images)))
        x = nn.functional.relu(self.second(x) + self.shortcut(x), inplace=True)
        return self.leave(self.third(x).mean(dim=(2, 3)))


ARCHITECTURES = [
    Architecture("hand-written", 32, HandWritten, common=True),
    _timm("cifar_resnet20", 32, common=True),
    _timm("cifar_resnet56_bottleneck", 32),
    _timm("cifar_wrn_16_2", 32),
    _timm("cifar_resnet18", 32),
    _timm("resnet18", common=True),
    _timm("resnet50"),
    _timm("seresnext26t_32x4d"),
    _timm("regnety_002"),
    _timm("densenet121"),
    _timm("vgg11_bn", mlp_ratio=0.125),
    _timm("mobilenetv2_050", common=True),
    _timm("mobilenetv3_small_050", common=True),
    _timm("mobilenetv4_conv_small_035"),
    _timm("efficientnet_lite0"),
    _timm("ghostnet_050"),
    _timm("mnasnet_050"),
    _timm("lcnet_050"),
    _timm("convnext_atto", common=True),
    _timm("convnextv2_atto"),
    _timm("repvit_m0_9"),
    _timm("repvgg_a0"),
    _timm("fastvit_t8"),
    _timm("edgenext_xx_small"),
    _timm("mobileone_s0"),
    _timm("mobilevit_xxs"),
    _timm("mobilevitv2_050"),
    _timm("vit_tiny_patch16_224", 32, common=True, img_size=32, patch_size=4, depth=8),
    _timm("deit_tiny_patch16_224", 64, img_size=64, patch_size=8, depth=8),
    _timm("swin_tiny_patch4_window7_224", 56, img_size=56, window_size=7),
    _timm("levit_128s", 224),
    _timm("efficientformerv2_s0", 224),
    _timm("efficientvit_b0"),
    _timm("hrnet_w18_small"),
    _timm("poolformer_s12"),
    _timm("xcit_nano_12_p16_224", 64),
    _timm("coat_lite_tiny", 224),
    _timm("pvt_v2_b0"),
    _timm("hgnetv2_b0"),
    _timm("mambaout_femto"),
    _timm("starnet_s1"),
    _timm("dla34"),
    _timm("cspresnet50"),
    _timm("nfnet_l0"),
    _timm("inception_next_atto"),
    _timm("res2net50_26w_4s"),
    _timm("tiny_vit_5m_224", 224),
    _torchvision("resnet18"),
    _torchvision("densenet121"),
    _torchvision("mobilenet_v2"),
    _torchvision("mobilenet_v3_small"),
    _torchvision("efficientnet_b0"),
    _torchvision("shufflenet_v2_x0_5"),
    _torchvision("squeezenet1_1", 96),
    _torchvision("convnext_tiny"),
    _torchvision("swin_t"),
    Architecture(
        "torchvision:vit",
        32,
        lambda classes: torchvision.models.VisionTransformer(32, 8, 4, 2, 64, 128, num_classes=classes),
    ),
]
