"""How wrong and how good the scores of classes are, for every task whose targets are one class per example."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from niwaki.tasks.protocol import Metric


def right(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return whether the largest score is that of the true class: bool, shape ``[batch]``; the first of equal scores counts.

    Args:
        outputs: scores, shape ``[batch, classes]``.
        targets: class numbers, shape ``[batch]``.

    >>> import torch
    >>> right(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([1, 1]))
    tensor([ True, False])
    """
    return outputs.argmax(dim=1) == targets


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy ``log Σ_k exp(s_k) - s_true`` of every example with scores s, in nats: shape ``[batch]``.

    Args:
        outputs: scores (logits), shape ``[batch, classes]``.
        targets: class numbers, shape ``[batch]``.

    >>> import torch
    >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    tensor([0.6931])
    """
    return F.cross_entropy(outputs, targets, reduction="none")


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric(right, "share of examples whose largest output is their class"),
    "loss": Metric(cross_entropy, "mean cross-entropy of the examples, in nats", higher_is_better=False, percent=False),
}
"""Accuracy, the headline, and loss."""
