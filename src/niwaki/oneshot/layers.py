"""What became of each layer: its sparsity, and how far its outputs are from what they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.masks import canonical_name
from niwaki.oneshot.capture import primary


@dataclass(frozen=True)
class PrunedLayer:
    """What became of one weight.

    Attributes:
        name: of the parameter in the model.
        block: path of its block; empty outside all blocks.
        weights: how many it has.
        sparsity: share of them that is masked.
        error: ``‖y' - y‖ / ‖y‖`` over the data, where its module makes y of its inputs with the weights from before, and y' with those from
            after; both read what the pruned network gives them. None where the module is not called.
    """

    name: str
    block: str
    weights: int
    sparsity: float
    error: float | None


@dataclass
class Owner:
    """A module that owns targets, and its parameters from before."""

    module: nn.Module
    targets: list[str]
    before: dict[str, Tensor]
    error: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    size: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    busy: bool = False


def owners_of(module: nn.Module, targets: Iterable[str]) -> list[Owner]:
    """Return the modules that own targets, with copies of all their parameters."""
    wanted = set(targets)
    found = []
    for path, inner in module.named_modules():
        own = dict(inner.named_parameters(recurse=False))
        names = [canonical_name(f"{path}.{name}" if path else name) for name in own]
        if wanted & set(names):
            found.append(Owner(inner, [n for n in names if n in wanted], {n: p.detach().clone() for n, p in own.items()}))
    return found


@contextmanager
def comparing(owners: Sequence[Owner]) -> Iterator[Callable[[], dict[str, float]]]:
    """Compare inside the block what modules write with what they would have written with their parameters from before.

    Yields a function that returns the relative error of each target so far.
    """

    def compare(owner: Owner, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if owner.busy:
            return
        owner.busy = True
        was = primary(torch.func.functional_call(module, owner.before, args, kwargs))
        owner.busy = False
        now = primary(output)
        if was is None or now is None:
            return
        was = was.to(torch.float64)
        owner.error = owner.error.to(was.device) + (now - was).square().sum()
        owner.size = owner.size.to(was.device) + was.square().sum()

    def found() -> dict[str, float]:
        return {name: float((o.error / o.size).sqrt()) for o in owners for name in o.targets if o.size > 0}

    with ExitStack() as hooks:
        for owner in owners:
            hooks.callback(owner.module.register_forward_hook(partial(compare, owner), with_kwargs=True).remove)
        yield found
