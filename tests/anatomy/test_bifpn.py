"""The feature pyramid: its blocks, its sizes and its wiring."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attar.anatomy.bifpn import BiFPN, Fusion, MirroredBiFPN, PointwiseBlock, SeparableBlock, halved, resampled


def test_fusion_weights() -> None:
    fusion = Fusion(3)
    torch.testing.assert_close(fusion.weights(), torch.full((3,), 1 / 3), atol=1e-6, rtol=0)
    with torch.no_grad():
        fusion.v.copy_(torch.tensor([2.0, -1.0, 1.0]))
    torch.testing.assert_close(fusion.weights(), torch.tensor([0.666667, 0, 0.333333]), atol=1e-6, rtol=0)
    maps = [torch.full((1, 2, 3, 3), float(k)) for k in (3, 100, 6)]
    torch.testing.assert_close(fusion(*maps), torch.full((1, 2, 3, 3), 4.0), atol=1e-5, rtol=0)
    with torch.no_grad():
        fusion.v.fill_(-1.0)
    assert not fusion(*maps).any()  # all switched off: nothing, not infinity


def test_blocks_are_layers_as_published() -> None:
    kinds = [type(layer).__name__ for layer in SeparableBlock(6, 2)]
    assert kinds == ["Conv2d", "Conv2d", "_Norm", "ReLU", "Conv2d", "Conv2d", "_Norm"]
    convolutions = [layer for layer in SeparableBlock(6, 2) if isinstance(layer, nn.Conv2d)]
    assert [layer.groups for layer in convolutions] == [6, 1, 6, 1]
    assert [layer.kernel_size for layer in convolutions] == [(3, 3), (1, 1), (3, 3), (1, 1)]
    assert all(layer.bias is None for layer in convolutions)
    lateral = PointwiseBlock(6, 4)
    assert [type(layer).__name__ for layer in lateral] == ["Conv2d", "_Norm", "ReLU"]
    assert (lateral[0].groups, lateral[0].bias, lateral[0].kernel_size) == (1, None, (1, 1))  # not depth-wise
    assert len(PointwiseBlock(6, 4, activated=False)) == 2


def test_pooling_pads_behind_even_and_around_odd_sides() -> None:
    row = torch.tensor([1.0, 2, 3, 4, 5]).view(1, 1, 1, 5)
    assert halved(row).flatten().tolist() == [2, 4, 5]  # windows (0, 1, 2), (2, 3, 4), (4, 5, 0)
    row = torch.tensor([9.0, 2, 3, 4, 5, 8]).view(1, 1, 1, 6)
    assert halved(row).flatten().tolist() == [9, 5, 8]  # windows (9, 2, 3), (3, 4, 5), (5, 8, 0)
    assert halved(torch.ones(1, 1, 1, 1)).shape == (1, 1, 1, 1)


@settings(max_examples=30, deadline=None)
@given(
    source=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    target=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    seed=st.integers(0, 99),
)
def test_resampling_reaches_any_size_with_values_of_the_map(
    source: tuple[int, int], target: tuple[int, int], seed: int
) -> None:
    x = torch.rand(1, 2, *source, generator=torch.Generator().manual_seed(seed))
    y = resampled(x, target)
    assert tuple(y.shape) == (1, 2, *target)
    assert torch.isin(y, x).all()  # nearest neighbours and maxima invent nothing
    if source == target:
        assert y is x
    if target == (2 * source[0], 2 * source[1]):
        assert torch.equal(y, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("convolved", [True, False])
def test_wiring_against_the_definition(convolved: bool) -> None:
    """Three levels written out by hand."""
    torch.manual_seed(0)
    widths = (4, 6, 8) if convolved else (5, 5, 5)
    net = BiFPN((3, 4, 5), widths, convolved=convolved).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.uniform_(-1, 1)
    f = [torch.randn(2, c, s, s, dtype=torch.float64) for c, s in ((3, 8), (4, 4), (5, 2))]
    r = torch.relu
    up = lambda x: nn.functional.interpolate(x, scale_factor=2, mode="nearest")  # noqa: E731
    lateral = [net.laterals[i](r(f[i])) for i in range(3)]
    second = [net.second_laterals[i](r(f[i + 1])) for i in range(2)]
    p3 = lateral[2]
    p2 = net.up_nodes[1](net.up_fusions[1](r(lateral[1]), net.ups[1](up(r(p3)))))
    p1 = net.up_nodes[0](net.up_fusions[0](r(lateral[0]), net.ups[0](up(r(p2)))))
    t1 = p1
    t2 = net.down_nodes[0](net.down_fusions[0](r(second[0]), r(p2), net.downs[0](halved(r(t1)))))
    t3 = net.down_nodes[1](net.down_fusions[1](r(second[1]), net.downs[1](halved(r(t2)))))
    for found, expected in zip(net(f), (t1, t2, t3), strict=True):
        torch.testing.assert_close(found, expected)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), levels=st.integers(2, 5), size=st.integers(3, 21))
def test_any_number_of_levels_any_sizes(data: st.DataObject, levels: int, size: int) -> None:
    """Sizes that shrink by any rule, or stay; every parameter takes part in the deepest map."""
    sizes = [size]
    for _ in range(levels - 1):
        sizes.append(data.draw(st.sampled_from([sizes[-1], (sizes[-1] + 1) // 2, max(sizes[-1] // 2, 1)])))
    channels = [data.draw(st.integers(1, 6)) for _ in sizes]
    widths = [data.draw(st.integers(1, 6)) for _ in sizes]
    net = BiFPN(channels, widths, depth=1)
    maps: list[Tensor] = [torch.rand(2, c, s, s + 1) for c, s in zip(channels, sizes, strict=True)]
    refined = net(maps)
    assert [tuple(t.shape) for t in refined] == [(2, d, s, s + 1) for d, s in zip(widths, sizes, strict=True)]
    refined[-1].square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_one_value_per_channel_is_normalised_by_running_statistics() -> None:
    block = PointwiseBlock(3, 4).train()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    x = torch.randn(1, 3, 1, 1)
    torch.testing.assert_close(block(x), nn.functional.relu(block[0](x)) / (1 + 1e-5) ** 0.5)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_mirrored_it_ends_at_the_finest_map() -> None:
    torch.manual_seed(0)
    mirrored = MirroredBiFPN((3, 4, 5), (4, 6, 8), depth=1)
    plain = BiFPN((5, 4, 3), (8, 6, 4), depth=1)
    plain.load_state_dict(mirrored.state_dict())
    maps = [torch.randn(2, c, h, w) for c, h, w in ((3, 13, 9), (4, 7, 5), (5, 2, 2))]
    seen: dict[nn.Module, Tensor] = {}
    for end in mirrored.ends:
        end.register_forward_hook(lambda module, args, output: seen.update({module: output}))
    refined = mirrored(maps)
    assert [tuple(t.shape) for t in refined] == [(2, 4, 13, 9), (2, 6, 7, 5), (2, 8, 2, 2)]
    for end, t, expected in zip(mirrored.ends, refined, plain(maps[::-1])[::-1], strict=True):
        assert seen[end] is t
        assert torch.equal(t, expected)
    refined[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mirrored.parameters())


def test_ends_are_the_blocks_of_the_refined_maps() -> None:
    net = BiFPN((3, 4, 5), (4, 6, 8), depth=1)
    assert net.ends == [net.up_nodes[0], net.down_nodes[0], net.down_nodes[1]]
