"""Residual networks for small images: depth 6n + 2 in both block forms, and ResNet-18/50 with a CIFAR stem."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from timm.layers import create_classifier
from torch import Tensor, fx, nn

from attar.errors import AttarError
from attar.functional import average_pool

__all__ = ["BasicBlock", "Bottleneck", "CifarNet", "CifarResNet", "cifar_resnet", "per_stage", "scaled"]

fx.wrap("average_pool")  # it looks at the layout in memory, which a symbolic trace has not


def scaled(channels: int, width: float) -> int:
    """Return floor(width * channels), the width rule of compressed ensembles; AttarError when nothing is left."""
    result = int(round(width * channels, 6))  # the inner round keeps 100 * 0.29 = 28.999999999999996 from losing one
    if result < 1:
        raise AttarError(f"width={width} leaves none of {channels} channels: choose at least {1 / channels:g}.")
    return result


def per_stage(family: str, depth: int, extra: int) -> int:
    """Return n in depth = 6 n + extra; AttarError for a depth that is not of this form, naming the nearest that is."""
    n = (depth - extra) // 6
    if n < 1 or depth != 6 * n + extra:
        nearest = 6 * max(1, round((depth - extra) / 6)) + extra
        raise AttarError(f"{family} has depth 6n + {extra}, which {depth} is not: the nearest is {nearest}.")
    return n


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: y = relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)) (He et al., CVPR 2016).

    Shapes: [N, inputs, H, W] -> [N, planes, H / stride, W / stride]; the shortcut is the identity where the shapes
    agree, else a strided 1x1 convolution with batch norm.
    """

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int = 1, inner: int | None = None) -> None:
        super().__init__()
        inner = inner or planes
        self.conv1 = nn.Conv2d(inputs, inner, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _projection(inputs, planes, stride)
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, which nothing modifies afterwards."""
        residual = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        output: Tensor = self.act2(residual + self.downsample(x))
        return output


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided), 1x1 convolutions around `inner` channels (default `planes`), 4 `planes` out.

    Shapes: [N, inputs, H, W] -> [N, 4 planes, H / stride, W / stride]; shortcut as in `BasicBlock`.
    """

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int = 1, inner: int | None = None) -> None:
        super().__init__()
        inner, outputs = inner or planes, self.expansion * planes
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.act2 = nn.ReLU(inplace=True)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _projection(inputs, outputs, stride)
        self.act3 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, which nothing modifies afterwards."""
        residual = self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        output: Tensor = self.act3(self.bn3(self.conv3(residual)) + self.downsample(x))
        return output


def _projection(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class _AveragePool(nn.Module):
    """Maps [N, C, H, W] -> [N, C, 1, 1], with a gradient that is channels-last where the map is."""

    def forward(self, x: Tensor) -> Tensor:
        return average_pool(x, keepdim=True)


class CifarNet(nn.Module, ABC):
    """What every network here shares with timm's: features, then global pool, dropout and a linear classifier `fc`.

    Shapes: images [N, in_chans, H, W], any H and W from 8 up -> logits [N, num_classes]; `forward_features` gives the
    last stage's map [N, num_features, h, w] and `forward_head(..., pre_logits=True)` the embedding [N, num_features].
    """

    feature_info: list[dict[str, Any]]  # one entry per stage: its module, channels and reduction
    global_pool: nn.Module
    fc: nn.Module

    def _finish(self, features: int, num_classes: int, global_pool: str, drop_rate: float) -> None:
        self.num_features = self.head_hidden_size = features
        self.drop_rate = drop_rate
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # std sqrt(2 / (k k Cout)); batch norm and Linear keep their defaults
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer (an identity when `num_classes` is 0)."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, and the pooling when one is named."""
        self.num_classes = num_classes
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=pool)
        if pool == "avg":
            self.global_pool.pool = _AveragePool()

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's map [N, num_features, h, w]."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of a feature map, or with `pre_logits` the pooled embedding that they are read from."""
        embedding: Tensor = self.head_drop(self.global_pool(x))
        return embedding if pre_logits else self.fc(embedding)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes]."""
        return self.forward_head(self.forward_features(x))


class CifarResNet(CifarNet):
    """Residual network with a 3x3 stem of stride 1 and no max-pool (He et al., CVPR 2016, section 4.2).

    Differs from the paper: projection shortcuts with batch norm in place of zero-padded identities, as most
    distillation code has. Stage i halves the resolution for i > 1 and ends in a ReLU.

    Args:
        blocks: number of blocks of each stage.
        planes: channels of each stage before the block's expansion (a bottleneck's output has 4 times as many).
        bottleneck: `Bottleneck` blocks, else `BasicBlock`.
        widen: multiplies the channels inside each block only (8 in the "WRN-20-8" of online distillation).
        width: multiplies all channels, rounded down.
        num_classes: 0 for no classifier.
        in_chans: image channels.
        global_pool: timm's pooling name.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        planes: Sequence[int] = (16, 32, 64),
        bottleneck: bool = False,
        widen: int = 1,
        width: float = 1.0,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        block: type[BasicBlock] | type[Bottleneck] = Bottleneck if bottleneck else BasicBlock
        channels = scaled(planes[0], width)
        self.in_chans = in_chans
        self.conv1 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU(inplace=True)
        self.stage_names = [f"layer{i}" for i in range(1, len(blocks) + 1)]
        self.feature_info = []
        for i, (name, count, base) in enumerate(zip(self.stage_names, blocks, planes, strict=True)):
            stage = nn.Sequential()
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(block(channels, scaled(base, width), stride, widen * scaled(base, width)))
                channels = block.expansion * scaled(base, width)
            self.add_module(name, stage)
            self.feature_info.append({"num_chs": channels, "reduction": 2**i, "module": name})
        self._finish(channels, num_classes, global_pool, drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's map [N, num_features, h, w]."""
        x = self.act1(self.bn1(self.conv1(x)))
        for name in self.stage_names:
            x = getattr(self, name)(x)
        return x


def cifar_resnet(depth: int, bottleneck: bool = False, **kwargs: Any) -> CifarResNet:
    """Build the CIFAR ResNet of n = (depth - 2) / 6 blocks per stage; AttarError for any other depth.

    `bottleneck=True` puts a bottleneck wherever the paper has a basic block, as the code of ONE does from depth 44 up:
    its "ResNet-110" has 18 bottlenecks per stage, 164 layers. Papers that mean a bottleneck network of 110 layers
    have 12 per stage: `CifarResNet((12, 12, 12), bottleneck=True)`.
    """
    return CifarResNet((per_stage("A CIFAR ResNet", depth, 2),) * 3, bottleneck=bottleneck, **kwargs)
