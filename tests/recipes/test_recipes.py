"""Recipes: complete, valid, faithful to the tables they cite, and known by name."""

from __future__ import annotations

import functools
import inspect
import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from attar import methods, recipes
from attar.compare.protocol import label_of
from attar.data.augment import AUGMENTATIONS
from attar.errors import AttarError
from attar.method import Method
from attar.recipes.catalog import _MODULES
from attar.recipes.recipe import CLASSES, FROM_MEMORY, IMAGENET, NOTES, runs_of
from attar.spec import TrainSpec, method_options, parse, teacher_options
from attar.train.models import make_model

NAMES = list(recipes.available())
RUNNABLE = [name for name in NAMES if not recipes.missing_methods(recipes.find(name))]


@functools.cache
def _network(model: str, classes: int, options: str) -> nn.Module:
    with torch.device("meta"):
        return make_model(model, classes, json.loads(options))


def network_of(spec: TrainSpec, classes: int) -> nn.Module:
    """Build what a recipe names, without memory, each network once: many recipes share one."""
    return _network(spec.model, classes, json.dumps(spec.model_options))


def test_every_function_of_every_module_is_a_recipe_of_its_own_name():
    listed = [name for module in _MODULES for name in module.__all__]
    assert sorted(listed) == NAMES
    assert len(set(listed)) == len(listed)
    for module in _MODULES:
        public = [n for n, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__]
        assert sorted(module.__all__) == sorted(n for n in public if not n.startswith("_"))
    for name, make in recipes.available().items():
        assert make().name == name
        assert inspect.signature(make).return_annotation == "Recipe"


def test_every_method_has_a_recipe():
    assert recipes.methods_without_recipe() == []


def test_a_method_without_a_recipe_is_found(monkeypatch):
    class Later(Method):
        """A method whose builder forgot the recipe."""

    monkeypatch.setattr(methods, "Later", Later, raising=False)
    assert recipes.methods_without_recipe() == ["Later"]


def test_missing_methods_are_listed_and_refused(tmp_path):
    lines = {line.name: line for line in recipes.recipe_lines()}
    assert list(lines) == NAMES
    for name in set(NAMES) - set(RUNNABLE):
        recipe = recipes.find(name)
        missing = ", ".join(recipes.missing_methods(recipe))
        assert set(recipes.missing_methods(recipe)) & set(methods.available()) == set()
        assert lines[name].state == f"needs {missing}, which attar does not have yet"
        with pytest.raises(AttarError, match=rf"^{name} needs {missing}, which attar does not have yet\.$"):
            recipes.reproduce(recipe, scale="small", out=tmp_path, console=Console(file=io.StringIO()))
    assert lines["one_resnet32_cifar100"].state == "runs"
    assert lines["one_resnet32_cifar100"].published == "top-1 error: plain 31.18? -> ONE 26.61 %"
    assert lines["one_resnet18_imagenet"].state == "runs with --data IMAGENET-FOLDER"
    assert not list(tmp_path.iterdir())


def test_a_recipe_of_a_method_that_does_not_exist_needs_it():
    recipe = recipes.find("dml_resnet32_cifar100")
    assert recipes.methods_of(recipe) == ("DML",)
    assert recipes.missing_methods(recipe) == tuple({"DML"} - set(methods.available()))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_whole(name):
    recipe = recipes.find(name)
    runs = runs_of(recipe)
    assert recipe.published
    assert recipe.notes
    assert all((recipe.title, recipe.paper, recipe.table))
    assert recipe.spec.data in CLASSES
    assert len(runs) == 1 + len(recipe.beside) + (recipe.teacher is not None)  # no two runs of one label
    assert {figure.run for figure in recipe.published} <= set(runs)
    own = any(figure.run == label_of(recipe.spec.methods) for figure in recipe.published)
    # Nobody published a figure for a reconstruction, and some tables were not to be had: such a recipe says so.
    assert own or any("reconstruction" in note or "could not be checked" in note for note in recipe.notes)
    for spec in runs.values():
        assert parse(TrainSpec, spec.model_dump()) == spec
        assert spec.seed == 0
        assert spec.data == recipe.spec.data
        assert spec.augment in AUGMENTATIONS
    for figure in recipe.published:
        assert figure.known
        if figure.metric.startswith("top-1"):
            assert 1 < figure.value < 100


