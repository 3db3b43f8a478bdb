"""Small networks of which units are removed by hand, with the statistics that numpy finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from niwaki.compensation import Change, Removal, Units
from niwaki.layout import Layout, layout_of
from niwaki.statistics import InputCovariance, InputMean, InputResponses

EXAMPLES = 128


def statistics(inputs: Tensor, layout: Layout) -> dict:
    """What is known of inputs, ``[observations, inputs]``."""
    data = inputs.detach().double()
    view = [n if r in ("group", "input") else 1 for r, n in zip(layout.roles, layout.shape, strict=True)]
    mean = data.mean(0)
    covariance = (data - mean).T @ (data - mean) / len(data)
    return {InputMean(): mean.view(view), InputCovariance(): covariance, InputResponses(examples=EXAMPLES): data[:EXAMPLES]}


def change(name: str, module: nn.Module, keep: Tensor, inputs: Tensor | None = None, active: Tensor | None = None) -> Change:
    weight = module.weight.detach()
    layout = layout_of(module, "weight", weight.shape)
    assert layout is not None
    active = torch.ones_like(weight, dtype=torch.bool) if active is None else active
    known = {} if inputs is None else statistics(inputs, layout)
    bias = None if module.bias is None else module.bias.detach()
    return Change(
        f"{name}.weight",
        layout,
        (weight * active).view(layout.shape),
        active.view(layout.shape),
        keep.view(layout.shape),
        known,
        bias,
        None if bias is None else f"{name}.bias",
    )


def without(model: nn.Sequential, gone: Sequence[int], data: Tensor, maker: int = 0, reader: int = 2, positions: int = 1) -> Removal:
    """Return the removal of some units that one layer makes and another reads, each in ``positions`` entries."""
    units = model[maker].weight.shape[0]
    keep = torch.ones(units, dtype=torch.bool)
    keep[list(gone)] = False
    made, read = model[maker], model[reader]
    inputs = model[:reader](data)
    inputs = inputs if inputs.ndim == 2 else inputs.movedim(1, -1).flatten(0, -2)
    owner = torch.arange(units).repeat_interleave(positions)
    rows = keep.view(-1, *[1] * (made.weight.ndim - 1)).expand(made.weight.shape)
    columns = keep[owner].view(1, -1, *[1] * (read.weight.ndim - 2)).expand(read.weight.shape)
    changes = [change(str(maker), made, rows), change(str(reader), read, columns, inputs)]
    group = Units(
        str(maker),
        torch.ones_like(keep),
        keep,
        [(f"{maker}.weight", 0, tuple(made.weight.shape), torch.arange(units))],
        [(f"{reader}.weight", 1, tuple(read.weight.shape), owner)],
    )
    return Removal({one.name: one for one in changes}, [group])


def outputs(model: nn.Module, removal: Removal, found: dict[str, Tensor], data: Tensor) -> Tensor:
    """Return what the network computes after the removal, with the new values."""
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, one in removal.changes.items():
        value = found.get(name, one.weight).masked_fill(~one.keep, 0.0)
        tensors[name] = value.view(tensors[name].shape).to(tensors[name])
    tensors |= {name: value.to(tensors[name]) for name, value in found.items() if name not in removal.changes}
    for units in removal.units:  # a masked unit has no bias either
        bias = units.makers[0][0].replace("weight", "bias")
        if bias in tensors:
            tensors[bias] = tensors[bias] * units.keep
    with torch.no_grad():
        return torch.func.functional_call(model, tensors, (data,))


def perceptron(activation: Callable[[], nn.Module] = nn.ReLU, units: int = 6, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, units), activation(), nn.Linear(units, 3, bias=bias)).double()
