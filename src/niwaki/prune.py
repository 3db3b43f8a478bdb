"""Pruning at one moment: a fraction of what is active, as the ``prune`` of a stage says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from niwaki.binding import Bound
from niwaki.counter import key
from niwaki.dependency import Example, Group
from niwaki.errors import InputError
from niwaki.granularity import Grouped
from niwaki.masks import Masks, shard
from niwaki.ranking import find_groups_with, rank_targets
from niwaki.recipe import Prune, Recipe
from niwaki.recipe.stages import sparsity_after
from niwaki.sparsifier import Sparsifier
from niwaki.update import sum_counts


def pruned(
    model: nn.Module,
    prune: Prune,
    masks: Masks | None = None,
    *,
    seed: int = 0,
    step: int = 0,
    data: Iterable[tuple[Any, Any]] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    groups: Sequence[Group] | None = None,
    example: Example | None = None,
) -> Sparsifier:
    """Prune a fraction of the active pieces of the targets, in place; ``masks`` of what is returned are those of all tensors then.

    ``round((1 - fraction) active)`` pieces stay, of all targets together, ranked by their scores on the model as it is; the allocation
    decides how many of them are in which tensor. What ``masks`` prune stays pruned, in tensors that are no targets too.

    Args:
        model: its pruned weights become zero.
        prune: what to prune, and by which scores.
        masks: of the model so far; None when nothing is masked.
        seed: of random scores.
        step: of random scores too, so that rounds differ.
        data: batches ``(inputs, targets)``, for scores that need them.
        loss: ``loss(outputs, targets)``, for scores that need gradients.
        groups: the model's dependency groups, for granularities of their units; None: they are found.
        example: arguments of a forward pass to find them with; by default the inputs of the first batch of ``data``.

    Raises:
        InputError: the scores need data or a loss that were not given, or the recipe does not fit the model.

    >>> import torch
    >>> model = nn.Linear(4, 1, bias=False)
    >>> model.weight.data = torch.tensor([[0.1, 3.0, 2.0, 0.4]])
    >>> everything = {"weights": {"include": ["*"]}}
    >>> masks = pruned(model, Prune(fraction=0.25, target=everything)).masks
    >>> pruned(model, Prune(fraction=0.33, target=everything), masks).masks["weight"]
    tensor([[False,  True,  True, False]])
    """
    masks = masks or Masks()
    if "gradient" in prune.saliency.needs and (data is None or loss is None):
        raise InputError(f"prune.saliency: {prune.saliency.name!r} needs data= and loss=")
    if isinstance(prune.granularity, Grouped) and groups is None:
        groups, data = find_groups_with(model, prune.granularity, example, data)
    ranked, _ = rank_targets(model, prune, groups)

    def gone(bound: Bound) -> Tensor | None:
        mask = masks.get(bound.name)
        return None if mask is None else ~shard(mask, bound.parameter, bound.name).reshape(bound.here.shape)

    active = sum_counts([one.active(gone) for one in ranked], ranked)
    sparsity = sparsity_after(prune.fraction, sum(active), sum(one.pieces for one in ranked))
    slots = {field: getattr(prune, field) for field in Prune.model_fields if field != "fraction"}
    recipe = Recipe(sparsity=sparsity, **slots)
    return Sparsifier(model, recipe, masks=masks, seed=key(seed, step, "prune"), data=data, loss=loss, groups=groups).finalize()