@pytest.mark.parametrize("name", RUNNABLE)
def test_models_and_methods_of_a_recipe_exist(name):
    for spec in runs_of(recipes.find(name)).values():
        network = network_of(spec, CLASSES[spec.data])
        assert next(network.parameters()).is_meta
        for method in spec.methods:
            kind = methods.find(method.name)
            teacher = {option: ["a teacher"] for option in teacher_options(kind)}
            options = parse(method_options(kind), {**teacher, **method.options})
            changed = options.model_dump(mode="json", exclude_defaults=True)
            assert method.options.items() <= changed.items(), "an option at its default belongs out of the label"


@pytest.mark.parametrize(
    ("name", "run", "value", "known"),
    [
        ("one_resnet32_cifar10", "plain", 6.93, FROM_MEMORY),
        ("one_resnet32_cifar10", "ONE", 5.99, "repeated in arXiv 2011.07449"),
        ("one_resnet32_cifar100", "plain", 31.18, FROM_MEMORY),
        ("one_resnet32_cifar100", "ONE", 26.61, "repeated in arXiv 2011.07449"),
        ("one_resnet110_cifar100", "plain", 25.33, NOTES),
        ("one_resnet110_svhn", "ONE", 1.76, "repeated in arXiv 2011.07449"),
        ("one_resnext29_8x64d_cifar100", "ONE", 16.07, FROM_MEMORY),
        ("one_densenet_bc_190_40_svhn", "plain", 1.73, FROM_MEMORY),
        ("one_resnet18_imagenet", "plain", 30.48, NOTES),
        ("one_resnext50_imagenet", "ONE(cut=layer2)", 21.85, "repeated in arXiv 2011.07449"),
        ("dml_resnet110_cifar100", "DML", 24.10, "repeated in arXiv 2011.07449"),
        ("dml_pair_resnet32_cifar100", "DML", 71.19, FROM_MEMORY),
        ("dml_wrn_28_10_with_resnet32_cifar100", "DML(peers=cifar_resnet32)", 78.96, FROM_MEMORY),
        ("dml_thirdparty_resnet32_cifar100", "DML", 71.03, "README of chxy95/Deep-Mutual-Learning"),
        ("kdcl_resnet50_with_resnet18_imagenet", "DML(peers=resnet18)", 75.8, NOTES),
        ("kdcl_resnet50_with_resnet18_imagenet", "KDCL(peers=resnet18,target=linear)", 77.8, NOTES),
        ("kd_resnet32_cifar100", "KD", 28.83, FROM_MEMORY),
        ("one_resnet110_cifar100_without_distillation", "ONE(kl_weight=0.0)", 24.73, NOTES),
        ("one_resnet110_cifar100_without_sharing", "ONE(cut=conv1)", 22.45, NOTES),
        ("one_resnet110_cifar100_without_gate", "ONE(gate=mean)", 22.26, NOTES),
        ("one_resnet32_cifar100_5_branches", "ONE(branches=5)", 26.52, FROM_MEMORY),
        ("kd_wrn_40_2_wrn_16_2_cifar100", "KD", 74.92, "RepDistiller's README"),
        ("kd_resnet110_resnet32_cifar100", "teacher", 74.31, "RepDistiller's README"),
    ],
)
def test_published_figures_and_how_they_are_known(name, run, value, known):
    figures = [figure for figure in recipes.find(name).published if figure.run == run]
    assert any((figure.value, figure.known, figure.network) == (value, known, "student") for figure in figures)


def test_ensembles_and_reruns_of_one():
    ensembles = {name: [f for f in recipes.find(name).published if f.network == "ONE.ensemble"] for name in NAMES}
    told = {name: (figures[0].value, figures[0].known) for name, figures in ensembles.items() if figures}
    assert told == {"one_resnet32_cifar100": (24.63, FROM_MEMORY), "one_resnet110_cifar100": (21.03, FROM_MEMORY)}
    rerun = recipes.find("one_rerun_densenet_40_12_cifar100").published[0]
    assert (rerun.metric, rerun.value, rerun.spread) == ("top-1 accuracy", 71.60, 0.38)
    assert rerun.known.startswith("PCL's tables as repeated in")


