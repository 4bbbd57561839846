"""Segmentation: its loss by hand, void pixels, networks that return several answers, refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar import AttarError, Distiller, Segmentation
from attar.anatomy import survey
from attar.functional import kl_divergence, masked_mean


def logits_and_masks() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator)
    masks = torch.randint(0, 3, (2, 4, 5), generator=generator)
    masks[0, :2] = 255
    return logits, masks


def test_the_loss_is_the_mean_over_valid_pixels() -> None:
    logits, masks = logits_and_masks()
    total, count = 0.0, 0
    for n in range(2):
        for y in range(4):
            for x in range(5):
                label = int(masks[n, y, x])
                if label != 255:
                    z = logits[n, :, y, x]
                    total += float(torch.logsumexp(z, 0) - z[label])
                    count += 1
    assert count == 30
    assert Segmentation(3).loss(logits, masks).item() == pytest.approx(total / count, rel=1e-12)


def test_class_weights_as_torch_has_them() -> None:
    logits, masks = logits_and_masks()
    weights = (0.5, 2.0, 1.0)
    expected = F.cross_entropy(logits, masks, torch.tensor(weights, dtype=torch.float64), ignore_index=255)
    assert Segmentation(3, class_weights=weights).loss(logits, masks).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_as_torch_has_it(smoothing: float) -> None:
    logits, masks = logits_and_masks()
    expected = F.cross_entropy(logits, masks, ignore_index=255, label_smoothing=smoothing)
    assert Segmentation(3).loss(logits, masks, smoothing).item() == pytest.approx(expected.item())


def test_void_pixels_change_nothing() -> None:
    logits, masks = logits_and_masks()
    task = Segmentation(3, dice_weight=1.0, class_weights=(0.5, 2.0, 1.0))
    logits.requires_grad_()
    loss = task.loss(logits, masks)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[0, :, :2].any()
    assert gradient[0, :, 2:].any()
    moved = logits.detach().clone()
    moved[0, :, :2] = 100 * torch.randn(3, 2, 5, dtype=torch.float64)
    assert task.loss(moved, masks).item() == pytest.approx(loss.item(), rel=1e-12)


def test_a_batch_without_a_valid_pixel_teaches_nothing() -> None:
    logits, masks = logits_and_masks()
    logits.requires_grad_()
    for task in (Segmentation(3), Segmentation(3, class_weights=(1, 2, 3)), Segmentation(3, dice_weight=1.0)):
        loss = task.loss(logits, torch.full_like(masks, 255))
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, logits)[0].any()


def test_dice_by_hand() -> None:
    # One pixel of class 0 with p = 3/4, one of class 1 with p = 1/2 for it; class 2 has no label and does not count.
    logits = torch.tensor([[[[math.log(6), 0.0]], [[0.0, math.log(2)]], [[0.0, 0.0]]]], dtype=torch.float64)
    masks = torch.tensor([[[0, 1]]])
    p = torch.softmax(logits, 1)[0, :, 0]
    zero = (2 * p[0, 0] + 1) / (p[0].sum() + 1 + 1)
    one = (2 * p[1, 1] + 1) / (p[1].sum() + 1 + 1)
    expected = 1 - (zero + one) / 2
    plain = Segmentation(3).loss(logits, masks)
    assert (Segmentation(3, dice_weight=2.0).loss(logits, masks) - plain).item() == pytest.approx(2 * expected.item())


def test_perfect_answers_have_no_dice_loss() -> None:
    _, masks = logits_and_masks()
    logits = 100 * F.one_hot(masks.where(masks != 255, 0), 3).permute(0, 3, 1, 2).double()
    assert Segmentation(3, dice_weight=1.0).loss(logits, masks).item() == pytest.approx(0, abs=1e-12)


def test_masked_divergence_is_the_divergence_of_the_pixels_that_count() -> None:
    one, masks = logits_and_masks()
    other = torch.randn(one.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    valid = masks != 255
    picked = [z.permute(0, 2, 3, 1)[valid] for z in (one, other)]
    found = kl_divergence(one, other, 4.0, valid=valid)
    assert found.item() == pytest.approx(kl_divergence(*picked, 4.0).item(), rel=1e-12)
    assert masked_mean(one[:, 0], torch.zeros_like(valid)).item() == 0


ANSWER, OTHER = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("output", "auxiliary"),
    [
        (ANSWER, set()),
        ({"out": ANSWER}, set()),
        ({"logits": ANSWER, "hidden": None}, set()),
        ({"out": ANSWER, "aux": OTHER}, {"aux"}),
        ((ANSWER, OTHER), {"aux1"}),
        ([ANSWER, torch.ones(2, 5)], set()),  # a classifier's answer beside it
    ],
)
def test_answers_are_found(output: object, auxiliary: set[str]) -> None:
    task = Segmentation(3)
    assert task.logits(output) is ANSWER
    found = task.auxiliary(output)
    assert set(found) == auxiliary
    assert all(value.shape == ANSWER.shape for value in found.values())


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU())
        self.head, self.second = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        deep = self.encoder(x)
        out = F.interpolate(self.head(deep), x.shape[-2:], mode="bilinear")
        return {"out": out, "aux": self.second(deep)}


def test_auxiliary_answers_are_trained_and_go_with_the_plain_network() -> None:
    torch.manual_seed(0)
    images, masks = torch.randn(2, 3, 16, 24), torch.randint(0, 3, (2, 16, 24))
    distiller = Distiller(TwoHeads(), [], Segmentation(3, auxiliary_weight=0.25)).build(images).train()
    terms = distiller((images, masks), progress=0.5)
    assert terms.weights == {"task": 1.0, "aux": 0.25}
    terms.total().backward()
    gradient = distiller.student.second.weight.grad.clone()
    larger = F.interpolate(distiller.student(images)["aux"], (16, 24), mode="bilinear")
    loss = F.cross_entropy(larger, masks)
    assert terms.losses["aux"].item() == pytest.approx(loss.item())
    (alone,) = torch.autograd.grad(loss, distiller.student.second.weight)
    torch.testing.assert_close(gradient, 0.25 * alone)
    stripped = distiller.strip()
    assert list(stripped.state_dict()) == list(TwoHeads().state_dict())
    assert set(stripped(images)) == {"out", "aux"}


class UNet(nn.Module):
    """A flat network that goes down and up again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.deep, self.up, self.head = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(24, 8, 3, 1, 1), nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.first(x).relu()
        middle = self.down(high).relu()
        low = F.interpolate(self.deep(middle).relu(), middle.shape[-2:])
        up = F.interpolate(self.up(torch.cat([low, middle], 1)).relu(), high.shape[-2:])
        return self.head(torch.cat([up, high], 1))


