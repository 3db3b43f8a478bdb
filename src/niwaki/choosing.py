"""Which pieces are kept: the best ones, some that are drawn by their scores, or those that reach a value.

Counts are exact, of each tensor, of all together, or of every output row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from niwaki import counter
from niwaki.allocation import row_counts
from niwaki.errors import InputError
from niwaki.layout import from_matrix, matrix
from niwaki.pieces import Ranked
from niwaki.recipe import Recipe
from niwaki.selecting import Bernoulli, Gumbel, Hysteresis
from niwaki.selection import kept, select
from niwaki.update_input import Scores, Update, tell


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


def draw(
    recipe: Recipe,
    ranked: Sequence[Ranked],
    scores: Scores,
    counts: list[int],
    eligible: Sequence[Tensor | None],
    update: Update,
    rows: bool = True,
) -> list[Tensor]:
    """Return the pieces that the selection keeps: the best ones, or some that are drawn with chances by their scores."""
    selection = recipe.selection

    def numbers(i: int, score: Tensor) -> Tensor:
        stream = counter.key(update.seed, update.step, f"{ranked[i].name}::selection")
        return counter.uniform(stream, ranked[i].start, score.numel(), score.device).view(score.shape)

    if isinstance(selection, Gumbel):

        def keys(i: int) -> Tensor:
            score = scores(i)
            return selection.keys(score, numbers(i, score), ranked[i].name)

        return choose(recipe, ranked, keys, counts, eligible, update, rows=rows)
    if not isinstance(selection, Bernoulli):
        return choose(recipe, ranked, scores, counts, eligible, update, rows=rows)
    sharded = next((one.name for one in ranked if one.processes is not None), None)
    if sharded is not None:
        raise InputError(f"selection: 'bernoulli' looks at whole tensors, and {sharded} is sharded; choices: gumbel, top_k")
    keep: list[Tensor] = []
    together = [range(len(ranked))] if recipe.allocation.joint else [[i] for i in range(len(ranked))]
    for count, some in zip(counts, together, strict=True):
        values = [scores(i) for i in some]
        allowed = [(eligible[i], value) for i, value in zip(some, values, strict=True)]
        limits = [torch.ones_like(value, dtype=torch.bool) if limit is None else limit for limit, value in allowed]
        weights = [selection.log_weights(v, ranked[i].name)[limit] for i, v, limit in zip(some, values, limits, strict=True)]
        chances = torch.split(selection.chances(torch.cat(weights), count), [len(w) for w in weights])
        for i, value, limit, chance in zip(some, values, limits, chances, strict=True):
            near = torch.full_like(value, torch.inf, dtype=torch.float64)
            near[limit] = numbers(i, value)[limit] / chance
            kept = near < 1.0
            if not bool(kept.any()) and bool(limit.any()):
                kept = select([-near], 1, eligible=[limit], names=[ranked[i].name])[0]
                tell(update, f"kept one piece of {ranked[i].name}, of which the selection 'bernoulli' drew none")
            keep.append(kept)
    return keep


def hysteresis(selection: Hysteresis, ranked: Sequence[Ranked], scores: Scores, active: Sequence[Tensor], update: Update) -> list[Tensor]:
    """Return the pieces that scores far enough from the middle of their tensor decide anew, and the others as they are."""
    kept = []
    for i, (one, before) in enumerate(zip(ranked, active, strict=True)):
        score = scores(i)
        if bool(score.isnan().any()):
            raise InputError(f"{one.name}: a score is NaN; its weights or statistics are not finite")
        if one.name not in update.numbers:
            some = score[score != 0].to(torch.float64)
            sums = torch.stack([torch.tensor(some.numel(), dtype=torch.float64, device=some.device), some.sum(), some.square().sum()])
            if one.processes is not None:
                dist.all_reduce(sums, group=one.processes)
            update.numbers[one.name] = selection.middle(*sums.tolist())
        drawn = float(counter.uniform(counter.key(update.seed, update.step, f"{one.name}::hysteresis"), 0, 1))
        keep = selection.keep(score, before, update.numbers[one.name]) if drawn < selection.chance(update.step) else before
        if sum_counts([keep], [one]) == [0]:
            tell(update, f"kept one piece of {one.name}, which the selection 'hysteresis' would have emptied")
            keep = select([score], 1, names=[one.name], group=one.processes)[0]
        kept.append(keep)
    return kept


def above(
    recipe: Recipe,
    threshold: Callable[[Ranked, Tensor, Tensor], float],
    ranked: Sequence[Ranked],
    scores: Scores,
    active: Sequence[Tensor],
    update: Update,
) -> list[Tensor]:
    """Return the pieces whose scores reach a value; the best one of a tensor or group where none does."""
    eligible = active if update.from_active else [torch.ones_like(a) for a in active]
    values, above = [], []
    for i, (one, allowed) in enumerate(zip(ranked, eligible, strict=True)):
        score = scores(i)
        values.append(threshold(one, score, active[i]))
        above.append((score >= values[i]) & allowed)
    found = sum_counts(above, ranked)
    counts = [max(n, min(1, most)) for n, most in zip(found, sum_counts(eligible, ranked), strict=True)]
    for one, value, n, count in zip(ranked, values, found, counts, strict=True):
        if count > n:
            tell(update, f"kept one piece of {one.name}, of which no score reaches {value:.6g}, the value of the threshold")
    return choose(recipe, ranked, scores, counts, eligible, update)


def quantile(one: Ranked, scores: Tensor, active: Tensor, share: float) -> float:
    """Return the score that ``round(share n)`` of the n active pieces of a tensor or group (of all its shards) rank below.

    With ties, and with so few pieces that all would, it is the score of the best piece that ranks lowest of the others.
    """
    number = sum_counts([active], [one])[0]
    if number == 0:
        return 0.0
    above = select([scores], max(kept(share, number), 1), eligible=[active], names=[one.name], group=one.processes)[0]
    lowest = torch.cat([scores[above].double(), scores.new_full((1,), torch.inf, dtype=torch.float64)]).min()
    if one.processes is not None:
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=one.processes)
    return float(lowest)


def choose(
    recipe: Recipe,
    ranked: Sequence[Ranked],
    scores: Scores,
    counts: list[int],
    eligible: Sequence[Tensor | None],
    update: Update,
    taken: Sequence[Tensor] | None = None,
    rows: bool = True,
) -> list[Tensor]:
    """Return the best pieces: ``counts[i]`` of each tensor or group, or ``counts[0]`` of all of them together.

    ``taken`` are pieces that are kept besides, so that none can be emptied. ``rows``: as many in every row, where the allocation counts so.
    """
    lazy = [partial(scores, i) for i in range(len(ranked))]
    names = [one.name for one in ranked]
    forced = [_protected(recipe, one, score, allowed) for one, score, allowed in zip(ranked, lazy, eligible, strict=True)]
    if not recipe.allocation.joint:
        result = []
        for i, (one, allowed) in enumerate(zip(ranked, eligible, strict=True)):
            if recipe.allocation.by_row and rows:
                # At the end of a run where weights were exchanged, rows have what they have: ablated ones have none.
                limits = None if allowed is None or not recipe.growth.grows else row_sums(one, allowed).tolist()
                result.append(choose_by_row(one, lazy[i], row_counts(counts[i], one.layer.layout.outputs, limits), allowed))
                if (more := counts[i] - int(result[-1].sum())) > 0:
                    tell(update, f"masked {more} more weights of {one.name} than asked: some of its rows have no others that are active")
                continue
            result += _forced_select([lazy[i]], counts[i], [allowed], [forced[i]], [one.name], one.processes)
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
            tell(update, f"kept one piece of {names[i]}, which the allocation {recipe.allocation.name!r} would have emptied")
            forced[i] = select([lazy[i]], 1, eligible=[eligible[i]], names=[names[i]], group=group)[0]


def choose_by_row(one: Ranked, scores: Callable[[], Tensor], counts: Sequence[int], eligible: Tensor | None) -> Tensor:
    """Return the best weights of every output row, ``counts`` of them; fewer where fewer are eligible."""
    bound = one.parts[0].bound
    if bound.group is not None:
        raise InputError(f"allocation.uniform: rows of {one.name} need the whole tensor, and it is sharded; say per: tensor")
    values = scores()
    if bool(values.isnan().any()):
        raise InputError(f"{one.name}: a score is NaN; its weights or statistics are not finite")
    table = matrix(values, bound.layout)
    rows = table.flatten(0, 1)
    best = rows.argsort(dim=1, descending=True, stable=True)
    if eligible is not None:
        barred = ~matrix(eligible, bound.layout).flatten(0, 1)
        best = best.gather(1, barred.gather(1, best).to(torch.int8).argsort(dim=1, stable=True))
    places = torch.empty_like(best).scatter_(1, best, torch.arange(rows.shape[1], device=rows.device).expand_as(best))
    keep = places < torch.tensor(counts, device=rows.device)[:, None]
    chosen = from_matrix(keep.view(table.shape), bound.layout).reshape(values.shape)
    return chosen if eligible is None else chosen & eligible


def row_sums(one: Ranked, mask: Tensor) -> Tensor:
    """Return how many weights of each output row are True."""
    return matrix(mask, one.parts[0].bound.layout).flatten(0, 1).sum(dim=1)


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
