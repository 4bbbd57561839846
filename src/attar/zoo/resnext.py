"""ResNeXt for small images: ResNeXt-L, CxDd, bottlenecks around grouped convolutions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attar.errors import AttarError
from attar.zoo.resnet import CifarNet, scaled

__all__ = ["CifarResNeXt", "GroupedBottleneck", "cifar_resnext", "layers_per_stage"]


def layers_per_stage(family: str, depth: int, step: int, extra: int) -> int:
    """Return n in depth = step n + extra; AttarError for a depth that is not of this form, naming the nearest."""
    n = (depth - extra) // step
    if n < 1 or depth != step * n + extra:
        nearest = step * max(1, round((depth - extra) / step)) + extra
        raise AttarError(f"{family} has depth {step}n + {extra}, which {depth} is not: the nearest is {nearest}.")
    return n


class GroupedBottleneck(nn.Module):
    """1x1, grouped 3x3 (strided), 1x1 convolutions: the aggregated transformations of Xie et al., CVPR 2017, figure 3c.

    Shapes: [N, inputs, H, W] -> [N, outputs, H / stride, W / stride]; the shortcut is the identity where the shapes
    agree, else a strided 1x1 convolution with batch norm.
    """

    def __init__(self, inputs: int, inner: int, outputs: int, groups: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, which nothing modifies afterwards."""
        residual = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        output: Tensor = self.act3(self.bn3(self.conv3(residual)) + self.downsample(x))
        return output


class CifarResNeXt(CifarNet):
    """ResNeXt-L, CxDd: stem of 64 channels, three stages of n = (L - 2) / 9 blocks with 256, 512, 1024 channels out.

    The grouped convolution of stage i has C groups of 2^(i-1) D channels (Xie et al., CVPR 2017, section 5.2): 8x64d
    starts with 512 channels in 8 groups. Stage i halves the resolution for i > 1 and ends in a ReLU.

    Args:
        depth: L = 9n + 2.
        cardinality: C, the number of groups.
        base_width: D, channels of each group in the first stage.
        width: multiplies all channels, rounded down (inside a block those of each group, so that C stays).
        num_classes: 0 for no classifier.
        in_chans: image channels.
        global_pool: timm's pooling name.
        drop_rate: dropout before the classifier.

    Raises:
        AttarError: a depth that is not 9n + 2, or a width that leaves no channels.
    """

    def __init__(
        self,
        depth: int,
        cardinality: int,
        base_width: int,
        width: float = 1.0,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        n = layers_per_stage("A CIFAR ResNeXt", depth, 9, 2)
        if cardinality < 1:
            raise AttarError(f"A ResNeXt needs a cardinality of at least 1, not {cardinality}.")
        channels = scaled(64, width)
        self.in_chans = in_chans
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = []
        stages = []
        for i in range(3):
            inner, outputs = cardinality * scaled(base_width * 2**i, width), scaled(256 * 2**i, width)
            stage = nn.Sequential()
            for j in range(n):
                stage.append(GroupedBottleneck(channels, inner, outputs, cardinality, 2 if i > 0 and j == 0 else 1))
                channels = outputs
            stages.append(stage)
            self.feature_info.append({"num_chs": outputs, "reduction": 2**i, "module": f"layer{i + 1}"})
        self.layer1, self.layer2, self.layer3 = stages
        self._finish(channels, num_classes, global_pool, drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's map [N, num_features, h, w]."""
        features: Tensor = self.layer3(self.layer2(self.layer1(self.act1(self.bn1(self.conv1(x))))))
        return features


def cifar_resnext(depth: int, cardinality: int, base_width: int, **kwargs: Any) -> CifarResNeXt:
    """Build ResNeXt-`depth`, `cardinality`x`base_width`d; other arguments are `CifarResNeXt`'s, AttarErrors too."""
    return CifarResNeXt(depth, cardinality, base_width, **kwargs)
