"""The `attar` command.

torch and everything that needs it is imported inside the commands: help and mistakes in the words of the command line
must not wait for it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attar import __version__
from attar.errors import AttarError, unknown_name
from attar.options import Parser, pairs, values_of

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from attar.distiller import Distiller
    from attar.method import Batch, Method
    from attar.spec import MethodSpec, TrainSpec

__all__ = ["COMMANDS", "main"]

# How tables look: columns and nothing else, so that they read well in a log too.
_PLAIN: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0), "header_style": "bold"}
# The fields of a run that matter to one batch.
_CHECKED = (
    *("model", "data", "model_options", "weights", "stages", "image_size", "augment", "holdout", "split_seed"),
    *("skip_bad_images", "train_limit", "seed"),
)
_DOCS = "Make the network you already have more accurate at zero inference cost."


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 `check` found a problem, 2 the user's mistake, 130 Ctrl-C."""
    words = list(sys.argv[1:] if words is None else words)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except AttarError as error:
        return _refuse(str(error))
    except KeyboardInterrupt as stopped:
        return _stop(str(stopped) or "Stopped.", 130)
    except BrokenPipeError:
        # The reader has gone (`attar methods | head`); what is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        return _refuse(f"'{error.filename}' cannot be used ({error.strerror}): choose a place that can be.")


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"attar {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name.startswith("-"):
        raise unknown_name("option", name, ["--help", "--version"])
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    return COMMANDS[name][1](rest)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {sentence}" for name, (sentence, _) in COMMANDS.items()]
    return "\n".join(
        [
            _DOCS,
            "",
            "usage: attar COMMAND ...     (attar COMMAND --help tells the options)",
            "",
            *lines,
            "",
            "  attar train ONE --model cifar_resnet20 --data ./photos --epochs 100",
            "",
            f"attar {__version__}; attar --version prints this.",
        ]
    )


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _refuse(sentence: str) -> int:
    return _stop(f"attar: {sentence}", 2)


def _stop(sentence: str, code: int) -> int:
    if _rank() == 0:
        print(sentence, file=sys.stderr)
    elif code == 2:
        # torchrun ends all processes when the first one leaves; rank 0 is the one that says why.
        time.sleep(2)
    return code


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, quiet=_rank() != 0, width=None if terminal else 120, highlight=False)


