"""Niwaki: sparsity in deep learning, pruning and growing neural networks."""

from niwaki.catalogue import METHODS, method
from niwaki.dry_run import Plan, plan
from niwaki.errors import InputError, NiwakiError
from niwaki.formats import load, save
from niwaki.masks import Masks
from niwaki.recipe import Recipe
from niwaki.sparsifier import Sparsifier

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "InputError",
    "Masks",
    "NiwakiError",
    "Plan",
    "Recipe",
    "Sparsifier",
    "load",
    "method",
    "plan",
    "save",
]
