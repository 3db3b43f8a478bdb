"""Optimal Brain Surgeon: the weights that stay move to where the quadratic model of the loss is smallest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from niwaki.compensation.base import Compensation, Removal
from niwaki.errors import InputError


class SurgeonUpdate(Compensation):
    """The survivors' best change by the saliency's own quadratic model of the loss.

    ``group``: for all that goes at once, exactly: ``δ_S = H_SS⁻¹ (H_SQ w_Q - g_S)`` for survivors S and removed Q. ``block``: exactly for
    what goes from each tensor by itself, and the changes of the tensors are added. ``single``: as if each weight went alone, and the
    changes are added, ``δ = -H⁻¹ Σ_q e_q v_q / [H⁻¹]_qq - H⁻¹ g`` with ``v = w - H⁻¹ g``: what WoodFisher publishes. The gradient g counts
    for ``woodtaylor`` only.

    Only tensors of the curvature move. Weights that make a unit which goes count for nothing: no one reads them any more.

    Source: Hassibi & Stork 1992; Singh & Alistarh 2020 (``single``); Kurtic et al. 2022 (``group``).

    >>> import torch
    >>> from niwaki.compensation import Change, Removal, SurgeonUpdate
    >>> from niwaki.curvature import DenseCurvature
    >>> from niwaki.layout import Layout
    >>> active, keep = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    >>> curvature = DenseCurvature(torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double(), {"weight": active})
    >>> change = Change("weight", Layout(("output", "input"), (1, 2)), torch.tensor([[2.0, 1.0]]), active, keep)
    >>> SurgeonUpdate().compensate(Removal({"weight": change}, curvature=curvature))
    {'weight': tensor([[2.5000, 0.0000]], dtype=torch.float64)}
    """

    name = "obs"
    equation = "δ_S = H_SS⁻¹ (H_SQ w_Q - g_S), S: what stays, Q: what goes"
    source = "Hassibi & Stork 1992; Singh & Alistarh 2020"
    needs_curvature: ClassVar[bool] = True
    single_field: ClassVar[str | None] = "removal"
    effort = "as the saliency's scores: woodfisher and mfac m² operations for each weight that stays, kfac_obs conjugate gradients"
    advice = (
        "with obs, l_obs, woodfisher, mfac and kfac_obs. The model holds near the weights: where much goes, in several rounds. single moves"
        " less than group, which is worse after little and can be better after much"
    )

    removal: Literal["group", "block", "single"] = "group"

    def compensate(self, removal: Removal) -> dict[str, Tensor]:
        """Return the new weights of all changed tensors that the curvature knows, float64, zero where they go.

        Raises:
            InputError: there is no curvature.
        """
        curvature = removal.curvature
        if curvature is None:
            raise InputError("compensation obs: the saliency has no curvature; choose obs, l_obs, woodfisher, woodtaylor, mfac or kfac_obs")
        told = curvature.notes
        changes = {name: change for name, change in removal.changes.items() if name in curvature.active}
        weights = {name: change.weight.to(torch.float64) for name, change in changes.items()}
        stays = {name: change.keep & change.active for name, change in changes.items()}
        unread = self._unread(removal)
        gone = {n: c.active & ~c.keep & ~unread[n] if n in unread else c.active & ~c.keep for n, c in changes.items()}
        lost = {name: torch.where(gone[name], weight, 0.0) for name, weight in weights.items()}
        newton = curvature.newton
        if self.removal == "group":
            force = curvature.multiply(lost)
            if curvature.gradient is not None:
                force = {name: values - curvature.gradient[name] for name, values in force.items()}
            moves = [curvature.solve(stays, force)]
        elif self.removal == "block":
            moves = [self._one(removal, name, values, gone[name]) for name, values in lost.items() if bool(gone[name].any())]
        else:
            aims = lost if newton is None else {n: torch.where(gone[n], weights[n] - newton[n], 0.0) for n in lost}
            aims = {name: torch.where(gone[name], values / curvature.inverse_diagonal(name), 0.0) for name, values in aims.items()}
            moves = [_minus(curvature.solve(curvature.active, aims))]
        if newton is not None and self.removal != "group":
            moves.append(_minus(newton))
        removal.notes.extend(note for note in curvature.notes if note not in told)
        total = {
            name: weight + torch.stack([move[name].view(weight.shape) for move in moves]).sum(0)
            for name, weight in weights.items()
            if moves
        }
        return {name: torch.where(stays[name], values, 0.0) for name, values in total.items()}

    def _one(self, removal: Removal, name: str, lost: Tensor, gone: Tensor) -> dict[str, Tensor]:
        """Return the change of all weights when one tensor loses what it loses, and no other does; without the gradient's own part."""
        curvature = removal.curvature
        assert curvature is not None
        aim = lost if curvature.newton is None else torch.where(gone, lost - curvature.newton[name], 0.0)
        rest: Mapping[str, Tensor] = {n: mask & ~gone if n == name else mask for n, mask in curvature.active.items()}
        return curvature.solve(rest, curvature.multiply({name: aim}))

    def _unread(self, removal: Removal) -> dict[str, Tensor]:
        """Return which weights make units that go, for each tensor that has such."""
        found: dict[str, Tensor] = {}
        for units in removal.units:
            goes = torch.cat([units.active & ~units.keep, torch.zeros(1, dtype=torch.bool, device=units.keep.device)])
            for name, dim, shape, entries in units.makers:
                if name in removal.changes:
                    across = [-1 if d == dim else 1 for d in range(len(shape))]
                    mask = goes[entries.to(goes.device)].view(across).expand(shape).reshape(removal.changes[name].weight.shape)
                    found[name] = found[name] | mask if name in found else mask
        return found


def _minus(vector: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: -values for name, values in vector.items()}
