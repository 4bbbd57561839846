"""Recipes: the papers' table rows as typed functions, each with the number that was published for it."""

from __future__ import annotations

from attar.recipes.catalog import available, find, methods_without_recipe, recipe_lines, recipe_table
from attar.recipes.recipe import Published, Recipe, methods_of, missing_methods, runs_of
from attar.recipes.reproduction import Figure, Reproduction, reproduce
from attar.recipes.scale import small

__all__ = [
    "Figure",
    "Published",
    "Recipe",
    "Reproduction",
    "available",
    "find",
    "methods_of",
    "methods_without_recipe",
    "missing_methods",
    "recipe_lines",
    "recipe_table",
    "reproduce",
    "runs_of",
    "small",
]
