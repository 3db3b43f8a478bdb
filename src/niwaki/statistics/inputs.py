"""Statistics of what a weight reads: the inputs of its module over the data, in evaluation mode.

An observation is one position of one example: a token, a pixel, a row of a batch. *Inputs* are input channels, ``[groups, inputs of a
group]``; *columns* are those times kernel positions, as ``unfold`` cuts them. Every value is float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from niwaki.layout import Layout
from niwaki.statistics.base import Source, Statistic


@dataclass(frozen=True)
class InputStatistic(Statistic):
    """Base: something about what a weight reads."""

    source: ClassVar[Source] = "inputs"
    columns: ClassVar[bool] = False
    """Whether kernel positions are apart."""


@dataclass(frozen=True)
class InputSize(InputStatistic):
    """Mean of ``|x|`` of each input; in the view, size 1 but for groups and inputs. Of an embedding: the share of each word."""


@dataclass(frozen=True)
class InputMean(InputStatistic):
    """Mean of each input; in the view, size 1 but for groups and inputs."""


@dataclass(frozen=True)
class InputVariance(InputStatistic):
    """Variance of each input over all observations (denominator: their number); in the view, size 1 but for groups and inputs."""


@dataclass(frozen=True)
class InputZeros(InputStatistic):
    """Share of observations at which an input is exactly zero; in the view, size 1 but for groups and inputs."""


@dataclass(frozen=True)
class InputSquare(InputStatistic):
    """Mean of ``x²`` of each column; in the view, size 1 but for groups, inputs and kernel positions. Not of transposed convolutions."""

    columns: ClassVar[bool] = True


@dataclass(frozen=True)
class InputGram(InputStatistic):
    """Mean of ``x xᵀ`` over observations, second moments of the columns: ``[groups, columns, columns]``.

    Twice this is the Hessian of ``mean ‖W x - Y‖²`` for every row of W. Not of transposed convolutions, which cut out no columns.
    """

    columns: ClassVar[bool] = True

    def memory(self, layout: Layout) -> int:
        """Return the bytes of the matrix and of one copy of it."""
        size = layout.size("input") * prod(layout.kernel)
        return 2 * 8 * layout.size("group") * size * size


@dataclass(frozen=True)
class InputCovariance(InputStatistic):
    """Covariance of all inputs with each other, groups together: ``[inputs, inputs]`` (denominator: the number of observations)."""

    def memory(self, layout: Layout) -> int:
        """Return the bytes of the matrix and of one copy of it."""
        return 2 * 8 * layout.inputs**2


@dataclass(frozen=True)
class InputResponses(InputStatistic):
    """Mean of each input over the positions of an example, example by example: ``[examples, inputs]``, the first ``examples`` of the data.

    An example is an entry of the first dimension of what the weight's module reads. Ranks contribute equal shares, one after the other.
    """

    examples: int = 512

    def memory(self, layout: Layout) -> int:
        """Return the bytes of the responses."""
        return 8 * self.examples * layout.inputs

    def within(self, budget: int, layouts: list[Layout]) -> str:
        """Say how many examples fit."""
        fitting = budget // max(8 * sum(layout.inputs for layout in layouts), 1)
        return f"examples: {fitting}" if fitting else ""


@dataclass(frozen=True)
class Coactivity(InputStatistic):
    """Mean of ``y xᵀ``: what the weight's module puts out times the columns that it reads, ``[groups, rows, columns]``.

    Outputs are those of the module itself, biases included, before any activation function. Not of transposed convolutions and
    embeddings, nor of a weight that is spread over processes.

    Attributes:
        normalized: divide by the root of both mean squares: the cosine of the two responses, 0 where one of them is always 0.
    """

    columns: ClassVar[bool] = True

    normalized: bool = False

    def memory(self, layout: Layout) -> int:
        """Return the bytes of one number a weight, and of one copy."""
        return 2 * 8 * layout.elements
