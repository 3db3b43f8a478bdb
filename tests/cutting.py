"""The independent oracle of groups: a model cut by hand, with nothing but index_select, against the masked one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.dependency import Group

Cuts = Sequence[tuple[Group, Tensor]]
"""Groups, and the units of each that go."""

Numbers = Callable[[Any, Mapping[str, int]], Mapping[str, Any]]
"""Says, of a model whose tensors were cut, and of how many units of each cut group are left, which attributes have to have which values."""


def scrambled(model: nn.Module) -> nn.Module:
    """Return the model in double precision, with no bias, scale or statistic as it starts."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    return model.double().eval()


def some_units(groups: Iterable[Group], share: float) -> Cuts:
    """Choose units of every removable group."""
    generator = torch.Generator().manual_seed(0)
    return [(g, torch.randperm(g.size, generator=generator)[: int(share * g.size)].sort().values) for g in groups if g.removable]


def masked(model: nn.Module, cuts: Cuts) -> nn.Module:
    """Return a copy whose parameters are zero in all entries of the units."""
    model = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for group, units in cuts:
            for member in group.members:
                if member.name in parameters:
                    parameters[member.name].index_fill_(member.dim, member.entries(units), 0.0)
    return model


def cut(model: nn.Module, cuts: Cuts, numbers: Numbers = lambda model, left: {}) -> nn.Module:
    """Return a copy whose parameters and buffers lack all entries of the units."""
    model = copy.deepcopy(model)
    gone: dict[tuple[str, int], set[int]] = {}
    for group, units in cuts:
        for member in group.members:
            gone.setdefault((member.name, member.dim), set()).update(member.entries(units).tolist())
    for (name, dim), entries in gone.items():
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, own)
        keep = torch.tensor([i for i in range(old.shape[dim]) if i not in entries])
        new = old.detach().index_select(dim, keep).contiguous()
        setattr(module, own, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    left = {group.name: group.size - len(units) for group, units in cuts}
    for path, value in numbers(model, left).items():
        where, _, own = path.rpartition(".")
        setattr(model.get_submodule(where), own, value)
    return model
