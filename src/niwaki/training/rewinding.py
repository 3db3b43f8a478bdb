"""Weights that a training goes back to: those of a snapshot, signs of them, or new random ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from niwaki.counter import key
from niwaki.errors import InputError
from niwaki.masks import Masks, canonical_name
from niwaki.removed import Removed
from niwaki.structured import replay
from niwaki.training.state import copied, other_buffers

Build = Callable[[int], nn.Module]
"""Returns the model with the initial weights of a seed."""


def values_of(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return a copy of all weights and buffers, also of those that the model's own state leaves out."""
    return {"model": copied(model.state_dict()), "buffers": copied(other_buffers(model))}


@torch.no_grad()
def give(model: nn.Module, values: dict[str, dict[str, Tensor]]) -> None:
    """Give a model the weights and buffers of :func:`values_of`."""
    model.load_state_dict(values["model"])
    for name, buffer in other_buffers(model).items():
        buffer.copy_(values["buffers"][name])


@torch.no_grad()
def take_signs(model: nn.Module, masks: Masks) -> None:
    """Leave of every masked tensor of a model the signs of its weights, all with one size: their standard deviation.

    ``w <- sign(w) σ(w)``, with σ the population standard deviation over the whole tensor. A weight that is zero stays zero.

    Raises:
        InputError: nothing is masked.
    """
    if not masks:
        raise InputError("restore: as 'signs' is about tensors that are masked, and nothing is masked yet; prune before that")
    for name, parameter in model.named_parameters():
        if canonical_name(name) in masks:
            size = parameter.double().std(correction=0).to(parameter.dtype)
            parameter.copy_(parameter.sign() * size)


def fresh_values(build: Build, seed: int, stage: int, removed: Removed) -> dict[str, dict[str, Tensor]]:
    """Return the weights and buffers of a new model: random numbers that depend on the run's seed and the number of the stage alone.

    Args:
        build: makes the model.
        seed: of the run.
        stage: that restores them.
        removed: what was taken out of the run's model.
    """
    model = build(_stream(seed, stage))
    if removed:
        replay(model, removed)
    return values_of(model)


def require_random(build: Build | None, seed: int) -> None:
    """Refuse to restore fresh weights where there are none: the model's initial weights do not depend on a seed, as pretrained ones.

    Raises:
        InputError: so it is, or nobody said how the model is built.
    """
    if build is None:
        raise InputError("restore: weights 'fresh' need a way to build the model anew; name a snapshot, or use niwaki run")
    first, second = (values_of(build(_stream(seed, stage)))["model"] for stage in (0, 1))
    if all(torch.equal(first[name], value) for name, value in second.items()):
        raise InputError("restore: weights 'fresh' are random ones, and this model is always built with the same; name a snapshot")


def _stream(seed: int, stage: int) -> int:
    return key(seed, stage, "fresh weights")
