"""One mask update: from scores and a target sparsity to the pieces that are kept.

Pure with respect to the model: it reads tensors and returns masks. The order of a drop-and-grow update is RigL's (survey 6.1): drop
the weakest active pieces, then let everything that was not kept compete to grow, just-dropped pieces included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
import torch.distributed as dist
from torch import Tensor

from niwaki import counter
from niwaki.allocation import Evidence, guard, row_counts
from niwaki.binding import Bound
from niwaki.errors import InputError
from niwaki.granularity import Grouped, PatternNM
from niwaki.growth import DropAndGrow, Growth, dropped
from niwaki.layout import from_matrix, matrix
from niwaki.pieces import Ranked, element_masks
from niwaki.recipe import Recipe, Threshold
from niwaki.saliency import Observation
from niwaki.selection import kept, select

Scores = Callable[[int], Tensor]
"""Index of what is ranked (a tensor or a group) -> the scores of its pieces on this rank."""


@dataclass
class Update:
    """What one mask update needs besides the tensors, and what it has to tell.

    Attributes:
        sparsity: share of the pieces to mask after the update.
        step: number of optimizer steps taken before it.
        progress: share of the schedule that has passed, in [0, 1] (for decaying growth).
        seed: of the run.
        observe: tensor -> what the saliency may look at.
        observe_growth: the same for growth.
        observe_allocation: the same for the allocation.
        flops: parameter name -> multiply-adds of each of its weights in a forward pass; None when no component needs it.
        dense_flops: FLOPs of a forward pass of the whole dense model, in the same unit as ``flops``; None when no component needs it.
        loss: the mean loss over the data if everything ranked keeps some pieces (bool, one tensor each); None when there are no data.
        averaged: scores that were averaged over batches, one tensor for each thing ranked; None where the saliency sees all it needs.
        first: whether it is the initial selection.
        grows: whether drop-and-grow may exchange pieces (not at the end of the run, where grown ones could not learn).
        from_active: whether only active pieces may be kept (hard masks without growth).
        notes: sentences for the user.
        weights: tensor name -> new weights in its view, of a saliency that chooses them with the mask.
    """

    sparsity: float
    step: int
    progress: float
    seed: int
    observe: Callable[[Bound], Observation]
    observe_growth: Callable[[Bound], Observation]
    observe_allocation: Callable[[Bound], Observation]
    first: bool
    from_active: bool
    flops: Mapping[str, float] | None = None
    dense_flops: float | None = None
    loss: Callable[[Sequence[Tensor]], float] | None = None
    averaged: Sequence[Tensor] | None = None
    grows: bool = True
    notes: list[str] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


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

    if isinstance(recipe.selection, Threshold):
        return _above(recipe, recipe.selection.value, ranked, saliency, active, update)
    if keeps_all(recipe, ranked, update.sparsity):
        if not update.from_active:
            return [torch.ones_like(a) for a in active]
        if recipe.allocation.budget is not None or sum_counts(active, ranked) == [one.pieces for one in ranked]:
            return list(active)
    counts = _counts(recipe, ranked, active, saliency, update)
    if recipe.saliency.solves:
        return _solved(recipe, ranked, counts, update)
    if sum(counts) == sum(one.pieces for one in ranked):
        return [torch.ones_like(a) for a in active]
    if update.first and starts_at_random(growth):
        keep = _choose(recipe, ranked, random, counts, [None] * len(ranked), update)
    elif isinstance(growth, DropAndGrow) and not update.first and update.grows:
        keep = _drop_and_grow(recipe, growth, ranked, saliency, counts, active, update)
    else:
        eligible = active if update.from_active else [None] * len(ranked)
        keep = _choose(recipe, ranked, saliency, counts, eligible, update)
    if granularity.sparsity is not None and (more := sum(sum_counts(keep, ranked))) > sum(counts):
        asked = sum(counts)
        _tell(
            update, f"kept {more} weights where the sparsity asks for {asked}: groups of {granularity.name} keep their best, short ones too"
        )
    return keep


def keeps_all(recipe: Recipe, ranked: Sequence[Ranked], sparsity: float) -> bool:
    """Return whether a sparsity masks nothing, so that nothing has to be ranked."""
    pieces = sum(one.pieces for one in ranked)
    less = sparsity > 0.0 if recipe.allocation.budget is not None else kept(sparsity, pieces) < pieces
    return not less and not isinstance(recipe.selection, Threshold)


def _above(
    recipe: Recipe, value: float, ranked: Sequence[Ranked], scores: Scores, active: Sequence[Tensor], update: Update
) -> list[Tensor]:
    """Return the pieces whose scores reach a value; the best one of a tensor or group where none does."""
    eligible = active if update.from_active else [torch.ones_like(a) for a in active]
    found = sum_counts([(scores(i) >= value) & allowed for i, allowed in enumerate(eligible)], ranked)
    counts = [max(n, min(1, most)) for n, most in zip(found, sum_counts(eligible, ranked), strict=True)]
    for one, n, count in zip(ranked, found, counts, strict=True):
        if count > n:
            _tell(update, f"kept one piece of {one.name}, of which no score reaches {value:.6g}, the value of the threshold")
    return _choose(recipe, ranked, scores, counts, eligible, update)


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
            _tell(update, note)
        keep.append(solution.keep)
    return keep


def starts_at_random(growth: Growth) -> bool:
    """Return whether the first mask is drawn at random rather than ranked by saliency."""
    return isinstance(growth, DropAndGrow) and growth.initial_mask == "random"


def _drop_and_grow(
    recipe: Recipe,
    growth: DropAndGrow,
    ranked: Sequence[Ranked],
    saliency: Scores,
    counts: list[int],
    active: Sequence[Tensor],
    update: Update,
) -> list[Tensor]:
    """Drop the share that the growth component says of the active pieces, then grow up to the target counts."""
    fraction = growth.fraction.at(update.progress)
    now = sum_counts(active, ranked)
    if recipe.allocation.joint:
        now = [sum(now)]
    if "survivors" in recipe.allocation.wants:
        survivors = [min(n - dropped(fraction, n), count) for n, count in zip(now, counts, strict=True)]
    else:
        survivors = [min(n, count) for n, count in zip(now, counts, strict=True)]
        survivors = [n - dropped(fraction, n) for n in survivors]
    if recipe.allocation.joint:
        survivors = [max(n, min(count, len(ranked))) for n, count in zip(survivors, counts, strict=True)]  # one a tensor can stay
    keep = _choose(recipe, ranked, saliency, survivors, active, update)
    free = [~k for k in keep]
    more = [count - n for count, n in zip(counts, survivors, strict=True)]
    grown = _choose(recipe, ranked, lambda i: ranked[i].score(growth, update.observe_growth), more, free, update, keep)
    return [k | g for k, g in zip(keep, grown, strict=True)]


def _counts(recipe: Recipe, ranked: Sequence[Ranked], active: Sequence[Tensor], scores: Scores, update: Update) -> list[int]:
    """Return the pieces to keep of each tensor or group, or one total when all are ranked together."""
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
            _tell(update, f"kept {len(ranked)} pieces, one a {what}, where the sparsity {update.sparsity:.6g} asks for {total}")
        return [max(total, len(ranked))]
    evidence = _evidence(recipe, ranked, active, scores, update) if allocation.wants or allocation.statistics else None
    counts, raised = guard(allocation.keep(update.sparsity, layers, recipe.final_sparsity, evidence), layers)
    for name in raised:
        _tell(update, f"kept one piece of {name}, which the allocation {allocation.name!r} would have emptied")
    return counts if now is None else _within(counts, now)


def _evidence(recipe: Recipe, ranked: Sequence[Ranked], active: Sequence[Tensor], scores: Scores, update: Update) -> Evidence:
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

    survivors = None
    if isinstance(recipe.growth, DropAndGrow) and not update.first and update.grows:
        fraction = recipe.growth.fraction.at(update.progress)
        survivors = [n - dropped(fraction, n) for n in sum_counts(active, ranked)]
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
        tell=lambda note: _tell(update, note),
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


def _choose(
    recipe: Recipe,
    ranked: Sequence[Ranked],
    scores: Scores,
    counts: list[int],
    eligible: Sequence[Tensor | None],
    update: Update,
    taken: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return the best pieces: ``counts[i]`` of each tensor or group, or ``counts[0]`` of all of them together.

    ``taken`` are pieces that are kept besides, so that none can be emptied.
    """
    lazy = [partial(scores, i) for i in range(len(ranked))]
    names = [one.name for one in ranked]
    forced = [_protected(recipe, one, score, allowed) for one, score, allowed in zip(ranked, lazy, eligible, strict=True)]
    if not recipe.allocation.joint:
        result = []
        for i, one in enumerate(ranked):
            if recipe.allocation.by_row:
                result.append(_by_row(one, lazy[i](), counts[i], eligible[i]))
                if (more := counts[i] - int(result[-1].sum())) > 0:
                    _tell(update, f"masked {more} more weights of {one.name} than asked: some of its rows have no others that are active")
                continue
            result += _forced_select([lazy[i]], counts[i], [eligible[i]], [forced[i]], [one.name], one.processes)
        return result
    group = ranked[0].processes
    if any(one.processes is not group for one in ranked):
        raise InputError("allocation: global needs all target tensors sharded over the same processes")
    counted = sum_counts([torch.ones(1) if e is None else e for e in eligible], ranked)  # a mask that was given may have emptied one
    while True:
        keep = _forced_select(lazy, counts[0], list(eligible), forced, names, group)
        if taken is not None or counts[0] < len(ranked):
            return keep
        emptied = [i for i, n in enumerate(sum_counts(keep, ranked)) if n == 0 and counted[i]]
        if not emptied:
            return keep
        for i in emptied:
            _tell(update, f"kept one piece of {names[i]}, which the allocation {recipe.allocation.name!r} would have emptied")
            forced[i] = select([lazy[i]], 1, eligible=[eligible[i]], names=[names[i]], group=group)[0]


