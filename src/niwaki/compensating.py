"""What survivors do when others are removed, on a model: the new values that a compensation finds, written before the masks change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.collecting import Collected
from niwaki.compensation import Change, Compensation, Removal, Units
from niwaki.granularity import Grouped
from niwaki.layout import is_transposed_linear
from niwaki.masked import MaskedTensor
from niwaki.masks import canonical_name
from niwaki.pieces import Part, Ranked, Slices

BIASED = (nn.Linear, nn.modules.conv._ConvNd)
"""Modules that add a bias to what their weight makes."""


@torch.no_grad()
def compensate(
    model: nn.Module,
    compensation: Compensation,
    ranked: Sequence[Ranked],
    tensors: Mapping[str, MaskedTensor],
    keep: Mapping[str, Tensor],
    pieces: Sequence[Tensor],
    seen: Collected,
) -> list[str]:
    """Give the survivors of a coming update the values that a compensation finds for them; return sentences for the user.

    Args:
        model: whose weights and biases change.
        compensation: what finds them.
        ranked: what is ranked.
        tensors: their tensors by name, with the masks as they are before the update.
        keep: the coming masks, bool in the tensors' views.
        pieces: which pieces of everything ranked are kept.
        seen: statistics from before the update.
    """
    biases = _biases(model)
    changes: dict[str, Change] = {}
    for name, mask in keep.items():
        tensor = tensors[name]
        active = tensor.kept(tensor.pruned)
        adjusted = seen.curvature is not None and name in seen.curvature.active  # it may change although nothing goes from it
        if tensor.bound.parameter.ndim < 2 or (bool((mask | ~active).all()) and not adjusted):
            continue
        bias_name, bias = biases.get(tensor.bound.parameter, (None, None))
        weight = tensor.weight.masked_fill(~active, 0.0)
        statistics = seen.values.get(name, {})
        values = None if bias is None else bias.detach()
        changes[name] = Change(name, tensor.bound.layout, weight, active, mask & active, statistics, values, bias_name)
    if all(torch.equal(change.keep, change.active) for change in changes.values()):
        return []
    units = [_units(one, kept, tensors) for one, kept in zip(ranked, pieces, strict=True) if isinstance(one.granularity, Grouped)]
    removal = Removal(changes, units, seen.curvature)
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, values in compensation.compensate(removal).items():
        if name in changes:
            tensors[name].rewrite(values.masked_fill(~changes[name].keep, 0.0).to(tensors[name].weight.dtype))
        else:
            parameters[name].copy_(values)
    return removal.notes


def _biases(model: nn.Module) -> dict[nn.Parameter, tuple[str, nn.Parameter]]:
    """Return for each weight the bias that its module adds, where it is the only weight of that bias."""
    found: dict[nn.Parameter, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, BIASED) or is_transposed_linear(module):
            bias = getattr(module, "bias", None)
            if isinstance(bias, nn.Parameter):
                found[module.weight] = (canonical_name(f"{path}.bias" if path else "bias"), bias)
    return found


def _units(one: Ranked, kept: Tensor, tensors: Mapping[str, MaskedTensor]) -> Units:
    along = [(*_entries(part), part.bound.parameter.detach()) for part in one.along]
    active = one.active(lambda bound: tensors[bound.name].pruned)
    return Units(
        one.name,
        active,
        kept & active,
        [_entries(part) for part in one.makers],
        [_entries(part) for part in one.readers],
        [(name, dim, values, owner) for name, dim, _, owner, values in along],
    )


def _entries(part: Part) -> tuple[str, int, tuple[int, ...], Tensor]:
    """Return the dimension of the parameter that units are in, and the unit of each of its entries, or -1."""
    cut = part.cut
    assert isinstance(cut, Slices)
    size = cut.shape[cut.dim]
    owner = torch.full((size + 1,), -1, dtype=torch.int64)  # the last takes what places are filled up with
    owner[cut.places.cpu()] = cut.units.cpu()[:, None].expand(cut.places.shape)
    return part.bound.name, cut.dim, cut.shape, owner[:size]
