from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.functional.filters import filter_norms, strongest
from attar.functional.pooling import pooled


def test_worked_example() -> None:
    weight = torch.zeros(4, 2, 3, 3, dtype=torch.float64)
    weight[:, 0, 0, 0], weight[:, 1, 2, 1] = torch.tensor([1.0, 0.5, -2.0, 2.0]), torch.tensor([-2.0, 0.0, 0.0, 0.5])
    assert filter_norms(weight).tolist() == [3.0, 0.5, 2.0, 2.5]
    assert strongest(filter_norms(weight), 2).tolist() == [0, 3]
    assert filter_norms(weight, 2.0).tolist() == pytest.approx([5**0.5, 0.5, 2.0, 4.25**0.5])


@given(st.integers(1, 8), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_permuted_filters_permute_what_is_kept(keep: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 3, 3, 3, generator=generator)
    order = torch.randperm(8, generator=generator)
    kept, permuted = strongest(filter_norms(weight), keep), strongest(filter_norms(weight[order]), keep)
    assert sorted(order[permuted].tolist()) == kept.tolist() == sorted(kept.tolist())
    dropped = [k for k in range(8) if k not in kept.tolist()]
    norms = filter_norms(weight)
    assert not dropped or norms[kept].min() >= norms[dropped].max()


def test_what_cannot_be_kept_or_pooled() -> None:
    with pytest.raises(ValueError, match="9 of 8 channels"):
        strongest(torch.ones(8), 9)
    with pytest.raises(ValueError, match="2 x 4 is not pooled to 4 x 4"):
        pooled(torch.ones(1, 1, 2, 4), (4, 4))


def test_pooling_is_the_mean_and_nothing_at_equal_size() -> None:
    features = torch.randn(2, 3, 4, 6)
    assert pooled(features, (4, 6)) is features
    torch.testing.assert_close(pooled(features, (2, 3)), torch.nn.functional.avg_pool2d(features, 2))
