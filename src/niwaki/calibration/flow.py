"""What flows through a whole network: synaptic flow, propagated relevance, sensitivity of its outputs."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from niwaki.calibration.across import gathered
from niwaki.calibration.batches import class_dimension, count, in_float64, logits_of, mapped
from niwaki.calibration.passes import forward
from niwaki.calibration.reading import before_reading, entries, zeros_like_reading
from niwaki.calibration.run import Run, Values, Watched, differentiable
from niwaki.errors import InputError
from niwaki.layout import columns_view, is_normalization
from niwaki.ranks import average_
from niwaki.statistics import Covariance, Mean, OutputSensitivity, Relevance, SynapticFlow

OUTPUTS = 4096
"""The most outputs of an example that are looked at one by one, or ranked."""

ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Hardtanh,
    nn.Hardsigmoid, nn.Hardswish, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink,
)  # fmt: skip
"""Modules that act on each entry alone."""


def synaptic_flow(run: Run, request: SynapticFlow) -> Values:
    """Return ``∂R/∂|w|`` of ``R = 1ᵀ f(1)``, all parameters and buffers of a copy in float64 being absolute values."""
    exact = run.copied()
    _absolute(exact.model)
    with differentiable():
        flow = logits_of(forward(exact.model, _ones(run.first_inputs()))).sum()
        if not bool(torch.isfinite(flow)):
            raise InputError("model: the synaptic flow through its absolute weights overflows float64; synflow cannot score this model")
        slopes = torch.autograd.grad(flow, exact.weights, materialize_grads=True)
    average_(list(slopes))  # equal on all ranks already, unless the example holds words
    return exact.views(slopes)


def relevance(run: Run, request: Relevance) -> Values:
    """Return the importance of every input: the derivative of ``sᵀ f`` with respect to it, f being linear with absolute weights.

    Biases and running means are zero, activation modules and normalizations other than batch normalization let everything pass. An
    activation that is a function acts by its slope where all inputs are ones: ReLU lets everything pass too.
    """
    importance = None if request.final == "equal" else _infinite_ranking(_responses(run))
    exact = run.copied()
    _absolute(exact.model)
    with torch.no_grad(), ExitStack() as hooks:
        for module in exact.model.modules():
            for name in ("bias", "running_mean"):
                tensor = getattr(module, name, None)
                if isinstance(tensor, Tensor):
                    tensor.zero_()
            if isinstance(module, ACTIVATIONS) or (is_normalization(module) and not isinstance(module, _BatchNorm)):
                hooks.callback(module.register_forward_hook(lambda _, args, output: args[0]).remove)
        probes: list[tuple[Watched, Any, Tensor]] = []
        with differentiable(), before_reading(exact.model, exact.tensors, _probing(probes)):
            responses = logits_of(forward(exact.model, _ones(run.first_inputs())))
            responses = responses.movedim(class_dimension(responses), -1)
            total = responses.sum() if importance is None else (responses * importance).sum()
        slopes = torch.autograd.grad(total, [zero for _, _, zero in probes], materialize_grads=True)
    found: Values = {}
    for (one, module, _), slope in zip(probes, slopes, strict=True):
        sums = entries(module, one.layout, slope).sum(dim=(0, 1))
        found[one.name] = found.get(one.name, 0.0) + columns_view(sums.reshape(one.layout.size("group"), -1), one.layout)
    average_(list(found.values()))
    return found


def output_sensitivity(run: Run, request: OutputSensitivity) -> Values:
    """Return mean size of the outputs' derivatives, and mean and variance over examples of their root mean square, for every input."""
    sizes = {one.name: Mean() for one in run.tensors}
    norms = {one.name: Covariance(full=False) for one in run.tensors}
    for _, inputs, _ in run.batches():
        probes: list[tuple[Watched, Any, Tensor]] = []
        with differentiable(), before_reading(run.model, run.tensors, _probing(probes)):
            outputs = logits_of(forward(run.model, inputs))
        flat = outputs.reshape(len(outputs), -1)
        if flat.shape[1] > OUTPUTS:
            raise InputError(f"the sensitivity of outputs takes at most {OUTPUTS} outputs for an example, the model has {flat.shape[1]}")
        squares: list[Tensor] = []
        for k in range(flat.shape[1]):
            slopes = torch.autograd.grad(flat[:, k].sum(), [zero for _, _, zero in probes], retain_graph=True, materialize_grads=True)
            each = [entries(module, one.layout, slope).double() for (one, module, _), slope in zip(probes, slopes, strict=True)]
            for (one, _, _), slope in zip(probes, each, strict=True):
                sizes[one.name].update(slope.abs().sum(dim=(0, 1)), slope.shape[0] * slope.shape[1])
            more = [slope.square().mean(dim=1) / flat.shape[1] for slope in each]
            squares = more if not squares else [a + b for a, b in zip(squares, more, strict=True)]
        for (one, _, _), square in zip(probes, squares, strict=True):
            norms[one.name].update(square.sqrt())
    found: Values = {}
    for one in run.tensors:
        sizes[one.name].all_reduce()
        norms[one.name].all_reduce()
        values = [sizes[one.name].value(), norms[one.name].mean, norms[one.name].value()]
        found[one.name] = torch.stack([columns_view(value.reshape(one.layout.size("group"), -1), one.layout) for value in values])
    return found


