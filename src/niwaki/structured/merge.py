"""Merging units that resemble each other, so that those that stay take over what those that go did.

Units of a removable dependency group are exchangeable: with equal weights that make them, and equal biases and normalizations, two are
equal for every input. What reads them then loses nothing when one goes and the other's outgoing weights become the sum of both. For
similar units the sum is the best that can be done without data (Srinivas & Babu 2015).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.alike import Merge, merges, places
from niwaki.dependency import Example, Group, Member, find_groups
from niwaki.errors import InputError, did_you_mean
from niwaki.masks import Masks
from niwaki.removed import named_modules, named_tensors
from niwaki.structured.costs import unit_masks
from niwaki.structured.running import difference, evaluating, run


@dataclass(frozen=True)
class Merged:
    """What :func:`merge` returns.

    Attributes:
        model: the units that went are zero in it.
        masks: of the units that went; :func:`niwaki.shrink` takes them out.
        merges: group -> what was merged, in this order.
    """

    model: nn.Module
    masks: Masks
    merges: dict[str, list[Merge]]


def merge(model: nn.Module, widths: Mapping[str, int], example: Example, *, groups: Sequence[Group] | None = None) -> Merged:
    """Return a copy of a model in which the most similar units of groups are merged until so many are left.

    ``s_ij = ‖a_j‖² ‖w_i - w_j‖²``: of the pair with the least, unit j goes, and ``a_i <- a_i + a_j``. Here ``w`` is all that makes a unit
    (its weights, bias, and a batch normalization behind it, folded into them), and ``a`` all that reads it. Where a multiple of a unit's
    input makes the same multiple of its output (ReLU; this is tried on the example), multiples count as alike:
    ``s_ij = ‖a_j‖² ‖c w_i - w_j‖²`` with the best ``c ≥ 0``, and ``a_i <- a_i + c a_j``. If ``c = 0``, the unit is only removed.

    Args:
        model: left as it was.
        widths: group -> how many units stay.
        example: arguments of a forward pass.
        groups: the model's dependency groups; None to find them.

    Raises:
        InputError: a group that does not exist, of which nothing can be removed, or whose units cannot be compared, or a width that is
            not between 1 and its size.

    Source: Srinivas & Babu 2015, section 3.

    >>> model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Tanh(), nn.Linear(3, 1, bias=False))
    >>> model[0].weight.data, model[2].weight.data = torch.tensor([[1.0], [2.0], [1.0]]), torch.tensor([[3.0, 4.0, 5.0]])
    >>> merged = merge(model, {"0": 2}, torch.ones(1, 1))
    >>> merged.merges["0"], merged.model[2].weight.data
    ([Merge(unit=0, into=2, scale=1.0, saliency=0.0)], tensor([[0., 4., 8.]]))
    """
    groups = find_groups(model, example) if groups is None else groups
    named = {group.name: group for group in groups}
    for name, width in widths.items():
        if name not in named:
            raise InputError(f"widths: no group is called {name!r}; {did_you_mean(name, named)}")
        if not named[name].removable:
            raise InputError(f"widths: no unit of {name} can be removed: {named[name].reason}")
        if not 1 <= width <= named[name].size:
            raise InputError(f"widths: {name} has {named[name].size} units, so {width} of them cannot stay")
    work = copy.deepcopy(model)
    merges, kept = {}, {}
    with torch.no_grad(), evaluating(work):
        for name, width in widths.items():
            merges[name], kept[name] = _merge_group(work, named[name], width, example)
        masks = unit_masks(work, groups, kept)
        masks.apply_(work)
    return Merged(work, masks, merges)


def _merge_group(model: nn.Module, group: Group, width: int, example: Example) -> tuple[list[Merge], Tensor]:
    """Merge units of one group in place; return what was merged, and which units stay (bool)."""
    tensors = named_tensors(model)
    entries = {m: places(m.units, group.size, f"widths: units of {group.name} in {m.name}") for m in group.members}
    if {(m.name, m.dim) for m in group.made_by()} & {(m.name, m.dim) for m in group.read_by()}:
        raise InputError(f"widths: what makes the units of {group.name} reads them too (tied weights); they cannot be merged")
    if len({(m.name, m.dim) for m in group.read_by()}) < len(group.read_by()):
        raise InputError(
            f"widths: units of {group.name} are multiplied with each other before they are read, so that they cannot be merged"
        )
    makes = _folded(model, group, tensors, entries)
    scales = makes is not None and _is_homogeneous(model, group, example)
    made = torch.cat([_slices(tensors, m, entries) for m in group.members if m.role != "input"], dim=1) if makes is None else makes
    read = torch.cat([_slices(tensors, m, entries) for m in group.read_by()], dim=1) if group.read_by() else made.new_zeros(group.size, 0)
    alone = torch.ones(group.size, dtype=torch.bool)
    found = list(itertools.islice(merges(made, read, alone, scales), group.size - width))
    begin = 0
    for member in group.read_by():
        tensor, place = tensors[member.name], entries[member]
        moved = tensor.movedim(member.dim, 0)
        size = moved[place].flatten(1).shape[1]
        moved[place] = read[:, begin : begin + size].view(moved[place].shape).to(moved)
        begin += size
    return found, alone


def _slices(tensors: Mapping[str, Tensor], member: Member, entries: Mapping[Member, Tensor]) -> Tensor:
    """Return what every unit has in a member, in float64: ``[units, elements of one]``."""
    return tensors[member.name].detach().cpu().movedim(member.dim, 0)[entries[member]].flatten(1).to(torch.float64)


def _folded(model: nn.Module, group: Group, tensors: Mapping[str, Tensor], entries: Mapping[Member, Tensor]) -> Tensor | None:
    """Return weights and bias of every unit with the batch normalization behind them folded in: ``[units, inputs + 1]``.

    With scale g, shift s, mean m and variance v: ``g w / √(v + ε)`` and ``s + g (b - m) / √(v + ε)``. None where the units are made, or
    changed, in another way.
    """
    chain = _chain(model, group)
    if chain is None:
        return None
    maker, bias, norm = chain
    weight = _slices(tensors, maker, entries)
    offset = weight.new_zeros(group.size, 1) if bias is None else _slices(tensors, bias, entries)
    if norm is not None:
        mean, variance = (value.detach().cpu().to(torch.float64)[:, None] for value in (norm.running_mean, norm.running_var))
        gain = (variance + norm.eps).rsqrt()
        offset = (offset - mean) * gain
        if norm.affine:
            scale, shift = (value.detach().cpu().to(torch.float64)[:, None] for value in (norm.weight, norm.bias))
            gain, offset = gain * scale, offset * scale + shift
        weight = weight * gain
    return torch.cat([weight, offset], dim=1)


def _chain(model: nn.Module, group: Group) -> tuple[Member, Member | None, Any] | None:
    """Return the one weight that makes the units, its bias, and the batch normalization that they go through; None for anything else."""
    if len(group.made_by()) != 1:
        return None
    [maker] = group.made_by()
    module = maker.name.rpartition(".")[0]
    along = [member for member in group.members if member.role == "along"]
    bias = next((member for member in along if member.name == f"{module}.bias".lstrip(".")), None)
    owners = {member.name.rpartition(".")[0] for member in along if member is not bias}
    norms = [named_modules(model)[owner] for owner in owners]
    if len(norms) > 1 or any(not isinstance(n, nn.modules.batchnorm._BatchNorm) or n.running_mean is None for n in norms):
        return None
    if any(len(member.units) != group.size for member in along):
        return None
    return maker, bias, norms[0] if norms else None


def _is_homogeneous(model: nn.Module, group: Group, example: Example) -> bool:
    """Return whether what goes into the units, doubled, comes out of them doubled: tried by halving what reads them."""
    chain = _chain(model, group)
    if chain is None:
        return False
    maker, bias, norm = chain
    makes = {maker.name} if bias is None else {maker.name, bias.name}
    if norm is not None:
        path = next(name for name, module in named_modules(model).items() if module is norm)
        makes = {f"{path}.weight", f"{path}.bias"} if norm.affine else set()
    if not makes:
        return False
    other = copy.deepcopy(model)
    tensors = named_tensors(other)
    for member in group.members:
        if member.role == "input" or member.name in makes:
            tensors[member.name].movedim(member.dim, 0)[member.units >= 0] *= 0.5 if member.role == "input" else 2.0
    return not difference(run(other, example), run(model, example))
