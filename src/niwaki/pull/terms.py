"""What penalties act on: weights, scales of normalizations, and what a relaxation computes from its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from niwaki.errors import InputError
from niwaki.gates import Gates
from niwaki.granularity import Grouped
from niwaki.layout import Layout
from niwaki.masked import MaskedTensor
from niwaki.masks import local
from niwaki.penalty import Penalized
from niwaki.pieces import Part, Ranked


class WeightTerm:
    """A parameter of the model, or the latent weight behind it.

    Attributes:
        name: of the parameter, and of the group if it is penalized as part of one.
        parameter: the one that an optimizer steps.
        cost: factor of the strength.
    """

    def __init__(self, name: str, parameter: nn.Parameter, tensor: MaskedTensor | None, layout: Layout | None = None) -> None:
        self.name, self.parameter, self.tensor, self.layout = name, parameter, tensor, layout
        self.cost: Tensor | float = 1.0

    @property
    def sharded(self) -> bool:
        """Whether this rank holds only a part of it."""
        return local(self.parameter).shape != self.parameter.shape

    @property
    def elements(self) -> int:
        """Number of weights, on all ranks."""
        return self.parameter.numel()

    @property
    def weight(self) -> Tensor:
        """The weight that is trained."""
        return local(self.parameter.detach()) if self.tensor is None else self.tensor.weight

    def read(self) -> Penalized:
        """Return what a penalty may look at."""
        active = learns = None
        if self.tensor is not None:
            active, learns = (None if gone is None else ~gone for gone in (self.tensor.pruned, self.tensor.blocked))
        return Penalized(self.weight, active, learns, cost=self.cost, layout=self.layout)

    def gradient(self) -> Tensor | None:
        """Return the gradient of the loss."""
        if self.tensor is not None:
            return self.tensor.gradient
        found = self.parameter.grad
        return None if found is None else local(found.to_dense() if found.is_sparse else found)

    def pull_back(self, pull: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield parameters and the gradients that they get, given that of what was read."""
        yield self.parameter, pull.view(local(self.parameter).shape)

    def write(self, weight: Tensor) -> None:
        """Put another weight in its place."""
        if self.tensor is None:
            local(self.parameter.detach()).copy_(weight.view(local(self.parameter).shape))
            return
        self.tensor.rewrite(weight)
        if self.tensor.latent is not None and not self.tensor.republishes:
            self.tensor.publish()


