"""All recipes: a recipe is any function that one of the modules imported here lists in its `__all__`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from attar import methods
from attar.errors import unknown_name
from attar.recipes import (
    at,
    bake,
    blockwise,
    byot,
    codistillation,
    cs_kd,
    ddgsd,
    dlb,
    dml,
    fitnet,
    frskd,
    indistill,
    information_flow,
    kd,
    kdcl,
    meal,
    moonshine,
    okddip,
    one,
    online_ensemble,
    oskd,
    pcl,
    pkt,
    ps_kd,
    sad,
    scd,
    sla,
    spkd,
    srm,
    supervised,
    tf_kd,
)
from attar.recipes.recipe import FROM_MEMORY, IMAGENET, UNITS, Published, Recipe, methods_of, missing_methods

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["RecipeLine", "available", "find", "methods_without_recipe", "recipe_lines", "recipe_table"]

_MODULES = (
    at,
    bake,
    blockwise,
    byot,
    codistillation,
    cs_kd,
    ddgsd,
    dlb,
    dml,
    fitnet,
    frskd,
    indistill,
    information_flow,
    kd,
    kdcl,
    meal,
    moonshine,
    okddip,
    one,
    online_ensemble,
    oskd,
    pcl,
    pkt,
    ps_kd,
    sad,
    scd,
    sla,
    spkd,
    srm,
    supervised,
    tf_kd,
)


def available() -> dict[str, Callable[[], Recipe]]:
    """Every recipe by name, in alphabetical order; those whose methods attar does not have yet too."""
    return dict(sorted((name, getattr(module, name)) for module in _MODULES for name in module.__all__))


def find(name: str) -> Recipe:
    """Return the recipe of that name, whatever its case and with - for _.

    Raises:
        AttarError: there is none; the message names the nearest.
    """
    folded = name.casefold().replace("-", "_")
    if folded not in available():
        raise unknown_name("recipe", name, available())
    return available()[folded]()


def methods_without_recipe() -> list[str]:
    """Return the methods of attar that no recipe is about: there should be none."""
    known = {name for make in available().values() for name in methods_of(make())}
    return [name for name in methods.available() if name not in known]


class RecipeLine(NamedTuple):
    """One recipe in a list.

    Attributes:
        name: on the command line.
        title: what is trained on what.
        source: paper and table.
        published: its table's own figures in words; those from memory carry a question mark.
        state: "runs", or what it needs first.
    """

    name: str
    title: str
    source: str
    published: str
    state: str


def recipe_lines() -> list[RecipeLine]:
    """Return every recipe in a line, with what was published and whether it can run."""
    return [_line(make()) for make in available().values()]


def recipe_table() -> Table:
    """Return the same as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("recipe", no_wrap=True)  # what is typed must be readable whole
    for heading in ("published", "state"):
        table.add_column(heading)
    for line in recipe_lines():
        table.add_row(*map(Text, (line.name, line.published, line.state)))
    table.caption = f"?: {FROM_MEMORY}"
    table.caption_justify = "left"
    return table


def _line(recipe: Recipe) -> RecipeLine:
    # Parameters and costs are left to the recipe itself, and so are figures that belong to other tables' rows.
    figures = [figure for figure in recipe.published if figure.metric.startswith(("top-1", "mAP (cosine"))]
    own = [figure for figure in figures if figure.table is None]
    told = own if len(own) > 1 else figures
    metric = figures[0].metric
    values = " -> ".join(_figure(figure) for figure in told)
    return RecipeLine(
        recipe.name,
        recipe.title,
        f"{recipe.paper}, {recipe.table}",
        f"{metric}: {values} {UNITS[metric]}",
        _state(recipe),
    )


def _figure(figure: Published) -> str:
    return f"{figure.run} {figure.value:.2f}{'?' if figure.known == FROM_MEMORY else ''}"


def _state(recipe: Recipe) -> str:
    if missing := missing_methods(recipe):
        return f"needs {', '.join(missing)}, which attar does not have yet"
    return "runs with --data IMAGENET-FOLDER" if recipe.spec.data == IMAGENET else "runs"
