"""One mask update: from scores and a target sparsity to the pieces that are kept.

Pure with respect to the model: it reads tensors and returns masks. The order of a drop-and-grow update is RigL's (survey 6.1): drop
the weakest active pieces, then let everything that was not kept compete to grow, just-dropped pieces included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from niwaki import counter
from niwaki.allocation import guard
from niwaki.binding import Bound, active_pieces, reducer
from niwaki.errors import InputError
from niwaki.growth import DropAndGrow, Growth, dropped
from niwaki.recipe import Recipe
from niwaki.saliency import Observation
from niwaki.selection import kept, select

Scores = Callable[[int], Tensor]
"""Index of a tensor -> the scores of its pieces on this rank (shape of the grid)."""


@dataclass
class Update:
    """What one mask update needs besides the tensors, and what it has to tell.

    Attributes:
        sparsity: share of the pieces to mask after the update.
        step: number of optimizer steps taken before it.
        progress: share of the schedule that has passed, in [0, 1] (for decaying growth).
        seed: of the run.
        observe: tensor index -> what its saliency may look at.
        observe_growth: the same for growth.
        flops: tensor index -> FLOPs of one piece in a forward pass, or None when no component needs it.
        first: whether it is the initial selection.
        grows: whether drop-and-grow may exchange pieces (not at the end of the run, where grown ones could not learn).
        from_active: whether only active pieces may be kept (hard masks without growth).
        notes: sentences for the user.
    """

    sparsity: float
    step: int
    progress: float
    seed: int
    observe: Callable[[int], Observation]
    observe_growth: Callable[[int], Observation]
    flops: Callable[[int], float | None]
    first: bool
    from_active: bool
    grows: bool = True
    notes: list[str] = field(default_factory=list)


def next_masks(recipe: Recipe, bounds: Sequence[Bound], pruned: Sequence[Tensor | None], update: Update) -> list[Tensor]:
    """Return the bool element masks (True = active, local view shapes) that the recipe asks for.

    Raises:
        InputError: a NaN score (named), or a sparsity that falls without a growth component that says what comes back.
    """
    granularity, growth = recipe.granularity, recipe.growth
    reduces = [reducer(granularity, b) for b in bounds]
    active = [active_pieces(granularity, b, p) for b, p in zip(bounds, pruned, strict=True)]
    names = [b.name for b in bounds]

    def saliency(i: int) -> Tensor:
        scores = recipe.saliency.score(update.observe(i), reduces[i])
        return recipe.normalization.normalize(scores, update.flops(i))

    def random(i: int) -> Tensor:
        start = bounds[i].start if granularity.name in ("element", "n_m") else 0
        stream = counter.key(update.seed, update.step, names[i] + "::initial_mask")
        return counter.uniform(stream, start, active[i].numel(), active[i].device).view(active[i].shape)

    counts = _counts(recipe, bounds, active if update.from_active else None, update)
    if sum(counts) == sum(b.pieces for b in bounds):
        return [torch.ones(b.here.shape, dtype=torch.bool, device=a.device) for b, a in zip(bounds, active, strict=True)]
    if update.first and starts_at_random(growth):
        keep = _choose(recipe, bounds, random, counts, [None] * len(bounds), update)
    elif isinstance(growth, DropAndGrow) and not update.first and update.grows:
        keep = _drop_and_grow(recipe, growth, bounds, saliency, counts, active, update)
    else:
        eligible = active if update.from_active else [None] * len(bounds)
        keep = _choose(recipe, bounds, saliency, counts, eligible, update)
    if granularity.sparsity is not None and (more := sum(sum_counts(keep, bounds))) > sum(counts):
        asked = sum(counts)
        _tell(
            update, f"kept {more} weights where the sparsity asks for {asked}: groups of {granularity.name} keep their best, short ones too"
        )
    return [granularity.expand(k, b.here) for k, b in zip(keep, bounds, strict=True)]


def starts_at_random(growth: Growth) -> bool:
    """Return whether the first mask is drawn at random rather than ranked by saliency."""
    return isinstance(growth, DropAndGrow) and growth.initial_mask == "random"


def _drop_and_grow(
    recipe: Recipe, growth: DropAndGrow, bounds: Sequence[Bound], saliency: Scores, counts: list[int], active: list[Tensor], update: Update
) -> list[Tensor]:
    """Drop the share that the growth component says of the active pieces, then grow up to the target counts."""
    fraction = growth.fraction.at(update.progress)
    now = sum_counts(active, bounds)
    if recipe.allocation.joint:
        now = [sum(now)]
    survivors = [min(n, count) for n, count in zip(now, counts, strict=True)]
    survivors = [n - dropped(fraction, n) for n in survivors]
    if recipe.allocation.joint:
        survivors = [max(n, min(count, len(bounds))) for n, count in zip(survivors, counts, strict=True)]  # one a tensor can stay
    keep = _choose(recipe, bounds, saliency, survivors, active, update)
    free = [~k for k in keep]
    reduces = [reducer(recipe.granularity, b) for b in bounds]
    more = [count - n for count, n in zip(counts, survivors, strict=True)]
    grown = _choose(recipe, bounds, lambda i: growth.score(update.observe_growth(i), reduces[i]), more, free, update, keep)
    return [k | g for k, g in zip(keep, grown, strict=True)]


def _counts(recipe: Recipe, bounds: Sequence[Bound], active: Sequence[Tensor] | None, update: Update) -> list[int]:
    """Return the pieces to keep for each tensor, or one total when all tensors are ranked together."""
    layers = [b.layer for b in bounds]
    total = kept(update.sparsity, sum(b.pieces for b in bounds))
    now = None if active is None else sum_counts(active, bounds)
    if now is not None and sum(now) < total:
        raise InputError(
            f"schedule: the sparsity falls to {update.sparsity:.6g} before step {update.step}, and growth: none brings nothing back;"
            " choose growth: all, random or gradient"
        )
    if recipe.allocation.joint:
        if total < len(bounds):
            _tell(update, f"kept {len(bounds)} pieces, one a tensor, where the sparsity {update.sparsity:.6g} asks for {total}")
        return [max(total, len(bounds))]
    counts, raised = guard(recipe.allocation.keep(update.sparsity, layers, recipe.final_sparsity), layers)
    for name in raised:
        _tell(update, f"kept one piece of {name}, which the allocation {recipe.allocation.name!r} would have emptied")
    return counts if now is None else _within(counts, now)


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
    bounds: Sequence[Bound],
    scores: Scores,
    counts: list[int],
    eligible: Sequence[Tensor | None],
    update: Update,
    taken: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Return the best pieces: ``counts[i]`` of each tensor, or ``counts[0]`` of all of them together.

    ``taken`` are pieces that are kept besides, so that no tensor can be emptied.
    """
    groups = [b.group for b in bounds]
    names = [b.name for b in bounds]
    forced = [_protected(recipe, bounds[i], partial(scores, i), eligible[i]) for i in range(len(bounds))]
    if not recipe.allocation.joint:
        result = []
        for i, bound in enumerate(bounds):
            result += _forced_select([partial(scores, i)], counts[i], [eligible[i]], [forced[i]], [bound.name], bound.group)
        return result
    group = groups[0]
    if any(g is not group for g in groups):
        raise InputError("allocation: global needs all target tensors sharded over the same processes")
    lazy = [partial(scores, i) for i in range(len(bounds))]
    counted = sum_counts([torch.ones(1) if e is None else e for e in eligible], bounds)  # a mask that was given may have emptied one
    while True:
        keep = _forced_select(lazy, counts[0], list(eligible), forced, names, group)
        if taken is not None or counts[0] < len(bounds):
            return keep
        emptied = [i for i, n in enumerate(sum_counts(keep, bounds)) if n == 0 and counted[i]]
        if not emptied:
            return keep
        for i in emptied:
            _tell(update, f"kept one piece of {names[i]}, which the allocation {recipe.allocation.name!r} would have emptied")
            forced[i] = select([lazy[i]], 1, eligible=[eligible[i]], names=[names[i]], group=group)[0]


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


def _protected(recipe: Recipe, bound: Bound, scores: Callable[[], Tensor], eligible: Tensor | None) -> Tensor | None:
    """Return the pieces that the granularity keeps in any case (the N best of every group of M), or None."""
    if recipe.granularity.sparsity is None:
        return None
    values = scores() if eligible is None else scores().masked_fill(~eligible, -torch.inf)
    protected = recipe.granularity.protected(values, bound.here)
    return protected if protected is None or eligible is None else protected & eligible


def sum_counts(pieces: Sequence[Tensor], bounds: Sequence[Bound]) -> list[int]:
    """Return how many pieces are True in each whole tensor."""
    counts = [int(p.sum()) for p in pieces]
    for group in dict.fromkeys(b.group for b in bounds if b.group is not None):
        mine = [i for i, b in enumerate(bounds) if b.group is group]
        part = torch.tensor([counts[i] for i in mine], device=pieces[mine[0]].device)
        dist.all_reduce(part, group=group)
        for i, count in zip(mine, part.tolist(), strict=True):
            counts[i] = count
    return counts


def _tell(update: Update, note: str) -> None:
    if note not in update.notes:
        update.notes.append(note)
