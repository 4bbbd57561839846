from __future__ import annotations

import json
from pathlib import Path

import pytest

from attar.errors import AttarError
from attar.methods import KD, ONE
from attar.spec import TrainSpec, method_options, parse

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