def _probing(probes: list[tuple[Watched, Any, Tensor]]) -> Any:
    """Return what adds a zero to everything that is read and keeps it: its gradient is that of what is read."""

    def look(one: Watched, module: Any, inputs: Tensor) -> Tensor:
        zero = zeros_like_reading(inputs, one.name)
        probes.append((one, module, zero))
        return inputs + zero

    return look


@torch.no_grad()
def _responses(run: Run) -> Tensor:
    """Return the model's answers to the data as ``[observations, outputs]``, float64, of all ranks."""
    found = []
    for _, inputs, _ in run.batches():
        outputs = logits_of(forward(run.model, inputs)).double()
        found.append(outputs.movedim(class_dimension(outputs), -1).flatten(0, -2))
    return gathered(torch.cat(found))


def _infinite_ranking(responses: Tensor, *, mixing: float = 0.5, damping: float = 0.9) -> Tensor:
    """Return the infinite feature ranking of ``[observations, features]``: the energy of all paths through the graph of features.

    ``s = [(I - r A)⁻¹ - I] 1`` with ``A_ij = m max(d_i, d_j) + (1 - m) (1 - |c_ij|)``: c is the rank correlation, d the standard deviations
    over their largest, m the ``mixing``, and r the ``damping`` over the largest eigenvalue of A (Roffo, Melzi, Cristani 2015).

    Raises:
        InputError: there are too many features, or one is not finite.
    """
    if responses.shape[1] > OUTPUTS or not bool(torch.isfinite(responses).all()):
        what = f"at most {OUTPUTS} outputs, the model has {responses.shape[1]}" if responses.shape[1] > OUTPUTS else "finite outputs"
        raise InputError(f"final: infinite_ranking takes {what}; use final: equal")
    deviations = responses.std(dim=0, correction=0)
    deviations = deviations / deviations.max().clamp(min=torch.finfo(torch.float64).tiny)
    ranked = torch.stack([_average_ranks(feature) for feature in responses.T])
    ranked = ranked - ranked.mean(dim=1, keepdim=True)
    lengths = ranked.norm(dim=1)
    lengths = torch.where(lengths > 0, lengths, 1.0)  # a constant feature correlates with nothing
    correlation = (ranked @ ranked.T) / torch.outer(lengths, lengths)
    graph = mixing * torch.maximum(deviations.unsqueeze(0), deviations.unsqueeze(1)) + (1 - mixing) * (1 - correlation.abs())
    radius = torch.linalg.eigvalsh(graph).abs().max()
    if not radius > 0:
        return torch.ones_like(deviations)
    ones = torch.ones_like(deviations)
    energy: Tensor = torch.linalg.solve(torch.eye(len(ones), dtype=ones.dtype, device=ones.device) - damping / radius * graph, ones) - ones
    return energy


def _average_ranks(values: Tensor) -> Tensor:
    """Return the rank of every value; equal values share the mean of theirs."""
    _, group, sizes = torch.unique(values, return_inverse=True, return_counts=True)
    middle: Tensor = sizes.cumsum(0).double() - (sizes - 1) / 2
    return middle[group]


@torch.no_grad()
def _absolute(model: nn.Module) -> None:
    """Replace all parameters and buffers by their absolute values."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            tensor.abs_()


def _ones(inputs: Any) -> Any:
    """Return the first example with ones for every floating-point number; words and masks stay what they are."""
    size = count(inputs)

    def one(tensor: Tensor) -> Tensor:
        first = tensor[:1] if tensor.ndim and len(tensor) == size else tensor
        return torch.ones_like(first) if first.is_floating_point() else first

    return in_float64(mapped(one, inputs))
