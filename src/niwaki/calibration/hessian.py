"""Second derivatives of the loss with respect to the weights. The loss is the mean over all examples, whatever batches they come in.

What is exact is computed on a copy of the model in float64; the rest in the model's own precision, for convolutions in float64 take ten
times as long on CPUs. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from niwaki.calibration.across import rank
from niwaki.calibration.batches import count, logits_of, with_logits
from niwaki.calibration.passes import forward
from niwaki.calibration.run import Run, Values, differentiable
from niwaki.counter import key, uniform
from niwaki.errors import InputError
from niwaki.statistics import Hessian, HessianDiagonal, HessianGradient, JointMatrix, Mean

ROWS = 64
"""How many rows of a Hessian are taken at once."""
LARGEST = 20_000
"""Weights of the largest Hessian: 3 GiB."""
OUTPUTS = 1024
"""Outputs of an example for which the Hessian of the loss with respect to them is taken."""

OfBatch = tuple[int, Sequence[Tensor]]
"""How many examples a batch has, and something about every weight, of its mean loss."""


def hessian_gradient(run: Run, request: HessianGradient) -> Values:
    """Return ``H g`` of the active watched weights together. The gradient takes a pass of its own."""

    def change(outputs: Any) -> Any:
        return outputs if request.temperature == 1 else with_logits(outputs, logits_of(outputs) / request.temperature)

    with run.requiring_gradients():
        direction = _active(run, _mean(_gradients(run, change)))
        graphs = _gradients(run, change, again=True)
        return run.views(_mean((examples, _derivatives(_dot(graph, direction), run.weights)) for examples, graph in graphs))


def hessian_diagonal(run: Run, request: HessianDiagonal) -> Values:
    """Return the diagonal of the Hessian, or an estimate of it, of the active watched weights together."""
    if request.estimate == "exact":
        return run.views(_mean(_exact_diagonals(run.in_float64)))
    with run.requiring_gradients():
        estimate = _hutchinson_diagonals if request.estimate == "hutchinson" else _gauss_newton_diagonals
        return run.views(_mean(estimate(run, request.probes)))


def hessian(run: Run, request: Hessian) -> Mapping[str, JointMatrix]:
    """Return the Hessian of all watched weights together, under every name.

    Raises:
        InputError: it would be too large.
    """
    total = sum(one.layout.elements for one in run.tensors)
    if total > LARGEST:
        raise InputError(
            f"the exact Hessian of {total} weights would take {8 * total**2 / 2**30:.0f} GiB; at most {LARGEST} are possible: choose"
            " a smaller target, or a saliency with an estimate (woodfisher, mfac, kfac_obs)"
        )
    exact = run.in_float64
    kept = _kept(exact)
    mean = Mean()
    for examples, graph in _gradients(exact, again=True):
        flat = _flat(graph)
        matrix = torch.zeros(total, total, dtype=flat.dtype, device=flat.device)
        for rows in torch.split(kept, ROWS):
            matrix[rows] = _rows(flat, rows, exact.weights)
        mean.update(matrix * examples, examples)
    mean.all_reduce()
    gone = torch.ones(total, dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
    found = mean.value().masked_fill_(gone, 0.0)
    sizes = tuple(one.layout.elements for one in run.tensors)
    joint = JointMatrix(tuple(one.name for one in run.tensors), sizes, (found + found.T) / 2)
    return {one.name: joint for one in run.tensors}


def _exact_diagonals(run: Run) -> Iterator[OfBatch]:
    kept = _kept(run)
    for examples, graph in _gradients(run, again=True):
        flat = _flat(graph)
        diagonal = torch.zeros(len(flat), dtype=flat.dtype, device=flat.device)
        for rows in torch.split(kept, ROWS):
            diagonal[rows] = _rows(flat, rows, run.weights).gather(1, rows.unsqueeze(1)).squeeze(1)
        yield examples, _unflat(diagonal, run.weights)


def _hutchinson_diagonals(run: Run, probes: int) -> Iterator[OfBatch]:
    """Yield means of ``v ⊙ H v`` over random signs v (Hutchinson 1990; Bekas, Kokiopoulou, Saad 2007).

    Every batch has its own signs: with B batches that are alike, the variance is B times smaller than with the same for all.
    """
    for number, (examples, graph) in enumerate(_gradients(run, again=True)):
        totals = _zeros(run)
        for probe in range(probes):
            stream = f"{rank()} {number}"
            signs = [_signs(run.seed, probe, f"{one.name} {stream}", 0, w) for one, w in zip(run.tensors, run.weights, strict=True)]
            signs = _active(run, signs)
            for total, sign, product in zip(totals, signs, _derivatives(_dot(graph, signs), run.weights, keep=True), strict=True):
                total += (sign * product).double() / probes
        yield examples, totals


def _gauss_newton_diagonals(run: Run, probes: int) -> Iterator[OfBatch]:
    """Yield means of ``(Σ_n J_nᵀ H_n^(1/2) ε_n)²`` over random signs ε_n of every example's outputs.

    J_n is the Jacobian of its outputs and H_n the Hessian of the loss with respect to them, without its negative eigenvalues.
    """
    first = 0
    with differentiable():
        for number, inputs, targets in run.batches(targets=True):
            outputs = forward(run.model, inputs)
            logits = logits_of(outputs)
            roots = _roots(run, outputs, targets, number)
            totals = _zeros(run)
            for probe in range(probes):
                signs = _signs(run.seed, probe, f"outputs {rank()}", first * roots.shape[1], roots[:, 0])
                pushed = (roots @ signs.unsqueeze(-1)).reshape(logits.shape).to(logits.dtype)
                for total, pulled in zip(totals, _derivatives((logits * pushed).sum(), run.weights, keep=True), strict=True):
                    total += pulled.double().square() / probes
            first += len(roots)
            yield count(inputs), totals


def _roots(run: Run, outputs: Any, targets: Any, number: int) -> Tensor:
    """Return a root of the Hessian of the loss with respect to the outputs of each example: ``[examples, outputs, outputs]``, float64.

    Raises:
        InputError: there are too many outputs.
    """
    logits = logits_of(outputs).detach().requires_grad_(True)
    size = logits[0].numel()
    if size > OUTPUTS:
        raise InputError(f"estimate: gauss_newton takes at most {OUTPUTS} outputs for an example, the model has {size}; use hutchinson")
    loss = run.loss_of(with_logits(outputs, logits), targets, number)
    slopes = torch.autograd.grad(loss, logits, create_graph=True)[0].reshape(len(logits), size)
    rows = [_derivatives(slopes[:, i].sum(), [logits], keep=True)[0].reshape(len(logits), size) for i in range(size)]
    values, vectors = torch.linalg.eigh(torch.stack(rows, dim=1).double())
    root: Tensor = vectors * values.clamp(min=0).sqrt().unsqueeze(1)
    return root


def _gradients(run: Run, change: Callable[[Any], Any] = lambda outputs: outputs, *, again: bool = False) -> Iterator[OfBatch]:
    """Yield the gradients of every batch, to be differentiated again or not."""
    with differentiable():
        for number, inputs, targets in run.batches(targets=True):
            loss = run.loss_of(change(forward(run.model, inputs)), targets, number)
            yield count(inputs), _derivatives(loss, run.weights, again=again)


def _derivatives(value: Tensor, weights: Sequence[Tensor], *, again: bool = False, keep: bool = False) -> Sequence[Tensor]:
    """Return the derivatives of a number, zero where it does not depend on a weight."""
    if not value.requires_grad:
        return [torch.zeros_like(weight, requires_grad=False) for weight in weights]
    return torch.autograd.grad(value, weights, create_graph=again, retain_graph=again or keep, materialize_grads=True)


def _rows(flat: Tensor, rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Return rows of the Hessian: the derivatives of some entries of the flat gradient."""
    if not flat.requires_grad:
        return torch.zeros(len(rows), len(flat), dtype=flat.dtype, device=flat.device)
    chosen = torch.zeros(len(rows), len(flat), dtype=flat.dtype, device=flat.device)
    chosen.scatter_(1, rows.unsqueeze(1), 1.0)
    try:
        found = torch.autograd.grad(flat, weights, chosen, retain_graph=True, is_grads_batched=True, materialize_grads=True)
        return torch.cat([part.reshape(len(rows), -1) for part in found], dim=1)
    except RuntimeError:  # something in the backward pass cannot be vectorized
        each = [torch.autograd.grad(flat, weights, one, retain_graph=True, materialize_grads=True) for one in chosen]
        return torch.stack([_flat(parts) for parts in each])


