"""Running a model on an example, and comparing what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from niwaki.dependency import Example
from niwaki.dependency.trace import arguments, tensors_in
from niwaki.errors import InputError


def run(model: nn.Module, example: Example) -> list[Tensor]:
    """Return the floating-point tensors in a model's outputs, without gradients."""
    args, kwargs = arguments(example)
    with torch.no_grad():
        return [tensor for tensor in tensors_in(model(*args, **kwargs)) if tensor.is_floating_point()]


def expected_of(model: nn.Module, example: Example) -> list[Tensor]:
    """Return what a model computes on the user's example.

    Raises:
        InputError: it does not run on it, or nothing comes out that could be compared.
    """
    try:
        outputs = run(model, example)
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise InputError(f"example: {type(model).__name__} does not run on it: {why}") from error
    if not outputs:
        raise InputError(f"example: {type(model).__name__} returns no floating-point tensor for it, so nothing can be compared")
    return [tensor.clone() for tensor in outputs]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """Return how outputs differ by more than rounding, in words; nothing when they do not.

    Rounding is 1000 units in the last place of the largest output (at least 1), and at most 5 %.
    """
    if [t.shape for t in found] != [t.shape for t in expected]:
        return f"outputs of shapes {[list(t.shape) for t in found]} instead of {[list(t.shape) for t in expected]}"
    for a, b in zip(found, expected, strict=True):
        finite = b.isfinite()
        if not torch.equal(a.isfinite(), finite):
            return "other outputs are infinite or nan"
        scale = max(float(b[finite].abs().max()), 1.0) if finite.any() else 1.0
        worst = float((a[finite] - b[finite]).abs().max()) if finite.any() else 0.0
        if worst > min(1e3 * torch.finfo(b.dtype).eps, 0.05) * scale:
            return f"outputs of size {scale:.3g} differ by {worst:.3g}"
    return ""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module of it back into its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def refresh(model: nn.Module) -> None:
    """Let modules forget what they computed from their weights to use it again, which they do when they go into training mode."""
    with evaluating(model):
        model.train()
