"""Ranges of activations, recomputed by hand; runs compared with the plain one."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attar.anatomy import survey
from attar.deploy.ranges import Range, activation_ranges, ranges_of_run, ranges_text
from attar.errors import AttarError
from attar.train import fit
from networks import Net
from runs import quiet, tiny


class Overwriting(nn.Module):
    """The output of its first stage is rectified in place by what comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Conv2d(3, 4, 3, 2, 1)
        self.act = nn.ReLU(inplace=True)
        self.high = nn.Conv2d(4, 6, 3, 2, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.high(self.act(self.low(images))).mean(dim=(2, 3)))


def by_hand(name: str, values: Tensor) -> Range:
    x = values.detach().double().numpy()
    sizes = np.sort(np.abs(x), axis=None)[::-1]
    channels = np.abs(np.moveaxis(x, 1, 0)).reshape(x.shape[1], -1).max(1)
    middle = np.sort(channels)[(len(channels) - 1) // 2]
    tail = sizes[math.ceil(0.001 * x.size) - 1]
    width = max(x.max(), 0) - min(x.min(), 0)
    return Range(name, x.min(), x.max(), x.std(), sizes[0] / tail, channels.max() / middle, width / 255 / x.std())


def assert_close(found: Range, expected: Range) -> None:
    one, other = dataclasses.asdict(found), dataclasses.asdict(expected)
    assert one.pop("tap") == other.pop("tap")
    assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_every_tap_as_computed_by_hand() -> None:
    """More images than are shown at a time, and a batch norm that would behave otherwise in training."""
    torch.manual_seed(0)
    network, images = Net(batch_norm=True).train(), torch.randn(150, 3, 16, 16)
    network.low.eval()
    found = activation_ranges(network, images)
    assert network.training
    assert (network.low.training, network.high.training) == (False, True)
    network.eval()
    low = network.low(images)
    high = network.high(low)
    embedding = high.mean(dim=(2, 3))
    expected = [by_hand("low", low), by_hand("high", high), by_hand("embedding", embedding)]
    for one, other in zip(found, [*expected, by_hand("logits", network.head(embedding))], strict=True):
        assert_close(one, other)
        assert one.outliers >= 1
        assert one.channel_spread >= 1


def test_what_is_overwritten_later_is_read_before() -> None:
    torch.manual_seed(1)
    network, images = Overwriting(), torch.randn(70, 3, 16, 16)
    found = activation_ranges(network, images, survey(network, images[:1], ["low", "high"])[0])
    assert_close(found[0], by_hand("low", network.low(images)))
    assert found[0].low < 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_an_outlier_and_a_loud_channel_are_seen() -> None:
    torch.manual_seed(2)
    network, images = Net(), torch.randn(64, 3, 16, 16)
    network.low[2] = nn.Identity()
    before = activation_ranges(network, images)[0]
    with torch.no_grad():
        network.low[0].weight[3] *= 20
    louder = activation_ranges(network, images)[0]
    assert louder.channel_spread > 8 * before.channel_spread
    assert louder.step > before.step
    images[5, :, 6:9, 6:9] *= 50
    hit = activation_ranges(network, images)[0]
    assert hit.outliers > 2 * louder.outliers
    assert hit.step > 2 * louder.step


def test_a_silent_tap_has_no_width() -> None:
    network = Net()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    for each in activation_ranges(network, torch.randn(4, 3, 16, 16)):
        assert (each.std, each.outliers, each.channel_spread, each.step) == (0, 1, 1, 0)
        assert Range.of(each.as_dict()) == each
    endless = dataclasses.replace(each, channel_spread=math.inf)
    assert endless.as_dict()["channel_spread"] is None  # JSON has no infinity
    assert Range.of(endless.as_dict()) == endless
    with pytest.raises(AttarError, match="at least 1 image"):
        activation_ranges(network, torch.zeros(0, 3, 16, 16))


def test_runs_beside_the_plain_one(tmp_path: Path) -> None:
    measured = {}
    for label, methods in (("plain", ()), ("SCD|x", ("SCD",))):
        folder = tmp_path / str(len(measured))
        fit(tiny(*methods, epochs=1, train_limit=64), folder, console=quiet())
        measured[label] = [ranges_of_run(folder, 40)]
    assert measured["plain"] == [ranges_of_run(tmp_path / "0", 40)]
    assert measured["plain"] != measured["SCD|x"]
    lines = ranges_text(measured).splitlines()
    taps = [each.tap for each in measured["plain"][0]]
    assert taps[-2:] == ["embedding", "logits"]
    assert len(lines) == 2 + 2 * len(taps)
    cells = [cell.strip() for cell in lines[3].replace("\\|", "/").strip("|").split("|")]
    plain, other = measured["plain"][0][0], measured["SCD|x"][0][0]
    assert cells[:2] == [taps[0], "SCD/x"]
    assert cells[2] == f"{other.std:.3g} (× {other.std / plain.std:.2f})"
    with pytest.raises(AttarError, match="'plain', which is not among them"):
        ranges_text({"SCD": measured["SCD|x"]})
    with pytest.raises(AttarError, match="one architecture"):
        ranges_text({**measured, "other": [measured["plain"][0][:-1]]})
