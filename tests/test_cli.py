"""The command line: help, every refusal in one sentence with exit code 2, and what the commands print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import attar
from attar.cli import COMMANDS, main

CHECK = ["--model", "cifar_resnet20", "--model-options", "width=0.25", "--data", "digits"]


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
    assert list(COMMANDS) == ["demo", "train", "evaluate", "methods", "inspect", "check"]
    assert attar.__all__ == [
        *("AttarError", "Batch", "Classification", "Distiller", "Method", "Normalization", "Outputs", "Probe"),
        *("Teacher", "Terms", "functional", "methods", "testing", "zoo"),
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


def test_unknown_names_are_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "trian") == "There is no command 'trian': did you mean 'train'?"
    assert refused(capsys, "--versoin") == "There is no option '--versoin': did you mean '--version'?"
    assert refused(capsys, "methods", "onne") == "There is no method 'onne': did you mean 'ONE'?"
    assert refused(capsys, "inspect", "cifar_resnet21").startswith("There is no model 'cifar_resnet21': did you mean '")
    assert refused(capsys, "inspect", "torchvision:resnet19").startswith("There is no model 'resnet19': did you mean '")
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
        (["ONE", *CHECK, "--one.gate", "open"], "Option '--ONE.gate' cannot be 'open': input should be 'learned' or 'mean'"),
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
        (["--model-options", "widht=2"], "Model 'cifar_resnet20' does not take"),
        (["--classes", "1"], "Classification needs at least two classes"),
        (["--classes", "ten"], "Option '--classes': invalid int value: 'ten'"),
        (["--image-size", "2"], "CifarResNet refuses images of shape"),
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
        (["ONE", *CHECK, "--model-options", "num_classes=7"], "Model 'cifar_resnet20' does not take"),
        (["ONE", "--model", "torchvision:googlenet", "--data", "digits"], "The student returns a GoogLeNetOutputs"),
        (["ONE", "--model", "cifar_resnet20", "--data", "digitz"], "There is no data source 'digitz': did you mean 'digits'?"),
        (["ONE", *CHECK, "--augment", "corp"], "There is no augmentation 'corp': did you mean 'crop'?"),
    ],
)
def test_check_refuses(capsys: pytest.CaptureFixture[str], words: list[str], sentence: str) -> None:
    assert refused(capsys, "check", *words).startswith(sentence)


def test_check_ends_with_1_and_names_the_problem(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A student with a layer that its forward never uses would hang distributed training."""
    program = f"""
import sys, torch, timm
from timm.models import register_model
import attar.zoo
from attar.cli import main

@register_model
def idle_layer(pretrained=False, **options):
    network = timm.create_model("cifar_resnet20", width=0.25, **{{k: v for k, v in options.items() if "pretrained" not in k and "cache" not in k}})
    network.idle = torch.nn.Linear(2, 2)
    return network

sys.exit(main(["check", "ONE", "--model", "idle_layer", "--data", "digits", "--image-size", "16"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
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
