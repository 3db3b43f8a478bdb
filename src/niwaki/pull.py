"""Penalties at the step boundary: a gradient before the optimizer's step, or a step of their own after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from niwaki.collecting import Statistics
from niwaki.granularity import Grouped
from niwaki.masked import MaskedTensor
from niwaki.masks import local
from niwaki.penalty import L1, GroupLasso, Penalized, Penalty
from niwaki.pieces import Part, Ranked
from niwaki.target import NormScale, select_targets


class Pull:
    """A penalty on the weights of a model.

    Args:
        penalty: which.
        model: for penalties on the scales of normalizations, which are of the whole model.
        ranked: the tensors or groups that the recipe acts on.
        tensors: those of its tensors that are under a recipe, by parameter.
        density: share of active elements that the recipe asks for.
        statistics: to see the loss, for penalties that want a share of it.
        tell: takes sentences for the user.

    Raises:
        InputError: the penalty is on scales of normalizations, and the model has none.
    """

    def __init__(
        self,
        penalty: Penalty,
        model: nn.Module,
        ranked: Sequence[Ranked],
        tensors: Mapping[nn.Parameter, MaskedTensor],
        density: float,
        statistics: Statistics,
        tell: Callable[[str], None],
    ) -> None:
        self.penalty, self.density = penalty, density
        self.found: float | None = None
        """The strength that a ratio was turned into, at the first step."""
        self._tensors, self._statistics, self._tell = tensors, statistics, tell
        self._groups = [_Group(one, _weights(one)) for one in ranked] if penalty.grouped else []
        self._single: list[nn.Parameter] = []
        if not penalty.grouped:
            on_norms = isinstance(penalty, L1) and penalty.of == "norm"
            parts = chain.from_iterable(_weights(one) for one in ranked)
            parameters = (t.parameter for t in select_targets(model, NormScale())[0]) if on_norms else (p.bound.parameter for p in parts)
            self._single = list(dict.fromkeys(parameters))
        self._gradients: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def look(self) -> None:
        """Compute the gradients of the penalty at the weights as they are, before any of a step's optimizers moves them.

        Raises:
            InputError: the penalty's strength is to be found, and cannot be.
        """
        self._find_strength()
        self._gradients = {}
        if not self.penalty.after_step:
            for parameter, seen in self._seen():
                pull = self.penalty.gradient(seen).view(local(parameter).shape)
                before = self._gradients.get(parameter)
                self._gradients[parameter] = pull if before is None else before + pull

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Add the gradients of the penalty to those of the parameters that an optimizer steps."""
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer under a gradient scaler unscales in its own step
        for parameter in _of(optimizer):
            pull = self._gradients.pop(parameter, None)
            if pull is None or parameter.grad is None:
                continue
            if scale is not None:
                pull = pull * scale
            tensor = self._tensors.get(parameter)
            if tensor is not None and tensor.latent is not None:
                tensor.add_gradient(pull)
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense() + pull
            else:
                local(parameter.grad).add_(pull)

    @torch.no_grad()
    def after_step(self, optimizers: Iterable[Optimizer]) -> None:
        """Take the penalty's own step on all parameters that the optimizers hold, each with its learning rate."""
        if not self.penalty.after_step:
            return
        rates = {p: float(group["lr"]) for o in optimizers for group in o.param_groups for p in group["params"] if p.requires_grad}
        for parameter, seen in self._seen():
            if parameter in rates:
                self._write(parameter, self.penalty.step(seen, rates[parameter]))

    def take_strength(self, strength: float) -> None:
        """Go on with a strength that the ratio was turned into."""
        assert isinstance(self.penalty, GroupLasso)
        self.found, self.penalty = strength, self.penalty.with_strength(strength)

    def _find_strength(self) -> None:
        """Turn the ratio of the penalty to the loss into a strength, once."""
        penalty = self.penalty
        if not isinstance(penalty, GroupLasso) or penalty.ratio is None:
            return
        loss = self._statistics.mean_loss()
        value = sum(penalty.value(group.norms(self._weight), group.sizes) for group in self._groups)
        strength = penalty.strength_at(loss, value)
        self._tell(
            f"penalty: group_lasso has strength {strength:.6g}: its ratio is {penalty.ratio:.6g}, the loss {loss:.6g}, and the penalty at"
            f" strength 1 {value:.6g}"
        )
        self.take_strength(strength)

    def _write(self, parameter: nn.Parameter, weight: Tensor) -> None:
        tensor = self._tensors.get(parameter)
        if tensor is not None and tensor.latent is not None:
            tensor.latent.copy_(weight)
            tensor.publish()
        else:
            local(parameter.detach()).copy_(weight.view(local(parameter).shape))

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        tensor = self._tensors.get(parameter)
        return local(parameter.detach()) if tensor is None else tensor.weight

    def _seen(self) -> Iterator[tuple[nn.Parameter, Penalized]]:
        """Yield each penalized parameter with what the penalty may look at; one that belongs to two groups twice.

        It is read when it is asked for, so that what was written between two of them is seen, and norms are those of before the
        first tensor of a group.
        """
        for parameter in self._single:
            yield parameter, self._look_at(parameter)
        for group in self._groups:
            norm = group.norms(self._weight)
            for part in group.parts:
                parameter = part.bound.parameter
                yield parameter, self._look_at(parameter, part.expand(norm, 0.0), part.expand(group.sizes, 0.0))

    def _look_at(self, parameter: nn.Parameter, norm: Tensor | None = None, size: Tensor | None = None) -> Penalized:
        tensor, weight = self._tensors.get(parameter), self._weight(parameter)
        active = learns = None
        if tensor is not None:
            active, learns = (None if gone is None else ~gone for gone in (tensor.pruned, tensor.blocked))
        return Penalized(weight, active, learns, self.density, norm, size)


class _Group:
    """Pieces whose weights are penalized together; ``sizes`` are their numbers of weights."""

    def __init__(self, one: Ranked, parts: Sequence[Part]) -> None:
        self.one, self.parts = one, parts
        self.sizes = self.sum(lambda part: torch.ones(part.bound.here.shape, dtype=torch.float64, device=one.device))

    def norms(self, weight: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """Return the L2 norm of each piece, float64."""
        return self.sum(lambda part: weight(part.bound.parameter).to(torch.float64).square()).sqrt()

    def sum(self, values: Callable[[Part], Tensor]) -> Tensor:
        """Return the sum of the values of all elements of each piece, over all its weights."""
        pieces = [
            part.spread(part.cut(values(part).view(part.bound.here.shape)).to(self.one.device), self.one.pieces) for part in self.parts
        ]
        return torch.stack(pieces).sum(dim=0)


def _weights(one: Ranked) -> list[Part]:
    """Return the parts that a penalty on weights acts on: of a group, no biases and no normalizations."""
    if not isinstance(one.granularity, Grouped):
        return list(one.parts)
    return [part for part in one.parts if part.bound.parameter.ndim > 1]


def _of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
