"""What units that were added as zeros become: copies of others, new ones, bridges between what a layer reads and what the next one makes.

Tensors get other data, and are not written into, so that a checkpoint can take everything back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.addition import Bridging, Copy
from niwaki.calibration import forward
from niwaki.counter import key, normal
from niwaki.errors import InputError
from niwaki.removed import named_modules
from niwaki.structured.cutting import Part
from niwaki.structured.insertion import Grown, Insertion

Batches = Sequence[tuple[Any, Any]]
Loss = Callable[[Any, Any], Tensor]


def copy_units(work: Insertion, grown: Iterable[Grown]) -> None:
    """Make added units copies of those that they stand behind; what reads a unit is divided by the number of its copies."""
    for group in grown:
        copies = torch.bincount(group.source, minlength=group.group.size)[group.source]
        for part, reads in group.listings("input"):
            tensor = work.tensors[part.name]
            values = tensor.detach().index_select(part.dim, _origin(part, group.source).to(tensor.device))
            if reads:
                divisor = torch.where(part.units >= 0, copies[part.units.clamp(min=0)], 1)
                values = values / _along(divisor.to(values), part.dim, values.ndim)
            tensor.data = values


def perturb(work: Insertion, grown: Iterable[Grown], size: float, seed: int) -> dict[tuple[str, str], Tensor]:
    """Move copies of units apart: each weight that makes them by ``ε s_j σ z``; weights that are zero stay zero, as masked ones must.

    ``σ`` is the root mean square of the original tensor, ``z`` is normal and the same for all copies of a unit, ``s_j`` lies evenly in
    [-1, 1].

    Returns:
        (group, tensor) -> what was added to the tensor for it.
    """
    moved: dict[tuple[str, str], Tensor] = {}
    for group in grown:
        offsets = _offsets(group.source)
        for part, makes in group.listings("output"):
            tensor = work.tensors[part.name]
            if not makes or size == 0.0 or not isinstance(tensor, nn.Parameter):
                continue
            old = tensor.detach()
            noise = normal(key(seed, 0, f"perturbation {group.group.name} {part.name}"), 0, old.numel()).view(old.shape)
            noise = noise.index_select(part.dim, _origin(part, group.source))
            factor = torch.where(part.units >= 0, offsets[part.units.clamp(min=0)], 0.0)
            step = size * work.spreads[part.name] * noise * _along(factor, part.dim, noise.ndim)
            step = step.to(old.device).masked_fill(old == 0, 0.0)
            tensor.data = old + step.to(old)
            moved[group.group.name, part.name] = step
    return moved


def make_new(work: Insertion, grown: Iterable[Grown], seed: int) -> list[str]:
    """Give added units weights of their own, all active, which nothing reads; return notes on what had no initial value."""
    groups, notes = list(grown), dict[str, None]()
    initial: dict[str, nn.Module | None] = {}
    for group in groups:
        for part, reads in group.listings("input"):
            entries = entries_of(part, group.added)
            tensor = work.tensors[part.name]
            if not reads:
                values, told = _initial(work, part, entries, initial, seed)
                notes |= dict.fromkeys([told] if told else [])
                tensor.data = tensor.detach().index_copy(part.dim, entries.to(tensor.device), values.to(tensor))
            if part.name in work.masked:
                given = work.masked[part.name]
                work.masks[given] = work.masks[given].index_fill(part.dim, entries, True)
    for group in groups:  # not by new units of another group either: each is judged by itself
        for part, reads in group.listings("input"):
            if reads:
                tensor = work.tensors[part.name]
                tensor.data = tensor.detach().index_fill(part.dim, entries_of(part, group.added).to(tensor.device), 0.0)
    return list(notes)


def bridge(work: Insertion, grown: Iterable[Grown], how: Bridging, data: Batches, loss: Loss, seed: int) -> None:
    """Connect new units by the largest bridging gradients alone, with biases of zero.

    Raises:
        InputError: units that are not made by one linear layer and read by one.
    """
    groups = list(grown)
    ends = [_ends(work, group) for group in groups]
    for group, (maker, reader), gradient in zip(groups, ends, bridging_gradients(work.model, ends, data, loss), strict=True):
        units = group.added.nonzero().flatten()
        means = _mean_magnitude(maker.weight), _mean_magnitude(reader.weight)
        into, out = how.weights(gradient, len(units), means, key(seed, 0, f"bridging {group.group.name}"))
        for weight, dim, values in ((maker.weight, 0, into), (reader.weight, 1, out)):
            weight.data = weight.detach().index_copy(dim, units.to(weight.device), values.to(weight))
        if maker.bias is not None:
            maker.bias.data = maker.bias.detach().index_fill(0, units.to(maker.bias.device), 0.0)


def bridging_gradients(model: nn.Module, ends: Sequence[tuple[Any, Any]], data: Batches, loss: Loss) -> list[Tensor]:
    """Return ``G = Σ dL/du xᵀ`` for pairs of linear layers: x is what the first reads, u what the second makes; float64 ``[M, N]``."""
    read: dict[nn.Module, list[Tensor]] = {}
    made: dict[nn.Module, list[Tensor]] = {}
    handles = [m.register_forward_pre_hook(lambda m, args: read.setdefault(m, []).append(args[0].detach())) for m, _ in ends]
    handles += [r.register_forward_hook(lambda r, _, out: made.setdefault(r, []).append(out)) for _, r in ends]
    found = [torch.zeros(r.weight.shape[0], m.weight.shape[1], dtype=torch.float64) for m, r in ends]
    try:
        for inputs, targets in data:
            read.clear()
            made.clear()
            with torch.enable_grad():
                value = loss(forward(model, inputs), targets)
            outs = [out for _, reader in ends for out in made[reader]]
            slopes = iter(torch.autograd.grad(value, outs))
            for place, (maker, reader) in enumerate(ends):
                for x, _ in zip(read[maker], made[reader], strict=True):
                    found[place] += (next(slopes).flatten(0, -2).double().T @ x.flatten(0, -2).double()).cpu()
    finally:
        for handle in handles:
            handle.remove()
    return found


def gradients(model: nn.Module, data: Batches, loss: Loss) -> dict[str, Tensor]:
    """Return the gradient of the mean loss of all batches with respect to every parameter that has one; gradients of the model stay."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    total: dict[str, Tensor] = {}
    for inputs, targets in data:
        with torch.enable_grad():
            value = loss(forward(model, inputs), targets) / len(data)
        slopes = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        for name, slope in zip(named, slopes, strict=True):
            if slope is not None:
                total[name] = total[name] + slope if name in total else slope
    return total


