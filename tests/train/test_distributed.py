"""Two processes: one result, one writer, exact evaluation of uneven shards, errors that reach all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from attar.data import Normalization, open_source
from attar.errors import AttarError
from attar.spec import TrainSpec
from attar.tasks import Classification
from attar.train import evaluate, evaluate_run
from attar.train.distributed import Ranks, join
from attar.train.models import make_model
from runs import lines, tiny, train_as_rank, two_ranks

SPEC: dict[str, Any] = {"log_every": 2, "train_limit": 200, "keep_last": True, "ema": 0.9}


def test_one_on_two_ranks_ends_resumes_and_only_rank_0_writes(tmp_path: Path) -> None:
    spec = tiny("ONE", **SPEC)
    assert two_ranks(train_as_rank, spec, tmp_path / "whole", None) == [0, 0]
    assert two_ranks(train_as_rank, spec, tmp_path / "run", 3) == [130, 130]
    # Processes stop at a line of the log, after 4 steps.
    saved = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert saved == ["step_00000004.pt"]
    # The second half as the user starts it.
    program = tmp_path / "train.py"
    program.write_text(
        "import sys, torch; from pathlib import Path\n"
        "from attar.spec import TrainSpec; from attar.train import fit\n"
        "from runs import only_rank_0_writes\n"
        "torch.set_num_threads(1); only_rank_0_writes(Path(sys.argv[1]))\n"
        "fit(TrainSpec.load(Path(sys.argv[1]) / 'spec.json'), sys.argv[1])\n"
    )
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program), str(tmp_path / "run")]
    path = os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2/2") == 1
    for name in ("run", "whole"):
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert result["processes"] == 2
        assert [line["step"] for line in lines(tmp_path / name, "step")] == [2, 4, 6, 8, 10, 12, 14]
        # One process evaluates to the numbers of two.
        again = evaluate_run(tmp_path / name).as_dict()
        assert again == pytest.approx(result["test"], rel=1e-9)
        assert again["top1"] == result["test"]["top1"]
    weights = [(tmp_path / name / "student/model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]
    # Means over both processes, from steps before the stop and after it.
    epochs = [[line["losses"] for line in lines(tmp_path / name, "epoch")] for name in ("run", "whole")]
    assert epochs[0] == epochs[1]


def measure(folder: Path) -> None:
    torch.manual_seed(0)
    source = open_source("digits", holdout=0.5)
    normalization, network = Normalization(source.mean, source.std), make_model("cifar_resnet20", 10)
    with join() as ranks:
        numbers = [
            evaluate(network, split, normalization, Classification(10), ranks=ranks).as_dict()
            for split in (source.test, source.holdout, source.train)
        ]
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(numbers))


def test_uneven_evaluation_equals_one_process(tmp_path: Path) -> None:
    # 360, 719 and 718 images in batches of 250: 2, 3 and 3 batches for two processes.
    assert two_ranks(measure, tmp_path) == [0, 0]
    torch.manual_seed(0)
    source = open_source("digits", holdout=0.5)
    network = make_model("cifar_resnet20", 10)
    for rank in (0, 1):
        numbers = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for measured, split in zip(numbers, (source.test, source.holdout, source.train), strict=True):
            alone = evaluate(network, split, Normalization(source.mean, source.std), Classification(10)).as_dict()
            assert measured == pytest.approx(alone, rel=1e-6)
            assert measured["top1"] == alone["top1"]
            assert measured["top5"] == alone["top5"]


def measure_few(folder: Path) -> None:
    """Fewer batches than processes: one of them has nothing to do."""
    source = open_source("digits")
    with join() as ranks:
        found = evaluate(
            make_model("cifar_resnet20", 10).eval(),
            source.holdout,
            Normalization(source.mean, source.std),
            Classification(10),
            ranks=ranks,
        )
    (folder / f"rank{ranks.rank}.json").write_text(json.dumps(found.as_dict()))


def test_a_process_without_images(tmp_path: Path) -> None:
    assert two_ranks(measure_few, tmp_path) == [0, 0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"batch": 31}, "A batch of 31 cannot be shared evenly by 2 ranks"),
        ({"model": "resnet81"}, "no model 'resnet81'"),
        ({"data": "digitz"}, "no data source 'digitz'"),
    ],
)
def test_a_mistake_is_said_by_all_and_hangs_none(fields: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert two_ranks(train_as_rank, tiny(**fields), tmp_path / "run", None) == [2, 2]
    for rank in (0, 1):
        assert said in (tmp_path / f"said{rank}.txt").read_text()
    assert not (tmp_path / "run").exists()


def full_disk(spec: TrainSpec, folder: Path) -> None:
    from attar.train.checkpoint import Checkpoints

    def save(self: Checkpoints, step: int, state: dict[str, Any]) -> None:
        raise AttarError("No space is left.")

    Checkpoints.save = save  # type: ignore[method-assign]
    train_as_rank(spec, folder, None)


def test_what_fails_in_the_first_process_stops_all(tmp_path: Path) -> None:
    assert two_ranks(full_disk, tiny(), tmp_path / "run") == [2, 2]
    assert [(tmp_path / f"said{rank}.txt").read_text() for rank in (0, 1)] == ["No space is left."] * 2


def test_a_killed_process_does_not_hang_the_other(tmp_path: Path) -> None:
    spec = tiny(epochs=500, log_every=1, train_limit=None)
    path = tmp_path / "run/metrics.jsonl"

    def once_training(children: list[ForkServerProcess]) -> None:
        while children[0].is_alive() and not (path.exists() and path.read_bytes().count(b"\n") >= 2):
            time.sleep(0.01)
        children[1].kill()

    assert two_ranks(train_as_rank, spec, tmp_path / "run", None, meanwhile=once_training) == [2, -signal.SIGKILL]
    assert "Another process of this run has failed" in (tmp_path / "said0.txt").read_text()


def test_alone_nothing_is_communicated() -> None:
    with join() as ranks:
        assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
        assert not torch.distributed.is_initialized()
    alone = Ranks(0, 1, torch.device("cpu"))
    module = torch.nn.Linear(2, 2)
    assert alone.wrap(module) is module
    assert alone.any([True, False]) == [True, False]
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(alone.mean(values), values)
    assert torch.equal(alone.minimum(values), values)
    assert alone.on_first(lambda: 7) == alone.first_then_others(lambda: 7) == 7
