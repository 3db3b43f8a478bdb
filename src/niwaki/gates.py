"""The gates of a model: what a gate relaxation learns for each piece of what is ranked, and the tensors that it multiplies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.granularity import Grouped
from niwaki.masked import MaskedTensor, Now
from niwaki.pieces import Part, Ranked
from niwaki.recipe import Recipe
from niwaki.relaxation import Gate, Moment


class Gates:
    """The gates of the pieces of one tensor, or of the units of one dependency group.

    Attributes:
        name: of the tensor or group.
        own: the trainable parameters, each of the shape of the pieces.
        acting: the tensors whose weights the gates multiply: of a group those that read its units, or where there are none all.
        members: all tensors that are masked where a gate is zero.
    """

    def __init__(self, relaxation: Gate, one: Ranked, tensors: Mapping[str, MaskedTensor], seed: int, now: Now) -> None:
        if one.processes is not None:
            raise InputError(f"relaxation: {relaxation.name!r} needs whole tensors, and {one.name} is sharded; choose another relaxation")
        self.name = one.name
        self._relaxation, self._one, self._seed, self._now = relaxation, one, seed, now
        self.acting = [(tensors[part.bound.name], part) for part in (one.readers or one.parts)]
        self.members = [(tensors[part.bound.name], part) for part in one.parts]
        first = self.acting[0][0]
        counted = one.parts[0].cut(torch.ones(one.parts[0].bound.here.shape))
        shape = (one.pieces,) if isinstance(one.granularity, Grouped) else tuple(counted.shape)
        initial = relaxation.initial_parameters(shape, self._moment(evaluating=True))
        dtype = torch.promote_types(first.weight.dtype, torch.float32)
        self.own = {name: nn.Parameter(value.to(one.device, dtype)) for name, value in initial.items()}
        self._pulled: dict[str, Tensor | None] = {}
        self._added: dict[str, Tensor] = {}
        for tensor, part in self.members:
            tensor.gates.append((self, part, any(part is acts for _, acts in self.acting)))
        self.draw()

    # ------------------------------------------------------------------ the gates now

    def draw(self) -> None:
        """Compute the gates of the coming step, and those without noise."""
        with torch.no_grad():
            self.mode = self._relaxation.gate(self.values(), self._moment(evaluating=True))
            self.sample = self.mode
            if self._relaxation.mode_differs:
                self.sample = self._relaxation.gate(self.values(), self._moment(evaluating=False))

    def values(self) -> dict[str, Tensor]:
        """Return the values of the own parameters."""
        return {name: parameter.detach() for name, parameter in self.own.items()}

    def scores(self) -> Tensor:
        """Return the learned score of each piece."""
        return self._relaxation.gate_score(self.values())

    def sum(self, part: Part, values: Tensor) -> Tensor:
        """Return the sum of the values of a tensor's elements over each piece."""
        return part.spread(part.cut(values.view(part.bound.here.shape)).to(self._one.device), self._one.pieces)

    def penalized(self, what: str, own: Mapping[str, Tensor]) -> Tensor:
        """Return what a penalty of the gates is about, differentiable; as :meth:`niwaki.masked.MaskedTensor.penalized`."""
        if what == "gate":
            return self._relaxation.gate_soft(own, self._moment(evaluating=False))
        if what == "threshold":
            raise InputError(f"penalty.threshold: relaxation {self._relaxation.name!r} learns no thresholds; choices: dynamic_threshold")
        return self._relaxation.gate_active(own) if what == "active" else self._relaxation.gate_divergence(own)

    def _moment(self, evaluating: bool) -> Moment:
        return Moment(self.name, self._seed, self._now.step, 0, self._now.progress, evaluating)

    # ------------------------------------------------------------------ a step

    def pull_back(self) -> None:
        """Pull the gradients of the published weights back to the own parameters; called before the tensors let go of them."""
        found = [self.sum(part, pulled) for tensor, part in self.acting if (pulled := tensor.gate_gradient(self)) is not None]
        self._pulled, self._added = {}, {}
        if not found:
            return
        for_gate = torch.stack([one.to(torch.float64) for one in found]).sum(dim=0)
        with torch.enable_grad():
            leaves = {name: value.requires_grad_() for name, value in self.values().items()}
            gate = self._relaxation.gate(leaves, self._moment(evaluating=False))
            if gate.requires_grad:
                given = torch.autograd.grad(gate, list(leaves.values()), for_gate.to(gate.dtype).view(gate.shape), allow_unused=True)
                self._pulled = dict(zip(leaves, given, strict=True))

    def own_gradient(self, name: str) -> Tensor | None:
        """Return the gradient of one of the own parameters, after :meth:`pull_back`."""
        found = [one for one in (self._pulled.get(name), self._added.get(name)) if one is not None]
        return torch.stack(found).sum(dim=0) if found else None

    def add_own_gradient(self, name: str, pull: Tensor) -> None:
        """Add to the gradient of one of the own parameters, after :meth:`pull_back`."""
        before = self._added.get(name)
        self._added[name] = pull if before is None else before + pull

    def constrain(self) -> None:
        """Bring the own parameters back to where the relaxation wants them, after a step."""
        for name, value in self._relaxation.gate_constrain(self.values()).items():
            self.own[name].copy_(value)

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """Return the own parameters."""
        return {name: value.clone() for name, value in self.values().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from own parameters."""
        with torch.no_grad():
            for name, parameter in self.own.items():
                parameter.copy_(state[name])
        self.draw()


def make_gates(recipe: Recipe, ranked: Sequence[Ranked], tensors: Mapping[str, MaskedTensor], seed: int, now: Now) -> list[Gates]:
    """Return the gates of a recipe, one object for each tensor or group; none where its relaxation has no gates.

    Raises:
        InputError: a tensor is sharded.
    """
    if not isinstance(recipe.relaxation, Gate):
        return []
    return [Gates(recipe.relaxation, one, tensors, seed, now) for one in ranked]