def pull_on_units(work: Insertion, names: Iterable[str], slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``(Σ w dL/dw)²`` over what makes each unit of some groups: group -> float64 ``[units]``."""
    found = {}
    for name in names:
        group = work.groups[name]
        total = torch.zeros(group.size + 1, dtype=torch.float64)
        for part in group.select("output"):
            if part.name in slopes:
                products = (work.tensors[part.name].detach() * slopes[part.name]).double().cpu()
                total.index_add_(0, part.units % (group.size + 1), products.movedim(part.dim, 0).reshape(len(part.units), -1).sum(dim=1))
        found[name] = total[:-1].square()
    return found


# ---------------------------------------------------------------- entries


def _origin(part: Part, source: Tensor) -> Tensor:
    """Return for every entry the one that it copies: that of the source of its unit, the first of it for the first, and so on."""
    index = torch.arange(len(part.units))
    for unit in (source != torch.arange(len(source))).nonzero().flatten().tolist():
        index[part.units == unit] = (part.units == source[unit]).nonzero().flatten()
    return index


def entries_of(part: Part, units: Tensor) -> Tensor:
    """Return the entries of some units (bool ``[units]``)."""
    return ((part.units >= 0) & units[part.units.clamp(min=0)]).nonzero().flatten()


def _offsets(source: Tensor) -> Tensor:
    """Return for every unit its place among the copies of its source, in [-1, 1]; 0 for units without copies."""
    found = torch.zeros(len(source), dtype=torch.float64)
    for unit in (torch.bincount(source, minlength=len(source)) > 1).nonzero().flatten().tolist():
        copies = (source == unit).nonzero().flatten()
        found[copies] = Copy.offsets(len(copies))
    return found


def _along(values: Tensor, dim: int, ndim: int) -> Tensor:
    return values.view([-1 if d == dim else 1 for d in range(ndim)])


# ---------------------------------------------------------------- initial values


def _initial(work: Insertion, part: Part, entries: Tensor, made: dict[str, nn.Module | None], seed: int) -> tuple[Tensor, str]:
    """Return initial values of some entries, and a note where the module cannot say any.

    Then weights that make units are normal with the root mean square of those that there are, and others are the mean of those.
    """
    path, _, own = part.name.rpartition(".")
    if path not in made:
        made[path] = _fresh(named_modules(work.model)[path], key(seed, 0, f"initial {path}"))
    module = made[path]
    if module is not None:
        fresh: Tensor = getattr(module, own)
        return fresh.detach().index_select(part.dim, entries), ""
    tensor = work.tensors[part.name].detach().cpu()
    others = torch.ones(len(part.units), dtype=torch.bool).index_fill(0, entries, False).nonzero().flatten()
    known = tensor.index_select(part.dim, others).double()
    shape = [len(entries) if d == part.dim else size for d, size in enumerate(tensor.shape)]
    why = f"{part.name}: its module has no reset_parameters, so new entries are"
    if part.role != "output":
        return known.mean(dim=part.dim, keepdim=True).expand(shape), f"{why} the mean of the others"
    noise = normal(key(seed, 0, f"initial {part.name}"), 0, int(torch.tensor(shape).prod())).view(shape)
    return noise * known.square().mean().sqrt(), f"{why} normal with the root mean square of the others"


def _fresh(module: nn.Module, seed: int) -> nn.Module | None:
    """Return a copy of a module on the CPU with its initial values, or None where it does not know how to make them."""
    if not callable(getattr(module, "reset_parameters", None)):
        return None
    fresh = copy.deepcopy(module).cpu()
    initialize: Any = fresh.reset_parameters
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        initialize()
    return fresh


# ---------------------------------------------------------------- bridges


def _ends(work: Insertion, group: Grown) -> tuple[Any, Any]:
    """Return the linear layer that makes the units and the one that reads them."""
    modules = named_modules(work.model)
    name = group.group.name
    makers: list[Any] = [modules[part.name.rpartition(".")[0]] for part in group.group.select("output")]
    readers: list[Any] = [modules[part.name.rpartition(".")[0]] for part in group.group.select("input")]
    linear = all(isinstance(module, nn.Linear) for module in (*makers, *readers))
    whole = linear and len(makers) == len(readers) == 1 and makers[0].out_features == readers[0].in_features == group.group.size
    if not whole:
        raise InputError(f"by: 'bridging' connects what one linear layer reads with what the next one makes; {name} is not so; choose new")
    return makers[0], readers[0]


def _mean_magnitude(weight: Tensor) -> float:
    """Return the mean magnitude of the weights that are not zero."""
    values = weight.detach().double().abs()
    return float(values.sum() / (values != 0).sum().clamp(min=1))
