"""The tensors of a model that a recipe acts on, each with everything that an update of its mask has to know."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from niwaki.errors import InputError
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
        group: the processes that the tensor is sharded over, or None.
    """

    name: str
    parameter: nn.Parameter
    layout: Layout
    here: Layout
    start: int
    group: dist.ProcessGroup | None = None

    def view(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape as this rank's part in the layout's view."""
        return local(tensor.detach()).reshape(self.here.shape)

    def observe(self, weight: Tensor, *, need_gradient: bool, seed: int, step: int, **seen: Any) -> Observation:
        """Return what a score may look at; ``weight`` and everything else that was ``seen`` are already in the layout's view.

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
        return Observation(self.name, weight, gradient, seed=seed, step=step, start=self.start, layout=self.here, **seen)


def bind(name: str, parameter: nn.Parameter, layout: Layout | None = None) -> Bound:
    """Bind a tensor; without a layout its first dimension counts as outputs and the others as inputs.

    Raises:
        InputError: a sharded parameter whose shards are not ranges of its first dimension.
    """
    layout = Layout(("output", *["input"] * (parameter.ndim - 1))[: parameter.ndim], tuple(parameter.shape)) if layout is None else layout
    return _bind_sharded(name, parameter, layout) if is_sharded(parameter) else Bound(name, parameter, layout, layout, 0)


def _bind_sharded(name: str, parameter: Any, layout: Layout) -> Bound:
    """Bind a DTensor: this rank's part is a chunk of rows."""
    sharded = [(i, p) for i, p in enumerate(parameter.placements) if not p.is_replicate()]
    if not sharded:
        return Bound(name, parameter, layout, layout, 0)
    if len(sharded) > 1 or not sharded[0][1].is_shard(0):
        raise InputError(f"{name}: placements {parameter.placements} are not supported; shard over the first dimension only (FSDP2)")
    split = len(layout.shape) - parameter.ndim + 1  # dimensions of the view that make up the parameter's first dimension
    mesh = parameter.device_mesh
    rows, part = parameter.shape[0], parameter.to_local().shape[0]
    chunk = -(-rows // mesh.size(sharded[0][0]))
    first = min(mesh.get_local_rank(sharded[0][0]) * chunk, rows)
    here = Layout(layout.roles[split - 1 :], (part, *layout.shape[split:]), layout.shared_stack, layout.embedding)
    return Bound(name, parameter, layout, here, first * prod(parameter.shape[1:]), mesh.get_group(sharded[0][0]))
