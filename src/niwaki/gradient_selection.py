"""Which weights take the gradient of a step, chosen anew in each."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.gradient import Selected
from niwaki.masked import MaskedTensor
from niwaki.recipe import Recipe
from niwaki.selection import kept, select


def keep_best_gradients(recipe: Recipe, tensors: Iterable[MaskedTensor]) -> None:
    """Zero the gradients of all weights but those whose product with the weight is largest, of all tensors together.

    Raises:
        InputError: a gradient is sparse, tensors are spread over different processes, or a product is NaN.
    """
    policy = recipe.gradient
    assert isinstance(policy, Selected)
    sparsity = recipe.final_sparsity if policy.sparsity is None else policy.sparsity
    assert sparsity is not None
    targets = list(tensors)
    gradients = {tensor.bound.name: tensor.bound.parameter.grad for tensor in targets}
    learning = [tensor for tensor in targets if gradients[tensor.bound.name] is not None]
    if not learning:
        return
    group = learning[0].bound.group
    if any(tensor.bound.group is not group for tensor in learning):
        raise InputError("gradient: 'selected' needs all target tensors sharded over the same processes")
    sparse = next((name for name, gradient in gradients.items() if gradient is not None and gradient.is_sparse), None)
    if sparse is not None:
        raise InputError(f"gradient: 'selected' ranks dense gradients, and that of {sparse} is sparse; exclude it from the target")
    count = kept(sparsity, sum(tensor.bound.layout.elements for tensor in targets))
    best = select(
        [partial(_products, tensor) for tensor in learning],
        min(count, sum(tensor.bound.layout.elements for tensor in learning)),
        names=[tensor.bound.name for tensor in learning],
        group=group,
    )
    for tensor, chosen in zip(learning, best, strict=True):
        _gradient(tensor).masked_fill_(~chosen, 0.0)


def _gradient(tensor: MaskedTensor) -> Tensor:
    assert tensor.bound.parameter.grad is not None
    return tensor.bound.view(tensor.bound.parameter.grad)


def _products(tensor: MaskedTensor) -> Tensor:
    gradient = _gradient(tensor)
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(wide) * tensor.weight.to(wide)).abs()
