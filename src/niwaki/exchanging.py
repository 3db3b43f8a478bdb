"""Drop and grow: which active pieces an update gives up, and which others come in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from niwaki.allocation import Uniform, row_counts
from niwaki.choosing import choose, choose_by_row, draw, row_sums, sum_counts
from niwaki.errors import InputError
from niwaki.growth import ByFraction, DropAndGrow, dropped
from niwaki.pieces import Ranked
from niwaki.recipe import Recipe
from niwaki.selection import select
from niwaki.update_input import Scores, Update, tell


@dataclass(frozen=True)
class Staying:
    """What a drop leaves.

    Attributes:
        eligible: the active pieces that may stay.
        fraction: share of the active pieces that goes, of those that score lowest; None where all that may stay do.
        survivors: how many pieces stay of each tensor or group.
    """

    eligible: list[Tensor]
    fraction: float | None
    survivors: list[int]


def staying_after_drop(growth: DropAndGrow, ranked: Sequence[Ranked], scores: Scores, active: Sequence[Tensor], update: Update) -> Staying:
    """Return what the growth component's drop leaves; a threshold that moves is moved here."""
    now = sum_counts(active, ranked)
    if not isinstance(growth, ByFraction):
        eligible = [_may_stay(growth, one, pieces, update) for one, pieces in zip(ranked, active, strict=True)]
        return Staying(eligible, None, sum_counts(eligible, ranked))
    fraction = growth.fraction.at(update.progress)
    if growth.threshold is None:
        return Staying(list(active), fraction, [n - dropped(fraction, n) for n in now])
    value = update.numbers.get("growth.threshold", growth.threshold.initial)
    eligible = [(scores(i) >= value) & pieces for i, pieces in enumerate(active)]
    found = sum_counts(eligible, ranked)
    update.numbers["growth.threshold"] = growth.threshold.moved(value, sum(now) - sum(found), dropped(fraction, sum(now)))
    for i, one in enumerate(ranked):
        if now[i] and not found[i]:
            eligible[i] = select([partial(scores, i)], 1, eligible=[active[i]], names=[one.name], group=one.processes)[0]
            tell(update, f"kept one piece of {one.name}, of which no score reaches the threshold of growth {growth.name!r}")
    return Staying(eligible, None, [max(n, min(1, m)) for n, m in zip(found, now, strict=True)])


def _may_stay(growth: DropAndGrow, one: Ranked, active: Tensor, update: Update) -> Tensor:
    return active & growth.stays(update.observe_growth(one.parts[0].bound)).view(active.shape)


def drop_and_grow(
    recipe: Recipe,
    growth: DropAndGrow,
    ranked: Sequence[Ranked],
    saliency: Scores,
    counts: list[int],
    staying: Staying,
    active: Sequence[Tensor],
    update: Update,
) -> list[Tensor]:
    """Drop what the growth component says of the active pieces, then grow up to the target counts."""
    sharded = next((one.name for one in ranked if one.processes is not None), None)
    if growth.needs_whole and sharded is not None:
        raise InputError(f"growth: {growth.name!r} looks at whole tensors, and {sharded} is sharded; choices: gradient, momentum, random")
    joint, fraction = recipe.allocation.joint, staying.fraction
    now = staying.survivors if fraction is None else sum_counts(active, ranked)
    survivors = [min(n, count) for n, count in zip([sum(now)] if joint else now, counts, strict=True)]
    if fraction is not None and "survivors" in recipe.allocation.wants:
        survivors = [min(n, count) for n, count in zip(staying.survivors, counts, strict=True)]
    elif fraction is not None:
        survivors = [n - dropped(fraction, n) for n in survivors]
    if joint and fraction is not None:
        survivors = [max(n, min(count, len(ranked))) for n, count in zip(survivors, counts, strict=True)]  # one a tensor can stay
    eligible = staying.eligible
    left = sum_counts(eligible, ranked)
    if survivors == ([sum(left)] if joint else left):
        keep = eligible
    else:
        keep = draw(recipe, ranked, saliency, survivors, eligible, update, rows=False)

    def growths(i: int) -> Tensor:
        return ranked[i].score(growth, update.observe_growth)

    if recipe.allocation.by_row:
        return [
            _grown_by_row(recipe, ranked[i], partial(saliency, i), partial(growths, i), counts[i], active[i], keep[i])
            for i in range(len(ranked))
        ]
    free = [~k for k in keep]
    more = [count - n for count, n in zip(counts, survivors, strict=True)]
    grown = choose(recipe, ranked, growths, more, free, update, keep)
    return [k | g for k, g in zip(keep, grown, strict=True)]


def _grown_by_row(
    recipe: Recipe,
    one: Ranked,
    scores: Callable[[], Tensor],
    growths: Callable[[], Tensor],
    count: int,
    active: Tensor,
    keep: Tensor,
) -> Tensor:
    """Return what of a tensor is kept and grown, as many weights in every output row, or in every one that is not ablated.

    Args:
        recipe: whose allocation counts by row.
        one: the tensor.
        scores: the saliencies of its weights.
        growths: their growth scores.
        count: how many are active after the update.
        active: which were before it.
        keep: which of them the drop left.
    """
    targets = row_counts(count, one.layer.layout.outputs)
    assert isinstance(recipe.allocation, Uniform)
    if recipe.allocation.ablation is not None:
        salient = keep | select([growths], count - int(keep.sum()), eligible=[~keep], names=[one.name])[0]
        before = int((row_sums(one, active) > 0).sum())
        fewest = max(1.0, recipe.allocation.ablation * count / max(before, 1))
        targets = _ablated(count, row_sums(one, salient).tolist(), one.layer.layout.elements, fewest)
    keep = choose_by_row(one, scores, targets, keep)  # where the sparsity rises or a row is ablated, some have more than that
    more = [target - n for target, n in zip(targets, row_sums(one, keep).tolist(), strict=True)]
    return keep | choose_by_row(one, growths, more, ~keep)


def _ablated(count: int, salient: Sequence[int], elements: int, fewest: float) -> list[int]:
    """Return how many weights each output row gets where rows with fewer salient ones than ``fewest`` get none.

    The rows with the fewest go first, of equal ones the last, and no more of them than the others have room for.
    """
    width = elements // len(salient)
    gone = sorted((row for row, n in enumerate(salient) if n < fewest), key=lambda row: (salient[row], -row))
    room = len(salient) - -(-count // width)
    limits = [width] * len(salient)
    for row in gone[:room]:
        limits[row] = 0
    return row_counts(count, len(salient), limits)
