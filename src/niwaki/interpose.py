"""The one way to act inside a module's forward or backward.

``interpose(module, action)`` puts an object in the place of the module's ``forward``, in the instance only: class, parameters,
``state_dict`` and hooks stay what they are. Actions compose (the last one added is the outermost) and come off in any order without
a trace. A copied or pickled module is plain torch: its ``forward`` is that of its class.

Modules whose parents read their parameters instead of calling them cannot be reached this way; :func:`unreached` names them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

Forward = Callable[..., Any]
Action = Callable[..., Any]
"""``action(forward, *args, **kwargs)``: calls ``forward(*args, **kwargs)`` when and how it likes, and returns the output."""


class _Interposed:
    """A forward with actions around it. Copies and pickles as the bound method of the class."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = module.__dict__.get("forward")
        """The instance's forward that somebody else had put there before, or None."""
        self.actions: list[tuple[Handle, Action]] = []

    def inner(self) -> Forward:
        return self.own if self.own is not None else partial(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.inner()
        for _, action in self.actions:
            call = _Bound(action, call)
        return call(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.own is not None:
            return copy.copy, (self.own,)
        return getattr, (self.module, "forward")  # evaluated on the copy, which has only its class's forward at that time


class _Bound:
    """One action with the forward that it wraps."""

    def __init__(self, action: Action, forward: Forward) -> None:
        self.action, self.forward = action, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.action(self.forward, *args, **kwargs)


class Handle:
    """Takes one action off again. Usable as a context manager; removing twice does nothing."""

    def __init__(self, module: nn.Module) -> None:
        self._module: nn.Module | None = module

    def remove(self) -> None:
        """Take the action off; with the last one the module has no trace of this module left."""
        module, self._module = self._module, None
        interposed = None if module is None else module.__dict__.get("forward")
        if module is None or not isinstance(interposed, _Interposed):
            return
        interposed.actions = [(h, a) for h, a in interposed.actions if h is not self]
        if not interposed.actions:
            del module.__dict__["forward"]
            if interposed.own is not None:
                module.__dict__["forward"] = interposed.own

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def interpose(module: nn.Module, action: Action) -> Handle:
    """Run ``action(forward, *args, **kwargs)`` in place of the module's forward until the returned handle is removed.

    >>> import torch
    >>> layer = torch.nn.Linear(2, 2)
    >>> with interpose(layer, lambda forward, x: forward(x) * 0):
    ...     layer(torch.ones(1, 2)).abs().sum().item()
    0.0
    >>> "forward" in vars(layer)
    False
    """
    interposed = module.__dict__.get("forward")
    if not isinstance(interposed, _Interposed):
        interposed = _Interposed(module)
        module.__dict__["forward"] = interposed
    handle = Handle(module)
    interposed.actions = [*interposed.actions, (handle, action)]
    return handle


def unreached(model: nn.Module) -> dict[str, str]:
    """Return the modules of a model whose forward their parent may bypass, each with the reason.

    ``nn.MultiheadAttention`` reads the weights of its output projection, and ``nn.TransformerEncoderLayer`` reads those of all its
    children when its inference fast path is taken.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.MultiheadAttention):
            found[f"{prefix}out_proj"] = "nn.MultiheadAttention reads its weight and never calls it"
        elif isinstance(module, nn.TransformerEncoderLayer):
            for child, _ in module.named_modules():
                if child and f"{prefix}{child}" not in found:
                    found[f"{prefix}{child}"] = (
                        "the fast path of nn.TransformerEncoderLayer bypasses it in evaluation mode without gradients"
                    )
    return found
