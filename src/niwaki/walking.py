"""Random walks: what a recipe does to weights by chance after every optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch.optim import Optimizer

from niwaki.growth import Rewiring
from niwaki.masked import MaskedTensor
from niwaki.recipe import Recipe
from niwaki.relaxation import SoftRewiring


def walk(recipe: Recipe, tensors: Iterable[MaskedTensor], optimizers: Iterable[Optimizer], seed: int, step: int) -> None:
    """Move the weights that optimizers hold, each with its learning rate.

    Args:
        recipe: whose growth or relaxation walks.
        tensors: the targets.
        optimizers: those that have just stepped.
        seed: of the run.
        step: number of steps taken.
    """
    growth, relaxation = recipe.growth, recipe.relaxation
    if not isinstance(growth, Rewiring) and not isinstance(relaxation, SoftRewiring):
        return
    rates = {p: float(group["lr"]) for o in optimizers for group in o.param_groups for p in group["params"] if p.requires_grad}
    for tensor in tensors:
        rate = rates.get(tensor.bound.parameter)
        if rate is None:
            continue
        if isinstance(relaxation, SoftRewiring):
            tensor.rewrite(relaxation.moved(tensor.weight, replace(tensor.moment, step=step), rate))
            tensor.publish()
        elif isinstance(growth, Rewiring):
            active = None if tensor.pruned is None else ~tensor.pruned
            seen = tensor.bound.observe(tensor.weight, need_gradient=False, seed=seed, step=step, active=active)
            tensor.rewrite(growth.moved(seen, rate))
