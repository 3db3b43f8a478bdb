"""Budgets from the shapes of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from niwaki.allocation.base import Allocation
from niwaki.allocation.layer import Layer
from niwaki.allocation.sharing import capped_proportional
from niwaki.layout import Layout


class ErdosRenyi(Allocation):
    """Narrow layers stay denser: the connections that a layer keeps grow with its inputs plus outputs.

    ``n_out`` counts all outputs of the weight, ``n_in`` the inputs that one output sees: the weight's own fan, so that
    ``n_in * n_out * prod(kernel)`` is always the number of its elements, also for grouped and depthwise convolutions (``n_in`` = input
    channels / groups) and stacked matrices (``n_out`` = all gates). A layer that would need more than all its pieces becomes
    dense, and the rest is solved anew, until none does.

    >>> from niwaki.layout import Layout
    >>> layers = [Layer("a", Layout(("output", "input"), (10, 90)), 900), Layer("b", Layout(("output", "input"), (10, 10)), 100)]
    >>> ErdosRenyi().keep(0.88, layers)
    [100, 20]
    """

    name = "erdos_renyi"
    equation = "p_l = min(1, e (n_in + n_out) / (n_in n_out)), e such that sum p_l N_l = (1 - S) sum N_l"
    source = "Mocanu et al. 2018 (SET)"
    effort = "nothing"
    advice = "sparse training from scratch of fully connected layers"

    def densities(self, sparsity: float, layers: Sequence[Layer], final: float) -> list[float]:  # noqa: D102
        return capped_proportional([self.rate(layer.layout) for layer in layers], [layer.pieces for layer in layers], 1.0 - sparsity)

    def rate(self, layout: Layout) -> float:
        """Return what the density of a layer is proportional to."""
        outputs, inputs = layout.outputs, layout.size("input")
        return (inputs + outputs) / (inputs * outputs)


class ErdosRenyiKernel(ErdosRenyi):
    """Erdős-Rényi that also counts the kernel's sizes, so that large kernels are sparser than pointwise ones.

    Fans and the dense-layer loop as for ``erdos_renyi``. On ResNet-50 it costs about twice the FLOPs of ``uniform`` at equal sparsity.

    Attributes:
        power: exponent of the rate, above 0; below 1 the budgets come closer to uniform.
    """

    name = "erdos_renyi_kernel"
    equation = "p_l = min(1, e ((n_in + n_out + sum k) / (n_in n_out prod k))^power), e such that sum p_l N_l = (1 - S) sum N_l"
    source = "Evci, Gale, Menick, Castro, Elsen 2020 (RigL)"
    effort = "nothing"
    advice = "sparse training from scratch of convolutions, where weights and not FLOPs are scarce"

    power: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0

    def rate(self, layout: Layout) -> float:  # noqa: D102
        return float(((layout.size("input") + layout.outputs + sum(layout.kernel)) / layout.elements) ** self.power)
