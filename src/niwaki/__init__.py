"""Niwaki: sparsity in deep learning, pruning and growing neural networks."""

from niwaki.catalogue import METHODS, method
from niwaki.errors import InputError, NiwakiError
from niwaki.formats import load, save
from niwaki.interpose import interpose
from niwaki.masks import Masks
from niwaki.plan import Plan, plan
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
    "interpose",
    "load",
    "method",
    "plan",
    "save",
]
