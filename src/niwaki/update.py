"""One mask update: from scores and a target sparsity to the pieces that are kept.

Pure with respect to the model: it reads tensors and returns masks. The order of a drop-and-grow update is RigL's (survey 6.1): drop
the weakest active pieces, then let everything that was not kept compete to grow, just-dropped pieces included.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from niwaki import counter
from niwaki.allocation import Evidence, guard
from niwaki.choosing import above, choose, draw, hysteresis, sum_counts
from niwaki.errors import InputError
from niwaki.exchanging import drop_and_grow, staying_after_drop
from niwaki.granularity import Grouped, PatternNM
from niwaki.growth import DropAndGrow, Growth
from niwaki.pieces import Ranked, element_masks
from niwaki.recipe import Recipe
from niwaki.saliency import Observation
from niwaki.selecting import Hysteresis
from niwaki.selection import kept, select
from niwaki.update_input import Scores, Update, tell


def next_pieces(recipe: Recipe, ranked: Sequence[Ranked], active: Sequence[Tensor], update: Update) -> list[Tensor]:
    """Return the pieces that the recipe keeps: bool, of the shape that the scores have, one tensor for each thing ranked.

    Args:
        recipe: what to do.
        ranked: the tensors or groups whose pieces are ranked.
        active: which of their pieces are active now.
        update: everything else; sentences for the user are added to its notes.

    Raises:
        InputError: a NaN score (named), or a sparsity that falls without a growth component that says what comes back.
    """
    granularity, growth = recipe.granularity, recipe.growth

    def saliency(i: int) -> Tensor:
        scores = ranked[i].score(recipe.saliency, update.observe) if update.averaged is None else update.averaged[i]
        return recipe.normalization.normalize(scores, None if update.flops is None else ranked[i].flops(update.flops))

    def random(i: int) -> Tensor:
        stream = counter.key(update.seed, update.step, ranked[i].name + "::initial_mask")
        return counter.uniform(stream, ranked[i].start, active[i].numel(), active[i].device).view(active[i].shape)

    if isinstance(recipe.selection, Hysteresis):
        return hysteresis(recipe.selection, ranked, saliency, active, update)
    if update.threshold is not None:
        return above(recipe, update.threshold, ranked, saliency, active, update)
    if keeps_all(recipe, ranked, update.sparsity):
        if not update.from_active:
            return [torch.ones_like(a) for a in active]
        if recipe.allocation.budget is not None or sum_counts(active, ranked) == [one.pieces for one in ranked]:
            return list(active)
    exchanges = isinstance(growth, DropAndGrow) and not update.first and update.grows
    staying = staying_after_drop(growth, ranked, saliency, active, update) if isinstance(growth, DropAndGrow) and exchanges else None
    survivors = staying.survivors if staying is not None else None
    if isinstance(growth, DropAndGrow) and not update.first and not update.grows:
        survivors = sum_counts(active, ranked)
    counts = _counts(recipe, ranked, active, saliency, update, survivors)
    if recipe.saliency.solves:
        return _solved(recipe, ranked, counts, update)
    if sum(counts) == sum(one.pieces for one in ranked):
        return [torch.ones_like(a) for a in active]
    if update.first and starts_at_random(growth):
        keep = choose(recipe, ranked, random, counts, [None] * len(ranked), update)
    elif isinstance(growth, DropAndGrow) and staying is not None:
        keep = drop_and_grow(recipe, growth, ranked, saliency, counts, staying, active, update)
    else:
        eligible = active if update.from_active else [None] * len(ranked)
        keep = draw(recipe, ranked, saliency, counts, eligible, update)
    if granularity.sparsity is not None and (more := sum(sum_counts(keep, ranked))) > sum(counts):
        asked = sum(counts)
        tell(
            update, f"kept {more} weights where the sparsity asks for {asked}: groups of {granularity.name} keep their best, short ones too"
        )
    return keep


def keeps_all(recipe: Recipe, ranked: Sequence[Ranked], sparsity: float) -> bool:
    """Return whether a sparsity masks nothing, so that nothing has to be ranked."""
    pieces = sum(one.pieces for one in ranked)
    less = sparsity > 0.0 if recipe.allocation.budget is not None else kept(sparsity, pieces) < pieces
    return not less and recipe.selection.counted and recipe.schedule.quantile is None


def _solved(recipe: Recipe, ranked: Sequence[Ranked], counts: Sequence[int], update: Update) -> list[Tensor]:
    """Return the pieces that a saliency keeps which chooses mask and weights of each tensor together; the weights go to the update."""
    granularity = recipe.granularity
    pattern = (granularity.n, granularity.m) if isinstance(granularity, PatternNM) else None
    keep = []
    for one, count in zip(ranked, counts, strict=True):
        bound = one.parts[0].bound
        if bound.group is not None:
            raise InputError(f"saliency: {recipe.saliency.name!r} needs whole tensors, and {one.name} is sharded; prune before sharding")
        if isinstance(granularity, PatternNM) and granularity.dimension != "input":
            raise InputError(f"granularity: saliency {recipe.saliency.name!r} knows N:M patterns along the inputs; say dimension: input")
        solution = recipe.saliency.solve(update.observe(bound), count, pattern)
        update.weights[bound.name] = solution.weight
        for note in solution.notes:
            tell(update, note)
        keep.append(solution.keep)
    return keep


def starts_at_random(growth: Growth) -> bool:
    """Return whether the first mask is drawn at random rather than ranked by saliency."""
    return isinstance(growth, DropAndGrow) and growth.initial_mask == "random"


def _counts(
    recipe: Recipe, ranked: Sequence[Ranked], active: Sequence[Tensor], scores: Scores, update: Update, survivors: Sequence[int] | None
) -> list[int]:
    """Return the pieces to keep of each tensor or group, or one total when all are ranked together.

    ``survivors``: how many stay in each after a drop (all, where nothing is exchanged any more); None when the first masks are made.
    """
    layers = [one.layer for one in ranked]
    now = sum_counts(active, ranked) if update.from_active else None
    allocation = recipe.allocation
    total = kept(update.sparsity, sum(one.pieces for one in ranked))
    if now is not None and sum(now) < total and allocation.budget is None:
        raise InputError(
            f"schedule: the sparsity falls to {update.sparsity:.6g} before step {update.step}, and growth: none brings nothing back;"
            " choose growth: all, random or gradient"
        )
    if allocation.joint:
        if total < len(ranked):
            what = "group" if isinstance(recipe.granularity, Grouped) else "tensor"
            tell(update, f"kept {len(ranked)} pieces, one a {what}, where the sparsity {update.sparsity:.6g} asks for {total}")
        return [max(total, len(ranked))]
    evidence = _evidence(recipe, ranked, active, scores, update, survivors) if allocation.wants or allocation.statistics else None
    counts, raised = guard(allocation.keep(update.sparsity, layers, recipe.final_sparsity, evidence), layers)
    for name in raised:
        tell(update, f"kept one piece of {name}, which the allocation {allocation.name!r} would have emptied")
    return counts if now is None else _within(counts, now)


def _evidence(
    recipe: Recipe, ranked: Sequence[Ranked], active: Sequence[Tensor], scores: Scores, update: Update, survivors: Sequence[int] | None
) -> Evidence:
    """Return what the allocation may look at; scores are computed once.

    Raises:
        InputError: a tensor is sharded, so that this rank cannot see all of it.
    """
    sharded = next((one.name for one in ranked if one.processes is not None), None)
    if sharded is not None:
        name = recipe.allocation.name
        raise InputError(f"allocation: {name!r} looks at whole tensors, and {sharded} is sharded; choose uniform, global or erdos_renyi")
    eligible = active if update.from_active else None
    limits: Sequence[Tensor | None] = [None] * len(ranked) if eligible is None else eligible
    score = lru_cache(maxsize=None)(scores)

    def best(counts: Sequence[int]) -> list[Tensor]:
        return [select([partial(score, i)], n, eligible=[limits[i]], names=[ranked[i].name])[0] for i, n in enumerate(counts)]

    def loss(counts: Sequence[int]) -> float:
        assert update.loss is not None
        return update.loss(best(counts))

    def flops_left(counts: Sequence[int]) -> float:
        assert uses is not None
        assert update.dense_flops is not None
        masks = element_masks(ranked, best(counts))
        return update.dense_flops - sum(2.0 * uses.get(name, 0.0) * int((~mask).sum()) for name, mask in masks.items())

    def observe(i: int) -> list[Observation]:
        parts = (ranked[i].readers or ranked[i].makers) if recipe.allocation.observes == "inputs" else ranked[i].scored
        return [update.observe_allocation(part.bound) for part in parts]

    uses = update.flops
    counted = uses is not None and update.dense_flops is not None
    return Evidence(
        scores=score,
        active=eligible,
        flops=None if uses is None else [one.flops(uses) for one in ranked],
        dense_flops=update.dense_flops,
        flops_left=flops_left if counted and isinstance(recipe.granularity, Grouped) else None,
        loss=None if update.loss is None else loss,
        survivors=survivors,
        observe=observe,
        seed=update.seed,
        step=update.step,
        tell=lambda note: tell(update, note),
    )


def _within(counts: list[int], limits: list[int]) -> list[int]:
    """Move what exceeds a limit (by rounding, while a schedule rises) to the first tensors with room; the sum stays."""
    result = [min(c, n) for c, n in zip(counts, limits, strict=True)]
    spare = sum(counts) - sum(result)
    for i, limit in enumerate(limits):
        more = min(spare, limit - result[i])
        result[i] += more
        spare -= more
    return result