def _count(number: float) -> str:
    """Write a large number with three digits: 1.23 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


# The words of train and check: METHOD[+METHOD...], the fields of a spec, the options of the methods.


def _method_classes(word: str) -> list[type[Method]]:
    from attar.methods import find

    kinds = [] if word.casefold() == "plain" else [find(name) for name in word.split("+")]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise AttarError(f"{kind.__name__} is given {kinds.count(kind)} times: give each method once.")
    return kinds


def _read_run(
    parser: Parser, words: list[str], only: Sequence[str] | None, **fixed: Any
) -> tuple[TrainSpec, dict[str, Any]]:
    """Read a run's spec and the command's own options from words that begin with the methods."""
    from attar.spec import TrainSpec, method_options, parse

    fields = [name for name in TrainSpec.model_fields if name != "methods" and (only is None or name in only)]
    parser.add_fields("the run", TrainSpec, only=fields)
    if not words or words[0] in ("-h", "--help"):
        parser.epilog = "METHOD is one of `attar methods`, several joined by +, or plain for no method at all.\n"
        parser.epilog += f"{parser.prog} METHOD --help tells the options of the method too."
        parser.print_help()
        raise SystemExit(0)
    if words[0].startswith("-"):
        raise AttarError(f"Name the method first, for example {parser.prog} ONE {words[0]} ... (or plain for none).")
    kinds = _method_classes(words[0])
    options = {kind: method_options(kind) for kind in kinds}
    for kind in kinds:
        from attar.inspection import card

        prefix = f"{kind.__name__}."
        parser.add_fields(f"{kind.__name__}", options[kind], prefix=prefix, texts=card(kind).arguments)
    given = parser.read(words[1:])
    chosen = []
    for kind in kinds:
        try:
            values = parse(options[kind], values_of(given, options[kind], f"{kind.__name__}."))
        except AttarError as error:
            raise AttarError(str(error).replace("Option '", f"Option '--{kind.__name__}.", 1)) from error
        chosen.append({"name": kind.__name__, "options": values.model_dump(mode="json", exclude_defaults=True)})
    run = {name: value for name, value in values_of(given, TrainSpec).items() if name in fields}
    return parse(TrainSpec, {"methods": chosen, **fixed, **run}), given


def _label(methods: Sequence[MethodSpec]) -> str:
    return "+".join(method.name for method in methods) or "plain"


def _train(words: list[str]) -> int:
    parser = Parser(
        "attar train",
        "Train a student. A run that was interrupted goes on when the same command is given again.",
        usage="attar train METHOD[+METHOD...] --model MODEL --data DATA [options]",
    )
    parser.add_argument("--out", metavar="FOLDER", help="run folder; default: runs/METHODS-MODEL-DATA-FINGERPRINT")
    parser.add_argument("--overwrite", action="store_true", help="remove what an earlier run left there")
    spec, given = _read_run(parser, words, None)
    folder = Path(given["out"] or Path("runs") / _run_name(spec))
    console = _console()
    from attar.train import fit

    if given["overwrite"] or not (folder / "result.json").is_file():
        _announce(spec, folder, console)
    result = fit(spec, folder, overwrite=given["overwrite"], console=console)
    _show_result(result, folder, console)
    return 0


def _run_name(spec: TrainSpec) -> str:
    data = spec.data.rstrip("/").rpartition("/")[2]
    name = f"{_label(spec.methods)}-{spec.model}-{data}-{spec.fingerprint()[:8]}"
    return re.sub(r"[^\w.+-]+", "-", name)


def _announce(spec: TrainSpec, folder: Path, console: Console) -> None:
    """Say what the run will do, in five lines; the first process only."""
    if _rank() != 0:
        return
    import torch

    from attar.train import build_model, build_source
    from attar.train.precision import resolved

    source = build_source(spec)
    parameters = sum(p.numel() for p in build_model(spec, source.num_classes).parameters())
    batch = min(spec.batch, len(source.train))
    steps = -(-len(source.train) // batch) if spec.keep_last else len(source.train) // batch
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    height, width = source.image_size
    sizes = {name: len(split) for name, split in source.splits.items()}
    lines = {
        "student": f"{spec.model}, {_count(parameters)} parameters",
        "methods": _label(spec.methods),
        "data": f"{spec.data}: {source.num_classes} classes, {height} x {width}; {sizes['train']} training, "
        f"{sizes['holdout']} hold-out and {sizes['test']} test images"
        + (f", {len(source.skipped)} unreadable ones skipped" if source.skipped else ""),
        "training": f"{spec.epochs} epochs of {steps} steps of {batch} images, {device.type}, "
        f"{resolved(spec.precision, device)}",
        "run": str(folder),
    }
    for name, line in lines.items():
        console.print(f"{name:9}{line}", markup=False, soft_wrap=True)


def _show_result(result: dict[str, Any], folder: Path, console: Console) -> None:
    from rich.table import Table

    table = Table("", "images", "top-1", "top-5", "NLL", "calibration error", "parameters", **_PLAIN)
    parameters = result["parameters"]["deployed"]
    table.add_row("student, hold-out", *_metric_cells(result["holdout"]), _count(parameters))
    table.add_row("student, test", *_metric_cells(result["test"]), _count(parameters))
    for name, other in result["deployables"].items():
        table.add_row(f"{name}, test", *_metric_cells(other["test"]), _count(other["parameters"]))
    console.print()
    console.print(table)
    console.print(
        f"\nbest epoch {result['best_epoch'] + 1} of {result['epochs']}, "
        f"{result['training_seconds']:.0f} s of training, "
        f"{result['images_per_second']:.0f} images/s"
    )
    if not result["exportable"]:
        console.print(f"note: {result['export_refusal']}", markup=False)
    console.print(f"The plain student is in {folder / 'student'}. To load it:\n", markup=False, soft_wrap=True)
    console.print(loading(str(result["model"]), folder), markup=False, soft_wrap=True)


def loading(model: str, folder: Path) -> str:
    """Return the Python lines that load the student of a run, without attar where the model is not attar's own."""
    if model.startswith("torchvision:"):
        return f'import attar.train\nstudent = attar.train.load_student("{folder}").network'
    imports = "import timm, attar.zoo" if model.startswith("cifar_") else "import timm"
    return f'{imports}\nstudent = timm.create_model("local-dir:{folder / "student"}", pretrained=True)'


