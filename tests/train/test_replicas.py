"""Codistillation over processes: a replica in each, weights that travel now and then, exact resume, one is kept."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import attar
from attar.methods import Codistillation
from attar.train import evaluate_run
from attar.train.distributed import join
from networks import IMAGES, LABELS, Net
from runs import assert_same_run, tiny, train_as_rank, two_ranks


def steps_of_a_replica() -> None:
    with join() as ranks:
        torch.manual_seed(ranks.rank)
        method = Codistillation(replicas="ranks", interval=3, burn_in=0.5)
        student = Net(batch_norm=True).double()
        distiller = attar.Distiller(student, [method], attar.Classification(3)).build(IMAGES).train()
        alone = copy.deepcopy(student).train()
        mine = slice(3 * ranks.rank, 3 * ranks.rank + 3)
        images, labels = IMAGES[mine], LABELS[mine]
        optimizer = torch.optim.SGD([p for p in distiller.parameters() if p.requires_grad], 0.1)
        apart = torch.optim.SGD(alone.parameters(), 0.1)
        for step in range(4):
            # Two epochs of ten steps are over, in which not even copies are asked.
            distiller.epoch_start(step // 2, 10)
            optimizer.zero_grad()
            distiller((images, labels), 0.1).total().backward()
            optimizer.step()
            apart.zero_grad()
            attar.Classification(3).loss(alone(images), labels).backward()
            apart.step()
        theirs = alone.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in student.state_dict().items())

        distiller.epoch_start(5, 10)
        (stale,) = method.copies.networks
        for step in range(7):
            everyones: list[Any] = [None, None]
            statistics: list[Any] = [None, None]
            dist.all_gather_object(everyones, {name: p.detach().clone() for name, p in student.named_parameters()})
            before = copy.deepcopy(stale.state_dict())
            optimizer.zero_grad()
            terms = distiller((images, labels), 0.6)
            terms.total().backward()
            wanted = everyones[1 - ranks.rank] if step % 3 == 0 else before
            dist.all_gather_object(statistics, dict(student.named_buffers()))
            if step % 3 == 0:
                wanted = {**wanted, **statistics[1 - ranks.rank]}
            assert wanted.keys() == stale.state_dict().keys()
            assert all(torch.equal(value, wanted[name]) for name, value in stale.state_dict().items()), step
            with torch.no_grad():
                q = stale(images).softmax(1)
                p = terms.logits.softmax(1)
            torch.testing.assert_close(terms.losses["Codistillation.kl"], (q * (q / p).log()).sum(1).mean())
            assert terms.weights["Codistillation.kl"] == 1.0
            optimizer.step()
        assert not any(torch.equal(value, everyones[0][name]) for name, value in everyones[1].items())


def test_processes_send_each_other_their_weights_when_it_is_time() -> None:
    assert two_ranks(steps_of_a_replica) == [0, 0]


def test_a_run_of_two_replicas_resumes_exactly_and_keeps_the_first(tmp_path: Path) -> None:
    method = {"name": "Codistillation", "options": {"replicas": "ranks", "interval": 3, "burn_in": 0.3}}
    spec = tiny(method, train_limit=160, log_every=2, ema=0.9)
    assert two_ranks(train_as_rank, spec, tmp_path / "whole", None) == [0, 0]
    assert two_ranks(train_as_rank, spec, tmp_path / "run", 7) == [130, 130]
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step*8.pt")] == ["step_00000008.pt"]
    assert two_ranks(train_as_rank, spec, tmp_path / "run", None) == [0, 0]
    assert_same_run(tmp_path / "run", tmp_path / "whole")

    state = torch.load(tmp_path / "whole/checkpoints/step_00000010.pt", weights_only=True)
    first, second = (replica["distiller"] for replica in state["replicas"])
    weight = next(name for name in first if name.startswith("student.") and name.endswith("weight"))
    assert not torch.equal(first[weight], second[weight])
    assert torch.equal(first[weight], state["distiller"][weight])
    name = weight.replace("student.", "methods.Codistillation.copies.networks.0.")
    assert not torch.equal(first[name], second[name])
    # What was measured and kept is the first process's student.
    result = json.loads((tmp_path / "whole/result.json").read_text())
    assert result["processes"] == 2
    again = evaluate_run(tmp_path / "whole").as_dict()
    assert again == pytest.approx(result["test"], rel=1e-9)
    assert evaluate_run(tmp_path / "whole", split="holdout").as_dict() == pytest.approx(result["holdout"], rel=1e-9)


def test_in_one_process_it_says_how_to_start_several(tmp_path: Path) -> None:
    from attar.errors import AttarError
    from attar.train import fit
    from runs import quiet

    spec = tiny({"name": "Codistillation", "options": {"replicas": "ranks"}})
    with pytest.raises(AttarError, match="start several with torchrun"):
        fit(spec, tmp_path / "run", console=quiet())
    assert not (tmp_path / "run").exists()
