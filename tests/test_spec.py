from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import nn

from attar.errors import AttarError
from attar.method import Method
from attar.methods import KD, ONE
from attar.spec import TrainSpec, method_options, parse, peer_options, teacher_options

RUN = {"methods": [{"name": "ONE"}], "model": "resnet18", "data": "digits"}


def test_round_trip_and_fingerprint(tmp_path: Path) -> None:
    spec = parse(TrainSpec, RUN)
    spec.save(tmp_path / "spec.json")
    assert TrainSpec.load(tmp_path / "spec.json") == spec
    assert spec.fingerprint() == parse(TrainSpec, {**RUN, "log_every": 7}).fingerprint()
    assert spec.fingerprint() != parse(TrainSpec, {**RUN, "seed": 1}).fingerprint()


def test_adamw_has_its_own_defaults() -> None:
    sgd, adamw = parse(TrainSpec, RUN), parse(TrainSpec, {**RUN, "optimizer": "adamw"})
    assert (sgd.lr, sgd.weight_decay) == (0.1, 5e-4)
    assert (adamw.lr, adamw.weight_decay) == (1e-3, 0.05)
    assert parse(TrainSpec, {**RUN, "optimizer": "adamw", "lr": 3e-3}).lr == 3e-3


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"epoch": 3}, r"no option 'epoch': did you mean 'epochs'\?"),
        ({"epochs": 0}, "'epochs' cannot be 0: input should be greater than or equal to 1"),
        ({"optimizer": "adam"}, "'optimizer' cannot be 'adam'"),
        ({"holdout": 1.0}, "'holdout' cannot be 1.0"),
    ],
)
def test_mistakes_are_one_sentence(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(AttarError, match=sentence) as error:
        parse(TrainSpec, {**RUN, **change})
    assert "\n" not in str(error.value)


def test_missing_fields_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(AttarError, match="Option 'model' must be given"):
        parse(TrainSpec, {"methods": [], "data": "digits"})
    path = tmp_path / "spec.json"
    with pytest.raises(AttarError, match="cannot be read"):
        TrainSpec.load(path)
    path.write_text("{")
    with pytest.raises(AttarError, match="cannot be read"):
        TrainSpec.load(path)
    path.write_text(json.dumps({**RUN, "something": 1}))
    with pytest.raises(AttarError, match="no spec of this version"):
        TrainSpec.load(path)


def test_a_methods_options_are_its_constructors_arguments() -> None:
    options = method_options(ONE).model_fields
    assert options["branches"].default == 3
    assert "tail" not in options, "a module cannot be given on a command line"
    assert method_options(KD).model_fields["teachers"].annotation == tuple[str, ...]
    with pytest.raises(AttarError, match=r"no option 'branch': did you mean 'branches'\?"):
        parse(method_options(ONE), {"branch": 2})


class Cohort(Method):
    """A method that takes networks which train beside the student."""

    def __init__(self, *, peers: int | nn.Module | Sequence[nn.Module] = 1, tail: nn.Module | None = None) -> None:
        super().__init__()
        self.peers = peers


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        (2, 2),
        ("2", 2),
        (["2"], 2),
        ([3], 3),
        ("-1", -1),
        ("cifar_resnet32", ("cifar_resnet32",)),
        (["cifar_resnet32"], ("cifar_resnet32",)),
        (["cifar_resnet32", "resnet18"], ("cifar_resnet32", "resnet18")),
        ("[cifar_resnet32, resnet18]", ("cifar_resnet32", "resnet18")),
    ],
)
def test_peers_are_a_number_or_names(given: object, understood: object) -> None:
    assert (peer_options(Cohort), teacher_options(Cohort)) == ({"peers"}, frozenset())
    options = parse(method_options(Cohort), {"peers": given})
    assert options.peers == understood
    # As a run folder keeps them.
    kept = json.loads(json.dumps(options.model_dump(mode="json")))
    assert parse(method_options(Cohort), kept).peers == understood
    assert "tail" not in kept


@pytest.mark.parametrize("given", [2.5, [], "", [1, "resnet18"], {"a": 1}])
def test_other_peers_are_refused(given: object) -> None:
    with pytest.raises(AttarError, match=r"Option 'peers' cannot be .*: give how many, or the names of their models\."):
        parse(method_options(Cohort), {"peers": given})
