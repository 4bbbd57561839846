"""`attar methods`, `inspect` and `check`: what can be known before any training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from attar.cli.words import PLAIN_TABLE, count, make_console, names_of, read_run
from attar.errors import AttarError
from attar.options import Parser, pairs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attar.distiller import Distiller
    from attar.method import Batch
    from attar.spec import TrainSpec
    from attar.tasks import Task

__all__ = ["check", "inspect", "methods"]

_TASK: dict[str, Any] = {
    "choices": ("classification", "segmentation"),
    "default": "classification",
    "help": "what the model answers (default: classification)",
}
# Segmentation networks have no size of their own; what costs little and leaves every stage some pixels.
_DENSE_SIDE = 224

# The fields of a run that matter to one batch.
_CHECKED = (
    *("model", "data", "model_options", "weights", "stages", "image_size", "augment", "holdout", "split_seed"),
    *("skip_bad_images", "train_limit", "seed", "task", "class_weights", "dice_weight"),
)


def methods(words: list[str]) -> int:
    """List the methods, or show one."""
    parser = Parser("attar methods", "List the methods, or show one: its card, options and cost on a model.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="method to show")
    parser.add_argument("--model", default="cifar_resnet32", help="model to price it on (default: cifar_resnet32)")
    parser.add_argument("--classes", type=int, default=100, metavar="K", help="number of classes (default: 100)")
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the images; default: the model's own")
    parser.add_argument("--task", **_TASK)
    given = parser.read(words)
    if given["name"] is not None:
        return _show_method(**given)
    from rich.table import Table

    from attar import methods
    from attar.inspection import card, method_costs
    from attar.tasks import Classification

    images, network = _example("cifar_resnet20", Classification(10), None, {"width": 0.25})
    table = Table(**PLAIN_TABLE)
    table.add_column("method", no_wrap=True)
    table.add_column("what it does", ratio=7)
    table.add_column("terms", ratio=4)
    table.add_column("needs", ratio=2)
    for cost in method_costs(network, Classification(10), images):
        # One name for what a method has of every stage.
        terms = dict.fromkeys(term if "." not in term else f"{term.partition('.')[0]}.*" for term in cost.terms)
        idea = card(methods.available()[cost.name]).idea
        table.add_row(cost.name, idea, ", ".join(terms) or "none", cost.needs or "labels only")
    console = make_console()
    console.print(table)
    console.print("\nattar methods NAME shows the whole card, the options and the cost.")
    return 0


def _show_method(name: str, model: str, classes: int, image_size: int | None, task: str) -> int:
    from rich.table import Table

    from attar.inspection import card, cost, method_cost
    from attar.methods import find
    from attar.options import described
    from attar.spec import method_options
    from attar.train.evaluate import make_task

    kind = find(name)
    asked = make_task(task, classes)
    shown = card(kind)
    images, network = _example(model, asked, image_size, {})
    console = make_console()
    console.print(shown.text, markup=False)
    console.print("\nMeasured by attar compare, with the default options:" + _measured(kind.__name__), markup=False)
    table = Table("option", "default", "meaning", **PLAIN_TABLE)
    for option, default, meaning in described(method_options(kind), f"{kind.__name__}.", shown.arguments):
        table.add_row(option, default, meaning)
    console.print()
    console.print(table)
    plain, trained = cost(network(), images), method_cost(kind, network, asked, images)
    console.print(f"\nCost on {model} with {classes} classes at {images.shape[2]} x {images.shape[3]}:")
    if trained.refusal is not None:
        console.print(f"  {trained.refusal}", markup=False)
        return 0
    more = trained.cost.parameters - plain.parameters
    console.print(
        f"  parameters in training {count(trained.cost.parameters)} ({count(more)} more than the student's "
        f"{count(plain.parameters)}), deployed {count(plain.parameters)}\n"
        f"  multiply-adds of the training forward {count(trained.cost.multiply_adds)} an image "
        f"({trained.cost.multiply_adds / plain.multiply_adds:.2f} times the student's {count(plain.multiply_adds)})"
    )
    if "teacher" in trained.needs:
        console.print(f"  counted with another {model} as the teacher")
    return 0


def _measured(method: str) -> str:
    from attar.measured import measured

    return "".join(f"\n  {found}" for found in measured(method)) or " not yet."


def inspect(words: list[str]) -> int:
    """Show the anatomy of a model and what every method would attach."""
    parser = Parser("attar inspect", "Show the stages of a model, where it can be cut, and what each method would add.")
    parser.add_argument(
        "model", metavar="MODEL", help="any timm model (attar's CIFAR networks included) or torchvision:NAME"
    )
    parser.add_argument("--classes", type=int, default=10, metavar="K", help="number of classes (default: 10)")
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the images; default: the model's own")
    parser.add_argument("--model-options", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the model")
    parser.add_argument("--stages", nargs="+", metavar="TEXT", help="modules to use as stages")
    parser.add_argument("--task", **_TASK)
    given = parser.read(words)
    from rich.table import Table

    from attar.anatomy import survey
    from attar.inspection import cost, cut_at, method_costs
    from attar.train.evaluate import make_task

    task = make_task(given["task"], given["classes"])
    images, network = _example(
        given["model"], task, given["image_size"], pairs("--model-options", given["model_options"])
    )
    student = network()
    anatomy, output = survey(student, images, given["stages"], given["classes"], dense=task.dense)
    task.check_logits(output, size=(images.shape[2], images.shape[3]))
    plain = cost(student, images)
    console = make_console()
    console.print(
        f"{given['model']}: {given['classes']} classes, {count(plain.parameters)} parameters, "
        f"{count(plain.multiply_adds)} multiply-adds an image of {images.shape[2]} x {images.shape[3]}"
    )
    table = Table("stage", "channels", "size", "reduction", "layout", "cut behind it", **PLAIN_TABLE)
    for stage in anatomy.stages:
        behind, refusal = cut_at(student, stage.name, images)
        said = f"exact, {count(behind)} parameters behind" if refusal is None else refusal
        size = f"{stage.height} x {stage.width}"
        table.add_row(stage.name, str(stage.channels), size, f"{stage.reduction:g}", stage.tap.layout, said)
    console.print(table)
    embedding = f"{anatomy.embedding_dim} numbers" + (
        f", read before {anatomy.classifier}" if anatomy.classifier else ""
    )
    console.print(f"classifier: {anatomy.classifier or 'none found'}; embedding: {embedding}\n")
    table = Table("method", "would add", "reads", "parameters", "multiply-adds in training", **PLAIN_TABLE)
    for each in method_costs(network, task, images, given["stages"]):
        if each.refusal is not None:
            table.add_row(each.name, f"refused: {each.refusal}")
            continue
        added = ", ".join(f"{name} ({count(size)})" for name, size in each.auxiliaries) or each.needs or "nothing"
        more = f"+ {count(each.cost.parameters - plain.parameters)}"
        times = f"x {each.cost.multiply_adds / plain.multiply_adds:.2f}"
        table.add_row(each.name, added, ", ".join(each.taps) or "logits", more, times)
    console.print(table)
    return 0


def check(words: list[str]) -> int:
    """Take one step on one batch and say what is wrong; exit code 1 if anything is."""
    parser = Parser(
        "attar check",
        "Take one step on one real batch on the CPU and show every term, its gradient, and whatever would go wrong.",
        usage="attar check METHOD[+METHOD...] --model MODEL --data DATA [options]",
    )
    parser.add_argument("--images", type=int, default=16, metavar="N", help="images in the batch (default: 16)")
    parser.add_argument("--compile", action="store_true", help="also count the graph breaks of torch.compile")
    spec, given = read_run(parser, words, _CHECKED)
    from rich.table import Table

    from attar.inspection import check as look

    distiller, batch = _one_batch(spec, given["images"])
    found = look(distiller, batch, compiled=given["compile"])
    console = make_console()
    console.print(
        f"{names_of(spec.methods)} on {spec.model}: {count(sum(p.numel() for p in distiller.student.parameters()))} "
        f"parameters; one batch {list(batch.images.shape)} of {spec.data}"
    )
    table = Table("term", "value", "weight at 0, 1/2, 1", "gradient norm on the student", **PLAIN_TABLE)
    for term in found.terms:
        weights = ", ".join(f"{weight:.3g}" for weight in term.weights)
        table.add_row(str(term), f"{term.value:.4g}", weights, f"{term.gradient:.4g}")
    console.print(table)
    for method, phase, share in found.phases:
        console.print(f"{method} begins with the phase '{phase}', {share:.1%} of the run.")
    if found.taps:
        table = Table("tapped module", "side", "shape", **PLAIN_TABLE)
        for module, side, shape in found.taps:
            table.add_row(module, side, " x ".join(map(str, shape)))
        console.print(table)
    for name, size in found.added.items():
        console.print(f"{name} adds {count(size)} parameters while training.")
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

    from attar.data import Loader, Normalization, augmentation, make_sampler
    from attar.distiller import Distiller
    from attar.train import build_methods, build_model, build_source
    from attar.train.build import build_task
    from attar.train.memory import memory_format
    from attar.train.run import batch_of

    source = build_source(spec)
    torch.manual_seed(spec.seed)
    distiller = Distiller(
        build_model(spec, source.num_classes),
        build_methods(spec, source.num_classes),
        build_task(spec, source.num_classes),
        normalization=(source.mean, source.std),
        stages=spec.stages,
    )
    loader = Loader(
        source.train,
        make_sampler(distiller.sampling, source.train.targets, images, spec.seed),
        augmentation(spec.augment or source.default_augmentation, spec.task),
        Normalization(source.mean, source.std),
        views=distiller.views,
        seed=spec.seed,
        workers=0,
    )
    sample = next(loader.epoch(0))
    return distiller, batch_of(distiller, sample, memory_format(distiller, sample.images.device))


def _example(
    model: str, task: Task, image_size: int | None, options: dict[str, Any]
) -> tuple[Tensor, Callable[[], nn.Module]]:
    """Return random images that a model takes, and how to make the model."""
    import torch

    from attar.inspection import native_input
    from attar.train.models import make_model

    if image_size is not None and image_size < 1:
        raise AttarError(f"The image size must be at least 1 pixel a side, not {image_size}.")
    # A few images gain nothing from threads, and lose much where other programs keep the processor busy.
    torch.set_num_threads(1)
    channels, size = (3, _DENSE_SIDE) if task.dense else native_input(model)
    side = image_size or size
    torch.manual_seed(0)
    return torch.randn(2, channels, side, side), lambda: make_model(model, task.num_classes, options, task=task.name)
