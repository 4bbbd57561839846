"""Numerical fidelity: every golden case, computed by the published code, reproduced in float64.

The directory is `ATTAR_GOLDEN` (default: tests/golden). A case of a known file that no handler takes is a failure; a
file of a method that is not built yet is reported as such.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import attar
from attar.functional import (
    attention_map,
    attention_transfer,
    ensemble_log_probs,
    flat_map,
    kl_divergence,
    sigmoid_ramp,
)
from attar.methods import KD, ONE

DIRECTORY = Path(os.environ.get("ATTAR_GOLDEN") or Path(__file__).parent / "golden")
Tensors = dict[str, Tensor]


def assert_golden(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(
        actual.detach().flatten(), expected.double().flatten(), rtol=1e-6, atol=1e-9, msg=lambda m: f"{what}: {m}"
    )


def leaf(tensor: Tensor) -> Tensor:
    return tensor.double().requires_grad_()


def kd(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    student, teacher = leaf(t["in.logits_s"]), leaf(t["in.logits_t"])
    loss = kl_divergence(student, teacher, hyper["T"])
    loss.backward()
    assert_golden(loss, t["out64.loss"], "loss")
    assert_golden(student.grad, t["grad64.logits_s"], "gradient of the student's logits")
    assert teacher.grad is None

    # The same through the method itself: a student and a teacher that return the stored logits.
    student = leaf(t["in.logits_s"])
    distiller = attar.Distiller(
        _Stored(student), [KD(_Stored(t["in.logits_t"].double()), temperature=hyper["T"], weight=1.0, task_weight=0.0)],
        attar.Classification(student.shape[1]), stages=["stage"],
    )  # fmt: skip
    images = torch.zeros(student.shape[0], 1, 4, 4, dtype=torch.float64)
    distiller.student.logits = leaf(t["in.logits_s"])[:2]
    distiller.methods["KD"].teachers[0].network.logits = t["in.logits_t"].double()[:2]
    distiller.build(images)
    distiller.student.logits = student
    distiller.methods["KD"].teachers[0].network.logits = t["in.logits_t"].double()
    terms = distiller((images, torch.zeros(len(images), dtype=torch.long)), 0.5)
    terms.total().backward()
    assert_golden(terms.losses["KD.kl"], t["out64.loss"], "KD.kl")
    assert_golden(student.grad, t["grad64.logits_s"], "gradient through the distiller")
    assert_golden(ensemble_log_probs([teacher, teacher], hyper["T"]).exp(), (teacher / hyper["T"]).softmax(1), "mean")


class _Stored(nn.Module):
    """Returns stored logits whatever it sees."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.stage = nn.Conv2d(1, 1, 1, dtype=torch.float64)
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        self.stage(images)
        return self.logits[: len(images)]


class _Branch(nn.Module):
    """Classifier of one branch on its own stored feature, which travels packed behind the trunk's channels."""

    def __init__(self, trunk_channels: int, channels: int, classes: int) -> None:
        super().__init__()
        self.trunk_channels, self.channels, self.number = trunk_channels, channels, 0
        self.classifier = nn.Linear(channels, classes, dtype=torch.float64)

    def forward(self, packed: Tensor) -> Tensor:
        start = self.trunk_channels + self.number * self.channels
        return self.classifier(packed[:, start : start + self.channels, :8, :8].mean(dim=(2, 3)))


