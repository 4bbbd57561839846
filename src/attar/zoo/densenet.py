"""Densely connected networks for small images: DenseNet-L-k and DenseNet-BC-L-k."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attar.errors import AttarError
from attar.zoo.resnet import CifarNet, scaled
from attar.zoo.resnext import layers_per_stage

__all__ = ["CifarDenseNet", "DenseLayer", "cifar_densenet"]


class DenseLayer(nn.Module):
    """y = cat(x, conv3x3(relu(bn(h)))), h = x or, with a bottleneck, conv1x1(relu(bn(x))) of 4k channels.

    Shapes: [N, inputs, H, W] -> [N, inputs + k, H, W] (Huang et al., CVPR 2017).
    """

    def __init__(self, inputs: int, growth: int, bottleneck: bool) -> None:
        super().__init__()
        inner = 4 * growth if bottleneck else inputs
        self.squeeze = nn.Sequential()
        if bottleneck:
            self.squeeze.extend(
                [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), nn.Conv2d(inputs, inner, 1, bias=False)]
            )
        self.norm = nn.BatchNorm2d(inner)
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(inner, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x with k more channels; x itself is never modified."""
        return torch.cat((x, self.conv(self.act(self.norm(self.squeeze(x))))), dim=1)


class Transition(nn.Sequential):
    """bn, relu, 1x1 convolution, 2x2 average pooling: [N, inputs, H, W] -> [N, outputs, H / 2, W / 2]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.BatchNorm2d(inputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.AvgPool2d(2),
        )


class CifarDenseNet(CifarNet):
    """DenseNet-L-k: three dense blocks of n layers, each of which adds k channels, then batch norm and ReLU.

    Plain: n = (L - 4) / 3, a stem of 16 channels, transitions keep the channels. BC (`bottleneck`): n = (L - 4) / 6, a
    1x1 convolution in every layer, a stem of 2k channels, transitions halve the channels, rounded down. A stage here
    begins with the transition that halves its resolution and ends with its dense block, which is not yet activated; the
    last stage's output is the map after the final ReLU. Differs from the paper: `drop_rate` is before the classifier,
    not inside the blocks.

    Args:
        depth: L, 3n + 4 or, for BC, 6n + 4.
        growth: k.
        bottleneck: BC.
        width: multiplies stem and growth, rounded down, and so all channels.
        num_classes: 0 for no classifier.
        in_chans: image channels.
        global_pool: timm's pooling name.
        drop_rate: dropout before the classifier.

    Raises:
        AttarError: a depth of another form, no growth, or a width that leaves no channels.
    """

    def __init__(
        self,
        depth: int,
        growth: int,
        bottleneck: bool = True,
        width: float = 1.0,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        n = layers_per_stage("A DenseNet-BC" if bottleneck else "A plain DenseNet", depth, 6 if bottleneck else 3, 4)
        if growth < 1:
            raise AttarError(f"A DenseNet needs a growth of at least 1 channel a layer, not {growth}.")
        k = scaled(growth, width)
        channels = scaled(2 * growth if bottleneck else 16, width)
        self.in_chans = in_chans
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
        self.feature_info = []
        stages = []
        for i in range(3):
            stage = nn.Sequential()
            if i > 0:
                kept = channels // 2 if bottleneck else channels
                stage.append(Transition(channels, kept))
                channels = kept
            for _ in range(n):
                stage.append(DenseLayer(channels, k, bottleneck))
                channels += k
            stages.append(stage)
            module = f"layer{i + 1}" if i < 2 else "act"
            self.feature_info.append({"num_chs": channels, "reduction": 2**i, "module": module})
        self.layer1, self.layer2, self.layer3 = stages
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self._finish(channels, num_classes, global_pool, drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's map [N, num_features, h, w]."""
        features: Tensor = self.act(self.norm(self.layer3(self.layer2(self.layer1(self.conv1(x))))))
        return features


def cifar_densenet(depth: int, growth: int, bottleneck: bool = True, **kwargs: Any) -> CifarDenseNet:
    """Build DenseNet-BC-`depth`-`growth`, plain without `bottleneck`; other arguments are `CifarDenseNet`'s."""
    return CifarDenseNet(depth, growth, bottleneck, **kwargs)
