"""All statistics that components ask for, in as few passes over the data as they need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from niwaki.calibration.flow import output_sensitivity, relevance, synaptic_flow
from niwaki.calibration.gradients import gradient_statistics
from niwaki.calibration.hessian import hessian, hessian_diagonal, hessian_gradient
from niwaki.calibration.inputs import input_statistics
from niwaki.calibration.kronecker import kronecker_factors
from niwaki.calibration.passes import preserved
from niwaki.calibration.run import Replay, Run, Watched, plain
from niwaki.errors import InputError
from niwaki.metrics.flops import observing
from niwaki.statistics import (
    GradientStatistic,
    Hessian,
    HessianDiagonal,
    HessianGradient,
    InputStatistic,
    KroneckerFactors,
    OutputSensitivity,
    Relevance,
    Statistic,
    SynapticFlow,
)

PASSES: Mapping[type[Statistic], Callable[[Run, Any], Mapping[str, Any]]] = {
    Hessian: hessian,
    HessianDiagonal: hessian_diagonal,
    HessianGradient: hessian_gradient,
    KroneckerFactors: kronecker_factors,
    OutputSensitivity: output_sensitivity,
    Relevance: relevance,
    SynapticFlow: synaptic_flow,
}
"""Requests that have a pass of their own -> what answers them: tensor name -> value."""


def collect(
    model: nn.Module,
    data: Iterable[tuple[Any, Any]] | None,
    loss: Callable[[Any, Any], Tensor] | None,
    tensors: Sequence[Watched],
    requests: Collection[Statistic],
    *,
    seed: int = 0,
    example: Any = None,
) -> dict[str, dict[Statistic, Any]]:
    """Return what is asked of every tensor: tensor name -> request -> value.

    The model runs in evaluation mode; its buffers, gradients and modes and the random state are afterwards what they were. All that is
    asked of inputs takes one forward pass over the data, requests of gradients with equal settings take one pass together, and the others
    one each (:class:`~niwaki.statistics.HessianGradient` two). Means are over all observations of all batches and all ranks.

    Args:
        model: any module.
        data: batches ``(inputs, targets)``; an iterator is read no further than needed, and kept only if it must be read again. None where
            no request needs data.
        loss: called as ``loss(forward(model, inputs), targets)``: the mean over the examples of a batch.
        tensors: whose statistics; gradients, and rows and columns of Hessians, are zero at weights that are not active.
        requests: equal ones are collected once. Requests of the training's steps cannot be collected from data.
        seed: of random probes and sampled labels.
        example: inputs of one forward pass, for requests that need no data; by default the first batch's.

    Raises:
        InputError: there is no batch, a loss is needed and there is none, it is not finite, targets are missing, or a weight cannot be
            observed.

    >>> import torch
    >>> from niwaki.layout import Layout
    >>> from niwaki.statistics import InputMean
    >>> model = nn.Linear(2, 1)
    >>> weight = Watched("weight", model.weight, Layout(("output", "input"), (1, 2)))
    >>> collect(model, [(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None)], None, [weight], [InputMean()])["weight"][InputMean()]
    tensor([[2., 3.]], dtype=torch.float64)
    """
    found: dict[str, dict[Statistic, Any]] = {one.name: {} for one in tensors}
    if not tensors or not requests:
        return found
    model = plain(model)
    jobs = list(_jobs(list(dict.fromkeys(requests))))
    if isinstance(data, Iterator) and sum(reads for reads, _ in jobs) > 1:
        data = Replay(data)
    run = Run(model, tensors, data, loss, seed, example)
    with preserved(model), observing(model):
        if example is None and any(isinstance(request, SynapticFlow | Relevance) for request in requests):
            run = replace(run, example=run.first_inputs(), data=run.data)
        for _, job in jobs:
            for name, values in job(run).items():
                found[name].update(values)
    return found


def _jobs(requests: Sequence[Statistic]) -> Iterator[tuple[int, Callable[[Run], Mapping[str, Mapping[Statistic, Any]]]]]:
    """Yield what has to be done, each with how often it reads the data."""
    of_inputs = [request for request in requests if isinstance(request, InputStatistic)]
    if of_inputs:
        yield 1, partial(input_statistics, requests=of_inputs)
    alike: dict[Any, list[GradientStatistic]] = {}
    for request in requests:
        if isinstance(request, GradientStatistic):
            alike.setdefault((request.gradients, request.samples_per_gradient, request.labels), []).append(request)
    for group in alike.values():
        yield 1, partial(gradient_statistics, requests=group)
    for request in requests:
        if isinstance(request, InputStatistic | GradientStatistic):
            continue
        if type(request) not in PASSES:
            raise InputError(f"{type(request).__name__} is not collected from data; attach a sparsifier to a training to collect it")
        reads = {HessianGradient: 2, SynapticFlow: 0}.get(type(request), 1)
        yield reads, partial(_alone, request=request)


def _alone(run: Run, request: Statistic) -> Mapping[str, Mapping[Statistic, Any]]:
    return {name: {request: value} for name, value in PASSES[type(request)](run, request).items()}
