"""Going back to what a model was before something was tried on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from niwaki.removed import named_tensors, settings_of


def snapshot(model: nn.Module, optimizer: Optimizer | None = None) -> Callable[[], None]:
    """Return a function that makes a model, and its optimizer, what they are now.

    No tensor is copied, so it takes neither time nor memory. What is done in between may give tensors other data, as
    :func:`niwaki.removed.cut` does, but must not write into the data that they have.
    """
    tensors = [(tensor, tensor.data, tensor.grad) for tensor in set(named_tensors(model).values())]
    modules = set(model.modules())
    settings = {id(value): value for module in modules for _, value in settings_of(module)}
    fields = [(vars(owner), dict(vars(owner))) for owner in (*modules, *settings.values())]
    fields += [(module._modules, dict(module._modules)) for module in modules]
    state = {} if optimizer is None else {parameter: dict(slots) for parameter, slots in optimizer.state.items()}
    trained = [] if optimizer is None else [list(group["params"]) for group in optimizer.param_groups]

    def restore() -> None:
        for tensor, data, gradient in tensors:
            tensor.grad = None
            tensor.data, tensor.grad = data, gradient
        for now, before in fields:
            _replace(now, before)
        if optimizer is not None:
            _replace(optimizer.state, state)
            for group, parameters in zip(optimizer.param_groups, trained, strict=True):
                group["params"] = parameters

    return restore


def _replace(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    now.clear()
    now.update(before)
