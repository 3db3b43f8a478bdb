"""Taking units that a model does not need out of it, exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from niwaki.dependency import Example, Group, find_groups
from niwaki.errors import InputError, did_you_mean
from niwaki.masks import Masks, is_sharded
from niwaki.recipe import Recipe
from niwaki.recipe.stages import once
from niwaki.removed import Removed, is_container, named_tensors, replay, resolve
from niwaki.sparsifier import Sparsifier
from niwaki.structured import pretrained
from niwaki.structured.cutting import Limits, Removal
from niwaki.structured.running import evaluating, refresh


@dataclass(frozen=True)
class Smaller:
    """What :func:`shrink` returns.

    Attributes:
        model: the smaller model.
        removed: what was taken out; :func:`niwaki.structured.replay` and :func:`niwaki.save` take it.
        masks: the masks of what is left.
        notes: sentences about what is masked and could not be removed, and why.
        optimizer: for the smaller model, with the state of the given one; None without one.
        example: that outputs were compared on.
    """

    model: nn.Module
    removed: Removed
    masks: Masks
    notes: list[str]
    optimizer: Optimizer | None = None
    example: Example = field(default=(), repr=False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a Hugging Face model into a folder that ``from_pretrained`` loads again, after checking that it will compute the same.

        Raises:
            InputError: no such model, or no configuration of its class has these sizes, as when layers differ; nothing is written.
        """
        pretrained.save(self.model, folder, self.example)


def shrink(
    model: nn.Module,
    recipe_or_masks: Recipe | Mapping[str, Tensor],
    example: Example,
    *,
    groups: Sequence[Group] | None = None,
    optimizer: Optimizer | None = None,
    in_place: bool = False,
    round_to: int | None = None,
    minimum: int = 1,
    exclude: str | Sequence[str] = (),
    attributes: Mapping[str, int] | None = None,
    data: Iterable[tuple[Any, Any]] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
) -> Smaller:
    """Return a model without the units (channels, heads, blocks) that do nothing, after checking that it computes the same.

    A unit of a dependency group goes when

    - no weight that reads it is active, or
    - it is a constant ``c`` for every input, as no weight that makes it (or no normalization or depthwise weight on the way) is active,
      and every layer that reads it can take that over: ``b <- b + W[:, c] c``, for a convolution only where its padding changes nothing.
      If ``c = 0`` there is nothing to take over.

    What goes leaves others unread or constant, and so on: this cleans up after unstructured pruning too. A residual block goes when all
    its parameters are masked. Numbers that no shape tells, such as ``num_heads``, follow. At least one unit of a group stays.

    Args:
        model: stays as it is, unless ``in_place``.
        recipe_or_masks: masks (True = active; masked weights count as zero whatever they hold, and a weight without a mask is active), or
            a recipe, such as ``niwaki.method("filter_l1", sparsity=0.5)``, of which everything is masked at once.
        example: arguments of a forward pass: a tuple, a mapping of named ones, or the only one.
        groups: what goes together; None to find out.
        optimizer: of the model; its slots are cut alike, and it (or with a copy of the model, its copy) goes on with the smaller one.
        in_place: make the model itself, and its optimizer, smaller. Its parameters stay the objects that they are.
        round_to: widths stay multiples of this; the units with the largest norm stay for it.
        minimum: units that stay in every group.
        exclude: globs of groups or tensors that stay as they are.
        attributes: numbers that cannot be found out, such as ``{"blocks.0.attn.num_heads": 6}``: path -> value afterwards.
        data: batches for a recipe that needs statistics.
        loss: ``loss(outputs, targets)``, for a recipe that needs gradients.

    Raises:
        InputError: masks, groups, an exclusion or a path that do not fit the model, or a model that cannot be looked into.
        NiwakiError: the smaller model's outputs on the example differ (in evaluation mode) by more than rounding; nothing was changed.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> reads = torch.tensor([[True, False, True, False]]).expand(2, 4)
    >>> smaller = shrink(model, {"2.weight": reads}, torch.ones(1, 3))
    >>> smaller.model[0].weight.shape, smaller.removed.tensors["0.bias"]
    (torch.Size([2, 3]), {'0': [0, 2]})
    """
    for name, value in (("round_to", round_to), ("minimum", minimum)):
        if value is not None and value < 1:
            raise InputError(f"{name}: {value} is no number of units; give at least 1")
    sharded = next((name for name, tensor in named_tensors(model).items() if is_sharded(tensor)), None)
    if sharded is not None:
        raise InputError(f"model: {sharded!r} is sharded; shrink the whole model, and shard the smaller one")
    refresh(model)
    if isinstance(recipe_or_masks, Recipe):
        base = copy.deepcopy(model)
        given = Sparsifier(base, once(recipe_or_masks), groups=groups, example=example, data=data, loss=loss).finalize().masks
    else:
        base, given = model, Masks(recipe_or_masks)
    groups = find_groups(base, example, layers=_masks_blocks(base, given)) if groups is None else groups
    for path in attributes or {}:
        resolve(base, path)
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    limits = Limits(round_to or 1, minimum, excluded(groups, patterns), dict(attributes or {}))

    work, own = copy.deepcopy((base, optimizer))
    given.apply_(work)
    with evaluating(work), torch.no_grad():
        made = Removal(work, own, given, groups, example, limits, model)
        made.run()
    masks = Masks({name: mask.to(given[made.removed.name_before(name)].device) for name, mask in made.masks.items()})
    if not in_place:
        return Smaller(made.model, made.removed, masks, made.notes, made.optimizer, example)
    replay(model, made.removed, optimizer)
    with torch.no_grad():
        new = named_tensors(made.model)
        for name, tensor in named_tensors(model).items():
            tensor.copy_(new[name])
    refresh(model)
    return Smaller(model, made.removed, masks, made.notes, optimizer, example)


def _masks_blocks(model: nn.Module, masks: Masks) -> bool:
    """Return whether all parameters of some block of a row of blocks are masked."""
    names = {parameter: name for name, parameter in named_tensors(model).items()}
    gone = {name for name, mask in masks.items() if not mask.any()}
    blocks = (b for m in model.modules() if is_container(m) for b in m.children())
    owned = ([names[p] for p in block.parameters()] for block in blocks)
    return any(own and gone.issuperset(own) for own in owned)


def excluded(groups: Sequence[Group], patterns: Sequence[str]) -> frozenset[str]:
    """Return the names of the groups that globs match, by their own names or those of their tensors.

    Raises:
        InputError: a glob that matches nothing.
    """
    found: set[str] = set()
    for pattern in patterns:
        matched = {g.name for g in groups if any(fnmatchcase(name, pattern) for name in (g.name, *(m.name for m in g.members)))}
        if not matched:
            raise InputError(
                f"exclude: {pattern!r} matches no group and no tensor of one; {did_you_mean(pattern, [g.name for g in groups])}"
            )
        found |= matched
    return frozenset(found)