def _mean(batches: Iterable[OfBatch]) -> list[Tensor]:
    """Return the means over all examples of all ranks."""
    means: list[Mean] = []
    for examples, values in batches:
        means = means or [Mean() for _ in values]
        for mean, value in zip(means, values, strict=True):
            mean.update(value.detach().double() * examples, examples)
    for mean in means:
        mean.all_reduce()
    return [mean.value() for mean in means]


def _zeros(run: Run) -> list[Tensor]:
    return [torch.zeros_like(weight, dtype=torch.float64, requires_grad=False) for weight in run.weights]


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _active(run: Run, values: Sequence[Tensor]) -> list[Tensor]:
    """Return values that are zero at weights that are not active."""
    return [one.view(value).reshape(value.shape).to(one.parameter.dtype) for one, value in zip(run.tensors, values, strict=True)]


def _kept(run: Run) -> Tensor:
    """Return the flat indices of the active weights."""
    return torch.cat([one.view(torch.ones_like(one.parameter)).flatten() for one in run.tensors]).nonzero().squeeze(1)


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values])


def _unflat(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [weight.numel() for weight in like])
    return [part.reshape(weight.shape) for part, weight in zip(parts, like, strict=True)]


def _signs(seed: int, probe: int, name: str, first: int, like: Tensor) -> Tensor:
    """Return random signs in the shape of a tensor."""
    draws = uniform(key(seed, probe, name), first, like.numel(), device=like.device).reshape(like.shape)
    return torch.where(draws < 0.5, -1.0, 1.0).to(like.dtype)