def _metric_cells(metrics: dict[str, Any]) -> list[str]:
    top5 = f"{metrics['top5']:.2%}" if metrics["top5"] is not None else ""
    cells = [f"{metrics['top1']:.2%}", top5, f"{metrics['nll']:.4f}", f"{metrics['calibration_error']:.4f}"]
    return [str(metrics["images"]), *cells]


def _evaluate(words: list[str]) -> int:
    parser = Parser("attar evaluate", "Measure the plain student of a run on images it was not trained on.")
    parser.add_argument("folder", metavar="RUN", help="folder of a finished run, or its student folder with --data")
    parser.add_argument("--data", metavar="TEXT", help="other images of the same classes; default: the run's")
    parser.add_argument("--split", default="test", metavar="TEXT", help="test, holdout or train (default: test)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    given = parser.read(words)
    from rich.table import Table

    from attar.train import evaluate_run

    if not Path(given["folder"]).is_dir():
        raise AttarError(f"There is no folder '{given['folder']}': give the folder of a finished run.")
    metrics = evaluate_run(given["folder"], data=given["data"], split=given["split"]).as_dict()
    console = _console()
    if given["json"]:
        console.print(json.dumps(metrics), markup=False, soft_wrap=True)
        return 0
    table = Table("", "images", "top-1", "top-5", "NLL", "calibration error", **_PLAIN)
    table.add_row(given["split"], *_metric_cells(metrics))
    console.print(table)
    return 0


def _demo(words: list[str]) -> int:
    from attar.demo import EPOCHS, SEEDS, demo

    parser = Parser("attar demo", "Plain training against ONE on embedded digits, paired over seeds.")
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="where runs go (default: runs/demo)")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"runs per method (default: {SEEDS})")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"of every run (default: {EPOCHS})")
    parser.add_argument("--overwrite", action="store_true", help="begin anew instead of keeping what is there")
    given = parser.read(words)
    try:
        demo(Path(given["out"]), given["seeds"], given["epochs"], given["overwrite"], _console())
    except KeyboardInterrupt as stopped:
        raise KeyboardInterrupt("Stopped and saved: run the same command again to go on.") from stopped
    return 0


