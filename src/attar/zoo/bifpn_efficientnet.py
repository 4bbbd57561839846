"""FRSKD's published student for segmentation: an EfficientNet, a six-level pyramid and three cheap BiFPN layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models import resolve_pretrained_cfg as resolve_cfg
from torch import Tensor, nn

from attar.anatomy.neck import BiFPNNeck, DenseHead, enlarged
from attar.errors import AttarError

__all__ = ["BiFPNEfficientNet", "segmentation_names"]

# Name: timm's encoder (the published code's layers and weights), width of the pyramid.
_NETWORKS = {
    "bifpn_efficientnet_b0": ("tf_efficientnet_b0.aa_in1k", 64),
    "bifpn_efficientnet_b1": ("tf_efficientnet_b1.aa_in1k", 88),
    "bifpn_efficientnet_b2": ("tf_efficientnet_b2.aa_in1k", 112),
}
# The stages of an EfficientNet whose first block brings it to strides 4, 8 and 16; the last one ends at 32.
_TAPPED = (1, 2, 3)


class BiFPNEfficientNet(nn.Module):
    """EfficientNet encoder, feature pyramid P_2..P_7, neck of BiFPN layers and a head on the finest map.

    Definition, with C_2..C_5 the encoder's maps, ONE and THREE 1x1 and strided 3x3 convolutions with bias, batch norm
    and ReLU, up bilinear to the size of what it is added to:
        P_5 = ONE(C_5);  P_i = up(P_i+1) + ONE(C_i) for i = 4, 3, 2;  P_6 = THREE(C_5);  P_7 = THREE(P_6)
        S = three `BiFPNLayer` of P;  z = `DenseHead` of S_2, bilinear to the images' size
    C_2, C_3, C_4 are what the first block at strides 4, 8 and 16 returns, C_5 is the last map, at stride 32. The logits
    do not depend on S_3..S_7, which are there for the self-teacher to read.

    Shapes: images [N, in_chans, H, W], any H and W -> logits [N, num_classes, H, W]; P_i are ceil(H / 2^i) high.

    Args:
        encoder: an EfficientNet of timm.
        channels: of P and S.
        num_classes: K.
        in_chans: image channels.
        layers: BiFPN layers of the neck.
        head_channels: hidden channels of the head.
        stem_activation: the encoder's activation behind its stem, which the published network has not.
        norm_momentum: weight of the newest batch in the running statistics of pyramid and head. The published 0.997
            leaves the last batch's alone; it may have been meant as 0.003, which takes a thousand steps to settle.
        drop_path_rate: of the encoder.
        pretrained_encoder: load timm's ImageNet weights into the encoder, as published; `timm.create_model(NAME,
            pretrained=True)` does. Without them, and in small batches, the encoder's running statistics lag behind its
            fast-changing weights for the first hundreds of steps, and evaluation is poor for as long.

    Raises:
        AttarError: an encoder that is no EfficientNet of timm.

    Source: MingiJi/FRSKD ("EfficientDet-d0", -d1, -d2 in the paper). Differs from it: the batch norm of timm's encoder
    averages over fewer steps (momentum 0.1, not 0.01), and two 3x3 convolutions that nothing reads are left out.
    """

    def __init__(
        self,
        encoder: str = "tf_efficientnet_b0.aa_in1k",
        channels: int = 64,
        num_classes: int = 21,
        in_chans: int = 3,
        layers: int = 3,
        head_channels: int = 256,
        stem_activation: bool = False,
        norm_momentum: float = 0.997,
        drop_path_rate: float = 0.0,
        pretrained_encoder: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.encoder = _Encoder(
            timm.create_model(encoder, pretrained_encoder, in_chans=in_chans, drop_path_rate=drop_path_rate),
            stem_activation,
        )
        self.feature_info = self.encoder.feature_info
        self.pyramid = _Pyramid(self.encoder.channels, channels, norm_momentum)
        self.neck = BiFPNNeck(channels, 6, layers)
        self.finest = _Finest()
        self.head = DenseHead(channels, head_channels, num_classes, momentum=norm_momentum)

    @property
    def num_features(self) -> int:
        """Channels of the map that the logits are read from."""
        return self.neck.channels

    def get_classifier(self) -> nn.Module:
        """Return the last convolution."""
        return self.head.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last convolution by a fresh one."""
        self.num_classes = num_classes
        self.head.classifier = nn.Conv2d(self.head.classifier.in_channels, num_classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes, H, W]."""
        maps = self.neck(self.pyramid(self.encoder(x)))
        logits: Tensor = self.head(self.finest(maps), x.shape[-2:])
        return logits


class _Finest(nn.Module):
    """The finest of several maps.

    In training the others take part with weight zero: in plain training nothing else reads them, and several processes
    wait for every gradient.
    """

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return the first map."""
        if not self.training:
            return maps[0]
        return maps[0] + 0.0 * torch.stack([unread.mean() for unread in maps[1:]]).sum()


class _Encoder(nn.Module):
    """Stem and blocks of timm's EfficientNet: images -> C_2 .. C_5."""

    def __init__(self, network: nn.Module, stem_activation: bool) -> None:
        super().__init__()
        if not isinstance(network, timm.models.efficientnet.EfficientNet) or len(network.blocks) != 7:
            raise AttarError(f"{type(network).__name__} is no EfficientNet with seven stages: choose efficientnet_b0.")
        self.conv_stem, self.bn1, self.blocks = network.conv_stem, network.bn1, network.blocks
        if not stem_activation:
            self.bn1.act = nn.Identity()
        widths = [stage[0].bn3.num_features if i else stage[0].bn2.num_features for i, stage in enumerate(self.blocks)]
        self.channels = [*(widths[i] for i in _TAPPED), widths[-1]]
        self.feature_info = [
            {"num_chs": widths[i], "reduction": 2 ** (level + 2), "module": f"encoder.blocks.{i}.{len(blocks) - 1}"}
            for level, (i, blocks) in enumerate((i, self.blocks[i]) for i in (1, 2, 4, 6))
        ]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the four maps, fine to deep."""
        x = self.bn1(self.conv_stem(x))
        maps = []
        for i, stage in enumerate(self.blocks):
            for j, block in enumerate(stage):
                x = block(x)
                if i in _TAPPED and j == 0:
                    maps.append(x)
        return [*maps, x]


class _Pyramid(nn.Module):
    """Four maps of any widths -> six of one width."""

    def __init__(self, inputs: Sequence[int], channels: int, momentum: float) -> None:
        super().__init__()

        def block(inputs: int, kernel: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inputs, channels, kernel, stride, padding=kernel // 2),
                nn.BatchNorm2d(channels, eps=1e-4, momentum=momentum),
                nn.ReLU(inplace=True),
            )

        self.laterals = nn.ModuleList(block(c, 1, 1) for c in inputs)
        self.beyond = nn.ModuleList([block(inputs[-1], 3, 2), block(channels, 3, 2)])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return P_2 .. P_7."""
        found = [self.laterals[-1](maps[-1])]
        for i in range(len(self.laterals) - 2, -1, -1):
            lateral = self.laterals[i](maps[i])
            found.insert(0, enlarged(found[0], lateral) + lateral)
        lower = self.beyond[0](maps[-1])
        return [*found, lower, self.beyond[1](lower)]


# timm looks this name up in the module of a registered function.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 21,
            "input_size": (3, 512, 512),
            "min_input_size": (3, 32, 32),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "encoder.conv_stem",
            "classifier": "head.classifier",
        }
        for name in _NETWORKS
    }
)


def segmentation_names() -> list[str]:
    """Return the names of the segmentation networks that are registered with timm, sorted."""
    return sorted(_NETWORKS)


def _entry_point(name: str, encoder: str, channels: int) -> Callable[..., BiFPNEfficientNet]:
    def create(pretrained: bool = False, **kwargs: Any) -> BiFPNEfficientNet:
        if kwargs.pop("features_only", False):
            raise AttarError(f"'{name}' answers for pixels: take timm's '{encoder}' for features_only.")
        cfg = resolve_cfg(name, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        whole = pretrained and bool(cfg.has_weights or cfg.state_dict)  # a user's own exported folder
        settings = {"encoder": encoder, "channels": channels, "pretrained_encoder": pretrained and not whole}
        model: BiFPNEfficientNet = build_model_with_cfg(BiFPNEfficientNet, name, whole, **(settings | kwargs))
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"Build `{name}`; keyword arguments are those of `BiFPNEfficientNet`."
    return create


for _name, _network in _NETWORKS.items():
    globals()[_name] = register_model(_entry_point(_name, *_network))
