"""Agreement between the processes of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor

from niwaki.errors import NiwakiError


def world_size() -> int:
    """Return the number of processes of the default group, 1 when there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def require_same(masks: Mapping[str, Tensor], step: int) -> None:
    """Compare a hash of every mask across the ranks.

    Raises:
        NiwakiError: the ranks disagree; the message names the first tensor, on every rank alike.
    """
    if world_size() == 1 or not masks:
        return
    mine = {name: hashlib.sha256(mask.contiguous().cpu().numpy().tobytes()).hexdigest() for name, mask in masks.items()}
    everyone: list[dict[str, str]] = [{}] * world_size()
    dist.all_gather_object(everyone, mine)
    for name in mine:
        if len({theirs.get(name) for theirs in everyone}) > 1:
            raise NiwakiError(
                f"the ranks disagree on the mask of {name} before step {step}: their weights or gradients differ, so the model is not"
                " replicated as it should be"
            )


def mean(value: Tensor) -> Tensor:
    """Return the mean of a tensor over the ranks."""
    world = world_size()
    if world == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world


def average_(tensors: list[Tensor]) -> None:
    """Average tensors over the ranks, in place."""
    world = world_size()
    if world == 1:
        return
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor.div_(world)