def _by_row(one: Ranked, scores: Tensor, count: int, eligible: Tensor | None) -> Tensor:
    """Return the best weights of every output row, the same number of each but for a remainder: of one more in the first rows."""
    bound = one.parts[0].bound
    if bound.group is not None:
        raise InputError(f"allocation.uniform: rows of {one.name} need the whole tensor, and it is sharded; say per: tensor")
    values = scores if eligible is None else scores.masked_fill(~eligible, -torch.inf)
    if bool(values.isnan().any()):
        raise InputError(f"{one.name}: a score is NaN; its weights or statistics are not finite")
    table = matrix(values, bound.layout)
    rows = table.flatten(0, 1)
    best = rows.argsort(dim=1, descending=True, stable=True)
    places = torch.empty_like(best).scatter_(1, best, torch.arange(rows.shape[1], device=rows.device).expand_as(best))
    keep = places < torch.tensor(row_counts(count, len(rows)), device=rows.device)[:, None]
    chosen = from_matrix(keep.view(table.shape), bound.layout).reshape(scores.shape)
    return chosen if eligible is None else chosen & eligible


def _forced_select(
    scores: Sequence[Callable[[], Tensor]],
    keep: int,
    eligible: Sequence[Tensor | None],
    forced: Sequence[Tensor | None],
    names: Sequence[str],
    group: dist.ProcessGroup | None,
) -> list[Tensor]:
    """Select ``keep`` pieces, the forced ones first."""
    if all(f is None for f in forced):
        return select(scores, keep, eligible=eligible, names=names, group=group)
    number = sum(int(f.sum()) for f in forced if f is not None)
    if group is not None:
        whole = torch.tensor(number, device=next(f.device for f in forced if f is not None))
        dist.all_reduce(whole, group=group)
        number = int(whole)
    rest = [e if f is None else (~f if e is None else e & ~f) for e, f in zip(eligible, forced, strict=True)]
    chosen = select(scores, max(keep - number, 0), eligible=rest, names=names, group=group)
    return [c if f is None else c | f for c, f in zip(chosen, forced, strict=True)]


def _protected(recipe: Recipe, one: Ranked, scores: Callable[[], Tensor], eligible: Tensor | None) -> Tensor | None:
    """Return the pieces that the granularity keeps in any case (the N best of every group of M), or None."""
    if recipe.granularity.sparsity is None:
        return None
    values = scores() if eligible is None else scores().masked_fill(~eligible, -torch.inf)
    protected = one.parts[0].cut.protected(values)
    return protected if protected is None or eligible is None else protected & eligible


def sum_counts(pieces: Sequence[Tensor], ranked: Sequence[Ranked]) -> list[int]:
    """Return how many pieces are True in each tensor or group, in all its shards."""
    counts = [int(p.sum()) for p in pieces]
    for group in dict.fromkeys(one.processes for one in ranked if one.processes is not None):
        mine = [i for i, one in enumerate(ranked) if one.processes is group]
        part = torch.tensor([counts[i] for i in mine], device=pieces[mine[0]].device)
        dist.all_reduce(part, group=group)
        for i, count in zip(mine, part.tolist(), strict=True):
            counts[i] = count
    return counts


def _tell(update: Update, note: str) -> None:
    if note not in update.notes:
        update.notes.append(note)
