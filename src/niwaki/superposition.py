"""Several masks over the same weights: which of them an input is meant for.

One random network can hold a mask for each of many tasks (supermasks in superposition). When the task of an input is not known, all masks
are mixed, and the mask is sought that makes the network surest of what it sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from niwaki.errors import InputError
from niwaki.masks import Masks, canonical_name


def infer_task(model: nn.Module, masks: Sequence[Masks], inputs: Any, *, halving: bool = False) -> int:
    """Return the index of the mask that a batch of inputs belongs to.

    All masks are mixed, ``W ⊙ Σ a_i M_i`` with ``a_i = 1 / k``, and the one is chosen whose coefficient lowers the entropy ``H`` of the
    outputs' softmax fastest: ``argmax -∂H/∂a_i``. With ``halving`` the better half of the masks stays in the mixture, until one is left,
    which takes ``log2 k`` passes.

    Args:
        model: with its dense weights, in the mode that it is to be used in; it is not changed.
        masks: one for each task, of the same parameters.
        inputs: of the model, a tensor or a tuple of arguments; all of one task.
        halving: whether to decide in several passes.

    Raises:
        InputError: there are no masks, or they are not of the same parameters of this model.

    Source: Wortsman, Ramanujan, Liu, Kembhavi, Rastegari, Yosinski, Farhadi 2020 (SupSup, one-shot and binary).

    >>> model = nn.Linear(2, 2, bias=False)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.tensor([[4.0, 0.0], [0.0, 0.1]]))
    >>> masks = [Masks({"weight": torch.tensor(mask)}) for mask in ([[False, False], [False, True]], [[True, False], [False, False]])]
    >>> infer_task(model, masks, torch.ones(1, 2))
    1
    """
    if not masks:
        raise InputError("infer_task: there are no masks; pass one for each task")
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    for i, one in enumerate(masks):
        fits = {n for n, mask in one.items() if n in masks[0] and n in parameters and mask.shape == parameters[n].shape}
        odd = next((n for n in sorted({*one, *masks[0]}) if n not in fits), None)
        if odd is not None:
            raise InputError(f"infer_task: masks[{i}] and masks[0] must be of the same parameters of the model, and {odd} is not")
    left = list(range(len(masks)))
    while len(left) > 1:
        slopes = _entropy_slopes(model, parameters, [masks[i] for i in left], inputs)
        order = sorted(range(len(left)), key=lambda i: (float(slopes[i]), i))
        left = sorted(left[i] for i in order[: (len(left) + 1) // 2 if halving else 1])
    return left[0]


def _entropy_slopes(model: nn.Module, parameters: Mapping[str, Tensor], masks: Sequence[Masks], inputs: Any) -> Tensor:
    """Return the derivative of the mean entropy of the outputs in each mask's coefficient, where all are equal."""
    with torch.enable_grad():
        shares = torch.full((len(masks),), 1.0 / len(masks), requires_grad=True)
        names = {canonical_name(name): name for name, _ in model.named_parameters()}
        mixed = {name: buffer.clone() for name, buffer in model.named_buffers()}  # a normalization in training mode writes into its own
        for name in masks[0]:
            weight = parameters[name].detach()
            mixture = sum((share * one[name].to(weight) for share, one in zip(shares, masks, strict=True)), torch.zeros_like(weight))
            mixed[names[name]] = weight * mixture
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        probabilities = torch.log_softmax(functional_call(model, mixed, arguments).flatten(0, -2), dim=-1)
        entropy = -(probabilities.exp() * probabilities).sum(dim=-1).mean()
        [slopes] = torch.autograd.grad(entropy, [shares])
    return slopes
