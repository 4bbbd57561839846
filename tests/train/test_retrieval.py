"""Retrieval by embeddings: what does and does not depend on the batch, embeddings of networks, whole runs."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import attar.zoo  # noqa: F401 - registers the CIFAR networks with timm
from attar.cli import main
from attar.data import EvalLoader, Normalization, open_source
from attar.errors import AttarError
from attar.functional.retrieval import average_precision, precision_at, relevance_by_rank
from attar.spec import TrainSpec
from attar.train import Retrieval, load_student, measure_retrieval, retrieval, retrieve_run
from attar.train.retrieval import embed, retrieve

Run = tuple[Path, TrainSpec, dict[str, Any]]


def features(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 8, generator=generator)
    query_labels, labels = (torch.randint(5, (n,), generator=generator) for n in (70, 300))
    queries = centres[query_labels] + torch.randn(70, 8, generator=generator)
    return queries, query_labels, centres[labels] + torch.randn(300, 8, generator=generator), labels


def test_means_over_queries_and_depths_that_exist() -> None:
    queries, query_labels, database, labels = features()
    found = retrieve(queries, query_labels, database, labels, "euclidean", top_k=(1, 300, 301))
    relevance = relevance_by_rank(queries, query_labels, database, labels, "euclidean")
    assert found.map == pytest.approx(average_precision(relevance).mean().item(), abs=1e-15)
    assert found.precision == {k: pytest.approx(precision_at(relevance, k).mean().item()) for k in (1, 300)}
    assert (found.distance, found.queries, found.database, found.batch) == ("euclidean", 70, 300, 128)


def test_the_batch_changes_the_published_figures_only(monkeypatch: pytest.MonkeyPatch) -> None:
    all_at_once, few = (retrieve(*features(), batch=batch) for batch in (70, 8))
    assert few.map == pytest.approx(all_at_once.map, abs=1e-15)
    assert few.precision == pytest.approx(all_at_once.precision, abs=1e-15)
    assert few.batch_interpolated_map < all_at_once.batch_interpolated_map
    assert few.batch_interpolated_precision[50] < all_at_once.batch_interpolated_precision[50]
    # How many distances fit into memory changes nothing at all, and the last batch of 70 = 2 x 32 + 6 is a small one.
    whole = retrieve(*features(), batch=32)
    monkeypatch.setattr(retrieval, "_PAIRS", 900)
    parts = retrieve(*features(), batch=32)
    for name in ("map", "batch_interpolated_map", "precision", "batch_interpolated_precision"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), abs=1e-15), name


def test_a_perfect_and_a_hopeless_embedding() -> None:
    labels = torch.arange(200) % 4
    perfect = retrieve(torch.eye(4)[labels[:20]], labels[:20], torch.eye(4)[labels], labels)
    assert perfect.map == perfect.precision[50] == perfect.batch_interpolated_map == 1.0
    same = torch.ones(200, 3)  # all tie, so the order is the database's: every fourth is right
    hopeless = retrieve(same[:20], labels[:20], same, labels)
    assert hopeless.precision[100] == 0.25
    assert hopeless.map < 0.35


def test_features_must_be_finite_and_batches_not_empty() -> None:
    queries, query_labels, database, labels = features()
    with pytest.raises(AttarError, match="must hold at least one, not 0"):
        retrieve(queries, query_labels, database, labels, batch=0)
    database[3, 2] = torch.inf
    with pytest.raises(AttarError, match="the network has diverged"):
        retrieve(queries, query_labels, database, labels)


def test_the_embedding_is_what_the_classifier_reads_and_the_network_stays_as_it_was() -> None:
    source = open_source("digits")
    normalization = Normalization(source.mean, source.std)
    torch.manual_seed(0)
    network = timm.create_model("cifar_resnet20", num_classes=10, width=0.25).train()
    network.layer1.eval()
    modes = [module.training for module in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = embed(network, source.test, normalization)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    network.eval()
    with torch.no_grad():
        images = torch.cat([sample.images for sample in EvalLoader(source.test, 250, normalization)])
        expected = network.forward_head(network.forward_features(images), pre_logits=True)
    torch.testing.assert_close(found, expected)


def test_without_a_linear_classifier_the_pooled_last_stage_is_compared() -> None:
    """A classifier that is a convolution: there is no vector that it reads."""
    source = open_source("digits")
    body = [nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Sequential(nn.Conv2d(6, 12, 3, 2, 1), nn.ReLU())]
    network = nn.Sequential(*body, nn.Conv2d(12, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = embed(network, source.holdout, Normalization(source.mean, source.std))
    images = next(iter(EvalLoader(source.holdout, 1000, Normalization(source.mean, source.std)))).images
    with torch.no_grad():
        torch.testing.assert_close(found, nn.Sequential(*body)(images).mean(dim=(2, 3)))


def test_a_run_from_end_to_end(one_run: Run) -> None:
    folder, _, _ = one_run
    shares: list[float] = []
    found = retrieve_run(folder, progress=shares.append)
    assert list(found) == ["cosine", "euclidean"]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)
    source, student = open_source("digits"), load_student(folder)
    normalization = Normalization(student.mean, student.std)
    database = torch.cat([embed(student.network, part, normalization) for part in (source.train, source.holdout)])
    labels = torch.from_numpy(np.concatenate([source.train.targets, source.holdout.targets]))
    queries = embed(student.network, source.test, normalization)
    for distance, scores in found.items():
        relevance = relevance_by_rank(queries, torch.from_numpy(source.test.targets), database, labels, distance)
        assert scores.map == pytest.approx(average_precision(relevance).mean().item(), abs=1e-4)
        assert (scores.queries, scores.database) == (360, 1437)
        assert 0.1 < scores.map < scores.precision[1] <= 1.0
        assert scores.precision[100] < scores.batch_interpolated_precision[100]


def test_a_student_alone_takes_other_data_and_the_holdout_searches_the_rest(one_run: Run, tmp_path: Path) -> None:
    folder, _, _ = one_run
    shutil.copytree(folder / "student", tmp_path / "alone")
    assert retrieve_run(tmp_path / "alone", data="digits") == retrieve_run(folder)
    held = retrieve_run(folder, split="holdout")["cosine"]
    assert (held.queries, held.database) == (144, 1293)


def test_refusals(one_run: Run) -> None:
    folder, _, _ = one_run
    with pytest.raises(AttarError, match="take the queries from split test or holdout"):
        retrieve_run(folder, split="train")
    with pytest.raises(AttarError, match="did you mean 'test'"):
        retrieve_run(folder, split="tset")
    source, student = open_source("digits"), load_student(folder)
    normalization = Normalization(student.mean, student.std)
    few = source.train.targets != 7
    train = dataclasses.replace(
        source.train, rows=source.train.rows[few], targets=source.train.targets[few], index=source.train.index[few]
    )
    empty = dataclasses.replace(source.holdout, rows=source.holdout.rows[:0], targets=source.holdout.targets[:0])
    without = dataclasses.replace(source, train=train, holdout=empty)
    with pytest.raises(AttarError, match="Class '7' has test images but no training image to find"):
        measure_retrieval(student.network, without, normalization)
    with pytest.raises(AttarError, match="holdout split is empty"):
        measure_retrieval(student.network, without, normalization, split="holdout")


def test_the_command_line_prints_and_writes_the_same(one_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _, result = one_run
    expected = {distance: scores.as_dict() for distance, scores in retrieve_run(folder).items()}
    assert main(["evaluate", str(folder), "--retrieval", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("retrieval") == json.loads(json.dumps(expected))
    assert told == result["test"]
    assert main(["evaluate", str(folder), "--retrieval"]) == 0
    out = capsys.readouterr().out
    for distance, scores in expected.items():
        (line,) = (line for line in out.splitlines() if line.startswith(f"{distance} "))
        shares = [scores["map"], *scores["precision"].values()]
        assert line.split()[1:] == ["360", "1437", *(f"{share:.2%}" for share in shares)]
        assert f"{scores['batch_interpolated_map']:.2%}" in out
    assert main(["evaluate", str(folder), "--retrieval", "--split", "train"]) == 2
    err = capsys.readouterr().err
    assert err == "attar: Retrieval searches the training images: take the queries from split test or holdout.\n"


def test_fields_are_documented() -> None:
    assert all(f"{field.name}:" in (Retrieval.__doc__ or "") for field in dataclasses.fields(Retrieval))
