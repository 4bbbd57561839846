"""The data path: named sources, a cache of decoded images, augmentation, samplers and loaders.

Sample order and augmentation are pure functions of (seed, epoch, image, view): independent of batch, rank, worker
timing and of where a run was resumed.
"""

from __future__ import annotations

from attar.data.augment import AUGMENTATIONS, Augmentation, Normalization
from attar.data.images import BadImageError
from attar.data.joint import JOINT_AUGMENTATIONS, JointAugmentation, augmentation
from attar.data.loader import EvalLoader, Loader, Sample
from attar.data.masks import VOID, BadMaskError
from attar.data.samplers import Sampler, Shuffled, make_sampler, rank_slice
from attar.data.sources import Source, Split, open_source

__all__ = [
    "AUGMENTATIONS",
    "JOINT_AUGMENTATIONS",
    "VOID",
    "Augmentation",
    "BadImageError",
    "BadMaskError",
    "EvalLoader",
    "JointAugmentation",
    "Loader",
    "Normalization",
    "Sample",
    "Sampler",
    "Shuffled",
    "Source",
    "Split",
    "augmentation",
    "make_sampler",
    "open_source",
    "rank_slice",
]
