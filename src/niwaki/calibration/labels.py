"""Targets drawn from a model's own prediction, for the true Fisher matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from niwaki.calibration.batches import class_dimension, logits_of
from niwaki.counter import key, uniform
from niwaki.errors import InputError


def sampled_labels(outputs: Any, targets: Any, seed: int, stream: str, first: int) -> Tensor:
    """Return a class for every prediction, drawn from the softmax of the logits; targets below zero (to be ignored) stay.

    Args:
        outputs: of the model.
        targets: int64 of the data, which tell where the classes are; None where there are none.
        seed: of the draw.
        stream: draws with different names are independent.
        first: number of the first example in the data: the draw for an example does not depend on batches.

    Raises:
        InputError: there are no logits of classes.
    """
    logits = logits_of(outputs).detach().double()
    dimension = class_dimension(logits)
    if isinstance(targets, Tensor):
        fitting = [d for d in (logits.ndim - 1, 1) if d > 0 and targets.shape == logits.shape[:d] + logits.shape[d + 1 :]]
        if targets.is_floating_point() or not fitting:
            raise InputError(
                f"labels: sampled needs targets that are classes, of the shape of the model's output without the classes; got"
                f" {targets.dtype} {list(targets.shape)} for outputs {list(logits.shape)}; use labels: given"
            )
        dimension = dimension if dimension in fitting else fitting[0]
    elif logits.ndim < 2:
        raise InputError(f"labels: sampled needs logits [examples, classes], got {list(logits.shape)}; use labels: given")
    rows = logits.movedim(dimension, -1)
    each = rows[0, ..., 0].numel()
    draws = uniform(key(seed, 0, stream), first * each, len(rows) * each, device=rows.device).reshape(rows.shape[:-1])
    bounds = rows.softmax(dim=-1).cumsum(dim=-1)
    labels = torch.searchsorted(bounds, (draws * bounds[..., -1]).unsqueeze(-1), right=True).squeeze(-1)
    labels.clamp_(max=rows.shape[-1] - 1)
    return torch.where(targets < 0, targets, labels) if isinstance(targets, Tensor) else labels
