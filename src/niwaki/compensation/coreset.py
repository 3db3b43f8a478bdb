"""What was drawn into a coreset stands for what was not."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from niwaki.alike import places
from niwaki.compensation.base import Change, Compensation, Removal, Units
from niwaki.coresets import edges, representation, sensitivities
from niwaki.errors import InputError
from niwaki.layout import from_matrix, matrix
from niwaki.statistics import InputResponses, Statistic


class Coreset(Compensation):
    """Weights what the saliency ``coreset`` has drawn so that the input of the next layer stays what it was, on average over the draws.

    A sample of one with probability p_j counts 1 / p_j times; of several, drawn without replacement, each counts
    ``P(S | j first) / P(S)`` times, which is about 1 / (m p_j) and makes every sum exactly unbiased. Fields are to be those of the
    saliency, from which p comes, and the allocation is to say how many are drawn in each layer.

    Attributes:
        bound: on the size of activations, as for the saliency.
        examples: of the data that ``data`` looks at, as for the saliency.

    Source: Mussay et al. 2020; Baykal et al. 2019; the weights: Murthy 1957.

    >>> import torch
    >>> from niwaki.layout import Layout
    >>> layout, stay = Layout(("output", "input"), (2, 1)), torch.tensor([True, False])
    >>> makes = Change("0.weight", layout, torch.tensor([[1.0], [3.0]]), torch.ones(2, 1) > 0, stay[:, None])
    >>> layout = Layout(("output", "input"), (1, 2))
    >>> reads = Change("2.weight", layout, torch.tensor([[1.0, 1.0]]), torch.ones(1, 2) > 0, stay[None])
    >>> both = torch.arange(2)
    >>> units = Units("0", stay | True, stay, [("0.weight", 0, (2, 1), both)], [("2.weight", 1, (1, 2), both)])
    >>> Coreset().compensate(Removal({"0.weight": makes, "2.weight": reads}, [units]))  # p was 1/4
    {'2.weight': tensor([[4.0000, 1.0000]], dtype=torch.float64)}
    """

    name = "coreset"
    equation = "w_oj <- w_oj P(S | j first) / P(S) for j in the sample S, about w_oj / (m p_j)"
    source = "Mussay et al. 2020; Baykal et al. 2019; Murthy 1957"
    effort = "as the saliency coreset, and a small sum over samples"
    advice = "after the saliency coreset, and nothing else"

    bound: Literal["norm", "data"] = "norm"
    examples: int = Field(default=128, ge=1)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The responses of each input, example by example, for ``bound: data``."""
        return (InputResponses(examples=self.examples),) if self.bound == "data" else ()

    def compensate(self, removal: Removal) -> dict[str, Tensor]:
        """Return the weights that read units, or those of which single ones were drawn, in their views, float64.

        Raises:
            InputError: single weights were drawn and the bound is that of units, or responses were not collected.
        """
        if removal.units:
            found: dict[str, Tensor] = {}
            for units in removal.units:
                self._units(removal, units, found)
            return found
        if self.bound == "norm":
            raise InputError(f"compensation {self.name}: bound: norm is of units; single weights are drawn by bound: data")
        return {change.name: self._edges(change) for change in removal.changes.values()}

    def _units(self, removal: Removal, units: Units, found: dict[str, Tensor]) -> None:
        count = len(units.active)
        device = units.active.device
        squares = torch.zeros(count, dtype=torch.float64, device=device)
        for name, dim, shape, owner in units.makers:
            rows = removal.changes[name].weight.reshape(shape).movedim(dim, 0).flatten(1).to(torch.float64).square().sum(dim=1)
            mine = owner.to(device) >= 0
            squares.index_add_(0, owner.to(device)[mine], rows[mine])
        likely = torch.zeros_like(squares)
        for name, dim, shape, owner in units.readers:
            change = removal.changes[name]
            entries = places(owner, count, f"compensation {self.name}: units of {units.name} in {name}").to(device)
            rows = matrix(change.weight, change.layout)
            outputs = torch.arange(change.layout.outputs, device=device).view(len(rows), -1, 1).expand_as(rows)
            outputs = from_matrix(outputs, change.layout).reshape(shape)
            sizes = change.weight.reshape(shape).to(torch.float64).abs().movedim(dim, 0)[entries].flatten(1)
            read = torch.zeros(count, change.layout.outputs, dtype=torch.float64, device=device)
            read.scatter_add_(1, outputs.movedim(dim, 0)[entries].flatten(1), sizes)
            activity = squares.sqrt()[None] if self.bound == "norm" else self._responses(change)[:, entries].mean(dim=2)
            likely = torch.maximum(likely, sensitivities(read, activity))
        active = units.active
        weights = torch.ones_like(likely)
        weights[active] = representation(likely[active], units.keep[active])
        for name, dim, shape, owner in units.readers:
            change = removal.changes[name]
            weight = found.setdefault(name, change.weight.to(torch.float64, copy=True).contiguous())
            moved = weight.view(shape).movedim(dim, 0)
            mine = owner.to(device) >= 0
            moved[mine] *= weights[owner.to(device)[mine]].view(-1, *[1] * (moved.ndim - 1))

    def _edges(self, change: Change) -> Tensor:
        weights = matrix(change.weight, change.layout)
        kernel = weights.shape[2] * len(weights) // change.layout.inputs
        parts = self._responses(change).tensor_split(len(weights), dim=1)
        likely = [edges(one.T, columns.repeat_interleave(kernel, dim=1)).T for one, columns in zip(weights, parts, strict=True)]
        weight, inside = change.weight.to(torch.float64, copy=True), change.active
        shares = from_matrix(torch.stack(likely), change.layout)
        weight[inside] *= representation(shares[inside], change.keep[inside])
        return weight

    def _responses(self, change: Change) -> Tensor:
        [request] = self.statistics
        if request not in change.statistics:
            raise InputError(f"compensation {self.name}: the responses that {change.name} reads were not collected")
        return torch.as_tensor(change.statistics[request]).to(change.weight.device, torch.float64)
