"""Plain networks of three convolutions, which distillation's retrieval experiments train on CIFAR-10."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from attar.errors import AttarError
from attar.zoo.resnet import CifarNet, scaled

__all__ = ["CifarCNN"]

# Side of the map that the hidden layer reads: what 32 x 32 images leave.
_GRID = 2


class CifarCNN(CifarNet):
    """Three times convolution 3x3 (no padding), batch norm, ReLU and 2x2 max-pooling, then two linear layers.

    Images of 32 x 32 give maps of 15 x 15, 6 x 6 and 2 x 2; the last is flattened, not pooled, into a hidden layer of
    twice its channels with a ReLU, which is the embedding. Convolutions have a bias and torch's own initialisation.
    Source: gsarridis/InDistill and passalis/probabilistic_kt. Differs from them: images of other sizes are averaged
    to the 2 x 2 map.

    Args:
        channels: of the three convolutions.
        width: multiplies all channels, rounded down.
        num_classes: 0 for no classifier.
        in_chans: image channels.
        drop_rate: dropout before the classifier.

    Shapes: as `CifarNet`, but images of 22 x 22 at least; the embedding is [N, 2 num_features].
    """

    def __init__(
        self,
        channels: Sequence[int],
        width: float = 1.0,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.feature_info = []
        inputs = in_chans
        for i, outputs in enumerate((scaled(c, width) for c in channels), start=1):
            self.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, 3))
            self.add_module(f"bn{i}", nn.BatchNorm2d(outputs))
            self.add_module(f"act{i}", nn.ReLU(inplace=True))
            self.add_module(f"pool{i}", nn.MaxPool2d(2))
            self.feature_info.append({"num_chs": outputs, "reduction": 2**i, "module": f"pool{i}"})
            inputs = outputs
        self.num_features, self.head_hidden_size = inputs, 2 * inputs
        self.global_pool = nn.Sequential(nn.AdaptiveAvgPool2d(_GRID), nn.Flatten())
        self.fc1 = nn.Linear(inputs * _GRID**2, self.head_hidden_size)
        self.act = nn.ReLU()
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one.

        Raises:
            AttarError: another pooling is asked for, which the hidden layer could not read.
        """
        if global_pool is not None:
            raise AttarError("A CifarCNN flattens its last map: leave global_pool out.")
        self.num_classes = num_classes
        self.fc = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's map [N, num_features, h, w]."""
        for i in range(1, len(self.feature_info) + 1):
            for layer in ("conv", "bn", "act", "pool"):
                x = self.get_submodule(f"{layer}{i}")(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of a feature map, or with `pre_logits` the hidden layer that they are read from."""
        embedding: Tensor = self.head_drop(self.act(self.fc1(self.global_pool(x))))
        return embedding if pre_logits else self.fc(embedding)
