"""The learning rate as a function of the step, and what is decayed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import attar
from attar.distiller import Distiller
from attar.tasks import Classification
from attar.train.models import make_model
from attar.train.schedule import make_optimizer, make_schedule
from runs import tiny


def distiller(model: str = "cifar_resnet20", **options: Any) -> Distiller:
    return Distiller(make_model(model, 10, options), [], Classification(10))


def rates(total: int, starts: tuple[int, ...] = (0,), **fields: Any) -> list[float]:
    spec = tiny(lr=0.4, **fields)
    optimizer = make_optimizer(spec, distiller())
    schedule = make_schedule(spec, optimizer, total, starts)
    found = {}
    for step in [*range(total), *reversed(range(total))]:  # in any order: a function of the step alone
        schedule.step_update(step)
        rate = optimizer.param_groups[0]["lr"]
        assert found.setdefault(step, rate) == rate
    return [found[step] for step in range(total)]


def test_cosine() -> None:
    found = rates(100, warmup=0.1)
    for step, rate in enumerate(found):
        expected = 0.4 * (step + 1) / 11 if step < 10 else 0.2 * (1 + math.cos(math.pi * (step - 10) / 90))
        assert rate == pytest.approx(expected)
    assert max(found) == pytest.approx(0.4)


def test_step_and_constant() -> None:
    found = rates(100, schedule="step", warmup=0.0, milestones=(0.75, 0.5), gamma=0.1)
    assert found == pytest.approx([0.4] * 50 + [0.04] * 25 + [0.004] * 25)
    assert rates(10, schedule="constant", warmup=0.2) == pytest.approx([0.4 / 3, 0.8 / 3] + [0.4] * 8)
    assert len(rates(1)) == 1


@pytest.mark.parametrize("kind", ["cosine", "step", "constant"])
def test_stretches_are_schedules_of_their_own(kind: str) -> None:
    settings: dict[str, Any] = {"schedule": kind, "warmup": 0.1, "milestones": (0.5,), "gamma": 0.1}
    found = rates(100, (0, 20, 70), **settings)
    assert found == [*rates(20, **settings), *rates(50, **settings), *rates(30, **settings)]


def test_what_is_decayed() -> None:
    sgd = make_optimizer(tiny(weight_decay=0.1), distiller())
    assert [group["weight_decay"] for group in sgd.param_groups] == [0.1]
    model = distiller("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1)
    adamw = make_optimizer(tiny(optimizer="adamw", weight_decay=0.1), model)
    decayed = {id(p) for group in adamw.param_groups if group["weight_decay"] for p in group["params"]}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim <= 1 or name in ("student.pos_embed", "student.cls_token")
        assert (id(parameter) in decayed) is not exempt, name


class Judged(attar.Method):
    """A method whose judge learns at a tenth of the rate, and whose head learns as the student."""

    def build(self, probe: attar.Probe) -> None:
        self.judge, self.head = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)

    def lr_scale(self, parameter: str) -> float:
        return 0.1 if parameter.startswith("judge.") else 1.0


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_auxiliaries_with_a_rate_of_their_own_follow_the_schedule(kind: str) -> None:
    method = Judged()
    model = Distiller(make_model("cifar_resnet20", 10, {"width": 0.25}), [method], Classification(10))
    model.build(torch.randn(2, 3, 16, 16))
    spec = tiny(optimizer=kind, lr=0.4, weight_decay=0.1, schedule="step", milestones=(0.5,), warmup=0.2)
    optimizer = make_optimizer(spec, model)
    schedule = make_schedule(spec, optimizer, 10)
    groups = optimizer.param_groups
    owners = {id(p): group for group in groups for p in group["params"]}
    assert len(owners) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for step in (0, 1, 4, 7):
        schedule.step_update(step)
        rate = groups[0]["lr"]
        assert rate == pytest.approx({0: 0.4 / 3, 1: 0.8 / 3, 4: 0.4, 7: 0.04}[step])
        for name, parameter in model.named_parameters():
            group = owners[id(parameter)]
            assert group["lr"] == pytest.approx(rate * (0.1 if ".judge." in name else 1.0)), name
            assert group["weight_decay"] == (0.0 if kind == "adamw" and parameter.ndim <= 1 else 0.1), name


def test_nesterov_needs_momentum() -> None:
    assert isinstance(make_optimizer(tiny(momentum=0.0), distiller()), torch.optim.SGD)
