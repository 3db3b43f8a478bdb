"""What it costs to keep so many pieces of each layer: pieces themselves, FLOPs, energy, or measured seconds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from niwaki.allocation.base import Evidence
from niwaki.allocation.layer import Layer
from niwaki.errors import InputError, did_you_mean

MULTIPLY_ADD, SRAM_READ, DRAM_READ = 3.7 + 0.9, 5.0, 640.0
"""Picojoules of one operation on 32 bits in 45 nm: a multiplication and an addition, a read from a small SRAM, and one from DRAM.
Horowitz 2014, "Computing's energy problem"."""


@dataclass(frozen=True)
class Cost:
    """Cost of keeping the best pieces of each layer.

    Attributes:
        dense: of everything.
        fixed: of what is no target.
        layers: for each layer, number of pieces that stay -> cost; it never falls with the number.
        whole: numbers for all layers -> cost of everything, where layers share costs and their own do not add up.
    """

    dense: float
    fixed: float
    layers: Sequence[Callable[[int], float]]
    whole: Callable[[Sequence[int]], float] | None = None

    def total(self, counts: Sequence[int]) -> float:
        """Return the cost of everything."""
        return self.additive(counts) if self.whole is None else self.whole(counts)

    def additive(self, counts: Sequence[int]) -> float:
        """Return the sum of the layers' own costs and of what is no target."""
        return self.fixed + sum(of(n) for of, n in zip(self.layers, counts, strict=True))


def size(layers: Sequence[Layer]) -> Cost:
    """Return the number of pieces as a cost.

    >>> from niwaki.layout import Layout
    >>> size([Layer("a", Layout(("output", "input"), (3, 4)), 12)]).total([5])
    5.0
    """
    return Cost(float(sum(layer.pieces for layer in layers)), 0.0, [float for _ in layers])


def flops(layers: Sequence[Layer], evidence: Evidence) -> Cost:
    """Return the FLOPs of a forward pass of one example, of the whole model, as a cost."""
    assert evidence.flops is not None
    assert evidence.dense_flops is not None
    curves = [_curve(i, layers, evidence.flops[i], evidence) for i in range(len(layers))]
    targets = sum(_all(own, layer) for own, layer in zip(evidence.flops, layers, strict=True))
    return Cost(evidence.dense_flops, evidence.dense_flops - targets, curves, evidence.flops_left)


def energy(layers: Sequence[Layer], evidence: Evidence) -> Cost:
    """Return the energy of a forward pass of one example as a cost, in picojoules, of the target weights alone.

    ``E = MACs (e_multiply_add + e_SRAM) + weights e_DRAM``: each multiply-add reads a weight from on-chip memory, where each weight comes
    from DRAM once; activations are not counted, as masks of weights leave them as they are.

    Source: Yang, Chen, Sze 2017, with the energies of Horowitz 2014.

    Raises:
        InputError: pieces are units, whose energies do not add up.
    """
    assert evidence.flops is not None
    if evidence.flops_left is not None:
        raise InputError("allocation: the energy of units does not add up, as they share weights; use flops")
    curves = [
        _energy(_curve(i, layers, evidence.flops[i], evidence), layer.layout.elements / layer.pieces) for i, layer in enumerate(layers)
    ]
    return Cost(sum(curve(layer.pieces) for curve, layer in zip(curves, layers, strict=True)), 0.0, curves)


def _energy(flops_of: Callable[[int], float], weights: float) -> Callable[[int], float]:
    return lambda n: flops_of(n) / 2.0 * (MULTIPLY_ADD + SRAM_READ) + n * weights * DRAM_READ


def _all(own: float | Tensor, layer: Layer) -> float:
    return float(own.to(torch.float64).sum()) if isinstance(own, Tensor) else own * layer.pieces


def _curve(i: int, layers: Sequence[Layer], own: float | Tensor, evidence: Evidence) -> Callable[[int], float]:
    """Return the FLOPs of the best n pieces of a layer; without scores, of n average ones."""
    if not isinstance(own, Tensor):
        each = float(own)
        return lambda n: each * n
    values = own.to("cpu", torch.float64).flatten()
    if evidence.scores is None:
        mean = float(values.mean()) if values.numel() else 0.0
        return lambda n: mean * n
    summed = [0.0, *values[evidence.order(i, layers[i].name)].cumsum(0).tolist()]
    return lambda n: summed[min(n, len(summed) - 1)]


class LatencyTable(BaseModel):
    """Measured latencies: of the whole model, and of each layer at several sparsities.

    Between two measured sparsities a latency is interpolated, beyond the last it stays; one that rises with sparsity counts as the lower
    one before it, since a sparser layer can be run as a denser one. What is not in a layer costs what it did.

    Attributes:
        seconds: median time of the whole model with nothing masked.
        layers: name of a tensor (or group) -> sparsity -> median seconds; sparsity 0 must be among them.
        threads: torch's threads while measuring.
        machine: where it was measured.

    >>> table = LatencyTable(seconds=1.0, layers={"a": {0.0: 0.5, 0.5: 0.4, 0.9: 0.1}})
    >>> table.at("a", 0.25)
    0.45
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float = Field(gt=0, allow_inf_nan=False)
    layers: dict[str, dict[float, float]] = Field(min_length=1)
    threads: int | None = None
    machine: str = ""

    @field_validator("layers")
    @classmethod
    def _starts_dense(cls, layers: dict[str, dict[float, float]]) -> dict[str, dict[float, float]]:
        for name, row in layers.items():
            if 0.0 not in row or not all(0.0 <= s <= 1.0 and 0.0 <= t < float("inf") for s, t in row.items()):
                raise ValueError(f"{name!r} needs the seconds at sparsity 0, and sparsities in [0, 1] with finite seconds")
        return layers

    def at(self, name: str, sparsity: float) -> float:
        """Return the seconds of a layer at a sparsity.

        Raises:
            InputError: the table has no such layer.
        """
        if name not in self.layers:
            raise InputError(f"table: it has no latencies of {name!r}; {did_you_mean(name, set(self.layers))}; measure one for this model")
        measured = sorted(self.layers[name].items())
        seconds = np.minimum.accumulate([t for _, t in measured])
        return float(np.interp(sparsity, [s for s, _ in measured], seconds))

    def cost(self, layers: Sequence[Layer]) -> Cost:
        """Return the seconds of the whole model as a cost.

        Raises:
            InputError: a layer is missing, or the layers alone take longer than the whole model.
        """
        dense = [self.at(layer.name, 0.0) for layer in layers]
        if sum(dense) > self.seconds * (1 + 1e-9):
            raise InputError(
                f"table: its layers take {sum(dense):.4g} s together, and the whole model only {self.seconds:.4g} s; measure both alike"
            )
        curves = [self._curve(layer) for layer in layers]
        return Cost(self.seconds, self.seconds - sum(dense), curves)

    def _curve(self, layer: Layer) -> Callable[[int], float]:
        return lambda n: self.at(layer.name, 1.0 - n / layer.pieces)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON."""
        Path(path).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table.

        Raises:
            InputError: no file, or no such table.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give a table that LatencyTable.save wrote") from None
        except (ValidationError, UnicodeDecodeError) as error:
            first = str(error).partition("\n")[2].partition("\n")[2].partition("\n")[0].strip() or str(error)
            raise InputError(
                f"{path}: is no table of latencies ({first}); it needs seconds, and layers: {{name: {{sparsity: seconds}}}}"
            ) from None
