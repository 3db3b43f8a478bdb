"""Floating-point operations of training, by the accounting of RigL.

A training step costs three times its forward pass: the forward pass, the gradient by the activations and the gradient by the weights. With
``f_S`` and ``f_D`` the forward FLOPs per example of the sparse and of the dense model (a multiply-add is 2), a step of a sparse model
costs ``3 f_S``; one that needs the gradient of masked weights too, ``2 f_S + f_D``. Mask updates and the optimizer are not counted. As with
the forward FLOPs, only software that skips masked weights saves anything.

Source: Evci, Gale, Menick, Castro & Elsen 2020 (RigL), appendix on FLOPs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.metrics.flops import Flops

DEFINITION = (
    "FLOPs of all training steps / those of as many dense steps, by RigL's accounting: a step costs 3 forward passes of the active weights,"
    " or 2 of these and a dense one where the gradient of masked weights is needed"
)


def active_flops(flops: Flops, masks: Mapping[str, Tensor]) -> float:
    """Return ``f_S``, the forward FLOPs per example with other masks, from what ``forward_flops`` counted once for the model.

    ``f_S = Σ_layers dense · active / elements + activation products``: one count per mask and no forward pass, so that a training loop can
    call it after each mask update. Equal to ``forward_flops(..., masks=masks).sparse``, except for the packed projection of attention
    between sequences of different lengths, where it takes the mean over query, key and value.

    Args:
        flops: of the same model on the same example; its own masks do not matter.
        masks: canonical parameter name -> bool tensor, True = active; tensors without a mask count in full.

    >>> from torch import nn
    >>> from niwaki.metrics.flops import forward_flops
    >>> counted = forward_flops(nn.Linear(3, 4), (torch.ones(5, 3),))
    >>> active_flops(counted, {"weight": torch.eye(4, 3, dtype=torch.bool)})
    6.0
    """
    total = flops.activation_products
    for layer in flops.layers:
        mask = masks.get(layer.name)
        active = layer.elements if mask is None else int(torch.count_nonzero(mask))
        total += layer.dense / layer.elements * active if layer.elements else 0.0
    return total


def step_flops(forward_sparse: float, forward_dense: float, dense_gradient: bool = False) -> float:
    """Return the FLOPs per example of one training step: ``3 f_S``, or ``2 f_S + f_D`` with the gradient of masked weights.

    A static mask and SET cost the first at every step, SNFS the second; RigL the second at mask updates; a dense step is the first with
    ``f_S = f_D``.

    >>> step_flops(10, 100), step_flops(10, 100, dense_gradient=True)
    (30, 120)
    """
    return 2 * forward_sparse + (forward_dense if dense_gradient else forward_sparse)


def rigl_step_flops(forward_sparse: float, forward_dense: float, every: int) -> float:
    """Return RigL's mean FLOPs per example and step: ``(3 f_S Δ + 2 f_S + f_D) / (Δ + 1)``, one mask update after Δ = ``every`` steps.

    Raises:
        InputError: ``every`` below 1.

    >>> rigl_step_flops(10, 100, every=99)
    30.9
    """
    if every < 1:
        raise InputError(f"training FLOPs: a mask update comes every 1 step or less often, got every {every}")
    update = step_flops(forward_sparse, forward_dense, dense_gradient=True)
    return (step_flops(forward_sparse, forward_dense) * every + update) / (every + 1)


def gradual_step_flops(forward_dense: float, sparsities: Sequence[float]) -> float:
    """Return the mean FLOPs per example and step of gradual pruning, ``E_t[3 f_D (1 - s_t)]``: FLOPs are taken to fall with density.

    Args:
        forward_dense: ``f_D``.
        sparsities: of every step, or of any evenly spaced steps.

    Raises:
        InputError: no step, or a sparsity outside [0, 1].

    >>> gradual_step_flops(100, [0.0, 0.5, 1.0])
    150.0
    """
    if not sparsities or not all(0 <= sparsity <= 1 for sparsity in sparsities):
        raise InputError("training FLOPs: needs the sparsity, a share in [0, 1], of at least one step")
    return 3 * forward_dense * (1 - sum(sparsities) / len(sparsities))


def training_multiplier(steps: Iterable[tuple[float, int]], forward_dense: float) -> float:
    """Return the FLOPs of a training as a multiple of those of as many dense steps: ``Σ step / (3 f_D · steps)``.

    Args:
        steps: pairs of the FLOPs per example of a step (``step_flops``) and how many such steps there were.
        forward_dense: ``f_D``.

    Raises:
        InputError: no step, or no dense FLOPs to compare with.

    >>> training_multiplier([(step_flops(10, 100), 99), (step_flops(10, 100, dense_gradient=True), 1)], forward_dense=100)
    0.103
    """
    total, count = 0.0, 0
    for flops, times in steps:
        total += flops * times
        count += times
    if count < 1 or forward_dense <= 0:
        raise InputError(f"training FLOPs: needs at least one step and dense FLOPs above 0, got {count} and {forward_dense}")
    return total / (3 * forward_dense * count)
