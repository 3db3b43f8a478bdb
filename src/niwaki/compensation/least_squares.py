"""Weights that stay, solved anew for the outputs that there were."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from niwaki.compensation.base import Compensation, Removal
from niwaki.errors import InputError
from niwaki.layerwise.least_squares import refit
from niwaki.layout import from_matrix, matrix
from niwaki.statistics import InputGram, Statistic


class LeastSquares(Compensation):
    """Weights that stay get the values with which the layer's outputs on the data change least.

    Of each row (output), with S what stays, Q what goes and ``H = E[x xᵀ] + λ I``: ``w_S += H_SS⁻¹ H_SQ w_Q``. Where units of a group
    go, the layers that read them are solved for all outputs at once.

    Attributes:
        ridge: λ, as a share of the mean of the diagonal of ``E[x xᵀ]``. It holds weights near their old values.

    Source: Castellano, Fanelli, Pelillo 1997; He, Zhang, Sun 2017.

    >>> from niwaki.compensation import Change
    >>> from niwaki.layout import Layout
    >>> layout, gram = Layout(("output", "input"), (1, 2)), torch.tensor([[[1.0, 0.5], [0.5, 1.0]]])
    >>> weight, keep = torch.tensor([[3.0, 1.0]]), torch.tensor([[True, False]])
    >>> change = Change("w", layout, weight, torch.ones_like(keep), keep, {InputGram(): gram})
    >>> LeastSquares(ridge=0).compensate(Removal({"w": change}))
    {'w': tensor([[3.5000, 0.0000]])}
    """

    name = "least_squares"
    equation = "w_S <- argmin E(w_Sᵀ x_S - wᵀ x)² + λ ‖w_S - w‖² = w_S + (H_SS + λ I)⁻¹ H_SQ w_Q; H = E[x xᵀ]"
    source = "Castellano, Fanelli, Pelillo 1997; He, Zhang, Sun 2017"
    effort = "forward passes only; columns² numbers a tensor, and (columns that stay)³ operations for every mask that its rows have"
    advice = "any removal in one shot with little training after; units above all, as the rows that read them share a mask"

    ridge: float = Field(default=1e-4, ge=0.0, allow_inf_nan=False)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Second moments of what each tensor reads."""
        return (InputGram(),)

    def compensate(self, removal: Removal) -> dict[str, Tensor]:
        """Return the new weights of every changed tensor; a ridge that had to be raised is told in the removal's notes.

        Raises:
            InputError: second moments that are not finite.
        """
        result = {}
        for name, change in removal.changes.items():
            weight, keep = matrix(change.weight, change.layout).to(torch.float64), matrix(change.keep, change.layout)
            if not bool((keep.any(dim=2) & ((weight != 0) & ~keep).any(dim=2)).any()):
                continue  # only whole rows go: the others are as good as they were
            gram = change.statistics[InputGram()].to(torch.float64)
            if not bool(gram.isfinite().all()):
                raise InputError(f"{name}: second moments of its inputs are not finite; look for infinite or NaN values in the data")
            found = [refit(w, g, k, self.ridge) for w, g, k in zip(weight, gram, keep, strict=True)]
            most = max((used for _, used in found), default=self.ridge)
            if most > self.ridge:
                removal.notes.append(
                    f"{name}: its inputs are linearly dependent on this data; ridge was raised from {self.ridge:g} to {most:g}"
                )
            result[name] = from_matrix(torch.stack([new for new, _ in found]), change.layout).to(change.weight.dtype)
        return result
