"""Two gloo processes give the losses and gradients of one on the same global batch (float64, no batch norm)."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import attar
from attar.method import Method
from attar.methods import (
    AT,
    BAKE,
    BYOT,
    CSKD,
    DDGSD,
    DLB,
    DML,
    FRSKD,
    KD,
    KDCL,
    MEAL,
    ONE,
    OSAKD,
    OSKD,
    PCL,
    PKT,
    PSKD,
    SAD,
    SCD,
    SLA,
    SPKD,
    SRM,
    Blockwise,
    Codistillation,
    FitNet,
    InDistill,
    InformationFlow,
    Moonshine,
    OKDDip,
    OnlineEnsemble,
    Supervised,
    TfKD,
)
from networks import IMAGES, LABELS, Net

METHODS: dict[str, Callable[[], Method]] = {
    "AT": lambda: AT(Net().double()),
    "BAKE": lambda: BAKE(),
    # The norm over the whole batch is the hint that must be gathered.
    "BYOT": lambda: BYOT(form="journal", hint_last=True, head_norm=False),
    # Without batch norm there is nothing to remove; the blocks are compared all the same.
    "Blockwise": lambda: Blockwise(Net().double(), budget=1.0),
    "CSKD": lambda: CSKD(),
    "Codistillation": lambda: Codistillation(burn_in=0.0),
    "DDGSD": lambda: DDGSD(),
    "DLB": lambda: DLB(),
    "DML": lambda: DML(),
    "FRSKD": lambda: FRSKD(batch_norm=False),
    "FitNet": lambda: FitNet(Net().double(), batch_norm=False),
    "InDistill": lambda: InDistill(Net().double()),
    "InformationFlow": lambda: InformationFlow(Net().double()),
    "KD": lambda: KD(Net().double()),
    "KDCL": lambda: KDCL(),
    "MEAL": lambda: MEAL([Net().double(), Net().double()], out_dims=(20, 10)),
    "Moonshine": lambda: Moonshine(Net().double(), alpha=0.5),
    "OKDDip": lambda: OKDDip(branches=3),
    "ONE": lambda: ONE(gate_norm=False),
    "OnlineEnsemble": lambda: OnlineEnsemble(students=3),
    "OSAKD": lambda: OSAKD(k=2),
    "OSKD": lambda: OSKD(k=1),
    "PKT": lambda: PKT(Net().double(), form="combined", supervised=0.1),
    "PCL": lambda: PCL(branches=2),
    "PSKD": lambda: PSKD(),
    "SAD": lambda: SAD(),
    "SCD": lambda: SCD(),
    "SLA": lambda: SLA(),
    "SPKD": lambda: SPKD(),
    "SRM": lambda: SRM(Net().double(), sparsity=0.2),
    "Supervised": lambda: Supervised(label_smoothing=0.1),
    "TfKD": lambda: TfKD(),
}


def built(name: str) -> attar.Distiller:
    torch.manual_seed(0)
    return (
        attar.Distiller(Net().double(), [METHODS[name]()], attar.Classification(3)).build(IMAGES, len(IMAGES)).train()
    )


def step(distiller: attar.Distiller, forward: Callable[..., attar.Terms], rows: slice) -> dict[str, Tensor]:
    views = distiller.views
    images = torch.cat([IMAGES[rows], IMAGES.flip(-1)[rows]][:views])
    labels, index = LABELS[rows].repeat(views), torch.arange(len(IMAGES))[rows].repeat(views)
    batch = attar.Batch(images, labels, index, labels, views)
    partners = dataclasses.replace(batch, images=images.flip(-2))
    found: dict[str, Tensor] = {}
    for phase in (*range(len(distiller.phases)), None):
        distiller.enter(phase)
        # Two steps without an update: what a method remembers of the first shows in the second.
        for _ in range(2):
            distiller.zero_grad(set_to_none=True)
            terms = forward(dataclasses.replace(batch, partners=partners), torch.tensor(0.2))
            terms.total().backward()
        learnt = ((name, p.grad) for name, p in distiller.named_parameters())
        found |= {f"gradient {name}, phase {phase}": grad.clone() for name, grad in learnt if grad is not None}
        found |= {f"loss {name}, phase {phase}": loss.detach() for name, loss in terms.losses.items()}
    return found


def rank_main(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        for name in METHODS:
            distiller = built(name)
            parallel = DistributedDataParallel(distiller, find_unused_parameters=bool(distiller.phases))
            results = step(distiller, parallel, slice(3 * rank, 3 * rank + 3))
            for key in results:
                if key.startswith("loss"):
                    dist.all_reduce(results[key])
                    results[key] /= 2
            if rank == 0:
                torch.save(results, Path(folder) / f"{name}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(rank_main, args=(port, str(path)), nprocs=2, start_method="fork")
    return path


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_equal_one(name: str, folder: Path) -> None:
    distiller = built(name)
    expected = step(distiller, distiller, slice(None))
    found = torch.load(folder / f"{name}.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


def test_every_method_is_compared() -> None:
    assert set(METHODS) == set(attar.methods.available())
