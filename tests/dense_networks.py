"""The dense networks that anatomy and methods are proved on, with the image size each one wants."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import attar.zoo  # noqa: F401 - registers bifpn_efficientnet_b0


@dataclass(frozen=True)
class DenseNetwork:
    name: str
    size: tuple[int, int]
    make: Callable[[int], nn.Module]
    cheap: bool = False  # in the default run
    missing: str = ""  # the package that it comes from, where that cannot be imported


def block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """Concatenating skips, at its top level; returns the logits alone."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = block(3, 6, 2), block(6, 8, 2), block(8, 10, 2)
        self.up2, self.up1 = block(10 + 8, 8), block(8 + 6, 6)
        self.head = nn.Conv2d(6, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.down1(images)
        second = self.down2(first)
        x = self.down3(second)
        x = self.up2(torch.cat([self.enlarged(x, second), second], dim=1))
        x = self.up1(torch.cat([self.enlarged(x, first), first], dim=1))
        return self.enlarged(self.head(x), images)

    @staticmethod
    def enlarged(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


class Dilated(nn.Module):
    """Constant resolution behind stride 4, atrous convolutions; returns a dict with an auxiliary answer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        enter = nn.Sequential(block(3, 6, 2), block(6, 6))
        self.encoder = nn.Sequential(enter, block(6, 8, 2), block(8, 8, 1, 2), block(8, 8, 1, 4), block(8, 10, 1, 2))
        self.head = nn.Sequential(block(10, 8), nn.Dropout(0.1), nn.Conv2d(8, classes, 1))
        self.aux_head = nn.Sequential(block(10, 4), nn.Conv2d(4, classes, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.encoder(images)
        size = images.shape[-2:]
        out = F.interpolate(self.head(features), size=size, mode="bilinear", align_corners=False)
        aux = F.interpolate(self.aux_head(features), size=size, mode="bilinear", align_corners=False)
        return {"out": out, "aux": aux}


class Pyramid(nn.Module):
    """Top-down sums of laterals (a feature pyramid), and a head on all levels; returns a tuple."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList([block(3, 6, 2), block(6, 8, 2), block(8, 12, 2)])
        self.laterals = nn.ModuleList([nn.Conv2d(channels, 6, 1) for channels in (6, 8, 12)])
        self.smooth = nn.ModuleList([block(6, 6) for _ in range(3)])
        self.head = nn.Conv2d(6, classes, 1)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        maps, x = [], images
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        laterals = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=True)]
        total = self.smooth[2](laterals[2])
        for level in (1, 0):
            up = F.interpolate(total, size=laterals[level].shape[-2:], mode="nearest")
            total = self.smooth[level](laterals[level] + up)
        return (F.interpolate(self.head(total), size=images.shape[-2:], mode="bilinear", align_corners=False),)


def _torchvision(name: str, size: tuple[int, int] = (64, 96), **options: object) -> DenseNetwork:
    def make(classes: int) -> nn.Module:
        return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=classes, **options)

    return DenseNetwork(f"torchvision:{name}", size, make)


def _timm(name: str, size: tuple[int, int] = (64, 96)) -> DenseNetwork:
    return DenseNetwork(name, size, lambda classes: timm.create_model(name, num_classes=classes))


def _smp(name: str) -> DenseNetwork:
    def make(classes: int) -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, name)("resnet18", encoder_weights=None, classes=classes)

    package = "segmentation_models_pytorch"
    missing = "" if importlib.util.find_spec(package) else package
    return DenseNetwork(f"smp:{name}", (64, 96), make, missing=missing)


DENSE_NETWORKS = [
    DenseNetwork("unet", (32, 48), UNet, cheap=True),
    DenseNetwork("dilated", (32, 48), Dilated, cheap=True),
    DenseNetwork("pyramid", (32, 48), Pyramid),
    _torchvision("lraspp_mobilenet_v3_large"),
    _torchvision("deeplabv3_mobilenet_v3_large", aux_loss=True),
    _torchvision("deeplabv3_resnet50", aux_loss=False),
    _torchvision("fcn_resnet50", aux_loss=True),
    _timm("bifpn_efficientnet_b0"),
    _smp("Unet"),
    _smp("FPN"),
]
