"""Niwaki: sparsity in deep learning, pruning and growing neural networks."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from niwaki.catalogue import METHODS, method
    from niwaki.dry_run import Plan, plan
    from niwaki.errors import InputError, NiwakiError
    from niwaki.formats import load, save
    from niwaki.masks import Masks
    from niwaki.measurement import measure
    from niwaki.pruning import prune
    from niwaki.recipe import Recipe
    from niwaki.sparsifier import Sparsifier
    from niwaki.structured import shrink

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
    "measure",
    "method",
    "plan",
    "prune",
    "save",
    "shrink",
]

_HOMES = {
    "catalogue": ("METHODS", "method"),
    "dry_run": ("Plan", "plan"),
    "errors": ("InputError", "NiwakiError"),
    "formats": ("load", "save"),
    "masks": ("Masks",),
    "measurement": ("measure",),
    "pruning": ("prune",),
    "recipe": ("Recipe",),
    "sparsifier": ("Sparsifier",),
    "structured": ("shrink",),
}


def __getattr__(name: str) -> Any:
    """Import a public name or a module when it is first used: torch takes a second, and ``niwaki --help`` needs none of it."""
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(import_module(f"niwaki.{home}"), name)
            return value
    if not name.startswith("_") and find_spec(f"niwaki.{name}"):
        return import_module(f"niwaki.{name}")
    raise AttributeError(f"module 'niwaki' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
