from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import attar
from attar.errors import AttarError
from attar.method import Batch
from attar.methods import ONE, Supervised
from networks import IMAGES, LABELS, Net


def built(*methods: attar.Method) -> attar.Distiller:
    torch.manual_seed(0)
    return attar.Distiller(Net().double(), methods, attar.Classification(3)).build(IMAGES)


def test_label_smoothing_is_pytorchs() -> None:
    distiller = built(Supervised(label_smoothing=0.1))
    terms = distiller((IMAGES, LABELS), 0.0)
    assert list(terms.losses) == ["task"]
    torch.testing.assert_close(terms.losses["task"], F.cross_entropy(terms.logits, LABELS, label_smoothing=0.1))


def test_without_options_it_is_plain_training() -> None:
    terms = built(Supervised())((IMAGES, LABELS), 0.0)
    torch.testing.assert_close(terms.total(), F.cross_entropy(terms.logits, LABELS))
    torch.testing.assert_close(built()((IMAGES, LABELS), 0.0).total(), terms.total())


def test_smoothing_reaches_every_cross_entropy_of_the_run() -> None:
    terms = built(Supervised(label_smoothing=0.2), ONE(branches=1))((IMAGES, LABELS), 0.0)
    torch.testing.assert_close(terms.losses["ONE.ce_ensemble"], terms.losses["task"])
    plain = F.cross_entropy(terms.logits, LABELS, label_smoothing=0.2)
    torch.testing.assert_close(terms.losses["task"], plain)


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixing_keeps_targets_and_images_together(options: dict[str, float]) -> None:
    """Each image carries its label as its colour, so the share of each colour must equal the soft target."""
    method = Supervised(**options).train()
    method._num_classes = 3
    images = F.one_hot(LABELS, 3).float()[:, :, None, None].expand(6, 3, 16, 16)
    for seed in range(8):
        torch.manual_seed(seed)
        mixed = method.prepare(Batch.of((images.clone(), LABELS)))
        assert mixed.labels is None
        torch.testing.assert_close(mixed.images.mean(dim=(2, 3)), mixed.targets, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(mixed.targets.sum(1), torch.ones(6))


def test_mixing_draws_from_the_global_generator_and_rests_in_evaluation() -> None:
    method = Supervised(mixup=0.4, label_smoothing=0.1).train()
    method._num_classes = 3
    batch = Batch.of((IMAGES, LABELS))
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(method.prepare(batch).images)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert method.eval().prepare(batch) is batch


def test_refusals() -> None:
    with pytest.raises(AttarError, match=r"\[0, 1\)"):
        Supervised(label_smoothing=1.0)
    with pytest.raises(AttarError, match="must not be negative"):
        Supervised(mixup=-1.0)
    with pytest.raises(AttarError, match="class indices"):
        built(Supervised(label_smoothing=0.1))((IMAGES, F.one_hot(LABELS, 3).double()), 0.0)
