"""Residual blocks that do nothing once their weights are zero, and can then be taken out of the model as a whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.dependency.member import Group, Member
from niwaki.dependency.tape import tensors_in, undisturbed
from niwaki.dependency.trace import Example, arguments
from niwaki.masks import canonical_name


def find_layers(model: nn.Module, example: Example) -> list[Group]:
    """Return a group of kind ``layer`` for each ``nn.ModuleList`` or ``nn.Sequential`` with at least one block that can go.

    A block can go when, with all its parameters zero, it returns its first argument, or zeros that the model would not miss; that is
    tried on what it gets in a forward pass in evaluation mode. Units are numbered as the children of the container; those that cannot go
    own nothing. Members are all parameters of a block, whole: dimension 0, all entries of the block's unit.
    """
    containers = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)}
    blocks = {child: f"{name}.{key}".lstrip(".") for name, module in containers.items() for key, child in module.named_children()}
    seen: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(module, (args, kwargs))

    handles = [block.register_forward_pre_hook(watch, with_kwargs=True) for block in blocks if any(True for _ in block.parameters())]
    try:
        with undisturbed(model):
            args, kwargs = arguments(example)
            model(*args, **kwargs)
            for handle in handles:  # before anything is copied with them
                handle.remove()
            passes = {block for block, given in seen.items() if _is_identity(block, *given)}
            others = [block for block in seen if block not in passes]
            passes |= {block for block in others if _is_missed_by_nobody(model, block, blocks[block], seen[block], example)}
    finally:
        for handle in handles:
            handle.remove()
    names = {id(parameter): canonical_name(name) for name, parameter in model.named_parameters()}
    groups = []
    for name, container in containers.items():
        members = []
        for unit, child in enumerate(container.children()):
            if child not in passes or _is_inside(child, passes):
                continue
            for parameter in child.parameters():
                if parameter.ndim:
                    units = torch.full((parameter.shape[0],), unit)
                    members.append(Member(names[id(parameter)], 0, units, "output" if parameter.ndim > 1 else "along"))
        if members:
            groups.append(Group(f"{canonical_name(name)}:layer", "layer", len(container), tuple(members)))
    return groups


def _is_inside(child: nn.Module, passes: set[nn.Module]) -> bool:
    """Return whether the block is part of a larger one that can go."""
    return any(child is not other and any(child is inner for inner in other.modules()) for other in passes)


def _is_identity(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a block with all parameters zero returns its first argument."""
    given, returned = _through_zeros(block, args, kwargs)
    return given is not None and returned is not None and torch.equal(returned, given)


def _is_missed_by_nobody(model: nn.Module, block: nn.Module, path: str, seen: tuple[Any, Any], example: Example) -> bool:
    """Return whether a block with all parameters zero returns zeros, and the model does the same without it."""
    given, returned = _through_zeros(block, *seen)
    parent = path.rpartition(".")[0]
    if given is None or returned is None or returned.any() or not isinstance(model.get_submodule(parent), nn.ModuleList):
        return False
    silent, shorter = copy.deepcopy(model), copy.deepcopy(model)
    container = shorter.get_submodule(parent)
    assert isinstance(container, nn.ModuleList)
    for parameter in silent.get_submodule(path).parameters():
        parameter.zero_()
    del container[int(path.rpartition(".")[2])]
    args, kwargs = arguments(example)
    try:
        a, b = (list(tensors_in(one(*args, **kwargs))) for one in (silent, shorter))
    except Exception:  # the model counts on the block
        return False
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _through_zeros(block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Return what a block gets, and what it makes of that with all parameters zero, if both are of one shape."""
    given = next(tensors_in([*args, *kwargs.values()]), None)
    if given is None or not given.is_floating_point():
        return None, None
    silent = copy.deepcopy(block)
    for parameter in silent.parameters():
        parameter.zero_()
    try:
        returned = next(tensors_in(silent(*args, **kwargs)), None)
    except Exception:  # a block that cannot run without weights is none that can go
        return None, None
    return given, returned if returned is not None and returned.shape == given.shape else None
