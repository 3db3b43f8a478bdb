"""Statistics that need a pass of their own over the model."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

from torch import Tensor

from niwaki.layout import Layout
from niwaki.statistics.base import Labels, Source, Statistic


@dataclass(frozen=True, eq=False)
class JointMatrix:
    """A matrix over all weights of several tensors together, one tensor after the other, each flattened in its layout's view.

    Attributes:
        names: canonical parameter names, in the order of the rows.
        sizes: how many rows each of them has.
        matrix: ``[rows, rows]``, float64.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    matrix: Tensor

    def rows(self, name: str) -> slice:
        """Return where the rows of a tensor are.

        >>> JointMatrix(("a", "b"), (4, 2), Tensor(6, 6)).rows("b")
        slice(4, 6, None)
        """
        start = sum(self.sizes[: self.names.index(name)])
        return slice(start, start + self.sizes[self.names.index(name)])


@dataclass(frozen=True)
class PassStatistic(Statistic):
    """Base: it has a function of its own, in :mod:`niwaki.calibration`."""

    source: ClassVar[Source] = "model"

    def memory(self, layout: Layout) -> int:
        """Return the bytes of one number a weight."""
        return 8 * layout.elements


@dataclass(frozen=True)
class SynapticFlow(PassStatistic):
    """``∂R/∂|w|`` of ``R = 1ᵀ f(1)``, f with all parameters and buffers replaced by their absolute values, in evaluation mode; float64.

    It takes one forward and one backward pass of a single example in float64. The data only tell the shape of an input, but words
    (integers) stay what they are. Tanaka, Kunin, Yamins, Ganguli 2020 (SynFlow).
    """


@dataclass(frozen=True)
class Relevance(PassStatistic):
    """Importance of each input, propagated from the last responses by ``s_(l-1) = |W_l|ᵀ s_l``; view, size 1 but for groups and inputs.

    Of a map of positions: their sum. Biases count nothing, activation functions pass everything, batch normalization scales. It takes one
    backward pass of a single example in float64, and for a ranking a forward pass over the data. Yu et al. 2018 (NISP).

    Attributes:
        final: importance of the last responses: their infinite feature ranking (Roffo et al. 2015), or all alike.
    """

    final: Literal["infinite_ranking", "equal"] = "infinite_ranking"


@dataclass(frozen=True)
class OutputSensitivity(PassStatistic):
    """Sensitivity of the model's outputs to each input, ``∂out_k/∂x_i``: a tensor ``[3, *view]``, size 1 but for groups and inputs.

    The mean of ``|∂out_k/∂x_i|`` over outputs, positions and examples; and the mean and the variance over examples of an example's root
    mean square over outputs and positions. It takes a backward pass for every output of the model. Engelbrecht 2001.
    """


@dataclass(frozen=True)
class HessianGradient(PassStatistic):
    """``H g`` of the mean loss over the data, with logits divided by ``temperature``; view, float64. Wang, Zhang, Grosse 2020 (GraSP).

    H and g are of all weights that are watched and active, together. It takes two passes over the data, the second one twice as long.
    """

    needs_loss: ClassVar[bool] = True

    temperature: float = 200.0


@dataclass(frozen=True)
class HessianDiagonal(PassStatistic):
    """Diagonal of the Hessian of the mean loss over the data; view, float64.

    Attributes:
        estimate: ``exact`` by one backward pass a weight (small models), ``hutchinson`` by products with random signs, ``gauss_newton``
            by random signs through the Gauss-Newton matrix (never negative).
        probes: random vectors of an estimate for each batch: as many backward passes, through the gradient itself for ``hutchinson``.
    """

    needs_loss: ClassVar[bool] = True

    estimate: Literal["exact", "hutchinson", "gauss_newton"] = "hutchinson"
    probes: int = 32


@dataclass(frozen=True)
class Hessian(PassStatistic):
    """The whole Hessian of the mean loss over the data, of all tensors together: one :class:`JointMatrix` for all of them, float64.

    It takes a backward pass in float64 for each weight and batch.
    """

    needs_loss: ClassVar[bool] = True

    def memory(self, layout: Layout) -> int:
        """Return the bytes of the tensor's own block and of one copy of it; those between tensors come on top."""
        return 2 * 8 * layout.elements**2


@dataclass(frozen=True)
class KroneckerFactors(PassStatistic):
    """``A = E[a aᵀ]`` and ``G = E[∂s ∂sᵀ]`` of inputs a and pre-activation gradients ∂s of one example: ``F ≈ A ⊗ G``.

    A pair of ``[groups, columns, columns]`` and ``[groups, rows, rows]``, float64. Of a convolution, A sums over positions and G averages
    over them, as in Grosse & Martens 2016. Martens & Grosse 2015 (K-FAC).
    """

    needs_loss: ClassVar[bool] = True

    labels: Labels = "sampled"

    def memory(self, layout: Layout) -> int:
        """Return the bytes of both factors, their inverses and eigenvectors."""
        columns, rows = layout.size("input") * prod(layout.kernel), layout.size("stack") * layout.size("output")
        return 3 * 8 * layout.size("group") * (columns**2 + rows**2)
