"""From names to objects: every mistake is one sentence with the nearest valid name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from attar.errors import AttarError
from attar.methods import DML, KD, ONE
from attar.spec import TrainSpec
from attar.train import build_methods, build_model, build_source, evaluate_run, fit, load_student, load_teacher
from attar.train.models import make_model
from pictures import write_discs
from runs import quiet, tiny


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": "resnet81"}, "no model 'resnet81': did you mean 'resnet"),
        ({"model": "torchvision:resnet81"}, "did you mean 'torchvision:resnet"),
        ({"model_options": {"widht": 0.5}}, "'cifar_resnet20' cannot be made with these options .*widht"),
        ({"model_options": {"width": 0.01}}, "width=0.01 leaves none of"),
        ({"weights": "/nowhere.pt"}, "no weights file '/nowhere.pt'"),
    ],
)
def test_models(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(AttarError, match=said):
        build_model(tiny(**fields), 10)


def test_torchvision_and_channels() -> None:
    assert make_model("torchvision:squeezenet1_1", 4)(torch.randn(2, 3, 64, 64)).shape == (2, 4)
    assert make_model("cifar_resnet20", 4, in_chans=1)(torch.randn(2, 1, 8, 8)).shape == (2, 4)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "nested.pt"])
def test_weights(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    source = make_model("cifar_resnet20", 10, {"width": 0.25}).state_dict()
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        safetensors.torch.save_file(source, path)
    else:
        torch.save({"state_dict": source} if "nested" in suffix else source, path)
    loaded = build_model(tiny(weights=str(path)), 10).state_dict()
    assert all(torch.equal(source[name], value) for name, value in loaded.items())
    with pytest.raises(AttarError, match=r"holds fc.weight of shape \[10, 16\], but the model's is \[7, 16\]"):
        build_model(tiny(weights=str(path)), 7)
    with pytest.raises(AttarError, match="are these weights of the same model"):
        build_model(tiny(weights=str(path), model="cifar_resnet32"), 10)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AttarError, match="cannot be read as weights"):
        build_model(tiny(weights=str(path)), 10)


def test_a_file_that_runs_code_is_not_loaded(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(AttarError, match="cannot be read as weights"):
        build_model(tiny(weights=str(tmp_path / "module.pt")), 10)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(AttarError, match="holds no table of tensors"):
        build_model(tiny(weights=str(tmp_path / "list.pt")), 10)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("ONNE", "no method 'ONNE': did you mean 'ONE'"),
        ({"name": "ONE", "options": {"brances": 2}}, "ONE: There is no option 'brances': did you mean 'branches'"),
        ({"name": "ONE", "options": {"branches": "many"}}, "ONE: Option 'branches' cannot be 'many'"),
        ({"name": "ONE", "options": {"branches": 0}}, "ONE needs at least one branch"),
        ("KD", "KD: Option 'teachers' must be given"),
        ({"name": "KD", "options": {"teachers": "/nowhere"}}, "no teacher '/nowhere'"),
        ({"name": "KD", "options": {"teachers": ["resnet81=/w.pt"]}}, "no model 'resnet81'"),
        (
            {"name": "DML", "options": {"peers": ["cifar_resnet20", "resnet81"]}},
            "no model 'resnet81': did you mean 'res",
        ),
        ({"name": "DML", "options": {"peers": 1.5}}, "DML: Option 'peers' cannot be 1.5: give how many, or the names"),
        ({"name": "DML", "options": {"peers": -1}}, "DML cannot have -1 peers"),
    ],
)
def test_methods(method: str | dict[str, Any], said: str) -> None:
    with pytest.raises(AttarError, match=said):
        build_methods(tiny(method), 10)


def test_options_reach_the_method() -> None:
    (one,) = build_methods(tiny({"name": "one", "options": {"branches": 4, "variant": "paper"}}), 10)
    assert isinstance(one, ONE)
    assert (one.branches, one.ramp) == (4, 0.0)


def test_teachers(one_run: tuple[Path, TrainSpec, dict[str, Any]], tmp_path: Path) -> None:
    folder, _, _ = one_run
    path = tmp_path / "resnet.safetensors"
    safetensors.torch.save_file(make_model("cifar_resnet20", 10).state_dict(), path)
    given = {"name": "KD", "options": {"teachers": [str(folder), f"cifar_resnet20={path}"]}}
    (kd,) = build_methods(tiny(given), 10)
    assert isinstance(kd, KD)
    of_run, of_file = kd.teachers
    source = build_source(tiny())
    assert of_run.normalization is not None
    assert of_run.normalization.mean == pytest.approx(source.mean)
    assert of_run.image_size == 8
    assert (of_file.normalization, of_file.image_size) == (None, None)
    with pytest.raises(AttarError, match="knows 10 classes, but the data have 100"):
        load_teacher(str(folder), 100)


def test_peers() -> None:
    names = ["cifar_resnet20", "torchvision:squeezenet1_1"]
    (named,) = build_methods(tiny({"name": "DML", "options": {"peers": names}}), 4)
    assert isinstance(named, DML)
    assert [type(network).__name__ for network in named.peers.networks] == ["CifarResNet", "SqueezeNet"]
    assert [network(torch.randn(2, 3, 32, 32)).shape[1] for network in named.peers.networks] == [4, 4]
    assert all(parameter.requires_grad for parameter in named.parameters())
    (counted,) = build_methods(tiny({"name": "DML", "options": {"peers": 2}}), 4)
    assert isinstance(counted, DML)
    assert len(counted.peers) == 2
    # Drawn behind the student, which is the same whatever trains beside it.
    torch.manual_seed(0)
    alone = build_model(tiny(), 4)
    torch.manual_seed(0)
    beside = build_model(tiny(), 4)
    build_methods(tiny({"name": "DML", "options": {"peers": names}}), 4)
    assert all(torch.equal(p, beside.get_parameter(name)) for name, p in alone.named_parameters())


def test_train_limit_is_stratified_and_fixed() -> None:
    source, again = build_source(tiny(train_limit=100)), build_source(tiny(train_limit=100, seed=5))
    assert len(source.train) == 100
    assert np.bincount(source.train.targets).min() >= 9
    assert np.array_equal(source.train.index, again.train.index)
    whole = build_source(tiny(train_limit=None))
    assert set(source.train.index) <= set(whole.train.index)
    position = {index: k for k, index in enumerate(whole.train.index)}
    assert all(
        whole.train.targets[position[index]] == target
        for index, target in zip(source.train.index, source.train.targets, strict=True)
    )


def test_a_run_reads_the_column_it_names_and_so_does_its_evaluation(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature
    from PIL import Image

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(40)]
    kinds = Features({"image": ImageFeature(), "fine_label": Value("int64"), "coarse_label": Value("int64")})
    fine = [k % 4 for k in range(40)]
    rows = {"image": pictures, "fine_label": fine, "coarse_label": [k // 2 for k in fine]}
    (tmp_path / "table").mkdir()
    Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "table" / "train.parquet")
    # Without the name the fine labels would be taken.
    spec = tiny(data=f"parquet:{tmp_path / 'table'}", label_column="coarse_label", train_limit=None, epochs=1, batch=8)
    result = fit(spec, tmp_path / "run", console=quiet())
    assert load_student(tmp_path / "run").classes == ("0", "1")
    assert evaluate_run(tmp_path / "run").as_dict() == result["test"]
    # A folder has no columns: what the run's own images needed is not asked of it.
    for k, picture in enumerate(pictures):
        (tmp_path / "folder" / str(k % 2)).mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "folder" / str(k % 2) / f"{k}.png")
    assert evaluate_run(tmp_path / "run", data=str(tmp_path / "folder")).images == 8
    with pytest.raises(AttarError, match=r"is no table, .* leave label_column out"):
        build_source(tiny(label_column="coarse_label"))


def test_a_run_of_segmentation_takes_the_void_value_it_names(tmp_path: Path) -> None:
    write_discs(tmp_path, void=7)
    fields = {"data": str(tmp_path), "task": "segmentation", "model": "lraspp_mobilenet_v3_large"}
    assert len(build_source(tiny(**fields, ignore_index=7, train_limit=None)).train) == 14
    with pytest.raises(AttarError, match="the value 7, but the 3 classes"):
        build_source(tiny(**fields, train_limit=None))
    with pytest.raises(AttarError, match="are about masks"):
        build_source(tiny(ignore_index=7))
