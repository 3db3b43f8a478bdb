"""Which layers feed which, read off a symbolic trace of the model.

Only plain chains are understood: from a linear layer or an ungrouped convolution, through operations that treat every channel by
itself, to linear layers and convolutions. A chain that meets anything else says what it met.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (nn.Linear, *CONVOLUTIONS)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ELEMENTWISE = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout),
)
POOLS: dict[type[nn.Module], int] = {
    **{nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3, nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3},
    **{nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3},
    **{nn.AdaptiveMaxPool1d: 1, nn.AdaptiveMaxPool2d: 2, nn.AdaptiveMaxPool3d: 3},
}
"""Pooling module -> dimensions of its window."""

ELEMENTWISE_CALLS: frozenset[Any] = frozenset(
    {F.relu, torch.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.sigmoid, torch.sigmoid, F.tanh}
    | {torch.tanh, F.hardswish, F.hardsigmoid, F.hardtanh, F.softplus, F.softsign}
    | {"relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "contiguous", "clone"}
)
DROPOUT_CALLS: frozenset[Any] = frozenset({F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout})
POOL_CALLS: dict[Any, int] = {
    **{F.max_pool1d: 1, F.max_pool2d: 2, F.max_pool3d: 3, F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3},
    **{torch.max_pool1d: 1, torch.max_pool2d: 2, torch.max_pool3d: 3, torch.avg_pool1d: 1},
    **{F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3},
    **{F.adaptive_max_pool1d: 1, F.adaptive_max_pool2d: 2, F.adaptive_max_pool3d: 3},
}
PASSING_CALLS = frozenset(
    {*ELEMENTWISE_CALLS, *DROPOUT_CALLS, *POOL_CALLS} | {torch.flatten, torch.mean, "flatten", "mean", "view", "reshape"}
)


@dataclass
class Chain:
    """A layer, and what its outputs go through until other layers read them.

    Attributes:
        producer: name of the layer.
        source: what the layer reads, in words.
        norms: batch normalization on the way -> how many consecutive features are one channel.
        consumers: layer that reads the outputs -> how many consecutive inputs are one channel.
        reason: why nothing of the layer can be removed, in words; empty when something can.
    """

    producer: str
    source: str = ""
    norms: dict[str, int] = field(default_factory=dict)
    consumers: dict[str, int] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class _Where:
    """Where the channels are in a value: the dimension, and how many consecutive entries are one channel."""

    axis: int
    block: int


def find_chains(model: nn.Module, example: tuple[Any, ...]) -> list[Chain]:
    """Return a chain for every linear layer and convolution that a forward pass on the example calls; raises what tracing raises."""
    traced = fx.symbolic_trace(model)
    ShapeProp(traced).propagate(*example)
    modules = dict(model.named_modules())
    unchangeable = _unchangeable(model, traced)
    chains = []
    for node in traced.graph.nodes:
        module = _module(node, modules)
        if not isinstance(module, LAYERS):
            continue
        name = str(node.target)
        chain = Chain(name, _source(node, modules))
        spatial = len(module.kernel_size) if isinstance(module, CONVOLUTIONS) else 0
        chain.reason = unchangeable(name) or _follow(node, _Where(len(_shape(node)) - spatial - 1, 1), modules, chain)
        if not chain.reason:
            others = ((other, unchangeable(other)) for other in (*chain.norms, *chain.consumers))
            chain.reason = next((f"its outputs go into {other}, and {why}" for other, why in others if why), "")
        chains.append(chain)
    return chains


def _unchangeable(model: nn.Module, traced: fx.GraphModule) -> Callable[[str], str]:
    """Return a function that says why a module cannot be made smaller; nothing when it can."""
    modules = dict(model.named_modules())
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    read = {str(node.target).rpartition(".")[0] for node in traced.graph.nodes if node.op == "get_attr"}

    def why(name: str) -> str:
        module = modules[name]
        if getattr(module, "groups", 1) != 1:
            return "it is a grouped convolution"
        if calls[name] > 1 or any(owners[id(parameter)] > 1 for parameter in module.parameters()):
            return "it is used several times"
        if name in read or (isinstance(module, LAYERS) and "weight" not in module._parameters):
            return "its weight is not its own"
        return ""

    return why


def _follow(node: fx.Node, where: _Where, modules: Mapping[str, nn.Module], chain: Chain) -> str:
    """Note in the chain what a value goes through; return what of that is not understood, in words, or nothing."""
    if not node.users:
        return "nothing reads its outputs"
    dimensions = len(_shape(node))
    for user in node.users:
        if user.op == "output":
            return "its outputs are the model's"
        if _only_asks_size(user, where.axis):
            continue
        module, name = _module(user, modules), str(user.target)
        if not user.args or user.args[0] is not node:
            return f"its outputs go into {_name(user, module)}"
        if isinstance(module, nn.Linear) and where.axis == dimensions - 1:
            chain.consumers[name] = where.block
        elif isinstance(module, CONVOLUTIONS) and where == _Where(dimensions - len(module.kernel_size) - 1, 1):
            chain.consumers[name] = 1
        else:
            after = _through(user, module, _shape(node), where)
            if after is None:
                return f"its outputs go into {_name(user, module)}"
            if isinstance(module, NORMS):
                chain.norms[name] = where.block
            reason = _follow(user, after, modules, chain)
            if reason:
                return reason
    return ""


def _through(node: fx.Node, module: nn.Module | None, shape: Sequence[int], where: _Where) -> _Where | None:
    """Return where the channels are after an operation that keeps them apart, or None for any other operation.

    Args:
        node: the operation.
        module: the module that it calls, if it calls one.
        shape: of its input.
        where: the channels are in its input.
    """
    call = node.target if module is None else None
    options: list[Any] = list(node.args[1:])
    after = _shape(node)
    if call in ("view", "reshape"):
        flat = len(options) == 2 and options[1] == -1 and where.axis == 1 and after == (shape[0], prod(shape[1:]))
        return _Where(1, where.block * prod(shape[2:])) if flat else None
    if len(node.all_input_nodes) != 1 or not after:
        return None
    if isinstance(module, ELEMENTWISE) or call in ELEMENTWISE_CALLS or (isinstance(module, NORMS) and where.axis == 1):
        return where
    if call in DROPOUT_CALLS:
        return None if (options[1] if len(options) > 1 else node.kwargs.get("training", True)) else where
    window = POOL_CALLS.get(call) if module is None else POOLS.get(type(module))
    if window is not None:
        return where if len(shape) - where.axis - 1 == window else None
    if isinstance(module, nn.Flatten):
        return _flattened(shape, where, module.start_dim, module.end_dim)
    if call in (torch.flatten, "flatten"):
        options += [node.kwargs.get("start_dim", 0), node.kwargs.get("end_dim", -1)][len(options) :]
        return _flattened(shape, where, *options)
    if call in (torch.mean, "mean"):
        options += [node.kwargs.get("dim"), node.kwargs.get("keepdim", False)][len(options) :]
        return _averaged(shape, where, *options)
    return None


def _flattened(shape: Sequence[int], where: _Where, start: int, end: int) -> _Where | None:
    """Return where the channels are after flattening from ``start`` to ``end``."""
    start, end = start % len(shape), end % len(shape)
    if start > where.axis:
        return where
    if start == where.axis and end == len(shape) - 1:
        return _Where(where.axis, where.block * prod(shape[start + 1 :]))
    return None


def _averaged(shape: Sequence[int], where: _Where, dim: Any, keepdim: bool) -> _Where | None:
    """Return where the channels are after a mean over other dimensions."""
    dims = {d % len(shape) for d in (dim if isinstance(dim, list | tuple) else [dim]) if isinstance(d, int)}
    if not dims or where.axis in dims:
        return None
    return _Where(where.axis - (0 if keepdim else sum(d < where.axis for d in dims)), where.block)


def _only_asks_size(node: fx.Node, axis: int) -> bool:
    """Return whether an operation only asks for the size of another dimension than the channels'."""
    if node.op == "call_method" and node.target == "size":
        return len(node.args) == 2 and isinstance(node.args[1], int) and 0 <= node.args[1] != axis
    if node.target is getattr and node.args[1] == "shape":
        indices = [user.args[1] if user.target is operator.getitem else None for user in node.users]
        return all(isinstance(i, int) and 0 <= i != axis for i in indices)
    return False


def _source(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """Return what a layer reads, in words, past the operations that keep channels apart."""
    before = node.args[0] if node.args else None
    while isinstance(before, fx.Node) and before.op != "placeholder":
        module = _module(before, modules)
        passes = isinstance(module, (*ELEMENTWISE, *NORMS, *POOLS, nn.Flatten)) if module is not None else before.target in PASSING_CALLS
        if not passes:
            return f"the output of {_name(before, module)}"
        before = before.args[0]
    return "the model's input"


def _module(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    return modules[str(node.target)] if node.op == "call_module" else None


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a value on the example; empty when it is no tensor."""
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def _name(node: fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        return f"{node.target} ({type(module).__name__})"
    return str(getattr(node.target, "__name__", node.target))
