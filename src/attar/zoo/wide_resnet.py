"""Wide residual networks WRN-d-k: pre-activation basic blocks, k times the channels of a CIFAR ResNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attar.zoo.resnet import CifarNet, per_stage, scaled

__all__ = ["PreActivationBlock", "WideResNet", "wide_resnet"]


class PreActivationBlock(nn.Module):
    """y = shortcut + conv(relu(bn(conv(a)))), a = relu(bn(x)) (Zagoruyko and Komodakis, BMVC 2016).

    Shapes: [N, inputs, H, W] -> [N, outputs, H / stride, W / stride]; the shortcut is x where the shapes agree, else a
    strided 1x1 convolution of a, without batch norm.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.downsample: nn.Conv2d | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output; x itself is never modified."""
        active = self.act1(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(active)
        residual: Tensor = self.conv2(self.act2(self.bn2(self.conv1(active))))
        return residual + shortcut


class WideResNet(CifarNet):
    """WRN-d-k: stem 16, three stages of n = (d - 4) / 6 blocks with 16k, 32k, 64k channels, a last batch norm and ReLU.

    The first two stages end in a sum that is not yet activated (the next block does it); the last stage's output is
    the map after the final ReLU. Differs from the paper: `drop_rate` is before the classifier, not inside the blocks.

    Args:
        depth: d = 6n + 4.
        widen: k.
        width: multiplies all channels, the stem's too, rounded down.
        num_classes: 0 for no classifier.
        in_chans: image channels.
        global_pool: timm's pooling name.
        drop_rate: dropout before the classifier.

    Raises:
        AttarError: a depth that is not 6n + 4, or a width that leaves no channels.
    """

    def __init__(
        self,
        depth: int,
        widen: int,
        width: float = 1.0,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        n = per_stage("A wide ResNet of basic blocks", depth, 4)
        stem, first, second, third = (scaled(c, width) for c in (16, 16 * widen, 32 * widen, 64 * widen))
        self.in_chans = in_chans
        self.conv1 = nn.Conv2d(in_chans, stem, 3, padding=1, bias=False)
        self.layer1 = _stage(n, stem, first, stride=1)
        self.layer2 = _stage(n, first, second, stride=2)
        self.layer3 = _stage(n, second, third, stride=2)
        self.norm = nn.BatchNorm2d(third)
        self.act = nn.ReLU(inplace=True)
        self.feature_info = [
            {"num_chs": first, "reduction": 1, "module": "layer1"},
            {"num_chs": second, "reduction": 2, "module": "layer2"},
            {"num_chs": third, "reduction": 4, "module": "act"},
        ]
        self._finish(third, num_classes, global_pool, drop_rate)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's map [N, num_features, h, w]."""
        features: Tensor = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        features = self.act(self.norm(features))
        return features


def _stage(n: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
    rest = [PreActivationBlock(outputs, outputs) for _ in range(n - 1)]
    return nn.Sequential(PreActivationBlock(inputs, outputs, stride), *rest)


def wide_resnet(depth: int, width: int, num_classes: int = 10, **kwargs: Any) -> WideResNet:
    """Build WRN-depth-width (width is the paper's k); other arguments are `WideResNet`'s, AttarErrors too."""
    return WideResNet(depth, width, num_classes=num_classes, **kwargs)
