"""Recipes: a sparsification method as data, validated, read from and written to YAML 1.2."""

from niwaki.recipe.fields import Prune, Restore, Slots, Stage
from niwaki.recipe.recipe import Recipe
from niwaki.recipe.vocabulary import DEFAULTS

__all__ = ["DEFAULTS", "Prune", "Recipe", "Restore", "Slots", "Stage"]