def test_settings_are_those_of_ones_scripts():
    spec = recipes.find("one_resnet32_cifar100").spec
    assert (spec.epochs, spec.batch, spec.lr, spec.weight_decay) == (300, 128, 0.1, 1e-4)
    assert (spec.schedule, spec.milestones, spec.gamma, spec.warmup) == ("step", (0.5, 0.75), 0.1, 0.0)
    assert (spec.optimizer, spec.momentum, spec.nesterov, spec.progress) == ("sgd", 0.9, True, "epoch")
    assert recipes.find("one_resnet32_svhn").spec.epochs == 40
    assert recipes.find("one_resnet32_svhn").spec.augment == "none"
    assert recipes.find("one_resnet18_imagenet").spec.epochs == 90


def test_settings_are_those_of_repdistiller():
    recipe = recipes.find("kd_resnet56_resnet20_cifar100")
    for spec in runs_of(recipe).values():
        assert (spec.epochs, spec.batch, spec.lr, spec.weight_decay, spec.nesterov) == (240, 64, 0.05, 5e-4, False)
        assert [240 * share for share in spec.milestones] == [150, 180, 210]
    assert recipe.teacher.model == "cifar_resnet56"


@pytest.mark.parametrize(
    ("name", "millions"),
    [("one_resnet32_cifar100", 0.472756), ("one_resnet110_cifar100", 1.727284)],
)
def test_published_parameters_are_the_networks(name, millions):
    recipe = recipes.find(name)
    network = network_of(recipe.spec, CLASSES[recipe.spec.data])
    assert sum(p.numel() for p in network.parameters()) / 1e6 == millions
    assert millions in [figure.value for figure in recipe.published if figure.metric == "parameters"]


def test_a_name_that_is_none():
    with pytest.raises(AttarError, match=r"There is no recipe 'one_resnet32_cifar1000': did you mean 'one_resnet32_"):
        recipes.find("one_resnet32_cifar1000")
    assert recipes.find("ONE-ResNet32-CIFAR100").name == "one_resnet32_cifar100"


def test_the_table_of_recipes_fits_a_terminal():
    console = Console(file=io.StringIO(), width=160)
    console.print(recipes.recipe_table())
    said = console.file.getvalue()
    assert all(name in said for name in NAMES)
    assert "?: from memory, unverified" in said


@pytest.mark.parametrize("name", NAMES)
def test_small_keeps_methods_and_says_what_it_is(name):
    recipe = recipes.find(name)
    small = recipes.small(recipe)
    assert small.scale == "small"
    assert "comparable with nothing" in small.title
    assert "comparable with nothing" in small.notes[0]
    assert small.published == recipe.published
    phased = name.startswith(("indistill", "srm", "blockwise", "fitnet"))  # every phase takes an epoch at least
    for label, spec in runs_of(small).items():
        full = runs_of(recipe)[label]
        assert spec.methods == full.methods
        assert (spec.schedule, spec.milestones, spec.gamma) == (full.schedule, full.milestones, full.gamma)
        assert (spec.data, spec.epochs, spec.train_limit) == ("digits", 6 if phased else 2, 128)
        assert parse(TrainSpec, spec.model_dump()) == spec
        network = network_of(spec, 10)
        assert sum(p.numel() for p in network.parameters()) < 400_000


def test_small_refuses_a_network_it_knows_nothing_smaller_of():
    recipe = recipes.find("one_resnet18_imagenet")
    spec = recipe.spec.model_copy(update={"model": "vit_tiny_patch16_224"})
    with pytest.raises(AttarError, match=r"no small scale for 'vit_tiny_patch16_224': add its smallest relative"):
        recipes.small(type(recipe)(**{**recipe.__dict__, "spec": spec}))


def test_imagenet_must_be_given(tmp_path):
    recipe = recipes.find("one_resnet18_imagenet")
    assert recipe.spec.data == IMAGENET
    with pytest.raises(AttarError, match=r"^one_resnet18_imagenet needs ImageNet, which cannot be downloaded: give "):
        recipes.reproduce(recipe, out=tmp_path, console=Console(file=io.StringIO()))
