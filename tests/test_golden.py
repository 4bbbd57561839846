"""Numerical fidelity: every golden case, computed by the published code, reproduced in float64.

The directory is `ATTAR_GOLDEN` (default: tests/golden). A case that no handler takes is a failure, and so is a file
without a handler, unless it is named here as one of no method of attar.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import attar
from attar.anatomy.heads import ExitOutput
from attar.functional import (
    attention_map,
    attention_transfer,
    ensemble_log_probs,
    flat_map,
    kl_divergence,
    sigmoid_ramp,
)
from attar.functional.adversarial import activation_bins
from attar.functional.label_augmentation import Transform, joint_labels, transformed
from attar.functional.peers import peer_attention
from attar.functional.pkt import probabilistic_transfer
from attar.functional.sparse import decoded, sparsified
from attar.method import Method
from attar.methods import (
    AT,
    BAKE,
    BYOT,
    CSKD,
    DDGSD,
    DML,
    FRSKD,
    KD,
    MEAL,
    ONE,
    PKT,
    PSKD,
    SAD,
    SLA,
    SPKD,
    SRM,
    FitNet,
    InDistill,
    OKDDip,
    TfKD,
)
from attar.reader import Reading
from attar.zoo import CifarCNN

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

    # The same through the method itself; a square map belongs to a square image.
    student = leaf(t["in.f_s"])
    size = 8 if teacher.shape[2] == teacher.shape[3] else None
    distiller, images = _taught(lambda given: AT(given, **_ONLY), [student], [t["in.f_t"].double()], size)
    terms = distiller((images, torch.zeros(len(images), dtype=torch.long)), 0.5)
    terms.losses["AT.attention"].backward()
    assert_golden(terms.losses["AT.attention"], t["out64.loss"], "AT.attention")
    assert_golden(student.grad, t["grad64.f_s"], "gradient through the distiller")


# The one stage of `_Features` on both sides, named.
_ONLY: dict[str, Any] = {"stages": ("stages.0",), "teacher_stages": ("stages.0",)}


def _taught(
    make: Callable[[attar.Teacher], Method], ours: list[Tensor], theirs: list[Tensor], teacher_size: int | None = None
) -> tuple[attar.Distiller, Tensor]:
    """Build a method on a student and a teacher whose stages hold these features; return images of their number."""
    method = make(attar.Teacher(_Features(*theirs), image_size=teacher_size))
    names = [f"stages.{number}" for number in range(len(ours))]
    distiller = attar.Distiller(_Features(*ours), [method], attar.Classification(2), stages=names)
    size = [max(value.shape[axis] for value in (*ours, *theirs)) for axis in (2, 3)]
    images = torch.zeros(len(ours[0]), 1, *size, dtype=torch.float64)
    return distiller.build(images), images


class _Map(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return self.value[: len(images)]


class _Levels(nn.Module):
    """Stages that return stored maps, and stored logits."""

    def __init__(self, maps: list[Tensor], logits: Tensor) -> None:
        super().__init__()
        self.stages = nn.ModuleList(_Map() for _ in maps)
        for stage, value in zip(self.stages, maps, strict=True):
            stage.value = value
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        for stage in self.stages:
            stage(images)
        return self.logits[: len(images)]


def _frskd_key(official: str) -> str:
    """The name of an official weight of the self-teacher in attar's."""
    name = official.removeprefix("bifpn.").removeprefix("layers.0.")
    kind, _, rest = name.partition(".")
    if kind in ("fc", "linear"):
        return f"classifier.{rest}"
    level, _, rest = rest.partition(".")
    if kind in ("up_weight", "down_weight"):
        return f"pyramid.{kind.removesuffix('_weight')}_fusions.{level}.v"
    if kind in ("up_conv", "down_conv"):
        unit, layer, what = rest.removeprefix("conv.").split(".")
        position = int(layer) + (4 * int(unit) - 1 if int(unit) else 0)  # a ReLU stands in front of later units
        return f"pyramid.{kind.removesuffix('_conv')}_nodes.{level}.{position}.{what}"
    block = {"lat_conv": "laterals", "lat_conv2": "second_laterals", "up_sample": "ups", "down_sample": "downs"}[kind]
    return f"pyramid.{block}.{level}.{rest.removeprefix('1.').removeprefix('conv.0.')}"


