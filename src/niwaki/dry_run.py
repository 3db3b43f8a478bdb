"""The dry run: what a recipe would do to a model, without touching it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from niwaki.allocation import guard
from niwaki.clock import Clock
from niwaki.collecting import asking, bytes_of, requests_of, statistics_of
from niwaki.dependency import Example, Group
from niwaki.errors import InputError
from niwaki.granularity import Grouped
from niwaki.pieces import bounds_of
from niwaki.ranking import find_groups_with, rank_targets
from niwaki.recipe import Prune, Recipe
from niwaki.recipe.combinations import decides
from niwaki.target import LeftOut


@dataclass(frozen=True)
class PlannedTensor:
    """One row of the plan.

    Attributes:
        name: canonical parameter name, or name of the dependency group whose units are masked.
        shape: of the whole parameter, or of the one that makes the units.
        pieces: how many pieces the granularity makes of it.
        keep: pieces kept at the end, or None when they follow from scores that are not known yet.
        why: what decides the number.
    """

    name: str
    shape: tuple[int, ...]
    pieces: int
    keep: int | None
    why: str

    @property
    def sparsity(self) -> float | None:
        """Share of the pieces that is masked at the end."""
        return None if self.keep is None else 1.0 - self.keep / self.pieces


@dataclass(frozen=True)
class Plan:
    """What a recipe would do: which tensor, how much, when and why, and what is left out and why.

    Attributes:
        tensors: the targets, in parameter order: tensors, or groups of them that share masks.
        left_out: parameters that stay dense, each with its reason.
        updates: optimizer step -> sparsity of the mask update before it, None where scores or losses decide it; empty where nothing is
            selected.
        final_sparsity: of all targets together, or the most that a schedule may reach; None where the strength or the scores decide.
        notes: guards that would act.
    """

    tensors: tuple[PlannedTensor, ...]
    left_out: tuple[LeftOut, ...]
    updates: dict[int, float | None]
    final_sparsity: float | None
    notes: tuple[str, ...] = ()

    def to_data(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON."""
        return {
            "tensors": [
                {"name": t.name, "shape": list(t.shape), "pieces": t.pieces, "keep": t.keep, "sparsity": t.sparsity, "why": t.why}
                for t in self.tensors
            ],
            "left_out": [{"name": one.name, "reason": one.reason} for one in self.left_out],
            "updates": {str(step): sparsity for step, sparsity in self.updates.items()},
            "final_sparsity": self.final_sparsity,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [(t.name, " x ".join(map(str, t.shape)), f"{t.pieces}", "?" if t.keep is None else f"{t.keep}", t.why) for t in self.tensors]
        table = [("tensor", "shape", "pieces", "kept", "why"), *rows]
        widths = [max(len(row[i]) for row in table) for i in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        lines.append(f"masks are updated: {self.when()}")
        for reason in dict.fromkeys(one.reason for one in self.left_out):
            lines.append(f"left dense, {reason}: {', '.join(one.name for one in self.left_out if one.reason == reason)}")
        return "\n".join([*lines, *self.notes])

    def when(self) -> str:
        """Say in a few words when masks are updated."""
        if not self.updates:
            return "every step, by the relaxation's strength" if any(t.keep is None for t in self.tensors) else "never"
        steps = list(self.updates)
        if len(steps) == 1:
            return f"once, before step {steps[0]}"
        return f"{len(steps)} times, before steps {steps[0]} to {steps[-1]}"


def plan(
    model: nn.Module,
    recipe: Recipe,
    *,
    total_steps: int | None = None,
    steps_per_epoch: int | None = None,
    tokens_per_step: int | None = None,
    groups: Sequence[Group] | None = None,
    example: Example | None = None,
) -> Plan:
    """Return what a recipe would do to a model in a run of this length; neither is changed.

    ``groups`` or ``example`` are needed for granularities whose pieces are units of dependency groups, as for the sparsifier.

    Raises:
        InputError: as :class:`niwaki.Sparsifier` would for the same arguments.
    """
    if recipe.stages is not None:
        raise InputError("recipe: it has stages; plan each of niwaki.recipe.stages.unroll(recipe), or use niwaki run --dry-run")
    clock = Clock(total_steps, steps_per_epoch, tokens_per_step)
    notes = recipe.fit(clock)
    if isinstance(recipe.granularity, Grouped) and groups is None:
        groups, _ = find_groups_with(model, recipe.granularity, example, None)
    ranked, left_out = rank_targets(model, recipe, groups)
    sparsity = recipe.final_sparsity
    keep: list[int | None] = [None] * len(ranked)
    why = f"relaxation {recipe.relaxation.name}: its strength decides"
    if recipe.selects and recipe.schedule.decides:
        most = "" if sparsity is None else f", at most {sparsity:.6g}"
        why = f"schedule {recipe.schedule.name}: the {'validation loss decides' if recipe.schedule.validates else 'scores decide'}{most}"
    elif sparsity is not None and recipe.allocation.joint:
        why = f"allocation {recipe.allocation.name}: one ranking of all tensors"
    elif sparsity is not None and recipe.allocation.asked:
        why = f"allocation {recipe.allocation.name}: it looks at {' and '.join(dict.fromkeys(recipe.allocation.asked.values()))}"
    elif sparsity is not None:
        layers = [one.layer for one in ranked]
        counts, raised = guard(recipe.allocation.keep(sparsity, layers, sparsity), layers)
        if recipe.granularity.sparsity is not None:  # every group keeps its best, short ones too
            best = [recipe.granularity.protected(torch.zeros(one.layer.layout.shape), one.layer.layout) for one in ranked]
            counts = [int(mask.sum()) for mask in best if mask is not None]
        keep = list(counts)
        notes += [f"keeps one piece of {name}, which the allocation {recipe.allocation.name!r} would empty" for name in raised]
        why = f"allocation {recipe.allocation.name}"
    elif recipe.selects:
        why = f"selection {recipe.selection.name}: the scores decide"
    elif not decides(recipe.relaxation):
        keep = [one.pieces for one in ranked]
        why = "no selection"
    updates: dict[int, float | None] = {}
    if recipe.selects:
        for step in range(recipe.schedule.last(clock) + 1):
            due = recipe.schedule.at(step, sparsity or 0.0, clock)
            if due is not None:
                updates[step] = None if sparsity is None or recipe.schedule.decides else due
    rows = []
    for one, count in zip(ranked, keep, strict=True):
        shape = tuple(one.makers[0].bound.parameter.shape)
        shared = "" if one.parts == one.makers else f"; in {len(bounds_of([one]))} tensors"
        rows.append(PlannedTensor(one.name, shape, one.pieces, count, why + shared))
    return Plan(tuple(rows), tuple(left_out), updates, sparsity, tuple(notes))


def statistics_bytes(
    model: nn.Module,
    recipe: Recipe | Prune,
    *,
    groups: Sequence[Group] | None = None,
    example: Example | None = None,
    memory: int | None = None,
) -> int:
    """Return the bytes that a recipe's statistics of a model take; nothing is collected for that.

    Args:
        model: is not changed.
        recipe: to be carried out on it.
        groups: as for :func:`plan`.
        example: as for :func:`plan`.
        memory: most bytes that they may take; None for no limit.

    Raises:
        InputError: they take more than ``memory``; it says what would fit.

    >>> everything = {"weights": {"include": ["*"]}}
    >>> recipe = Recipe(sparsity=0.5, saliency={"woodfisher": {"gradients": 10}}, target=everything)
    >>> statistics_bytes(nn.Linear(4, 1, bias=False), recipe)  # 10 gradients of 4 weights in float32
    160
    """
    if not any(requests_of(component) for component in asking(recipe)):
        return 0
    if isinstance(recipe.granularity, Grouped) and groups is None:
        groups, _ = find_groups_with(model, recipe.granularity, example, None)
    ranked, _ = rank_targets(model, recipe, groups)
    return bytes_of(statistics_of(recipe, ranked), memory)
