from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.functional.label_augmentation import Transform, aggregated_logits, joint_labels, transformed, versions_of

TRANSFORMS = get_args(Transform)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_versions_differ_and_begin_with_the_image(transform: Transform) -> None:
    images = torch.randn(2, 3, 5, 5)
    versions = transformed(images, transform)
    assert versions.shape == (2, versions_of(transform), 3, 5, 5)
    assert torch.equal(versions[:, 0], images)
    distinct = {tuple(version.flatten().tolist()) for version in versions[0]}
    assert len(distinct) == versions_of(transform)
    for version in versions[0]:
        assert torch.equal(version.flatten().sort().values, images[0].flatten().sort().values)


def test_counts_are_those_of_the_names() -> None:
    assert {t: versions_of(t) for t in TRANSFORMS} == {
        "rotation": 4,
        "rotation2": 2,
        "color_perm": 6,
        "color_perm3": 3,
        "rot_color_perm6": 6,
        "rot_color_perm12": 12,
        "rot_color_perm24": 24,
    }


def test_quarter_turns_are_counter_clockwise() -> None:
    image = torch.tensor([[1.0, 2], [3, 4]]).view(1, 1, 2, 2)
    turned = transformed(image, "rotation")[0, :, 0].tolist()
    assert turned == [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]


def test_turning_an_image_shifts_its_versions() -> None:
    images = torch.randn(3, 3, 6, 6)
    versions = transformed(images, "rotation")
    shifted = transformed(torch.rot90(images, 1, (2, 3)), "rotation")
    assert torch.equal(shifted, versions.roll(-1, dims=1))


def test_images_that_are_not_square_or_not_rgb() -> None:
    assert transformed(torch.randn(1, 1, 4, 6), "rotation2").shape == (1, 2, 1, 4, 6)
    assert transformed(torch.randn(1, 1, 4, 4), "rotation").shape == (1, 4, 1, 4, 4)
    assert transformed(torch.randn(1, 3, 4, 6), "color_perm").shape == (1, 6, 3, 4, 6)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 4), classes=st.integers(2, 5), versions=st.integers(1, 6), seed=st.integers(0, 99))
def test_labels_and_aggregate_share_one_order(n: int, classes: int, versions: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    joint = torch.randn(n * versions, classes * versions, generator=generator, dtype=torch.float64)
    found = joint_labels(labels, versions)
    aggregate = aggregated_logits(joint, versions)
    assert aggregate.shape == (n, classes)
    for b in range(n):
        for j in range(versions):
            assert found[b * versions + j] == labels[b] * versions + j
        for i in range(classes):
            by_hand = sum(joint[b * versions + j, i * versions + j] for j in range(versions)) / versions
            torch.testing.assert_close(aggregate[b, i], by_hand)
    # The joint head that knows the label of every version is right in the aggregate.
    sure = torch.nn.functional.one_hot(found, classes * versions).double()
    assert torch.equal(aggregated_logits(sure, versions).argmax(1), labels)
    # One version: the joint label is the label, the aggregate the logits.
    assert torch.equal(joint_labels(labels, 1), labels)
    assert torch.equal(aggregated_logits(joint[:, :classes], 1), joint[:, :classes])
    # The class marginals of the joint probabilities are a distribution.
    marginal = joint.softmax(1).unflatten(1, (classes, versions)).sum(2)
    torch.testing.assert_close(marginal.sum(1), torch.ones(n * versions, dtype=torch.float64))
