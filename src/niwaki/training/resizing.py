"""What the end of a stage does to the size of a model: it takes out what is masked, or adds units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from niwaki.errors import NiwakiError
from niwaki.masks import Masks
from niwaki.metrics.flops import forward_flops
from niwaki.recipe.finish import Finish, Widen
from niwaki.removed import Removed
from niwaki.structured import shrink
from niwaki.structured.expansion import uniform


@dataclass(frozen=True)
class Surroundings:
    """What is at hand when a model gets another size.

    Attributes:
        example: arguments of a forward pass.
        flops: of a forward pass of the model that the run began with.
        batches: returns a few training examples.
        loss: of the task.
        seed: of what is random.
    """

    example: tuple[Any, ...]
    flops: float
    batches: Callable[[], list[tuple[Any, Any]]]
    loss: Callable[[Any, Any], Tensor]
    seed: int


def resize(
    finish: Literal["shrink"] | Finish, model: nn.Module, masks: Masks, optimizer: Optimizer, around: Surroundings
) -> tuple[Removed, Masks, list[str]]:
    """Give a model, and its optimizer, another size in place; return what was done, the masks, and sentences about it.

    What cannot be done is told, and not raised: hours of training end here, and the model as it is is what there is.
    """
    verb, done = ("shrink", "removed") if finish == "shrink" else ("widen", "added")
    before = _parameters(model)
    try:
        if finish == "shrink":
            smaller = shrink(model, masks, around.example, optimizer=optimizer, in_place=True)
            removed, masks, notes = smaller.removed, smaller.masks, smaller.notes
        else:
            removed, masks, notes = _widened(finish.widen, model, masks, optimizer, around)
    except NiwakiError as error:
        return Removed(), masks, [f"finish: {verb} {done} nothing: {error}"]
    if not removed:
        return removed, masks, [*notes, f"finish: {verb} {done} nothing"]
    size = f"{'smaller' if finish == 'shrink' else 'larger'}, from {before:,} parameters to {_parameters(model):,}"
    told = f"finish: {verb} made the model {size}: sparsities are of what is there now, and earlier snapshots no longer fit"
    return removed, masks, [*notes, told]


def _widened(how: Widen, model: nn.Module, masks: Masks, optimizer: Optimizer, around: Surroundings) -> tuple[Removed, Masks, list[str]]:
    wider = uniform(
        model,
        around.example,
        factor=how.factor,
        flops=None if how.flops is None else how.flops * around.flops / forward_flops(model, around.example).dense,
        by=how.by,
        data=around.batches() if how.by.needs else None,
        loss=around.loss,
        masks=masks,
        optimizer=optimizer,
        in_place=True,
        seed=around.seed,
    )
    return wider.removed, wider.masks, wider.notes


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