def _methods(words: list[str]) -> int:
    parser = Parser("attar methods", "List the methods, or show one: its card, options and cost on a model.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="method to show")
    parser.add_argument("--model", default="cifar_resnet32", help="model to price it on (default: cifar_resnet32)")
    parser.add_argument("--classes", type=int, default=100, metavar="K", help="number of classes (default: 100)")
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the images; default: the model's own")
    given = parser.read(words)
    if given["name"] is not None:
        return _show_method(**given)
    from rich.table import Table

    from attar import methods
    from attar.inspection import card, method_costs

    images, network = _example("cifar_resnet20", 10, None, {"width": 0.25})
    table = Table("method", "what it does", "terms", "auxiliaries", "needs", **_PLAIN)
    for cost in method_costs(network, 10, images):
        terms, own = ", ".join(cost.terms) or "none", ", ".join(name for name, _ in cost.auxiliaries) or "none"
        table.add_row(cost.name, card(methods.available()[cost.name]).idea, terms, own, cost.needs or "labels only")
    console = _console()
    console.print(table)
    console.print("\nattar methods NAME shows the whole card, the options and the cost.")
    return 0


def _show_method(name: str, model: str, classes: int, image_size: int | None) -> int:
    from rich.table import Table

    from attar.inspection import card, cost, method_cost
    from attar.methods import find
    from attar.options import described
    from attar.spec import method_options

    kind = find(name)
    shown = card(kind)
    images, network = _example(model, classes, image_size, {})
    console = _console()
    console.print(shown.text, markup=False)
    table = Table("option", "default", "meaning", **_PLAIN)
    for option, default, meaning in described(method_options(kind), f"{kind.__name__}.", shown.arguments):
        table.add_row(option, default, meaning)
    console.print()
    console.print(table)
    plain, trained = cost(network(), images), method_cost(kind, network, classes, images)
    console.print(f"\nCost on {model} with {classes} classes at {images.shape[2]} x {images.shape[3]}:")
    if trained.refusal is not None:
        console.print(f"  {trained.refusal}", markup=False)
        return 0
    more = trained.cost.parameters - plain.parameters
    console.print(
        f"  parameters in training {_count(trained.cost.parameters)} ({_count(more)} more than the student's "
        f"{_count(plain.parameters)}), deployed {_count(plain.parameters)}\n"
        f"  multiply-adds of the training forward {_count(trained.cost.multiply_adds)} an image "
        f"({trained.cost.multiply_adds / plain.multiply_adds:.2f} times the student's {_count(plain.multiply_adds)})"
    )
    if "teacher" in trained.needs:
        console.print(f"  counted with another {model} as the teacher")
    return 0


def _inspect(words: list[str]) -> int:
    parser = Parser("attar inspect", "Show the stages of a model, where it can be cut, and what each method would add.")
    parser.add_argument(
        "model", metavar="MODEL", help="any timm model (attar's CIFAR networks included) or torchvision:NAME"
    )
    parser.add_argument("--classes", type=int, default=10, metavar="K", help="number of classes (default: 10)")
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the images; default: the model's own")
    parser.add_argument("--model-options", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the model")
    parser.add_argument("--stages", nargs="+", metavar="TEXT", help="modules to use as stages")
    given = parser.read(words)
    from rich.table import Table

    from attar.anatomy import survey
    from attar.inspection import cost, cut_at, method_costs
    from attar.tasks import Classification

    images, network = _example(
        given["model"], given["classes"], given["image_size"], pairs("--model-options", given["model_options"])
    )
    student = network()
    anatomy, output = survey(student, images, given["stages"], given["classes"])
    Classification(given["classes"]).check_logits(output)
    plain = cost(student, images)
    console = _console()
    console.print(
        f"{given['model']}: {given['classes']} classes, {_count(plain.parameters)} parameters, "
        f"{_count(plain.multiply_adds)} multiply-adds an image of {images.shape[2]} x {images.shape[3]}"
    )
    table = Table("stage", "channels", "size", "reduction", "layout", "cut behind it", **_PLAIN)
    for stage in anatomy.stages:
        behind, refusal = cut_at(student, stage.name, images)
        said = f"exact, {_count(behind)} parameters behind" if refusal is None else refusal
        size = f"{stage.height} x {stage.width}"
        table.add_row(stage.name, str(stage.channels), size, f"{stage.reduction:g}", stage.tap.layout, said)
    console.print(table)
    embedding = f"{anatomy.embedding_dim} numbers" + (
        f", read before {anatomy.classifier}" if anatomy.classifier else ""
    )
    console.print(f"classifier: {anatomy.classifier or 'none found'}; embedding: {embedding}\n")
    table = Table("method", "would add", "reads", "parameters", "multiply-adds in training", **_PLAIN)
    for each in method_costs(network, given["classes"], images, given["stages"]):
        if each.refusal is not None:
            table.add_row(each.name, f"refused: {each.refusal}")
            continue
        added = ", ".join(f"{name} ({_count(size)})" for name, size in each.auxiliaries) or each.needs or "nothing"
        more = f"+ {_count(each.cost.parameters - plain.parameters)}"
        times = f"x {each.cost.multiply_adds / plain.multiply_adds:.2f}"
        table.add_row(each.name, added, ", ".join(each.taps) or "logits", more, times)
    console.print(table)
    return 0


def _check(words: list[str]) -> int:
    parser = Parser(
        "attar check",
        "Take one step on one real batch on the CPU and show every term, its gradient, and whatever would go wrong.",
        usage="attar check METHOD[+METHOD...] --model MODEL --data DATA [options]",
    )
    parser.add_argument("--images", type=int, default=16, metavar="N", help="images in the batch (default: 16)")
    parser.add_argument("--compile", action="store_true", help="also count the graph breaks of torch.compile")
    spec, given = _read_run(parser, words, _CHECKED)
    from rich.table import Table

    from attar.inspection import check

    distiller, batch = _one_batch(spec, given["images"])
    found = check(distiller, batch, compiled=given["compile"])
    console = _console()
    console.print(
        f"{_label(spec.methods)} on {spec.model}: {_count(sum(p.numel() for p in distiller.student.parameters()))} "
        f"parameters; one batch {list(batch.images.shape)} of {spec.data}"
    )
    table = Table("term", "value", "weight at 0, 1/2, 1", "gradient norm on the student", **_PLAIN)
    for term in found.terms:
        weights = ", ".join(f"{weight:.3g}" for weight in term.weights)
        table.add_row(term.name, f"{term.value:.4g}", weights, f"{term.gradient:.4g}")
    console.print(table)
    if found.taps:
        table = Table("tapped module", "side", "shape", **_PLAIN)
        for module, side, shape in found.taps:
            table.add_row(module, side, " x ".join(map(str, shape)))
        console.print(table)
    for name, size in found.added.items():
        console.print(f"{name} adds {_count(size)} parameters while training.")
    for name, frozen in found.teachers:
        console.print(f"The {name} is {'frozen, in evaluation mode' if frozen else 'NOT frozen'}.")
    if found.made_out_of_place:
        console.print(f"In-place mode is off while training for {', '.join(found.made_out_of_place)}.")
    console.print(f"{len(found.without_gradient)} parameters without a gradient.")
    if found.graph_breaks is not None:
        console.print(f"torch.compile would break the graph {len(found.graph_breaks)} times.")
        for reason in found.graph_breaks:
            console.print(f"  {reason}", markup=False)
    if found.strip is None:
        console.print("strip is proved: original class and keys, bit-identical logits, torch.export accepts it.")
    for sentence in found.remarks:
        console.print(f"note: {sentence}", markup=False)
    for sentence in found.problems:
        console.print(f"PROBLEM: {sentence}", markup=False)
    console.print("All is well." if not found.problems else f"{len(found.problems)} problems.")
    return 1 if found.problems else 0


def _one_batch(spec: TrainSpec, images: int) -> tuple[Distiller, Batch]:
    """Return an unbuilt distiller and one training batch on the CPU, as a run of this spec would have them."""
    import torch

    from attar.data import Loader, Normalization, Shuffled, augmentation
    from attar.distiller import Distiller
    from attar.method import Batch
    from attar.tasks import Classification
    from attar.train import build_methods, build_model, build_source
    from attar.train.memory import memory_format

    source = build_source(spec)
    torch.manual_seed(spec.seed)
    distiller = Distiller(
        build_model(spec, source.num_classes),
        build_methods(spec, source.num_classes),
        Classification(source.num_classes),
        normalization=(source.mean, source.std),
        stages=spec.stages,
    )
    loader = Loader(
        source.train,
        Shuffled(len(source.train), images, spec.seed),
        augmentation(spec.augment or source.default_augmentation),
        Normalization(source.mean, source.std),
        views=distiller.views,
        seed=spec.seed,
        workers=0,
    )
    sample = next(loader.epoch(0))
    pixels = sample.images.contiguous(memory_format=memory_format(distiller, sample.images.device))
    return distiller, Batch(pixels, sample.targets, sample.index, views=distiller.views)


def _example(
    model: str, classes: int, image_size: int | None, options: dict[str, Any]
) -> tuple[Tensor, Callable[[], nn.Module]]:
    """Return random images that a model takes, and how to make the model."""
    import torch

    from attar.inspection import native_input
    from attar.tasks import Classification
    from attar.train.models import make_model

    Classification(classes)  # refuses fewer than two
    if image_size is not None and image_size < 1:
        raise AttarError(f"The image size must be at least 1 pixel a side, not {image_size}.")
    # A few images gain nothing from threads, and lose much where other programs keep the processor busy.
    torch.set_num_threads(1)
    channels, size = native_input(model)
    side = image_size or size
    torch.manual_seed(0)
    return torch.randn(2, channels, side, side), lambda: make_model(model, classes, options)


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "demo": ("plain training against ONE on embedded images, in about a minute", _demo),
    "train": ("train a student with one method or several", _train),
    "evaluate": ("measure a trained student on images it has never seen", _evaluate),
    "methods": ("list the methods, or show one", _methods),
    "inspect": ("show the stages of a model and what each method would add", _inspect),
    "check": ("try one batch and show every term, gradient and problem", _check),
}
