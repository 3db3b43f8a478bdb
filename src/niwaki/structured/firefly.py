"""Adding the units that lower the loss most: many are proposed at once, and the best are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from niwaki.dependency import Example, Group
from niwaki.errors import InputError, did_you_mean
from niwaki.masks import Masks
from niwaki.structured import newcomers
from niwaki.structured.cutting import Part
from niwaki.structured.insertion import Grown, Insertion
from niwaki.structured.running import evaluating
from niwaki.structured.widening import Wider, copied, prepared, why_not, wider


@torch.no_grad()
def grow_best(
    model: nn.Module,
    example: Example,
    data: Iterable[tuple[Any, Any]],
    loss: Callable[[Any, Any], Tensor],
    keep: int,
    *,
    new: int = 8,
    names: Sequence[str] | None = None,
    perturbation: float = 0.01,
    groups: Sequence[Group] | None = None,
    masks: Mapping[str, Tensor] | None = None,
    optimizer: Optimizer | None = None,
    in_place: bool = False,
    attributes: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Wider:
    """Return a model with the ``keep`` units more that lower the loss most, of all splits and of new units.

    In a copy every unit is split into ``w ± ε σ z`` and new units with random weights are put beside them, read with weight zero. One
    gradient pass says what each would do to the loss, to the lowest order that does not vanish:

    - a split lowers it by ``-½ Σ_± <dL/dw_±, ±ε σ z>``, which is of second order, ``-½ ε² σ² zᵀ S z`` with the splitting matrix S;
    - a new unit, read with ``a = -ε σ √n g / |g|`` with ``g = dL/da`` at zero (n of them, not zero, in each tensor), by ``ε σ √n |g|``.

    The best that lower it are kept, over all groups together. This is the simple version: z is drawn rather than trained, and each
    candidate is judged once, by itself.

    Args:
        model: stays as it is, unless ``in_place``.
        example: arguments of a forward pass.
        data: batches ``(inputs, targets)``.
        loss: ``loss(outputs, targets)``.
        keep: units to add, at least 1.
        new: new units that are proposed for each group.
        names: groups to widen; None for all of channels that can have more units.
        perturbation: ``ε``, as a share of the root mean square ``σ`` of a tensor's weights.
        groups: the model's dependency groups; None to find them.
        masks: of the model; masked weights count as zero.
        optimizer: of the model; goes on as with :func:`widen`.
        in_place: make the model itself, and its optimizer, wider.
        attributes: numbers that cannot be found out: path -> value afterwards.
        seed: of what is random.

    Raises:
        InputError: a group that does not exist or cannot have more units, a number that is not above zero, or no candidate that lowers
            the loss.

    Source: Wu, Liu, Stone, Liu 2020 (Firefly), equations 3 to 5, without the gradient steps on z.
    """
    if keep < 1 or new < 0 or not 0.0 < perturbation < float("inf"):
        raise InputError(f"grow_best: keep={keep}, new={new} and perturbation={perturbation} must be above zero (new: at least 0)")
    groups = prepared(model, example, groups)
    chosen = _chosen(groups, names)
    given, batches = Masks(masks or {}), list(data)
    tried = copied(model, example, groups, given, optimizer, attributes)
    with evaluating(tried.model):
        candidates = _Candidates(tried, chosen, new, perturbation, seed)
        best = candidates.best(keep, batches, loss)
    work = copied(model, example, groups, given, optimizer, attributes)
    with evaluating(work.model):
        grown, reasons = work.insert({name: candidates.anchors(name, kept) for name, kept in best.items()})
        if reasons:
            raise InputError("grow_best: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))
        candidates.hand_over(work, grown, best)
        work.finish()
    widths = {name: one.group.size for name, one in grown.items()}
    return wider(work, given, widths, candidates.notes, in_place, model, optimizer)


class _Candidates:
    """A copy of a model in which every unit of some groups is split, and new units stand behind them.

    Of a group with n units, unit 2 i and its copy 2 i + 1 are the halves of unit i, and those from 2 n are new.

    Attributes:
        notes: about initial values.
    """

    def __init__(self, work: Insertion, names: Sequence[str], new: int, size: float, seed: int) -> None:
        self.work, self.size = work, size
        self.sizes = {name: work.groups[name].size for name in names}
        halves, reasons = work.insert({name: torch.arange(count) for name, count in self.sizes.items()})
        last = {name: torch.full((new,), 2 * count - 1) for name, count in self.sizes.items()} if new else {}
        behind, more = work.insert(last) if new and not reasons else ({}, {})
        if reasons | more:
            raise InputError("grow_best: " + "; ".join(f"{name}: {why}" for name, why in (reasons | more).items()))
        self.halves = {
            name: Grown(one.group, torch.cat([one.source, torch.arange(2 * self.sizes[name], one.group.size)]))
            for name, one in halves.items()
        }
        newcomers.copy_units(work, self.halves.values())
        self.notes = newcomers.make_new(work, behind.values(), seed)
        if wrong := work.wrong():
            raise InputError(f"grow_best: units cannot be split without a change of what the model computes ({wrong}); choose other names")
        self.before = {name: tensor.detach() for name, tensor in work.tensors.items()}
        self.moved = newcomers.perturb(work, self.halves.values(), size, seed)

    def best(self, keep: int, data: newcomers.Batches, loss: newcomers.Loss) -> dict[str, Tensor]:
        """Return which candidates lower the loss most: group -> bool, its units and then the new ones.

        New units that are kept get their outgoing weights.
        """
        slopes = newcomers.gradients(self.work.model, data, loss)
        scores = {name: torch.cat([self._by_splitting(name, slopes), self._by_reading(name, slopes)]) for name in self.sizes}
        every = torch.cat(list(scores.values()))
        order = every.argsort(descending=True, stable=True)[:keep]
        kept = torch.zeros(len(every), dtype=torch.bool).index_fill(0, order[every[order] > 0], True)
        if not kept.any():
            raise InputError("grow_best: no candidate lowers the loss on these data; propose more new ones, or train on")
        if int(kept.sum()) < keep:
            self.notes.append(f"{int(kept.sum())} candidates lower the loss, and {keep} were asked for")
        parts = torch.split(kept, [len(score) for score in scores.values()])
        return {name: part for name, part in zip(scores, parts, strict=True) if part.any()}

    def anchors(self, name: str, kept: Tensor) -> Tensor:
        """Return the units of the original group that those that are kept stand behind."""
        size = self.sizes[name]
        split = kept[:size].nonzero().flatten()
        return torch.cat([split, torch.full((int(kept[size:].sum()),), size - 1)])

    def hand_over(self, work: Insertion, grown: Mapping[str, Grown], best: Mapping[str, Tensor]) -> None:
        """Give a model to which the best were added as zeros the values that they have here, and take splits that were not kept back."""
        gone: dict[tuple[str, int], Tensor] = {}
        read: list[tuple[Part, Tensor]] = []
        for name, size in self.sizes.items():
            kept = best.get(name, torch.zeros(self.halves[name].group.size - size, dtype=torch.bool))
            stays = torch.cat([torch.stack([torch.ones(size, dtype=torch.bool), kept[:size]], dim=1).flatten(), kept[size:]])
            whole = torch.zeros_like(stays).index_fill(0, 2 * (~kept[:size]).nonzero().flatten(), True)
            for part, reads in self.halves[name].listings("input"):
                self._unmove(name, part, whole)
                read += [(part, whole)] if reads else []
                out = (part.units >= 0) & ~stays[part.units.clamp(min=0)]
                gone[part.name, part.dim] = gone.get((part.name, part.dim), torch.zeros_like(out)) | out
        for part, whole in read:  # after all weights are what they were
            self._reread(part, whole)
        for name, tensor in work.tensors.items():
            values = self.work.tensors[name].detach()
            for dim in range(values.ndim):
                if (name, dim) in gone:
                    values = values.index_select(dim, (~gone[name, dim]).nonzero().flatten().to(values.device))
            tensor.data = values
        for name, one in grown.items():
            units = torch.zeros(one.group.size, dtype=torch.bool)
            units[one.group.size - int(best[name][self.sizes[name] :].sum()) :] = True  # the new ones, which are active
            for part, _ in one.listings():
                if part.name in work.masked:
                    given = work.masked[part.name]
                    work.masks[given] = work.masks[given].index_fill(part.dim, newcomers.entries_of(part, units), True)

    def _by_splitting(self, name: str, slopes: Mapping[str, Tensor]) -> Tensor:
        """Return by how much each split lowers the loss: float64 ``[units]``."""
        group, size = self.halves[name].group, self.sizes[name]
        total = torch.zeros(group.size + 1, dtype=torch.float64)
        for part, makes in self.halves[name].listings("output"):
            step = self.moved.get((name, part.name))
            if makes and step is not None and part.name in slopes:
                products = (slopes[part.name].double() * step).cpu().movedim(part.dim, 0).reshape(len(part.units), -1).sum(dim=1)
                total.index_add_(0, part.units % (group.size + 1), products)
        return -0.5 * total[: 2 * size].view(size, 2).sum(dim=1)

    def _by_reading(self, name: str, slopes: Mapping[str, Tensor]) -> Tensor:
        """Return by how much each new unit lowers the loss once it is read, and let it be read so: float64 ``[new]``."""
        group, size = self.halves[name].group, self.sizes[name]
        total = torch.zeros(group.size - 2 * size, dtype=torch.float64)
        for part, reads in self.halves[name].listings("input"):
            if not reads or part.name not in slopes:
                continue
            tensor = self.work.tensors[part.name]
            values = tensor.detach().clone()
            for place, unit in enumerate(range(2 * size, group.size)):
                entries = (part.units == unit).nonzero().flatten().to(values.device)
                slope = slopes[part.name].index_select(part.dim, entries).double()
                length = float(slope.norm())
                reach = self.size * self.work.spreads[part.name] * float(slope.count_nonzero()) ** 0.5
                total[place] += reach * length
                if length > 0.0:
                    values.index_copy_(part.dim, entries, (-reach / length * slope).to(values))
            tensor.data = values
        return total

    def _reread(self, part: Part, whole: Tensor) -> None:
        """Double what reads units that are not split after all; halving and doubling are exact."""
        tensor = self.work.tensors[part.name]
        entries = newcomers.entries_of(part, whole).to(tensor.device)
        tensor.data = tensor.detach().index_copy(part.dim, entries, 2.0 * tensor.detach().index_select(part.dim, entries))

    def _unmove(self, name: str, part: Part, whole: Tensor) -> None:
        """Give units that are not split after all the weights that they had."""
        step = self.moved.get((name, part.name))
        if step is None:
            return
        tensor = self.work.tensors[part.name]
        entries = torch.zeros(len(part.units), dtype=torch.bool).index_fill(0, newcomers.entries_of(part, whole), True)
        back = entries.view([-1 if d == part.dim else 1 for d in range(step.ndim)]).to(step.device) & (step != 0)
        tensor.data = torch.where(back, self.before[part.name], tensor.detach())


def _chosen(groups: Sequence[Group], names: Sequence[str] | None) -> list[str]:
    """Return the names of the groups to widen.

    Raises:
        InputError: a name of no group, or of one that cannot have more units.
    """
    named = {group.name: group for group in groups}
    if names is None:
        names = [group.name for group in groups if group.kind == "channel" and not why_not(group)]
    for name in names:
        if name not in named:
            raise InputError(f"names: no group is called {name!r}; {did_you_mean(name, named)}")
        if why := why_not(named[name]):
            raise InputError(f"names: {name} cannot have more units: {why}")
    if not names:
        raise InputError("names: the model has no group of channels that could have more units; see find_groups")
    return list(names)
