"""The command line: help, every refusal in one sentence with exit code 2, and what the commands print."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import attar
from attar.cli import COMMANDS, main
from attar.cli.words import read_run
from attar.measured import measured
from attar.options import Parser

GOOGLENET = ["--model", "torchvision:googlenet", "--model-options", "init_weights=false"]
CHECK = ["--model", "cifar_resnet20", "--model-options", "width=0.5", "--data", "digits"]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must refuse, and return its one sentence."""
    code, out, err = run(capsys, *words)
    assert code == 2
    assert out == ""
    assert err.startswith("attar: ")
    assert err.count("\n") == 1
    assert err.endswith((".\n", "?\n"))
    return err.removeprefix("attar: ").strip()


def test_public_surface_does_not_grow_by_accident() -> None:
    assert list(COMMANDS) == [
        "demo",
        "train",
        "compare",
        "report",
        "reproduce",
        "evaluate",
        "export",
        "methods",
        "inspect",
        "check",
    ]
    assert attar.__all__ == [
        *("AttarError", "Batch", "Classification", "Distiller", "Method", "Normalization", "Outputs", "Phase"),
        *("Probe", "Segmentation", "Teacher", "Terms", "functional", "lab", "methods", "testing", "zoo"),
    ]


@pytest.mark.parametrize("words", [["--help"], [], ["--version"], ["train", "--help"], ["inspect", "--help"]])
def test_help_does_not_wait_for_torch(words: list[str]) -> None:
    heavy = {"torch", "timm", "torchvision", "datasets", "numpy"}
    program = f"""
import sys
import attar.cli
try:
    code = attar.cli.main({words})
except SystemExit as left:
    code = left.code
assert not code, code
loaded = {heavy} & set(sys.modules)
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "attar" in done.stdout


def test_help_names_every_command_and_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    from attar.spec import TrainSpec

    _, out, _ = run(capsys)
    assert all(f"  {name} " in out for name in COMMANDS)
    with pytest.raises(SystemExit) as left:
        main(["train", "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    for name, field in TrainSpec.model_fields.items():
        if name != "methods":
            assert f"--{name.replace('_', '-')}" in out
            assert " ".join((field.description or "").split()) in " ".join(out.split())
    assert "(default: 0.1)" in out


def test_help_of_a_method_has_its_options_and_their_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "ONE+Supervised", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--ONE.branches N B, the student's own included. (default: 3)" in out
    assert "--Supervised.label-smoothing X e in [0, 1). (default: 0.0)" in out
    assert "--ONE.tail" not in out


def test_peers_are_given_by_number_or_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "DML", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--DML.peers TEXT [TEXT ...] how many further networks of the student's kind" in out
    for given, kept in ((["2"], 2), (["cifar_resnet20"], ["cifar_resnet20"]), (["a", "b"], ["a", "b"])):
        words = ["DML", *CHECK, "--DML.peers", *given, "--DML.temperature", "2"]
        spec, _ = read_run(Parser("attar train", ""), words, None)
        assert spec.methods[0].options == {"peers": kept, "temperature": 2.0}


def test_unknown_names_are_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "trian") == "There is no command 'trian': did you mean 'train'?"
    assert refused(capsys, "--versoin") == "There is no option '--versoin': did you mean '--version'?"
    assert refused(capsys, "methods", "onne") == "There is no method 'onne': did you mean 'ONE'?"
    assert refused(capsys, "inspect", "cifar_resnet21").startswith("There is no model 'cifar_resnet21': did you mean '")
    assert refused(capsys, "inspect", "torchvision:resnet19").startswith(
        "There is no model 'torchvision:resnet19': did you mean 'torchvision:"
    )
    assert refused(capsys, "methods", "--clases", "3") == "There is no option '--clases': did you mean '--classes'?"


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ONNE"], "There is no method 'ONNE': did you mean 'ONE'?"),
        (["ONE+KDD"], "There is no method 'KDD': did you mean 'KD'?"),
        (["ONE", "--modell", "x"], "There is no option '--modell': did you mean '--model'?"),
        (["ONE", "--modell=x"], "There is no option '--modell': did you mean '--model'?"),
        (["ONE", "--ONE.branchs", "3"], "There is no option '--ONE.branchs': did you mean '--ONE.branches'?"),
        (["--ONE.branches", "3"], "Name the method first"),
        (["ONE", "--model"], "Option '--model': expected one argument"),
        (["ONE", "--data", "digits"], "Option 'model' must be given."),
        (["ONE", "--model", "cifar_resnet20", "digits"], "'digits' has no meaning here"),
        (["ONE", *CHECK, "--one.branches", "many"], "Option '--ONE.branches' cannot be 'many'"),
        (
            ["ONE", *CHECK, "--one.gate", "open"],
            "Option '--ONE.gate' cannot be 'open': input should be 'learned' or 'mean'",
        ),
        (["ONE", *CHECK, "--holdout", "2"], "Option 'holdout' cannot be '2'"),
        (["ONE", *CHECK, "--model-options", "wide"], "Option '--model-options' takes NAME=VALUE pairs, not 'wide'."),
        (["KD", *CHECK], "Option '--KD.teachers' must be given."),
    ],
)
def test_mistakes_in_the_words(
    capsys: pytest.CaptureFixture[str], command: str, words: list[str], sentence: str
) -> None:
    assert refused(capsys, command, *words).startswith(sentence)


def test_methods_lists_every_method_with_its_terms(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "methods")
    assert code == 0
    for name in attar.methods.available():
        assert f"\n{name} " in out
    assert "ce_branches, ce_ensemble, kl" in out
    assert "a teacher" in out


def test_methods_shows_a_card_with_options_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "methods", "one", "--model", "cifar_resnet32", "--classes", "100", "--image-size", "32")
    assert code == 0
    assert "NeurIPS 2018" in out
    assert "--ONE.branches" in out
    # The published claim on ResNet-32: three branches cost 1.65 times the multiply-adds.
    assert "1.65 times the student's 69.1 M" in out
    assert "deployed 473 k" in out
    assert str(measured("ONE")[0]) in " ".join(out.split())


def test_inspect_shows_stages_cuts_and_methods(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", "cifar_resnet20")
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "32 x 32" in lines["layer1"]
    assert "16 x 16" in lines["layer2"]
    assert "exact, 206 k parameters behind" in lines["layer2"]
    assert "classifier: fc; embedding: 64 numbers" in out
    assert "tails (413 k), gate (105)" in lines["ONE"]


def test_inspect_says_why_a_method_cannot_work(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", "cifar_resnet20", "--stages", "layer3")
    assert code == 0
    assert "refused: ONE finds only one stage" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--stages", "layer9"], "There is no stage or module 'layer9': did you mean 'layer"),
        (["--model-options", "widht=2"], "Model 'cifar_resnet20' cannot be made with these options"),
        (["--classes", "1"], "Classification needs at least two classes"),
        (["--classes", "ten"], "Option '--classes': invalid int value: 'ten'"),
        (["--image-size", "0"], "The image size must be at least 1 pixel a side, not 0."),
    ],
)
def test_inspect_refuses(capsys: pytest.CaptureFixture[str], words: list[str], sentence: str) -> None:
    assert refused(capsys, "inspect", "cifar_resnet20", *words).startswith(sentence)


def test_check_passes_on_a_real_batch(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", "ONE+Supervised", *CHECK, "--supervised.label_smoothing", "0.1", "--compile")
    assert code == 0, out
    terms = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("task", "ONE."))}
    assert set(terms) == {"task", "ONE.ce_branches", "ONE.ce_ensemble", "ONE.kl"}
    assert terms["ONE.kl"][1:4] == ["0.00674,", "1,", "1"]
    assert all(float(numbers[-1]) > 0 for numbers in terms.values())
    assert "0 parameters without a gradient." in out
    assert "torch.compile would break the graph 0 times." in out
    assert "strip is proved" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ONE", *CHECK, "--ONE.cut", "layer22"], "There is no stage or module 'layer22': did you mean 'layer2"),
        (["ONE", *CHECK, "--ONE.branches", "0"], "ONE needs at least one branch"),
        (["ONE+ONE", *CHECK], "ONE is given 2 times"),
        (["DML", *CHECK, "--DML.peers", "cifar_resnet20", "resnet81"], "There is no model 'resnet81': did you mean"),
        (["DML", *CHECK, "--DML.peer", "2"], "There is no option '--DML.peer': did you mean '--DML.peers'?"),
        (["ONE", *CHECK, "--model-options", "num_classes=7"], "The student returns [2, 7] instead of [N, 10]"),
        (["plain", *CHECK, "--model-options", "num_classes=7"], "The student returns [2, 7] instead of [N, 10]"),
        (["plain", *GOOGLENET, "--data", "digits", "--image-size", "32"], "The student returns a GoogLeNetOutputs"),
        (
            ["ONE", "--model", "cifar_resnet20", "--data", "digitz"],
            "There is no data source 'digitz': did you mean 'digits'?",
        ),
        (["ONE", *CHECK, "--augment", "corp"], "There is no augmentation 'corp': did you mean 'crop'?"),
    ],
)
def test_check_refuses(capsys: pytest.CaptureFixture[str], words: list[str], sentence: str) -> None:
    assert refused(capsys, "check", *words).startswith(sentence)


def test_one_teacher_for_all_methods_that_take_one() -> None:
    """The shared option reaches those that are not given their own; --student is --model."""
    words = ["InDistill+KD+ONE", "--student", "cifar_resnet20", "--data", "digits", "--teacher", "shared"]
    spec, _ = read_run(Parser("attar train", ""), [*words, "--KD.teachers", "own"], None)
    assert spec.model == "cifar_resnet20"
    given = {method.name: method.options.get("teachers") for method in spec.methods}
    assert given == {"InDistill": ["shared"], "KD": ["own"], "ONE": None}


TINY = ["--model", "cifar_resnet20", "--model-options", "width=0.5", "--data", "digits", "--train-limit", "64"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["ONE", *TINY, "--ONE.cut", "layer22"], "There is no stage or module 'layer22': did you mean 'layer2"),
        (["ONE", *TINY, "--stages", "layr1", "layer2"], "There is no stage or module 'layr1': did you mean 'layer1"),
        (["ONE+ONE", *TINY], "ONE is given 2 times"),
        (["plain", *TINY, "--model-options", "num_classes=7"], "The student returns [2, 7] instead of [N, 10]"),
        (
            ["plain", "--model", "cifar_resnet21", "--data", "digits"],
            "There is no model 'cifar_resnet21': did you mean '",
        ),
        (["plain", *TINY, "--data", "cifr10"], "There is no data source 'cifr10': did you mean 'cifar10'?"),
        (["plain", *TINY, "--data", "parquet:nowhere"], ""),
        (["plain", *TINY, "--weights", "nowhere.safetensors"], "There is no weights file 'nowhere.safetensors'"),
        (["KD", *TINY, "--KD.teachers", "nowhere"], "There is no teacher 'nowhere'"),
        (["KD", *TINY, "--teacher", "nowhere"], "There is no teacher 'nowhere'"),
        (["ONE", *TINY, "--teacher", "nowhere"], "There is no option '--teacher'"),
        (["plain", *TINY, "--out", "a_file"], "'a_file' is a file"),
        (["plain", *TINY, "--out", "a_file/below"], "'a_file"),
        (["plain", *TINY, "--out", "others"], "'others' is not empty and holds no run"),
    ],
)
def test_train_refuses_and_writes_nothing(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a_file").write_text("mine")
    Path("others").mkdir()
    Path("others/thesis.tex").write_text("mine")
    code, _, err = run(capsys, "train", *words)
    assert code == 2
    assert err.startswith(f"attar: {sentence}")
    assert err.count("\n") == 1
    assert sorted(path.as_posix() for path in Path().rglob("*")) == ["a_file", "others", "others/thesis.tex"]
    assert Path("a_file").read_text() == Path("others/thesis.tex").read_text() == "mine"


def _photos(root: Path, classes: int, images: int) -> Path:
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(images):
            image = Image.new("RGB", (12, 12), (40 * label, number, 90))
            image.save(root / f"class{label}" / f"{number}.png")
    return root


def test_train_says_what_is_wrong_with_a_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model = ["plain", "--model", "cifar_resnet20", "--model-options", "width=0.5", "--epochs", "1", "--batch", "8"]
    Path("empty").mkdir()
    assert "'empty'" in refused(capsys, "train", *model, "--data", "empty")
    _photos(Path("one_class"), 1, 4)
    assert "one class only, 'class0'" in refused(capsys, "train", *model, "--data", "one_class")
    photos = _photos(Path("photos"), 2, 12)
    (photos / "class1" / "5.png").write_bytes(b"")
    broken = photos / "class0" / "7.png"
    broken.write_bytes(broken.read_bytes()[:40])
    sentence = refused(capsys, "train", *model, "--data", "photos")
    assert "5.png" in sentence or "7.png" in sentence
    assert not Path("runs").exists()
    code, out, err = run(capsys, "train", *model, "--data", "photos", "--skip-bad-images", "--out", "run")
    assert (code, err) == (0, "")
    assert "2 unreadable ones skipped" in out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    assert main(["train", "ONE", *TINY, "--epochs", "1", "--batch", "32", "--out", str(folder)]) == 0
    return folder


def test_train_says_what_it_does_and_how_to_load_the_student(
    capsys: pytest.CaptureFixture[str], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "ONE", *TINY, "--epochs", "1", "--batch", "32"]
    code, out, err = run(capsys, *words, "--out", str(finished), "--overwrite")
    assert (code, err) == (0, "")
    assert "cifar_resnet20, 68.8 k parameters" in out
    assert "64 training, 144 hold-out and 360 test images" in out
    assert "1 epochs of 2 steps of 32 images, cpu" in out
    result = json.loads((finished / "result.json").read_text())
    assert f"{result['test']['top1']:.2%}" in out
    assert "ONE.ensemble, test" in out
    lines = out.split("To load it:")[1].strip().splitlines()
    loaded: dict[str, object] = {}
    exec("\n".join(lines), loaded)
    parameters = loaded["student"].parameters()  # type: ignore[attr-defined]
    assert sum(p.numel() for p in parameters) == result["parameters"]["deployed"]


def test_a_finished_run_is_not_repeated(capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    words = ["train", "ONE", *TINY, "--epochs", "1", "--batch", "32", "--out", str(finished)]
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "is finished" in out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_a_run_of_another_spec_is_left_alone(capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    code, _, err = run(capsys, "train", "ONE", *TINY, "--epochs", "2", "--batch", "32", "--out", str(finished))
    assert code == 2
    assert "differs in epochs (1 there, 2 now)" in err
    assert err.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_evaluate_equals_the_result_exactly(capsys: pytest.CaptureFixture[str], finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    code, out, _ = run(capsys, "evaluate", str(finished), "--json")
    assert code == 0
    assert json.loads(out) == result["test"]
    _, out, _ = run(capsys, "evaluate", str(finished), "--split", "holdout", "--json")
    assert json.loads(out)["images"] == result["holdout"]["images"]
    _, out, _ = run(capsys, "evaluate", str(finished / "student"), "--data", "digits")
    assert f"{result['test']['top1']:.2%}" in out


def test_evaluate_refuses(capsys: pytest.CaptureFixture[str], finished: Path, tmp_path: Path) -> None:
    assert refused(capsys, "evaluate").startswith("The following arguments are required: RUN")
    assert refused(capsys, "evaluate", "nowhere").startswith("There is no folder 'nowhere'")
    assert refused(capsys, "evaluate", str(tmp_path)).endswith("holds no student: give a finished run's folder.")
    assert refused(capsys, "evaluate", str(finished), "--split", "tset") == (
        "There is no split 'tset': did you mean 'test'?"
    )


def test_equal_options_have_one_default_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A default that is spelled out is the same run: it is found finished."""
    monkeypatch.chdir(tmp_path)
    words = ["train", "ONE", *TINY, "--epochs", "1", "--batch", "32"]
    assert run(capsys, *words)[0] == 0
    code, out, _ = run(capsys, *words, "--one.branches", "3", "--lr", "0.1")
    assert code == 0
    assert "is finished" in out
    (only,) = Path("runs").iterdir()
    assert only.name.startswith("ONE-cifar_resnet20-digits-")


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    from runs import attar_command, said_in_child

    words = ["train", "plain", *TINY, "--epochs", "15", "--batch", "8", "--out", "run"]
    stopped = said_in_child(attar_command, words, folder=tmp_path, signal_at=("\nepoch 2/", signal.SIGINT))
    assert stopped.returncode == 130, stopped.stderr
    assert "run the same command again to go on" in stopped.stderr
    assert stopped.stderr.count("\n") == 1
    done = said_in_child(attar_command, words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    epochs = [json.loads(line)["epoch"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert epochs == sorted(epochs)
    assert epochs[-1] == 14
    assert "epoch 1/15" not in done.stdout


def test_two_processes_print_once(tmp_path: Path) -> None:
    """torchrun itself starts processes in test_readme.py and train/test_distributed.py."""
    from runs import command_as_rank, two_ranks

    def printed(stream: str) -> str:
        return "".join((tmp_path / f"{stream}{rank}.txt").read_text() for rank in range(2))

    words = ["train", "ONE", *TINY, "--epochs", "1", "--batch", "16", "--out", "run"]
    assert two_ranks(command_as_rank, words, tmp_path) == [0, 0], printed("err")
    assert printed("out").count("student, test") == 1
    assert printed("out").count("epoch 1/1") == 1
    assert two_ranks(command_as_rank, [*words, "--epochs", "2"], tmp_path) == [2, 2]
    assert printed("err").count("attar: 'run' holds a run of another spec") == 1
    assert "AttarError" not in printed("err")


def test_check_ends_with_1_and_names_the_problem(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A student with a layer that its forward never uses would hang distributed training."""
    from runs import python_code, said_in_child

    program = """
import sys, torch, timm
from timm.models import register_model
import attar.zoo
from attar.cli import main

@register_model
def idle_layer(pretrained=False, **options):
    options = {name: value for name, value in options.items() if name == "num_classes"}
    network = timm.create_model("cifar_resnet20", width=0.5, **options)
    network.idle = torch.nn.Linear(2, 2)
    return network

sys.exit(main(["check", "ONE", "--model", "idle_layer", "--data", "digits", "--image-size", "16"]))
"""
    done = said_in_child(python_code, program, folder=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "PROBLEM: Parameter student.idle.weight gets no gradient." in done.stdout


def test_a_reader_that_leaves_early_is_no_error() -> None:
    pipeline = f"{sys.executable} -m attar methods one | head -1"
    done = subprocess.run(["bash", "-c", pipeline], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("ONE, On-the-fly Native Ensemble")
    assert done.stderr == ""


def test_a_mistake_is_printed_by_the_first_process_only() -> None:
    program = "import sys; from attar.cli import main; sys.exit(main(['trian']))"
    for rank, lines in (("0", 1), ("1", 0)):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={"RANK": rank}
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == lines
