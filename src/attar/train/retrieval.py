"""Judging a network by retrieval: test images as queries, training images as the database, distances of embeddings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attar.anatomy import Recorder, survey
from attar.data import EvalLoader, Normalization, Source, Split
from attar.errors import AttarError
from attar.functional.retrieval import (
    Distance,
    average_precision,
    batch_interpolated_average_precision,
    batch_interpolated_precision,
    precision_at,
    relevance_by_rank,
)
from attar.train.distributed import Ranks

__all__ = ["DISTANCES", "TOP_K", "Retrieval", "embed", "measure_retrieval", "retrieve"]

DISTANCES: tuple[Distance, ...] = ("cosine", "euclidean")
TOP_K = (1, 50, 100)

_IMAGES = 250  # a pass through the network
_PAIRS = 1 << 22  # distances in memory at a time, about 170 MB
_PUBLISHED_BATCH = 128  # queries evaluated together in the released code, on which its figures depend


@dataclass(frozen=True)
class Retrieval:
    """How well Q queries find the images of their class among N, by one distance.

    Attributes:
        distance: "cosine" or "euclidean".
        queries: Q.
        database: N.
        map: mean over queries of the plain average precision.
        precision: by k, the mean share of the query's class among the k nearest; k no larger than N.
        batch_interpolated_map: mAP as released code computes it, for comparison with published tables only: eleven
            levels of recall, interpolated over the number of queries in a batch (`batch`).
        batch_interpolated_precision: by k, likewise.
        batch: that number, 128 in the released code.
    """

    distance: Distance
    queries: int
    database: int
    map: float
    precision: dict[int, float]
    batch_interpolated_map: float
    batch_interpolated_precision: dict[int, float]
    batch: int

    def as_dict(self) -> dict[str, Any]:
        """Return the metrics by name."""
        return dataclasses.asdict(self)


def measure_retrieval(
    network: nn.Module,
    source: Source,
    normalization: Normalization,
    *,
    split: str = "test",
    distances: Sequence[Distance] = DISTANCES,
    ranks: Ranks | None = None,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Retrieval]:
    """Measure how well a network's embeddings find images of the same class, by each distance.

    The embedding is what the classifier reads (the pooled last stage where there is no linear classifier), in
    evaluation mode and float32. The database is the whole training set as it comes, not augmented: for the test images
    with the hold-out, whatever part of it the network was trained on; queries from the hold-out search the rest.

    Args:
        network: images [N, C, H, W] -> logits; its modes are restored.
        source: the images.
        normalization: of the network's images.
        split: where the queries come from, "test" or "holdout".
        distances: which.
        ranks: the processes that share the work; default: this one alone, on the network's device.
        progress: told the share of the work that is done, in 0..1.

    Raises:
        AttarError: queries from the training images, a class with queries and no image to find, no stage in the
            network, or embeddings that are not finite.
    """
    if split == "train":
        raise AttarError("Retrieval searches the training images: take the queries from split test or holdout.")
    ranks = ranks or Ranks(0, 1, next(network.parameters()).device)
    searched = [source.train, source.holdout] if split == "test" and len(source.holdout) else [source.train]
    asked = source.splits[split]
    if len(asked) == 0:
        raise AttarError(f"The {split} split is empty: choose another one, or set images aside for it.")
    images = sum(map(len, searched))
    # Rough shares of the work: networks dominate unless they are tiny.
    total = len(asked) + images + len(distances) * (len(asked) * images // 20_000 + 1)
    done = 0.0

    def advance(amount: float) -> None:
        nonlocal done
        done += amount
        if progress is not None:
            progress(min(done / total, 1.0))

    queries = embed(network, asked, normalization, ranks, advance)
    database = torch.cat([embed(network, part, normalization, ranks, advance) for part in searched])
    labels = torch.from_numpy(asked.targets).to(ranks.device)
    found = torch.from_numpy(np.concatenate([part.targets for part in searched])).to(ranks.device)
    missing = np.setdiff1d(asked.targets, found.cpu().numpy())
    if missing.size:
        raise AttarError(
            f"Class '{source.classes[int(missing[0])]}' has {split} images but no training image to find: "
            "give data that hold every class in both."
        )

    def scaled(share: float) -> None:
        advance(share * (len(asked) * images // 20_000 + 1))

    return {
        distance: retrieve(queries, labels, database, found, distance, ranks=ranks, advance=scaled)
        for distance in distances
    }


def retrieve(
    queries: Tensor,
    query_labels: Tensor,
    database: Tensor,
    database_labels: Tensor,
    distance: Distance = "cosine",
    *,
    top_k: Sequence[int] = TOP_K,
    batch: int = _PUBLISHED_BATCH,
    ranks: Ranks | None = None,
    advance: Callable[[float], None] | None = None,
) -> Retrieval:
    """Measure how well features of queries find features of their class.

    Cost: Q N distances and the sorting of Q lists of N numbers. 10,000 queries of 50,000 items of 64 numbers are
    2 x 5e8 x 64 = 6.4e10 operations and 5e8 numbers to sort. At most 2^22 distances are in memory at a time: 84 such
    queries, about 170 MB.

    Shapes: features [Q, D] and [N, D], labels [Q] and [N].

    Args:
        queries: features of the queries.
        query_labels: their labels.
        database: features of the images that are searched.
        database_labels: their labels.
        distance: "cosine" or "euclidean".
        top_k: the k of precision at k; those above N are left out.
        batch: of the batch-interpolated figures; nothing else depends on it.
        ranks: the processes that share the queries; all must hold all features.
        advance: told the share of this work that has been done since the last call.

    Raises:
        AttarError: features that are not finite, or a batch below 1.
    """
    if batch < 1:
        raise AttarError(f"A batch of queries must hold at least one, not {batch}.")
    if not (queries.isfinite().all() and database.isfinite().all()):
        raise AttarError("The embeddings are not all finite: the network has diverged, choose an earlier checkpoint.")
    ranks = ranks or Ranks(0, 1, queries.device)
    database = database.double()
    depths = [k for k in top_k if k <= len(database)]
    sums = torch.zeros(2, 1 + len(depths), dtype=torch.float64, device=queries.device)
    parts = list(_parts(len(queries), len(database), batch))
    for part, together in parts[ranks.rank :: ranks.world]:
        relevance = relevance_by_rank(queries[part], query_labels[part], database, database_labels, distance)
        sums[0, 0] += average_precision(relevance).sum()
        sums[1, 0] += batch_interpolated_average_precision(relevance, together).sum()
        interpolated = batch_interpolated_precision(relevance, together)
        for column, k in enumerate(depths, start=1):
            sums[0, column] += precision_at(relevance, k).sum()
            sums[1, column] += interpolated[:, k - 1].sum()
        if advance is not None:
            advance(ranks.world / len(parts))
    plain, published = (ranks.sum(sums) / len(queries)).tolist()
    return Retrieval(
        distance,
        len(queries),
        len(database),
        plain[0],
        dict(zip(depths, plain[1:], strict=True)),
        published[0],
        dict(zip(depths, published[1:], strict=True)),
        batch,
    )


def _parts(queries: int, items: int, batch: int) -> Iterator[tuple[slice, int]]:
    """Cut the queries into parts that fit into memory, each with the number of queries of its batch."""
    most = max(1, _PAIRS // items)
    for start in range(0, queries, batch):
        end = min(start + batch, queries)
        for first in range(start, end, most):
            yield slice(first, min(first + most, end)), end - start


def embed(
    network: nn.Module,
    split: Split,
    normalization: Normalization,
    ranks: Ranks | None = None,
    advance: Callable[[float], None] | None = None,
) -> Tensor:
    """Return the embedding [N, D] float32 of every image of a split, in evaluation mode; the network is left as it was.

    Args:
        network: images [N, C, H, W] -> logits.
        split: the images.
        normalization: of the network's images.
        ranks: the processes that share the work; all get all embeddings.
        advance: told how many images have been seen since the last call.

    Raises:
        AttarError: no stage is found in the network.
    """
    ranks = ranks or Ranks(0, 1, next(network.parameters()).device)
    loader = EvalLoader(split, _IMAGES, normalization, ranks.device)
    batches = loader.batches
    loader.batches = batches[ranks.rank :: ranks.world]
    anatomy, _ = survey(network, torch.zeros(2, 3, *split.image_size, device=ranks.device))
    tap = anatomy.embedding or anatomy.stages[-1].tap
    embeddings = torch.zeros(len(split), anatomy.embedding_dim, device=ranks.device)
    modes = {module: module.training for module in network.modules()}
    network.eval()
    recorder = Recorder(network, [tap], cloned=[tap])
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            for (images, _, _), positions in zip(loader, loader.batches, strict=True):
                value = recorder.run(images)[1][tap].float()
                pooled = value if value.ndim == 2 else value.mean(dim=(2, 3))
                embeddings[int(positions[0]) : int(positions[-1]) + 1] = pooled
                if advance is not None:
                    advance(len(images) * ranks.world)
    finally:
        recorder.remove()
        for module, mode in modes.items():
            module.training = mode
    return ranks.sum(embeddings)  # every image is one process's, and zero in all others
