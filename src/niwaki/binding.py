"""The tensors of a model that a recipe acts on, each with everything that an update of its mask has to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from niwaki.allocation import Layer
from niwaki.errors import InputError
from niwaki.granularity import Granularity
from niwaki.layout import Layout
from niwaki.masks import is_sharded, local
from niwaki.saliency import Observation


@dataclass(frozen=True, eq=False)
class Bound:
    """One target tensor of a model.

    Attributes:
        name: canonical parameter name.
        parameter: the model's own Parameter.
        layout: roles of the whole tensor.
        here: roles of this rank's part (the same unless the parameter is sharded).
        start: flat index of this rank's first element in the whole tensor.
        pieces: pieces of the whole tensor, by the recipe's granularity.
        group: the processes that the tensor is sharded over, or None.
    """

    name: str
    parameter: nn.Parameter
    layout: Layout
    here: Layout
    start: int
    pieces: int
    group: dist.ProcessGroup | None = None

    @property
    def layer(self) -> Layer:
        """What an allocation has to know of it."""
        return Layer(self.name, self.layout, self.pieces)

    def view(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape as this rank's part in the layout's view."""
        return local(tensor.detach()).reshape(self.here.shape)

    def observe(self, weight: Tensor, *, score: Tensor | None, need_gradient: bool, seed: int, step: int) -> Observation:
        """Return what a score may look at; ``weight`` and ``score`` are already in the layout's view.

        Raises:
            InputError: the gradient is needed and there is none.
        """
        gradient = None
        if need_gradient:
            if self.parameter.grad is None:
                raise InputError(
                    f"{self.name}: its gradient is needed for the mask update before step {step} and there is none; call backward() before"
                    " optimizer.step(), pass data= and loss= for an update before training, or exclude the tensor from the target"
                )
            grad = self.parameter.grad
            gradient = self.view(grad.to_dense() if grad.is_sparse else grad)
        return Observation(self.name, weight, gradient, score, seed, step, self.start)


def bind(name: str, parameter: nn.Parameter, layout: Layout, granularity: Granularity) -> Bound | str:
    """Bind one target weight, or return the reason why the granularity leaves it dense.

    Raises:
        InputError: the granularity does not fit the tensor, or its pieces would cross the shards of a sharded parameter.
    """
    if not granularity.check(layout, name):
        return "its dimensions are not divisible by the granularity (remainder: skip)"
    pieces = prod(granularity.grid(layout))
    if not is_sharded(parameter):
        return Bound(name, parameter, layout, layout, 0, pieces)
    return _bind_sharded(name, parameter, layout, granularity, pieces)


def _bind_sharded(name: str, parameter: Any, layout: Layout, granularity: Granularity, pieces: int) -> Bound:
    """Bind a DTensor: this rank's part is a chunk of rows."""
    sharded = [(i, p) for i, p in enumerate(parameter.placements) if not p.is_replicate()]
    if not sharded:
        return Bound(name, parameter, layout, layout, 0, pieces)
    if len(sharded) > 1 or not sharded[0][1].is_shard(0):
        raise InputError(f"{name}: placements {parameter.placements} are not supported; shard over the first dimension only (FSDP2)")
    split = len(layout.shape) - parameter.ndim + 1  # dimensions of the view that make up the parameter's first dimension
    block = granularity.block(layout)
    if any(size != 1 for size in block[:split]):
        raise InputError(f"{name}: pieces of granularity {granularity.name!r} would cross the shards of its first dimension")
    mesh = parameter.device_mesh
    rows, part = parameter.shape[0], parameter.to_local().shape[0]
    chunk = -(-rows // mesh.size(sharded[0][0]))
    first = min(mesh.get_local_rank(sharded[0][0]) * chunk, rows)
    here = Layout(layout.roles[split - 1 :], (part, *layout.shape[split:]), layout.shared_stack, layout.embedding)
    return Bound(name, parameter, layout, here, first * prod(parameter.shape[1:]), pieces, mesh.get_group(sharded[0][0]))


def active_pieces(granularity: Granularity, bound: Bound, pruned: Tensor | None) -> Tensor:
    """Return which pieces of this rank's part have an active element (bool, shape of the grid)."""
    if pruned is None:
        return torch.ones(granularity.grid(bound.here), dtype=torch.bool, device=local(bound.parameter).device)
    return granularity.reduce((~pruned).to(torch.float32), bound.here) > 0


Reduce = Callable[[Tensor], Tensor]


def reducer(granularity: Granularity, bound: Bound) -> Reduce:
    """Return the granularity's reduction, bound to this rank's layout."""
    return lambda values: granularity.reduce(values, bound.here)
