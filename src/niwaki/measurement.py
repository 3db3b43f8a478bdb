"""What a model costs: sizes, FLOPs, latency, memory and efficiency, each number with its definition.

>>> import torch
>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
>>> masks = {"0.weight": torch.eye(4, 8, dtype=torch.bool)}
>>> measured = measure(model, torch.ones(1, 8), masks, rounds=3)
>>> number = measured["forward FLOPs"]
>>> number.value, number.dense, number.unit
(24.0, 80.0, 'FLOPs')
>>> print(measured)
                                  sparse     dense
<BLANKLINE>
parameters                            46        46
active parameters                     18        46
...
forward FLOPs                         24        80
...
latency                          ... ms         -
peak memory of a forward pass       32 B         -
<BLANKLINE>
parameters: elements of all parameters; tied ones count once
...
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from textwrap import fill
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.calibration import preserved
from niwaki.errors import InputError
from niwaki.masks import Masks, canonical_name, equals_zero, local, sparsity_of
from niwaki.metrics import efficiency, flops, memory
from niwaki.metrics.flops import LayerFlops, forward_flops
from niwaki.metrics.latency import interleaved
from niwaki.metrics.sizes import dense_bytes
from niwaki.metrics.storage import Format, storage
from niwaki.metrics.units import show

ROUNDS = 21
"""Timed forward passes."""

_EFFICIENCIES = ("odds", "bits")
_WIDTH = 140


@dataclass(frozen=True)
class Number:
    """One number about a model.

    Attributes:
        name: what is measured.
        value: of the model with its masks; None where it is not defined.
        unit: ``share``, ``bytes``, ``bits``, ``FLOPs``, ``weights``, ``milliseconds`` or ``number``.
        definition: what the number means, in words.
        higher_is_better: which way is up; None when there is no better.
        dense: the same of the dense model, or, when none was given, of this one with nothing masked as far as shapes tell; else None.
    """

    name: str
    value: float | None
    unit: str
    definition: str
    higher_is_better: bool | None
    dense: float | None = None


@dataclass(frozen=True)
class Measurement:
    """Everything that ``measure`` found; printed as a table with definitions.

    Attributes:
        numbers: one after the other.
        storage: bits of all parameters by format, with positions apart.
        layers: FLOPs by weight tensor.
    """

    numbers: tuple[Number, ...]
    storage: tuple[Format, ...]
    layers: tuple[LayerFlops, ...]

    def __getitem__(self, name: str) -> Number:
        """Return a number by its name; raises KeyError with all names."""
        for number in self.numbers:
            if number.name == name:
                return number
        raise KeyError(f"there is no {name!r}; there are {', '.join(number.name for number in self.numbers)}")

    def to_data(self) -> dict[str, list[dict[str, Any]]]:
        """Return everything as plain data, ready for JSON."""
        return {
            "numbers": [asdict(number) for number in self.numbers],
            "storage": [asdict(row) for row in self.storage],
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        rows = [("", "sparse", "dense"), ("", "", "")]
        rows += [(number.name, show(number.value, number.unit), show(number.dense, number.unit)) for number in self.numbers]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [f"{name:{widths[0]}}  {value:>{widths[1]}}  {dense:>{widths[2]}}".rstrip() for name, value, dense in rows]
        words = [fill(f"{number.name}: {number.definition}", _WIDTH, subsequent_indent="  ") for number in self.numbers]
        return "\n".join([*table, "", *words])


def measure(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    masks: Mapping[str, Tensor] | None = None,
    *,
    dense: nn.Module | None = None,
    accuracy: float | None = None,
    dense_accuracy: float | None = None,
    rounds: int = ROUNDS,
    value_bits: int | None = None,
    block: tuple[int, int] = (4, 4),
) -> Measurement:
    """Measure what a model costs, and with its accuracy what it makes of that. The model is left as it was.

    Args:
        model: any model; it is run in evaluation mode without gradients.
        example: positional arguments of one forward pass, or the only one, on the model's device; the first dimension of the first tensor
            counts the examples.
        masks: canonical parameter name -> bool tensor, True = active; parameters without a mask are dense. By default the weights that are
            zero count as masked, in parameters of at least two dimensions that have any: what a finalized model is like. ``{}`` for none.
        dense: the dense model to set beside it. Forward passes of both take turns.
        accuracy: of the model on test examples, a share in [0, 1]; adds efficiencies.
        dense_accuracy: of the dense model.
        rounds: timed forward passes, after 2 untimed ones; 0 leaves latency out.
        value_bits: bits of one stored value; by default those of each parameter's data type.
        block: rows and columns of a block, for blocked storage.

    Raises:
        InputError: masks that do not fit the model, or a number outside its range.
    """
    if rounds < 0:
        raise InputError(f"measure: rounds must be at least 0, got {rounds}")
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    masks = Masks(_masks_of_zeros(model) if masks is None else masks)
    beside = model if dense is None else dense
    count, before = sparsity_of(model, masks), sparsity_of(beside, _everything(beside, masks))
    operations = forward_flops(model, inputs, masks=masks)
    operations_before = operations if dense is None else forward_flops(dense, inputs)
    formats = storage(dict(model.named_parameters()), masks, value_bits=value_bits, block=block)
    (dense_format,) = storage(dict(beside.named_parameters()), {}, value_bits=value_bits)
    numbers: list[Number] = []

    def add(name: str, unit: str, better: bool | None, definition: str, value: float | None, dense_value: float | None = None) -> None:
        numbers.append(Number(name, value, unit, definition, better, dense_value))

    active = count.parameters - count.masked
    if accuracy is not None:
        add("accuracy", "share", True, "share of right answers on test examples", accuracy, dense_accuracy)
    add("parameters", "weights", None, "elements of all parameters; tied ones count once", count.parameters, before.parameters)
    add("active parameters", "weights", False, "elements of all parameters that are not masked", active, before.parameters)
    add("weights of the targets", "weights", None, "elements of the tensors that have a mask", count.targets, before.targets)
    add("sparsity of the targets", "share", None, "masked weights / weights of the tensors that have a mask", count.of_targets, 0.0)
    add("sparsity of all parameters", "share", None, "masked weights / elements of all parameters", count.of_parameters, 0.0)
    add(
        "zeros among active weights",
        "weights",
        None,
        "weights of the targets that are zero and not masked",
        count.active_zeros,
        None if dense is None else before.active_zeros,
    )
    add(
        "zeros of all parameters",
        "weights",
        None,
        "elements of all parameters that are zero, whatever the reason",
        count.zeros,
        None if dense is None else before.zeros,
    )
    add("forward FLOPs", "FLOPs", False, flops.DEFINITION, operations.sparse, operations_before.dense)
    add(
        "dense file size",
        "bytes",
        False,
        "a plain safetensors file of the state dict, zeros stored",
        dense_bytes(model),
        dense_bytes(beside),
    )
    for row in formats:
        bits_before = dense_format.bits if row.format == "dense" else None
        add(f"bits as {row.format}", "bits", False, f"all parameters together: {row.definition}", row.bits, bits_before)
    numbers += _timed(model, dense, inputs, rounds)
    if accuracy is not None:
        numbers += _efficiencies(accuracy, active, dense_accuracy, before.parameters)
    return Measurement(tuple(numbers), formats, operations.layers)


def _masks_of_zeros(model: nn.Module) -> dict[str, Tensor]:
    weights = {name: local(parameter.detach()) for name, parameter in model.named_parameters() if parameter.dim() > 1}
    zeros = {name: equals_zero(weight) for name, weight in weights.items()}
    return {name: ~zero for name, zero in zeros.items() if zero.any()}


def _everything(model: nn.Module, masks: Masks) -> Masks:
    """Return masks of the same tensors in which everything is active; the model may have other shapes, or lack a tensor."""
    parameters = {canonical_name(name): local(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    return Masks({name: torch.ones(parameters[name].shape, dtype=torch.bool) for name in masks if name in parameters})


def _timed(model: nn.Module, dense: nn.Module | None, inputs: tuple[Any, ...], rounds: int) -> list[Number]:
    """Return latency and peak memory, of both models where there are two."""
    models = {"sparse": model} if dense is None else {"dense": dense, "sparse": model}
    calls = {name: partial(one, *inputs) for name, one in models.items()}
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    milliseconds: dict[str, float] = {}
    peaks: dict[str, float] = {}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for one in models.values():
            stack.enter_context(preserved(one))
            one.eval()
        if rounds:
            times = interleaved(calls, rounds, warmup=2)
            milliseconds = {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
        for name, call in calls.items():
            peaks[name] = memory.peak_bytes(call, device)
    threads = torch.get_num_threads()
    definition = (
        f"wall time of a forward pass on the given example in evaluation mode, median of {rounds} in turns, on the {device.type},"
        f" {threads} thread{'' if threads == 1 else 's'}; varies; masked weights cost what others do unless the model skips them"
    )
    found = []
    if rounds:
        found.append(Number("latency", milliseconds["sparse"], "milliseconds", definition, False, milliseconds.get("dense")))
    name = "peak memory of a forward pass"
    return [*found, Number(name, peaks["sparse"], "bytes", memory.DEFINITION, False, peaks.get("dense"))]


def _efficiencies(accuracy: float, active: int, dense_accuracy: float | None, parameters: int) -> list[Number]:
    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    pairs = [(accuracy, active), (dense_accuracy, parameters)]
    density = [None if a is None else efficiency.accuracy_density(a, n) for a, n in pairs]
    found = [Number("accuracy density", density[0], "number", efficiency.ACCURACY_DENSITY, True, density[1])]
    for hardness in _EFFICIENCIES:
        values = [None if a is None else finite(efficiency.parameter_efficiency(a, n, hardness)) for a, n in pairs]
        definition = f"{efficiency.EQUATIONS[hardness]} / million active parameters, with a the accuracy; not defined where all are right"
        found.append(Number(f"parameter efficiency ({hardness})", values[0], "number", definition, True, values[1]))
    return found