class _Packed(nn.Module):
    def __init__(self, trunk_channels: int, channels: int, classes: int) -> None:
        super().__init__()
        self.trunk = nn.Identity()
        self.branch = _Branch(trunk_channels, channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.branch(self.trunk(images))


def one(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    if hyper["variant"] == "rampup":
        epochs = t["in.epochs"].double()
        run = 300.0
        ramp = torch.stack([sigmoid_ramp(epoch / run, hyper["L"] / run) for epoch in epochs])
        assert_golden(ramp, t["out64.rampup"] if "out64.rampup" in t else t["out.rampup"], "ramp")
        return
    assert hyper["variant"] == "net", f"no handler for variant {hyper['variant']}"
    trunk, features = leaf(t["in.trunk"]), [leaf(t[f"in.f{k}"]) for k in (1, 2, 3)]
    padded = [nn.functional.pad(f, (0, 8, 0, 8)) for f in features]
    images = torch.cat([trunk, *padded], dim=1)
    classes = t["w.net.classfier3_1.weight"].shape[0]
    student = _Packed(trunk.shape[1], features[0].shape[1], classes)
    method = ONE(branches=3, temperature=hyper["T"], cut="trunk", variant="code", ramp=0.0, kl_weight=hyper["w"])
    distiller = attar.Distiller(student, [method], attar.Classification(classes), stages=["trunk"])
    distiller.build(images.detach())

    gate = method.gate
    branches = [student.branch, *(tail.branch for tail in method.tails)]
    with torch.no_grad():
        for number, branch in enumerate(branches):
            branch.number = number
            branch.classifier.weight.copy_(t[f"w.net.classfier3_{number + 1}.weight"])
            branch.classifier.bias.copy_(t[f"w.net.classfier3_{number + 1}.bias"])
        gate.linear.weight.zero_()
        gate.linear.weight[:, : trunk.shape[1]].copy_(t["w.net.control_v1.weight"])
        gate.linear.bias.copy_(t["w.net.control_v1.bias"])
        gate.norm.weight.copy_(t["w.net.bn_v1.weight"])
        gate.norm.bias.copy_(t["w.net.bn_v1.bias"])
        gate.norm.running_mean.copy_(t["w.net.bn_v1.running_mean"])
        gate.norm.running_var.copy_(t["w.net.bn_v1.running_var"])
    distiller.train(mode == "train")

    mixed: list[Tensor] = []
    handle = gate.register_forward_hook(lambda module, args, output: mixed.append(output))
    terms = distiller((images, t["in.labels"]), 0.5)
    terms.total().backward()
    handle.remove()
    losses = terms.losses
    assert_golden(terms.logits, t["out64.z1"], "z1")
    assert_golden(mixed[0], t["out64.gate"], "gate")
    logits = [branch(images) for branch in branches]
    for k, z in enumerate(logits, start=1):
        assert_golden(z, t[f"out64.z{k}"], f"z{k}")
    mixture = sum(g.unsqueeze(1) * z for g, z in zip(mixed[0].unbind(1), logits, strict=True))
    assert_golden(mixture, t["out64.ze"], "ze")
    assert_golden(losses["task"] + losses["ONE.ce_branches"] + losses["ONE.ce_ensemble"], t["out64.ce"], "ce")
    assert_golden(terms.weights["ONE.kl"] * losses["ONE.kl"], t["out64.kl_weighted"], "weighted kl")
    assert_golden(terms.total(), t["out64.loss"], "loss")
    assert_golden(trunk.grad, t["grad64.trunk"], "gradient of the trunk's output")
    for k, feature in enumerate(features, start=1):
        assert_golden(feature.grad, t[f"grad64.f{k}"], f"gradient of f{k}")
        assert_golden(branches[k - 1].classifier.weight.grad, t[f"gw64.net.classfier3_{k}.weight"], f"classifier {k}")
        assert_golden(branches[k - 1].classifier.bias.grad, t[f"gw64.net.classfier3_{k}.bias"], f"bias {k}")
    assert_golden(gate.linear.weight.grad[:, : trunk.shape[1]], t["gw64.net.control_v1.weight"], "gate weight")
    assert_golden(gate.linear.bias.grad, t["gw64.net.control_v1.bias"], "gate bias")
    assert_golden(gate.norm.weight.grad, t["gw64.net.bn_v1.weight"], "gate norm weight")
    assert_golden(gate.norm.bias.grad, t["gw64.net.bn_v1.bias"], "gate norm bias")


def at(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    assert hyper["variant"] in ("plain", "resize"), f"no handler for variant {hyper['variant']}"
    student, teacher = leaf(t["in.f_s"]), leaf(t["in.f_t"])
    if hyper["variant"] == "plain":
        for features, side in ((student, "s"), (teacher, "t")):
            mapped = flat_map(attention_map(features, reduce="mean"), "l2")
            assert_golden(mapped, t[f"out64.map_{side}"], f"map of the {side} side")
    loss = attention_transfer(student, teacher, resize=hyper["variant"] == "resize")
    loss.backward()
    assert_golden(loss, t["out64.loss"], "loss")
    assert_golden(student.grad, t["grad64.f_s"], "gradient of the student's features")
    assert teacher.grad is None


HANDLERS: dict[str, Callable[[dict[str, Any], Tensors, str], None]] = {"at": at, "kd": kd, "one": one}


def _cases() -> list[Any]:
    found = []
    for description in sorted(DIRECTORY.glob("*.json")):
        if description.stem not in HANDLERS:
            found.append(pytest.param(description.stem, None, id=f"{description.stem}-not-built-yet"))
            continue
        for case in json.loads(description.read_text())["cases"]:
            found.append(pytest.param(description.stem, case, id=f"{description.stem}-{case['case']}"))
    return found


@pytest.mark.parametrize(("stem", "case"), _cases())
def test_golden(stem: str, case: dict[str, Any] | None) -> None:
    if case is None:
        pytest.skip(f"{stem}: attar has no method for these vectors yet")
    prefix = case["case"] + "/"
    tensors = load_file(DIRECTORY / f"{stem}.safetensors")
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    assert own, f"{stem}.safetensors holds nothing of case {case['case']}"
    HANDLERS[stem](case["hyper"], own, case["mode"])


def test_every_handler_has_its_vectors() -> None:
    missing = [stem for stem in HANDLERS if not (DIRECTORY / f"{stem}.json").exists()]
    assert not missing or "ATTAR_GOLDEN" in os.environ, f"no vectors for {missing} in {DIRECTORY}"


def test_an_unknown_case_of_a_known_file_fails() -> None:
    with pytest.raises(AssertionError, match="no handler for variant"):
        one({"variant": "something new"}, {}, "train")