def frskd(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    if hyper["variant"] == "seg_kl":
        logits = leaf(t["in.logits"])
        loss = kl_divergence(logits, t["in.logits_t"].double(), hyper["T"])
        loss.backward()
        assert_golden(loss, t["out64.loss"], "loss")
        assert_golden(logits.grad, t["grad64.logits"], "gradient of the logits")
        return
    assert hyper["variant"] == "self-teacher", f"no handler for variant {hyper['variant']}"
    numbers = range(1, sum(key.startswith("in.x") for key in t) + 1)
    maps, logits = [leaf(t[f"in.x{i}"]) for i in numbers], leaf(t["in.logits"])
    bifpn = {"pyramid": "bifpn", "channels": 4} if hyper["module"] == "BiFPN with 4 channels" else {}
    method = FRSKD(
        alpha=hyper["alpha"], beta=hyper["beta"], temperature=hyper["T"], width=hyper["width"], depth=hyper["depth"],
        min_channels=1, **bifpn,
    )  # fmt: skip
    student = _Levels(maps, logits)
    stages = [f"stages.{i - 1}" for i in numbers]
    distiller = attar.Distiller(student, [method], attar.Classification(logits.shape[1]), stages=stages)
    images = torch.zeros(len(logits), 1, *maps[0].shape[2:], dtype=torch.float64)
    distiller.build(images).train(mode == "train")
    teacher = method.self_teacher
    own = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
    official = {key.removeprefix("w."): value for key, value in t.items() if key.startswith("w.")}
    assert {_frskd_key(name) for name in official} == {name for name in own if "num_batches" not in name}
    with torch.no_grad():
        for name, value in official.items():
            own[_frskd_key(name)].copy_(value)

    seen: list[Any] = []
    handle = teacher.register_forward_hook(lambda module, args, output: seen.extend(output))
    terms = distiller((images, t["in.labels"]), 0.5)
    terms.total().backward()
    handle.remove()
    for i, refined in zip(numbers, seen[0], strict=True):
        assert_golden(refined.relu(), t[f"out64.o{i}"], f"refined map {i}")
    assert_golden(seen[1], t["out64.t_logits"], "logits of the self-teacher")
    assert_golden(terms.losses["FRSKD.features"], t["out64.att"], "features")
    assert_golden(terms.losses["FRSKD.kl"], t["out64.kd"], "kl")
    assert_golden(terms.total(), t["out64.loss"], "loss")
    assert_golden(logits.grad, t["grad64.logits"], "gradient of the logits")
    for i, x in zip(numbers, maps, strict=True):
        assert_golden(x.grad, t[f"grad64.x{i}"], f"gradient of map {i}")
    for name in official:
        if f"gw64.{name}" in t:
            assert_golden(own[_frskd_key(name)].grad, t[f"gw64.{name}"], f"gradient of {name}")


def selfkd_extras(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    """Self-KD-Lib's TF_KD_reg, PS-KD and DKS."""
    if hyper["method"] == "dks":
        dks(hyper, t)
        return
    if hyper["method"] == "pskd":
        ps_kd(hyper, t)
        return
    assert hyper["method"] == "tfkd", f"no handler for method {hyper['method']}"
    student = _Stored(leaf(t["in.logits"]))
    method = TfKD(variant="self-kd-lib", temperature=hyper["T"], true_class=1 - hyper["epsilon"])
    task = attar.Classification(student.logits.shape[1])
    images = torch.zeros(len(student.logits), 1, 4, 4, dtype=torch.float64)
    terms = attar.Distiller(student, [method], task, stages=["stage"]).build(images)((images, t["in.labels"]), 0.5)
    term = terms.losses["TfKD.cross_entropy"]
    term.backward()
    assert terms.weights == {"task": 1.0, "TfKD.cross_entropy": 1.0}
    assert_golden(term, t["out64.loss"], "loss")
    assert_golden(student.logits.grad, t["grad64.logits"], "gradient of the logits")


def dks(hyper: dict[str, Any], t: Tensors) -> None:
    """The heads' logits are stored, as in the reference run; the last head is the network itself."""
    logits = leaf(t["in.logits"])
    heads, samples, classes = logits.shape
    student = _Levels([torch.zeros(samples, 2, 4, 4, dtype=torch.float64) for _ in range(heads)], logits[-1])
    method = BYOT(imitate="all", alpha=1.0, ce_weight=1.0, hint_weight=0.0, temperature=hyper["T"])
    stages = [f"stages.{i}" for i in range(heads)]
    distiller = attar.Distiller(student, [method], attar.Classification(classes), stages=stages)
    images = torch.zeros(samples, 1, 4, 4, dtype=torch.float64)
    distiller.build(images)
    for head, stored in zip(method.exits, logits[:-1], strict=True):
        head.register_forward_hook(lambda module, args, output, stored=stored: output._replace(logits=stored))
    terms = distiller((images, t["in.labels"]), 0.5)
    terms.total().backward()
    assert_golden(terms.losses["task"] + terms.losses["BYOT.ce_exits"], t["out64.loss_cls"], "cross-entropies")
    assert_golden(terms.losses["BYOT.kd"], t["out64.loss_div"], "divergences")
    assert_golden(terms.total(), t["out64.loss"], "loss")
    assert_golden(logits.grad, t["grad64.logits"], "gradient of the logits")


def ps_kd(hyper: dict[str, Any], t: Tensors) -> None:
    student = _Stored(leaf(t["in.logits"]))
    samples, classes = t["in.memory"].shape
    method = PSKD(alpha=hyper["alpha_T"])
    images = torch.zeros(len(student.logits), 1, 4, 4, dtype=torch.float64)
    distiller = attar.Distiller(student, [method], attar.Classification(classes), stages=["stage"])
    distiller.build(images, samples).train()
    first = hyper["epoch"] == 0
    if not first:  # in the first epoch the memory has been set to the labels, which an empty one stands for
        method.memory.copy_(t["in.memory"])
    progress = (hyper["epoch"] + 1) / hyper["epochs"]
    terms = distiller(attar.Batch(images, t["in.labels"], t["in.index"]), progress)
    terms.total().backward()
    assert_golden(terms.total(), t["out64.loss"], "loss")
    assert_golden(student.logits.grad, t["grad64.logits"], "gradient of the logits")
    rows = t["in.index"] if first else slice(None)
    assert_golden(method.memory[rows], t["out64.memory_after"][rows], "memory")


class _Feature(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, images: Tensor) -> Tensor:
        return self.value[: len(images)]


class _Features(nn.Module):
    """A student whose stages return stored features whatever it sees."""

    def __init__(self, *values: Tensor) -> None:
        super().__init__()
        self.stages = nn.ModuleList(map(_Feature, values))
        self.head = nn.Linear(1, 2, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        for stage in self.stages:
            stage(images)
        return self.head(images.mean(dim=(2, 3)))


def _between_stages(method: Method, values: list[Tensor], size: tuple[int, int] | None = None) -> Tensor:
    """Run a method without auxiliaries on a student whose stages hold these features; return its only term."""
    student = _Features(*values)
    names = [f"stages.{number}" for number in range(len(values))]
    distiller = attar.Distiller(student, [method], attar.Classification(2), stages=names)
    count = len(values[0])
    images = torch.zeros(count, 1, *(size or values[0].shape[2:]), dtype=torch.float64)
    losses = distiller.build(images)((images, torch.zeros(count, dtype=torch.long)), 0.5).losses
    (name,) = losses.keys() - {"task"}
    return losses[name]


def sad(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    variant = hyper["variant"]
    assert variant in ("released", "positions", "pair"), f"no handler for variant {variant}"
    over = "batch" if variant == "released" else "positions"
    method = SAD(variant="lane", start=0.0, align_corners=True, softmax_over=over)
    deep = leaf(t["in.f"])
    if variant == "pair":
        shallow = leaf(t["in.s"])
        size = tuple(shallow.shape[2:])
        loss = _between_stages(method, [shallow, deep])
        loss.backward()
        assert_golden(method.attention(shallow, size), t["out64.map_s"], "map of the shallow side")
        assert_golden(shallow.grad, t["grad64.s"], "gradient of the shallow features")
        assert deep.grad is None
    else:
        target = t["in.target"].double()
        size = tuple(target.shape[1:])
        loss = (method.attention(deep, size) - target.flatten(1)).square().mean()
        loss.backward()
        assert_golden(deep.grad, t["grad64.f"], "gradient of the features")
    assert_golden(method.attention(deep, size), t["out64.map"], "map")
    assert_golden(loss, t["out64.loss"], "loss")


def sad_thirdparty(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    assert hyper["variant"] in ("chain", "at_gen"), f"no handler for variant {hyper['variant']}"
    if hyper["variant"] == "chain":
        method = SAD(upsample="features")
        assert method.weights(torch.tensor(0.0))["attention"] == 1000
    else:
        method = SAD(variant="lane", start=0.0, stop_gradient=False)
    values = [leaf(t[f"in.f{number}"]) for number in (1, 2, 3) if f"in.f{number}" in t]
    loss = _between_stages(method, values)
    loss.backward()
    assert_golden(loss, t["out64.loss"], "loss")
    for number, value in enumerate(values, start=1):
        gradient = value.grad if value.grad is not None else torch.zeros_like(value)
        assert_golden(gradient, t[f"grad64.f{number}"], f"gradient of f{number}")


class _Flat(nn.Module):
    """A network of vectors, which travel as images one pixel high."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.stage = nn.Identity()
        self.net = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(self.stage(images).flatten(1))


def cs_kd(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    x = leaf(t["in.x"])
    last = max(key for key in t if key.startswith("w.net.") and key.endswith(".weight"))
    classes, width = t[last].shape
    layers = [nn.BatchNorm1d(width)] if hyper["network"] == "bn+linear" else []
    student = _Flat(*layers, nn.Linear(width, classes)).double()
    images = x[:, None, None, :]
    method = CSKD(temperature=hyper["T"], weight=hyper["lamda"])
    distiller = attar.Distiller(student, [method], attar.Classification(classes), stages=["stage"])
    distiller.build(images.detach())
    weights = {key.removeprefix("w."): value.double() for key, value in t.items() if key.startswith("w.net.")}
    student.load_state_dict(weights, strict=False)
    distiller.train(mode == "train")
    halves = [attar.Batch(*half) for half in zip(images.chunk(2), t["in.labels"].chunk(2), strict=True)]
    terms = distiller(dataclasses.replace(halves[0], partners=halves[1]), 0.5)
    terms.total().backward()
    assert_golden(terms.logits, t["out64.logits"], "logits")
    assert_golden(terms.losses["CSKD.kl"], t["out64.cls"], "kl")
    assert_golden(terms.total(), t["out64.loss"], "loss")
    assert_golden(x.grad, t["grad64.x"], "gradient of the input")
    for name, parameter in student.named_parameters():
        assert_golden(parameter.grad, t[f"gw64.{name}"], f"gradient of {name}")
    if layers:
        assert_golden(layers[0].running_mean, t["out64.running_mean_after"], "running mean")
        assert_golden(layers[0].running_var, t["out64.running_var_after"], "running variance")


class _Answer(nn.Module):
    """A layer that returns stored values, whatever it sees."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value[: len(x)]


class _Staged(nn.Module):
    """Stages with stored maps, a pooling and a classifier."""

    def __init__(self, maps: list[Tensor], classifier: nn.Module) -> None:
        super().__init__()
        self.stages = nn.ModuleList(_Answer(value) for value in maps)
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        for stage in self.stages:
            images = stage(images)
        return self.classifier(images.mean(dim=(2, 3)))

    def distiller(self, method: attar.Method, classes: int) -> tuple[attar.Distiller, Tensor]:
        """Build; the images that come along count for nothing but their number."""
        first = self.stages[0].value
        images = torch.zeros(len(first), 1, *(4 * side for side in first.shape[2:]), dtype=torch.float64)
        names = [f"stages.{i}" for i in range(len(self.stages))]
        return attar.Distiller(self, [method], attar.Classification(classes), stages=names).build(images), images


def ddgsd(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    logits, features = leaf(t["in.logits"]), leaf(t["in.features"])
    options = {"temperature": hyper["T"], "mmd_weight": hyper["mmd_weight"]}
    student = _Staged([features[:, :, None, None]], _Answer(logits))
    distiller, images = student.distiller(DDGSD(mmd="scalar", task_weight=0.5, **options), logits.shape[1])
    labels = t["in.labels"].repeat(2)
    terms = distiller(attar.Batch(images, labels, None, labels, views=2), 0.5)
    terms.total().backward()
    weighted = {name: terms.weights[name] * loss for name, loss in terms.losses.items()}
    assert_golden(weighted["task"], t["out64.loss_cls"], "loss_cls")
    assert_golden(weighted["DDGSD.kl"] + weighted["DDGSD.mmd"], t["out64.loss_div"], "loss_div")
    assert_golden(terms.total(), t["out64.loss"], "loss")
    assert_golden(sum(terms.logits.chunk(2)) / 2, t["out64.mean_logits"], "mean logits")
    assert_golden(logits.grad, t["grad64.logits"], "gradient of the logits")
    assert_golden(features.grad, t["grad64.features"], "gradient of the features")


def spkd(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    assert not hyper, f"no handler for variant {hyper}"
    student, teacher = leaf(t["in.f_s"]), leaf(t["in.f_t"])
    loss = _between_stages(SPKD(), [student, teacher], size=(16, 16))
    loss.backward()
    assert_golden(loss, t["out64.loss"], "loss")
    assert_golden(student.grad, t["grad64.f_s"], "gradient of the student's features")
    assert teacher.grad is None


class _Versions(nn.Module):
    """Knows which version of which image it sees, and answers with stored joint and single logits.

    Image b is b + 1 times a pattern whose every transformation looks different.
    """

    def __init__(self, pattern: Tensor, transform: Transform, joint: Tensor, single: Tensor) -> None:
        super().__init__()
        self.stage = nn.Identity()
        self.patterns = transformed(pattern, transform)[0].flatten(1)
        self.rows = torch.cat([joint, single], dim=1)
        width, classes = self.rows.shape[1], single.shape[1]
        self.head = nn.Linear(width, classes, bias=False, dtype=torch.float64)
        self.head.weight.data = torch.eye(width, dtype=torch.float64)[-classes:]

    def forward(self, images: Tensor) -> Tensor:
        seen = self.stage(images).flatten(1)
        number = (seen.sum(1) / self.patterns[0].sum()).round()
        version = (seen[:, None] / number[:, None, None] - self.patterns).abs().sum(2).argmin(1)
        return self.head(self.rows[(number.long() - 1) * len(self.patterns) + version])


def sla(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    n, variant = hyper["n"], hyper["variant"]
    if variant == "transform":
        versions = transformed(t["in.images"].double(), hyper["transform"])
        assert versions.shape[1] == n
        assert_golden(versions, t["out.transformed"], "versions")
        return
    assert variant in ("sla", "sd"), f"no handler for variant {variant}"
    transform: Transform = {2: "rotation2", 4: "rotation", 6: "color_perm"}[n]
    labels, joint = t["in.labels"], leaf(t["in.joint"])
    distil = variant == "sd"
    single = leaf(t["in.single"]) if distil else torch.zeros(len(joint), joint.shape[1] // n, dtype=torch.float64)
    assert_golden(joint_labels(labels, n).double(), t["out.joint_labels"], "joint labels")
    pattern = torch.rand(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for passes in ("others", "all"):
        joint.grad = single.grad = None
        method = SLA(
            transform=transform,
            temperature=hyper["T"],
            large_loss=hyper["with_large_loss"],
            distil=distil,
            passes=passes,
        )
        student = _Versions(pattern, transform, joint, single)
        distiller = attar.Distiller(student, [method], attar.Classification(single.shape[1]), stages=["stage"])
        images = pattern * torch.arange(1.0, len(labels) + 1, dtype=torch.float64).view(-1, 1, 1, 1)
        distiller.build(images).train()
        method.joint_head.weight.data = torch.eye(student.rows.shape[1], dtype=torch.float64)[: joint.shape[1]]
        method.joint_head.bias.data.zero_()
        terms = distiller((images, labels), 0.5)
        terms.total().backward()
        assert_golden(terms.total(), t["out64.loss"], "loss")
        assert_golden(joint.grad, t["grad64.joint"], "gradient of the joint logits")
        networks = method.deployables(student)
        assert_golden(networks["aggregated"](images), t["out64.agg"], "aggregated logits")
        if distil:
            assert_golden(terms.logits, t["out64.single"], "single logits")
            assert_golden(single.grad, t["grad64.single"], "gradient of the single logits")
        else:
            assert_golden(networks["single"](images), t["out64.single"], "single logits")


def _exits_answer(
    method: BYOT, t: Tensors, exits: list[int], maps: list[Tensor]
) -> tuple[attar.Terms, Tensor, Tensor, BYOT]:
    """Run BYOT on stored logits and features; `exits` are the positions of the shallow ones, the shallowest first."""
    z, f = leaf(t["in.z"]), leaf(t["in.f"])
    deep = f[0] if f[0].ndim == 4 else f[0][:, :, None, None]
    distiller, images = _Staged([*maps, deep], _Answer(z[0])).distiller(method, z.shape[-1])
    for position, number in enumerate(exits):
        own = f[number] if f[number].ndim == 4 else f[number][:, :, None, None]
        method.exits[position] = _Answers(ExitOutput(own, own.mean(dim=(2, 3)), z[number]))
    for position, adapter in enumerate(method.adapters):
        adapter.load_state_dict({name: t[f"w.adapt.{exits[position] - 1}.{name}"] for name in ("weight", "bias")})
    terms = distiller((images, t["in.labels"]), 0.5)
    terms.total().backward()
    return terms, z, f, method


class _Answers(nn.Module):
    """A head that returns a stored answer."""

    def __init__(self, answer: ExitOutput) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> ExitOutput:
        return self.answer


def _shallow(batch: int, *sizes: tuple[int, int]) -> list[Tensor]:
    return [torch.zeros(batch, 4, *size, dtype=torch.float64) for size in sizes]


def byot(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    if hyper["variant"] == "heads":
        return _byot_heads(t, mode)
    assert hyper["variant"] == "losses", f"no handler for variant {hyper['variant']}"
    options = {"alpha": hyper["loss_coefficient"], "hint_weight": hyper["feature_loss_coefficient"]}
    method = BYOT(form="journal", temperature=hyper["T"], **options)
    maps = _shallow(t["in.z"].shape[1], (8, 8), (4, 4), (2, 2))
    terms, z, f, method = _exits_answer(method, t, [3, 2, 1], maps)
    assert_golden(terms.total(), t["out64.loss"], "loss")
    assert_golden(z.grad, t["grad64.z"], "gradient of the logits")
    assert_golden(f.grad, t["grad64.f"], "gradient of the features")
    for number, adapter in zip((2, 1), method.adapters, strict=True):
        assert_golden(adapter.weight.grad, t[f"gw64.adapt.{number}.weight"], f"adaptation layer {number}")
        assert_golden(adapter.bias.grad, t[f"gw64.adapt.{number}.bias"], f"bias of adaptation layer {number}")
    # The released code owns a layer for the exit next to the deepest and never uses it; attar makes none.
    assert not t["gw64.adapt.0.weight"].any()
    return None


def _byot_heads(t: Tensors, mode: str) -> None:
    maps = [leaf(t[f"in.x{k}"]) for k in (1, 2, 3, 4)]
    classes, width = t["w.net.fc4.weight"].shape
    method = BYOT(form="journal")
    student = _Staged(maps, nn.Linear(width, classes, dtype=torch.float64))
    distiller, images = student.distiller(method, classes)

    def official(key: str) -> str:
        """The name of an official tensor in attar's."""
        part, number, rest = re.fullmatch(r"(attention|scala|fc)(\d)\.(.*)", key).groups()  # type: ignore[union-attr]
        if part == "fc":
            return f"student.classifier.{rest}" if number == "4" else f"exits.{int(number) - 1}.classifier.{rest}"
        rest = rest.replace("op.", "")
        step, _, rest = rest.partition(".")
        place = f"0.gate.{step}" if part == "attention" else str(int(step) + 1)
        return f"exits.{int(number) - 1}.neck.{place}.{rest}"

    own = dict(distiller.named_parameters()) | dict(distiller.named_buffers())
    names = {}
    for key in (key.removeprefix("w.net.") for key in t if key.startswith("w.net.")):
        name = official(key)
        names[key] = name if name.startswith("student.") else f"methods.BYOT.{name}"
        with torch.no_grad():
            own[names[key]].copy_(t[f"w.net.{key}"])
    unset = {name for name, _ in distiller.named_parameters()} - set(names.values())
    assert all("adapters" in name for name in unset), f"not in the vectors: {unset}"
    distiller.train(mode == "train")
    answers = [exit_(x) for exit_, x in zip(method.exits, maps, strict=False)]
    outputs = [*((a.logits, a.features) for a in answers), (student(images), maps[3].mean(dim=(2, 3)))]
    for k, (logits, features) in enumerate(outputs, start=1):
        assert_golden(logits, t[f"out64.out{k}"], f"logits of exit {k}")
        assert_golden(features, t[f"out64.feat{k}"], f"features of exit {k}")
    loss = torch.stack([logits.square().sum() for logits, _ in outputs]).sum()
    loss.backward()
    assert_golden(loss, t["out64.loss"], "loss")
    for k in (3, 4):  # those of the shallower maps are not stored
        assert_golden(maps[k - 1].grad, t[f"grad64.x{k}"], f"gradient of x{k}")


def byot_thirdparty(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    batch = t["in.z"].shape[1]
    if hyper["variant"] == "luan":
        options = {"alpha": hyper["alpha"], "task_weight": 1 - hyper["alpha"], "hint_weight": hyper["beta"]}
        method = BYOT(temperature=hyper["T"], soft="cross-entropy", hint="masked-sum", **options)
        terms, z, f, _ = _exits_answer(method, t, [1, 2, 3], _shallow(batch, (8, 8), (4, 4), (2, 2)))
        assert_golden(terms.losses["BYOT.kd"], t["out64.kd_sum"], "kd_sum")
        assert_golden(terms.losses["BYOT.hint"], t["out64.feature_sum"], "feature_sum")
    else:
        assert hyper["variant"] == "selfkdlib", f"no handler for variant {hyper['variant']}"
        method = BYOT(temperature=hyper["T"], alpha=1.0, ce_weight=1.0, hint="map", hint_weight=0.05)
        terms, z, f, _ = _exits_answer(method, t, [2, 1], _shallow(batch, (8, 12), (4, 6)))
        losses = {name: terms.weights[name] * loss for name, loss in terms.losses.items()}
        assert_golden(losses["task"] + losses["BYOT.ce_exits"], t["out64.loss_cls"], "loss_cls")
        assert_golden(losses["BYOT.kd"] + losses["BYOT.hint"], t["out64.loss_div"], "loss_div")
    assert_golden(terms.total(), t["out64.loss"], "loss")
    assert_golden(z.grad, t["grad64.z"], "gradient of the logits")
    assert_golden(f.grad, t["grad64.f"], "gradient of the features")


def bake(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    logits, features = leaf(t["in.logits"]), leaf(t["in.features"])
    method = BAKE(temperature=hyper["T"], omega=hyper["omega"], weight=hyper["lamda"])
    assert_golden(method.ensemble(logits.detach(), features.detach()), t["out64.q"], "q")
    student = _Stored(logits)
    images = torch.zeros(len(logits), 1, 4, 4, dtype=torch.float64)
    distiller = attar.Distiller(student, [method], attar.Classification(logits.shape[1]), stages=["stage"])
    distiller.build(images)
    # The embedding is what the method is given here: a student of stored numbers has none of its own.
    ensemble = method.ensemble
    method.ensemble = lambda z, _: ensemble(z, features.detach())
    terms = distiller((images, t["in.labels"]), 0.5)
    terms.total().backward()
    assert_golden(terms.losses["BAKE.kl"], t["out64.kd"], "kd")
    assert_golden(terms.total(), t["out64.loss"], "loss")
    assert_golden(logits.grad, t["grad64.logits"], "gradient of the logits")
    assert features.grad is None


def dml(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    """OKDDip's re-implementation: its targets have a gradient, its "ensemble" is the mean of the others' logits."""
    networks = [_Stored(torch.zeros(2, t["in.logits"].shape[1], dtype=torch.float64)) for _ in range(hyper["K"])]
    target = {"pairwise": "each", "ensemble": "logits"}[hyper["variant"]]
    method = DML(
        peers=networks[1:],
        temperature=hyper["T"],
        target=target,
        target_shift=1e-7,
        constant_targets=False,
    )
    distiller = attar.Distiller(networks[0], [method], attar.Classification(t["in.logits"].shape[1]), stages=["stage"])
    images = torch.zeros(len(t["in.labels"]), 1, 4, 4, dtype=torch.float64)
    distiller.build(images)
    logits = leaf(t["in.logits"])
    for number, network in enumerate(networks):
        network.logits = logits[:, :, number]
    terms = distiller((images, t["in.labels"]), 0.5)
    terms.total().backward()
    assert_golden(terms.total(), t["out64.loss"], "loss")
    assert_golden(logits.grad, t["grad64.logits"], "gradient of all logits")


class _Embedding(nn.Module):
    """Classifies stored embeddings, whatever it sees."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.stage = nn.Conv2d(1, 1, 1, dtype=torch.float64)
        self.head = nn.Linear(value.shape[1], 2, dtype=torch.float64)
        self.value = value

    def forward(self, images: Tensor) -> Tensor:
        self.stage(images)
        return self.head(self.value[: len(images)])


def pkt(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    assert not hyper, f"no handler for variant {hyper}"
    features = leaf(t["in.f_s"])
    method = PKT(_Embedding(t["in.f_t"].double()), supervised=1.0)
    images = torch.zeros(len(features), 1, 4, 4, dtype=torch.float64)
    distiller = attar.Distiller(_Embedding(features), [method], attar.Classification(2)).build(images)
    losses = distiller(attar.Batch(images, t["in.labels"] % 2, labels=t["in.labels"]), 0.5).losses
    losses["PKT.divergence"].backward()
    assert_golden(losses["PKT.divergence"], t["out64.loss"], "loss")
    assert_golden(losses["PKT.supervised"], t["out64.supervised"], "supervised")
    assert_golden(features.grad, t["grad64.f_s"], "gradient of the student's features")


class _Told(nn.Module):
    """A frozen network whose only stage has a map, so that a method can be built on it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(1 if i == 0 else 2, 2, 3, 2, 1, dtype=torch.float64) for i in range(2))
        self.head = nn.Linear(2, classes, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        for stage in self.stages:
            images = stage(images)
        return self.head(images.mean(dim=(2, 3)))


def meal(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    if hyper["variant"] == "pool":
        features = leaf(t["in.map"])
        tap = activation_bins(features, hyper["d"], hyper["pool"])
        tap.square().sum().backward()
        assert_golden(tap, t["out64.tap"], "tap")
        assert_golden(features.grad, t["grad64.map"], "gradient of the map")
        return
    assert hyper["variant"] == "losses", f"no handler for variant {hyper['variant']}"
    depths = range(len(hyper["gamma"]))
    student, teacher = ([leaf(t[f"in.{side}{i}"]) for i in depths] for side in "st")
    classes = student[-1].shape[1]
    method = MEAL(
        _Told(classes), last_stages=len(depths) - 1, out_dims=tuple(s.shape[1] for s in student[:-1]),
        gamma=hyper["gamma"], eta=hyper["eta"], similarity=hyper["loss"], final_relu=True,
        adversarial="reverse" if hyper["gradient_reversal"] else "joint",
    )  # fmt: skip
    images = torch.zeros(len(student[0]), 1, 16, 16, dtype=torch.float64)
    task = attar.Classification(classes)
    distiller = attar.Distiller(_Told(classes), [method], task, stages=["stages.0", "stages.1"][3 - len(depths) :])
    distiller.build(images)
    parameters: dict[str, Tensor] = {}
    with torch.no_grad():
        for i in depths:
            for layer in (1, 2, 3):
                linear = getattr(method.discriminators[i], f"linear{layer}")
                for kind in ("weight", "bias"):
                    name = f"disc.{i}.conv{layer}.{kind}"
                    parameters[name] = getattr(linear, kind)
                    parameters[name].copy_(t[f"w.{name}"].reshape(parameters[name].shape))
    # The stored vectors as maps of one row, which as many bins leave as they are.
    rows = [[vector[:, None, None, :] for vector in side[:-1]] for side in (student, teacher)]
    method._readers = (lambda images: Reading(rows[1], None, teacher[-1]),)
    outputs = distiller._pass(images)
    values = dict(zip(method.taps(distiller.anatomy), rows[0], strict=True))
    outputs = dataclasses.replace(outputs, logits=student[-1], values=values)
    losses = method.losses(outputs, attar.Batch(images, torch.zeros(len(images))), torch.tensor(0.5))
    loss = losses["similarity"] + losses["discriminator"]
    loss.backward()
    assert_golden(losses["similarity"], t["out64.similarity"], "similarity")
    assert_golden(losses["discriminator"], t["out64.d_loss"], "loss of the discriminators")
    assert_golden(loss, t["out64.loss"], "loss")
    for i in depths:
        told = method.discriminators[i](torch.cat([student[i], teacher[i]]))
        assert_golden(told, t[f"out64.disc{i}"], f"discriminator {i}")
        assert_golden(student[i].grad, t[f"grad64.s{i}"], f"gradient of s{i}")
    for name, parameter in parameters.items():
        assert_golden(parameter.grad, t[f"gw64.{name}"], f"gradient of {name}")


def okddip(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    """The code's leader is its last network; here it is the student and stands first."""
    whole = hyper["variant"] == "separate networks"
    assert whole or hyper["variant"] == "shared trunk", f"no handler for variant {hyper['variant']}"
    h = leaf(t["in.h"])
    labels, count, dim = t["in.labels"], hyper["K"], hyper["D"]
    classes = t["out64.leader"].shape[1]
    options = {"networks": True} if whole else {"cut": "trunk"}
    method = OKDDip(
        branches=count,
        temperature=hyper["T"],
        reduction=hyper["factor"],
        kl_weight=hyper["w"] * hyper["alpha"],
        ramp=0.0,
        **options,
    )
    images = torch.zeros(len(labels), 1, 4, 4, dtype=torch.float64) if whole else torch.cat(list(h), dim=1)
    student = _Given(dim, classes) if whole else _Packed(0, dim, classes)
    stage = "stage" if whole else "trunk"
    distiller = attar.Distiller(student, [method], attar.Classification(classes), stages=[stage])
    distiller.build(images.detach()).train(mode == "train")
    official = {key.removeprefix("w.net."): value for key, value in t.items() if key.startswith("w.net.")}
    own: dict[str, nn.Parameter] = {"query_weight.weight": method.query.weight, "key_weight.weight": method.key.weight}
    if whole:
        z = leaf(t["in.z"])
        for number, network in enumerate([*method.peers.networks, student]):
            network.embedding, network.logits = h[number], z[number]
    else:
        for number, branch in enumerate([*(peer.tail.branch for peer in method.peers), student.branch]):
            branch.number = number
            own |= {f"classifier3_{number}.{name}": value for name, value in branch.classifier.named_parameters()}
    assert own.keys() == official.keys()
    with torch.no_grad():
        for name, value in official.items():
            own[name].copy_(value)

    asked: list[Tensor] = []
    targets = method.targets
    method.targets = lambda embeddings, logits: asked.extend((embeddings, logits)) or targets(embeddings, logits)
    terms = distiller((images, labels), 0.5)
    terms.total().backward()
    embeddings, logits = asked
    attention = peer_attention(method.query(embeddings), method.key(embeddings))
    mixed = t["out64.targets"].transpose(1, 2)
    assert_golden(attention, t["out64.attention"], "attention")
    assert_golden(logits, t["out64.logits"].transpose(1, 2), "logits of the peers")
    assert_golden(targets(embeddings, logits), (mixed / hyper["T"]).log_softmax(2), "targets")
    assert_golden(terms.logits, t["out64.leader"], "logits of the leader")
    assert_golden(terms.losses["OKDDip.ce_peers"], t["out64.loss_true"], "cross-entropy of the peers")
    assert_golden(terms.losses["OKDDip.kl_peers"], t["out64.loss_group"], "divergence of the peers")
    assert_golden(terms.total(), t["out64.loss"], "loss")
    assert_golden(h.grad, t["grad64.h"], "gradient of the embeddings")
    if whole:
        assert_golden(z.grad, t["grad64.z"], "gradient of the logits")
    for name, value in own.items():
        assert_golden(value.grad, t[f"gw64.net.{name}"], f"gradient of {name}")


class _Given(nn.Module):
    """Returns stored logits, and lets a classifier read a stored embedding, whatever it sees."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.stage = nn.Conv2d(1, 1, 1, dtype=torch.float64)
        self.classifier = nn.Linear(dim, classes, dtype=torch.float64)
        self.embedding = torch.zeros(2, dim, dtype=torch.float64)
        self.logits = torch.zeros(2, classes, dtype=torch.float64)

    def forward(self, images: Tensor) -> Tensor:
        self.stage(images)
        return self.logits[: len(images)] + 0.0 * self.classifier(self.embedding[: len(images)])


def fitnet_hint(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    assert not hyper, f"no handler for variant {hyper}"
    student = leaf(t["in.f_s"])
    distiller, images = _taught(lambda given: FitNet(given, **_ONLY), [student], [t["in.f_t"].double()])
    (regressor,) = distiller.methods["FitNet"].regressors[0]
    weights = {key.removeprefix("w.reg."): value.double() for key, value in t.items() if key.startswith("w.reg.")}
    regressor.load_state_dict(weights, strict=False)
    distiller.train(mode == "train")
    regressed: list[Tensor] = []
    handle = regressor.register_forward_hook(lambda module, args, output: regressed.append(output))
    loss = distiller((images, torch.zeros(len(images), dtype=torch.long)), 0.5).losses["FitNet.hint"]
    loss.backward()
    handle.remove()
    assert_golden(regressed[0], t["out64.regressed"], "regressed map")
    assert_golden(loss, t["out64.loss"], "loss")
    assert_golden(student.grad, t["grad64.f_s"], "gradient of the student's features")
    for name, parameter in regressor.named_parameters():
        assert_golden(parameter.grad, t[f"gw64.reg.{name}"], f"gradient of {name}")


class _Mapped(nn.Module):
    """A stored map as its one stage, and stored logits."""

    def __init__(self, value: Tensor, logits: Tensor) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, dtype=torch.float64)
        self.map = _Map()
        self.map.value, self.logits = value, logits

    def forward(self, images: Tensor) -> Tensor:
        self.map(self.conv(images))
        return self.logits[: len(images)]


def indistill(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    if hyper["variant"] == "pkt":
        student, teacher = leaf(t["in.f_s"]), leaf(t["in.f_t"])
        loss = probabilistic_transfer(
            student, teacher, kernels=("cosine", "student-t"), divergence="jeffreys", eps=1e-6
        )
        loss.backward()
        assert_golden(loss, t["out64.loss"], "loss")
        assert_golden(student.grad, t["grad64.f_s"], "gradient of the student's features")
        return
    if hyper["variant"] == "schedule":
        distiller = attar.Distiller(CifarCNN((2, 2, 2)), [InDistill(CifarCNN((4, 4, 4)))], attar.Classification(10))
        distiller.build(torch.zeros(2, 3, 32, 32))
        epochs = hyper["first_learning_rate_epochs"] + 10
        names = []
        for epoch in range(epochs):
            distiller.epoch_start(epoch, epochs)
            names.append(distiller.phase.name if distiller.phase else "main")
        numbers = {"layer 1": 0, "layer 2": 1, "layer 3": 2, "main": 3}
        stored = t["out.active_layer"].tolist()
        assert [numbers[name] for name in names[: len(stored)]] == stored
        assert [int(name == "main") for name in names[: len(stored)]] == t["out.uses_pkt"].tolist()
        return
    assert hyper["variant"] == "prune", f"no handler for variant {hyper['variant']}"
    images, classes = t["in.x"].double(), t["w.teacher.fc2.bias"].shape[0]
    teacher = CifarCNN([t[f"in.w{i}"].shape[0] for i in (1, 2, 3)], num_classes=classes).double()
    # The official network's hidden layer is narrower; nothing behind the last stage is read.
    official = {
        re.sub(r"conv(\d)_bn", r"bn\1", key.removeprefix("w.teacher.")): value
        for key, value in t.items()
        if key.startswith("w.teacher.conv")
    }
    missing = teacher.load_state_dict(official, strict=False)
    assert not missing.unexpected_keys
    assert all(key.startswith("fc") or "num_batches" in key for key in missing.missing_keys)
    kept = [t[f"out.keep{i}"] for i in (1, 2, 3)]
    flat = [leaf(t[f"in.s{i}"]) for i in range(3)]
    sides = [int((values.shape[1] / len(k)) ** 0.5) for values, k in zip(flat, kept, strict=True)]
    maps = [v.unflatten(1, (len(k), side, side)) for v, k, side in zip(flat, kept, sides, strict=True)]
    student = _Levels(maps, torch.zeros(2, classes, dtype=torch.float64))
    method = InDistill(teacher, official_bn=True)
    stages = [f"stages.{i}" for i in range(3)]
    distiller = attar.Distiller(student, [method], attar.Classification(classes), stages=stages).build(images)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        indices = getattr(method, f"selected{i}")
        assert torch.equal(indices, kept[i])
        weight = teacher.get_submodule(f"conv{i + 1}").weight
        assert_golden(weight[indices], t[f"out64.pw{i + 1}"], f"pruned weights {i + 1}")
        assert_golden(method.target(i, images), t[f"out64.layer{i}"], f"pruned features {i}")
        distiller.enter(i)
        loss = distiller((images, torch.zeros(2, dtype=torch.long)), 0.0).total()
        assert_golden(loss, t[f"out64.mse{i}"], f"mse {i}")
        total = total + loss
    total.backward()
    assert_golden(total, t["out64.loss"], "loss")
    for i in (1, 2):  # that of the shallowest is not stored
        assert_golden(flat[i].grad, t[f"grad64.s{i}"], f"gradient of s{i}")


def srm(hyper: dict[str, Any], t: Tensors, mode: str) -> None:
    if hyper["variant"] == "kd":
        logits = leaf(t["in.logits"])
        maps = torch.randn(len(logits), 4, 2, 2, dtype=torch.float64)
        method = SRM(_Mapped(maps, t["in.logits_t"].double()), alpha=hyper["alpha"], temperature=hyper["T"])
        distiller = _mapped(method, maps, logits)
        terms = distiller((torch.zeros(len(logits), 1, 4, 4, dtype=torch.float64), t["in.labels"]), 0.5)
        terms.total().backward()
        assert_golden(terms.total(), t["out64.loss"], "loss")
        assert_golden(logits.grad, t["grad64.logits"], "gradient of the logits")
        return
    assert hyper["variant"] == "srm", f"no handler for variant {hyper['variant']}"
    theirs, ours = t["in.x_t"].double(), leaf(t["in.x_s"])
    batch, channels = theirs.shape[:2]
    logits = torch.zeros(batch, 2, dtype=torch.float64)
    method = SRM(
        _Mapped(theirs, logits),
        codewords=hyper["M"] / channels,
        sparsity=(hyper["sparsity"] + 0.01) / hyper["M"],
        embedding=False,
        teacher_stages=("map",),
    )
    distiller = _mapped(method, ours, logits)
    assert method.kept == [hyper["sparsity"]]
    (dictionary,), (head,) = method.dictionaries, method.heads
    with torch.no_grad():
        for block, name in ((dictionary, "rep"), (head, "pred")):
            block.centers.copy_(t[f"w.{name}.centers"])
            block.intercept.copy_(t[f"w.{name}.intercept"])
    images, labels = torch.zeros(batch, 1, *theirs.shape[2:], dtype=torch.float64), torch.zeros(batch, dtype=torch.long)
    codes = sparsified(dictionary(theirs).sigmoid(), hyper["sparsity"])
    assert_golden(decoded(codes, dictionary.centers), t["out64.recon"], "recon")
    ((pixel, image),) = method.labels(images)
    assert torch.equal(pixel, t.get("out64.local_label", t["out.local_label"]))
    assert_golden(image, t["out64.global_label"], "global label")
    similar = head(ours).sigmoid()
    assert_golden(similar, t["out64.local_pred"], "local prediction")
    assert_golden(similar.mean(dim=(2, 3)), t["out64.global_pred"], "global prediction")
    distiller.enter(0)
    reconstruction = distiller((images, labels), 0.0).total()
    assert_golden(reconstruction, t["out64.recon_loss"], "reconstruction")
    distiller.enter(1)
    terms = distiller((images, labels), 0.0)
    assert_golden(terms.losses["SRM.image"], t["out64.l_global"], "image")
    assert_golden(terms.losses["SRM.pixel"], t["out64.l_local"], "pixel")
    loss = reconstruction + terms.total()
    loss.backward()
    assert_golden(loss, t["out64.loss"], "loss")
    assert_golden(ours.grad, t["grad64.x_s"], "gradient of the student's features")
    for block, name in ((dictionary, "rep"), (head, "pred")):
        assert_golden(block.centers.grad, t[f"gw64.{name}.centers"], f"gradient of {name}.centers")
        assert_golden(block.intercept.grad, t[f"gw64.{name}.intercept"], f"gradient of {name}.intercept")


def _mapped(method: SRM, maps: Tensor, logits: Tensor) -> attar.Distiller:
    task = attar.Classification(logits.shape[1])
    distiller = attar.Distiller(_Mapped(maps, logits), [method], task, stages=["map"])
    return distiller.build(torch.zeros(len(maps), 1, *maps.shape[2:], dtype=torch.float64))


HANDLERS: dict[str, Callable[[dict[str, Any], Tensors, str], None]] = {
    "at": at,
    "bake": bake,
    "byot": byot,
    "byot_thirdparty": byot_thirdparty,
    "cs_kd": cs_kd,
    "ddgsd": ddgsd,
    "dml": dml,
    "fitnet_hint": fitnet_hint,
    "frskd": frskd,
    "indistill": indistill,
    "kd": kd,
    "meal": meal,
    "okddip": okddip,
    "one": one,
    "pkt": pkt,
    "sad": sad,
    "sad_thirdparty": sad_thirdparty,
    "selfkd_extras": selfkd_extras,
    "sla": sla,
    "spkd": spkd,
    "srm": srm,
}


NO_METHOD = {"relational_extras": "RKD, NST, CC and FSP are no methods of attar"}


def _cases() -> list[Any]:
    return [
        pytest.param(description.stem, case, id=f"{description.stem}-{case['case']}")
        for description in sorted(DIRECTORY.glob("*.json"))
        if description.stem in HANDLERS
        for case in json.loads(description.read_text())["cases"]
    ]


@pytest.mark.parametrize(("stem", "case"), _cases())
def test_golden(stem: str, case: dict[str, Any]) -> None:
    prefix = case["case"] + "/"
    tensors = load_file(DIRECTORY / f"{stem}.safetensors")
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    assert own, f"{stem}.safetensors holds nothing of case {case['case']}"
    HANDLERS[stem](case["hyper"], own, case["mode"])


def test_every_file_of_vectors_is_tested_or_of_no_method() -> None:
    files = {path.stem for path in DIRECTORY.iterdir() if path.suffix in (".json", ".safetensors")}
    untested = files - {param.values[0] for param in _cases()}
    assert untested <= NO_METHOD.keys(), f"no test of {sorted(untested - NO_METHOD.keys())}"
    assert not NO_METHOD.keys() & HANDLERS.keys()


def test_every_handler_has_its_vectors() -> None:
    missing = [stem for stem in HANDLERS if not (DIRECTORY / f"{stem}.json").exists()]
    assert not missing or "ATTAR_GOLDEN" in os.environ, f"no vectors for {missing} in {DIRECTORY}"


def test_an_unknown_case_of_a_known_file_fails() -> None:
    with pytest.raises(AssertionError, match="no handler for variant"):
        one({"variant": "something new"}, {}, "train")