class OwnTerm:
    """What a relaxation computes from its own parameters, and from the weight: gates, probabilities, divergences or thresholds.

    Attributes:
        name: of the tensor or group.
        cost: factor of the strength.
    """

    def __init__(self, owner: MaskedTensor | Gates, reads: str, layout: Layout | None = None) -> None:
        self.owner, self.reads, self.layout = owner, reads, layout
        self.name = owner.name if isinstance(owner, Gates) else owner.bound.name
        self.cost: Tensor | float = 1.0
        self._leaves: dict[nn.Parameter, Tensor] = {}
        self._values: Tensor | None = None

    @property
    def sharded(self) -> bool:
        """Whether this rank holds only a part of it."""
        return isinstance(self.owner, MaskedTensor) and self.owner.bound.group is not None

    @property
    def elements(self) -> int:
        """Number of weights that they are of, on all ranks."""
        tensors = [tensor for tensor, _ in self.owner.members] if isinstance(self.owner, Gates) else [self.owner]
        return sum(tensor.bound.layout.elements for tensor in tensors)

    @property
    def parameter(self) -> nn.Parameter | None:
        """The own parameter that is itself what is read, or None where something is computed from it."""
        self.read()
        return next((parameter for parameter, leaf in self._leaves.items() if leaf is self._values), None)

    def read(self) -> Penalized:
        """Return what a penalty may look at; how it was computed is remembered for :meth:`pull_back`."""
        own = {name: parameter.detach().requires_grad_() for name, parameter in self.owner.own.items()}
        self._leaves = {self.owner.own[name]: leaf for name, leaf in own.items()}
        with torch.enable_grad():
            if isinstance(self.owner, Gates):
                self._values = self.owner.penalized(self.reads, own)
            else:
                weight = self.owner.weight.detach().requires_grad_()
                self._leaves[self.owner.bound.parameter] = weight
                self._values = self.owner.penalized(self.reads, weight, own)
        return Penalized(self._values.detach(), cost=self.cost)

    def gradient(self) -> Tensor | None:
        """Return None: the loss has no gradient of what is computed only for a penalty."""
        return None

    def pull_back(self, pull: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield parameters and the gradients that they get, given that of what was read."""
        assert self._values is not None
        values, leaves, self._values, self._leaves = self._values, self._leaves, None, {}
        if not values.requires_grad:
            return
        found = torch.autograd.grad(values, list(leaves.values()), pull.to(values.dtype), allow_unused=True)
        for parameter, leaf, gradient in zip(leaves, leaves.values(), found, strict=True):
            if gradient is None:
                continue
            if isinstance(self.owner, MaskedTensor) and self.sharded and leaf.shape != pull.shape:  # every rank has seen its part only
                dist.all_reduce(gradient, group=self.owner.bound.group)
            yield parameter, gradient

    def write(self, weight: Tensor) -> None:
        """Put other values in the place of the own parameter that is itself what is read."""
        parameter = self.parameter
        assert parameter is not None
        parameter.detach().copy_(weight)


class GroupTerms:
    """Pieces whose weights are penalized together, over all tensors that have any; ``sizes`` are their numbers of weights."""

    def __init__(self, one: Ranked, parts: Sequence[Part], tensors: Mapping[nn.Parameter, MaskedTensor]) -> None:
        self.one = one
        self.parts = [
            (part, WeightTerm(f"{one.name}/{part.bound.name}", part.bound.parameter, tensors.get(part.bound.parameter), part.bound.here))
            for part in parts
        ]
        self.sizes = self._sum(lambda part, _: torch.ones(part.bound.here.shape, dtype=torch.float64, device=one.device))
        self.costs: Tensor | float = 1.0

    def norms(self, weight: Callable[[WeightTerm, Penalized], Tensor]) -> Tensor:
        """Return the L2 norm of each piece, float64, of the weights that a function returns."""
        return self._sum(lambda part, term: weight(term, self._read(part, term)).to(torch.float64).square()).sqrt()

    def read(self, norms: Tensor) -> Iterator[tuple[WeightTerm, Penalized]]:
        """Yield what a penalty may look at, for each tensor."""
        for part, term in self.parts:
            seen = self._read(part, term)
            yield term, Penalized(**vars(seen) | {"norm": part.expand(norms, 0.0), "norms": norms})

    def _read(self, part: Part, term: WeightTerm) -> Penalized:
        cost = part.expand(self.costs, 0.0) if isinstance(self.costs, Tensor) else self.costs
        return Penalized(**vars(term.read()) | {"size": part.expand(self.sizes, 0.0), "cost": cost})

    def _sum(self, values: Callable[[Part, WeightTerm], Tensor]) -> Tensor:
        """Return the sum of the values of all elements of each piece, over all its weights."""
        pieces = [
            part.spread(part.cut(values(part, term).view(part.bound.here.shape)).to(self.one.device), self.one.pieces)
            for part, term in self.parts
        ]
        return torch.stack(pieces).sum(dim=0)


def penalized_parts(one: Ranked) -> list[Part]:
    """Return the parts that a penalty on weights acts on: of a group, no biases and no normalizations."""
    if not isinstance(one.granularity, Grouped):
        return list(one.parts)
    return [part for part in one.parts if part.bound.parameter.ndim > 1]


def require_whole(name: str, terms: Sequence[WeightTerm | OwnTerm]) -> None:
    """Refuse sharded tensors.

    Raises:
        InputError: one of them is.
    """
    sharded = next((term.name for term in terms if term.sharded), None)
    if sharded is not None:
        raise InputError(f"penalty: {name!r} looks at whole tensors, and {sharded} is sharded; choose another penalty, such as l1")
