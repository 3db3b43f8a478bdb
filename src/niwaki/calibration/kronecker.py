"""Kronecker factors of the Fisher matrix of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from niwaki.calibration.across import rank
from niwaki.calibration.batches import count
from niwaki.calibration.labels import sampled_labels
from niwaki.calibration.passes import forward
from niwaki.calibration.reading import after_writing, before_reading, column_chunks, positions
from niwaki.calibration.run import Run, Watched, differentiable
from niwaki.statistics import KroneckerFactors, Mean


def kronecker_factors(run: Run, request: KroneckerFactors) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Return ``(A, G)`` of every weight, from one forward and one backward pass for each batch.

    ``A = Σ_n Σ_p a_np a_npᵀ / N`` over examples n and positions p, ``G = Σ_n Σ_p ∂s_np ∂s_npᵀ / (N P)`` with the gradients of the loss of
    one example. The loss of a batch must be the mean over its examples.
    """
    inner = {one.name: Mean() for one in run.tensors}
    outer = {one.name: Mean() for one in run.tensors}
    first = 0
    for number, inputs, targets in run.batches(targets=request.labels == "given"):
        size = count(inputs)
        read: dict[str, Tensor] = {}
        written: list[tuple[Watched, Tensor, int]] = []

        def look(one: Watched, module: Any, values: Tensor, read: dict[str, Tensor] = read) -> None:
            for columns in column_chunks(module, one.layout, values.detach(), one.name):
                apart = columns.double().movedim(0, 1)
                read[one.name] = read.get(one.name, 0.0) + apart.mT @ apart

        def probe(one: Watched, outputs: Tensor, written: list[tuple[Watched, Tensor, int]] = written) -> Tensor:
            zero = torch.zeros_like(outputs, requires_grad=True)
            written.append((one, zero, positions(outputs, one.layout).shape[0]))
            return outputs + zero

        with differentiable(), before_reading(run.model, run.tensors, look), after_writing(run.model, run.tensors, probe):
            outputs = forward(run.model, inputs)
            if request.labels == "sampled":
                targets = sampled_labels(outputs, targets, run.seed, f"labels {rank()}", first)
            loss = run.loss_of(outputs, targets, number)
        slopes = torch.autograd.grad(loss, [zero for _, zero, _ in written], materialize_grads=True)
        first += size
        rows = {one.name: sum(n for other, _, n in written if other is one) for one, _, _ in written}
        total: dict[str, Tensor] = {}
        for (one, _, _), slope in zip(written, slopes, strict=True):
            apart = positions(slope, one.layout).double().movedim(0, 1) * size  # of the example's own loss, not of its share in the mean
            total[one.name] = total.get(one.name, 0.0) + apart.mT @ apart
        for name, sums in total.items():
            inner[name].update(read[name], size)
            outer[name].update(sums * (size / rows[name]), size)
    for mean in (*inner.values(), *outer.values()):
        mean.all_reduce()
    return {one.name: (inner[one.name].value(), outer[one.name].value()) for one in run.tensors}