def test_stages_are_the_encoders() -> None:
    images = torch.randn(2, 3, 16, 24)
    assert [stage.name for stage in survey(UNet(), images, num_classes=3, dense=True)[0].stages] == [
        "first",
        "down",
        "deep",
    ]
    assert [stage.name for stage in survey(TwoHeads(), images, num_classes=3, dense=True)[0].stages] == [
        "encoder"  # its first convolution is the stem
    ]


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (nn.Conv2d(3, 4, 1), r"returns \[2, 4, 16, 24\] instead of \[N, 3, 16, 24\]"),
        (nn.Conv2d(3, 3, 2, 2), "logits of 8x12 for images of 16x24"),
    ],
)
def test_networks_that_do_not_segment_are_refused(network: nn.Module, said: str) -> None:
    with pytest.raises(AttarError, match=said):
        Distiller(nn.Sequential(network), [], Segmentation(3), stages=["0"]).build(torch.randn(2, 3, 16, 24))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_classes": 1}, "at least two classes"),
        ({"num_classes": 3, "ignore_index": 2}, "is one of the 3 classes"),
        ({"num_classes": 3, "class_weights": (1, 2)}, "Give 3 positive class weights"),
        ({"num_classes": 2, "class_weights": (1, 0)}, "Give 2 positive class weights"),
    ],
)
def test_refusals(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(AttarError, match=said):
        Segmentation(**arguments)  # type: ignore[arg-type]


def test_labels_that_are_no_classes_are_refused() -> None:
    task = Segmentation(3)
    task.check_targets(torch.tensor([[[0, 2, 255]]]))
    with pytest.raises(AttarError, match="but hold 3"):
        task.check_targets(torch.tensor([[[0, 3, 255]]]))
    with pytest.raises(AttarError, match=r"\[N, H, W\] integers"):
        task.check_targets(torch.zeros(2, 3))
