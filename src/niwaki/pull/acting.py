"""One recipe's penalties on one model, around every optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from niwaki.clock import Clock
from niwaki.collecting import Statistics
from niwaki.errors import InputError
from niwaki.gates import Gates
from niwaki.masked import MaskedTensor
from niwaki.masks import local
from niwaki.penalty import GroupLasso, Penalized, Penalty, Single
from niwaki.pieces import Ranked
from niwaki.pull.costs import weigh_gates, weigh_groups, weigh_scales, weigh_weights
from niwaki.pull.terms import GroupTerms, OwnTerm, WeightTerm, penalized_parts, require_whole
from niwaki.target import NormScale, select_targets

Term = WeightTerm | OwnTerm


class Pull:
    """The penalties of a recipe on a model.

    Args:
        penalty: which.
        model: for penalties on the scales of normalizations, which are of the whole model.
        ranked: the tensors or groups that the recipe acts on.
        tensors: those of its tensors that are under a recipe, by parameter.
        gates: the gates of the recipe's relaxation.
        density: share of active elements that the recipe asks for.
        clock: of the run, for times.
        statistics: to see the loss and FLOPs, for penalties that want a share of them.
        tell: takes sentences for the user.

    Raises:
        InputError: there is nothing that the penalty could act on, or it cannot act on it so.
    """

    def __init__(
        self,
        penalty: Penalty,
        model: nn.Module,
        ranked: Sequence[Ranked],
        tensors: Mapping[nn.Parameter, MaskedTensor],
        gates: Sequence[Gates],
        density: float,
        clock: Clock,
        statistics: Statistics,
        tell: Callable[[str], None],
    ) -> None:
        self._tensors, self._statistics, self._tell = tensors, statistics, tell
        owners: list[MaskedTensor | Gates] = [*tensors.values(), *gates]
        self._own = {p: (owner, name) for owner in owners for name, p in owner.own.items()}
        self._acting = [_Acting(one, model, ranked, tensors, gates, density, clock, statistics.uses) for one in penalty.penalties]
        self.found: float | None = None
        """The strength that a ratio was turned into, at the first step."""
        self._gradients: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def look(self, step: int, scale: Tensor | None = None) -> None:
        """Compute the gradients of the penalties at the weights as they are, before any of a step's optimizers moves them.

        Args:
            step: optimizer steps taken.
            scale: of the loss's gradients, where a fused optimizer under a gradient scaler divides by it in its own step.

        Raises:
            InputError: the penalty's strength is to be found, and cannot be.
        """
        self._find_strength()
        self._gradients = {}
        for acting in self._acting:
            for parameter, pull in acting.look(step, scale):
                before = self._gradients.get(parameter)
                self._gradients[parameter] = pull if before is None else before + pull

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """Add the gradients of the penalty to those of the parameters that an optimizer steps."""
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer under a gradient scaler unscales in its own step
        for parameter in _of(optimizer):
            pull = self._gradients.pop(parameter, None)
            if pull is None:
                continue
            if scale is not None:
                pull = pull * scale
            if parameter in self._own:
                owner, name = self._own[parameter]
                owner.add_own_gradient(name, pull.to(parameter.dtype))
                continue
            tensor = self._tensors.get(parameter)
            if parameter.grad is None:
                continue
            if tensor is not None and tensor.latent is not None:
                tensor.add_gradient(pull)
            elif parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense() + pull
            else:
                local(parameter.grad).add_(pull)

    @torch.no_grad()
    def after_step(self, step: int, optimizers: Iterable[Optimizer]) -> None:
        """Take the penalties' own steps on all parameters that the optimizers hold, each with its learning rate.

        ``step``: optimizer steps taken before the one that is over.
        """
        acting = [one for one in self._acting if one.penalty.after_step]
        if not acting:
            return
        rates = {p: float(group["lr"]) for o in optimizers for group in o.param_groups for p in group["params"] if p.requires_grad}
        for one in acting:
            one.after_step(step, rates)

    def take_strength(self, strength: float) -> None:
        """Go on with a strength that the ratio was turned into."""
        [acting] = self._acting
        assert isinstance(acting.penalty, GroupLasso)
        self.found, acting.penalty = strength, acting.penalty.with_strength(strength)

    def state_dict(self) -> list[dict[str, Any] | None]:
        """Return what each penalty remembers; None for those that remember nothing."""
        return [acting.state_dict() for acting in self._acting]

    def load_state_dict(self, states: Sequence[Mapping[str, Any] | None]) -> None:
        """Go on from what the penalties remembered."""
        for acting, state in zip(self._acting, states, strict=True):
            acting.load_state_dict(state)

    def _find_strength(self) -> None:
        """Turn the ratio of the penalty to the loss into a strength, once."""
        acting = self._acting[0]
        penalty = acting.penalty
        if not isinstance(penalty, GroupLasso) or penalty.ratio is None:
            return
        loss = self._statistics.mean_loss()
        value = sum(penalty.total(group.norms(lambda _, seen: seen.weight), group.sizes, group.costs) for group in acting.groups)
        strength = penalty.strength_at(loss, value)
        self._tell(
            f"penalty: group_lasso has strength {strength:.6g}: its ratio is {penalty.ratio:.6g}, the loss {loss:.6g}, and the penalty at"
            f" strength 1 {value:.6g}"
        )
        self.take_strength(strength)


class _Acting:
    """One penalty and all that it acts on."""

    def __init__(
        self,
        penalty: Single,
        model: nn.Module,
        ranked: Sequence[Ranked],
        tensors: Mapping[nn.Parameter, MaskedTensor],
        gates: Sequence[Gates],
        density: float,
        clock: Clock,
        uses: Mapping[str, float] | None,
    ) -> None:
        self.penalty, self._density, self._clock = penalty, density, clock
        self.terms: list[Term] = []
        self.groups: list[GroupTerms] = []
        self._states: dict[str, dict[str, Tensor]] = {}
        self._shared: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        parts = [part for one in ranked for part in penalized_parts(one)]
        weigh = getattr(penalty, "weigh", "none")
        if penalty.grouped:
            self.groups = [GroupTerms(one, penalized_parts(one), tensors) for one in ranked]
            if weigh != "none":
                weigh_groups(self.groups, weigh, uses)
        elif penalty.reads == "weight":
            weights = [
                WeightTerm(bound.name, bound.parameter, tensors.get(bound.parameter), bound.here)
                for bound in {part.bound.parameter: part.bound for part in parts}.values()
            ]
            self.terms += weights
            weigh_weights(weights, weigh, uses)
        elif penalty.reads == "norm":
            scales = [WeightTerm(t.name, t.parameter, tensors.get(t.parameter), t.layout) for t in select_targets(model, NormScale())[0]]
            self.terms += scales
            if weigh != "none":
                weigh_scales(scales, ranked, weigh, uses)
        elif gates:
            of_gates = [OwnTerm(one, penalty.reads) for one in gates]
            self.terms += of_gates
            if weigh != "none":
                weigh_gates(of_gates, ranked, weigh, uses)
        else:
            own = [OwnTerm(t, penalty.reads) for t in {p.bound.name: tensors[p.bound.parameter] for p in parts}.values()]
            self.terms += own
            weigh_weights(own, weigh, uses)
        if penalty.whole:
            require_whole(penalty.name, [*self.terms, *(term for group in self.groups for _, term in group.parts)])
        for term in self.terms:
            self._try(term)

    def _try(self, term: Term) -> None:
        """Refuse, before training, what the relaxation does not have and what cannot be written."""
        if isinstance(term, WeightTerm):
            return
        with torch.no_grad():
            plain = term.parameter is not None
        if self.penalty.apply != "gradient" and not plain:
            raise InputError(
                f"penalty.{self.penalty.name}.apply: {self.penalty.apply!r} is of numbers that are trained themselves, and the relaxation"
                " computes its gates; choices: apply: gradient, relaxation: factor"
            )

    # ------------------------------------------------------------------ around a step

    def look(self, step: int, scale: Tensor | None) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Renew the state if that is due, and yield parameters and the gradients that they get."""
        penalty = self.penalty
        if penalty.wants_gradient:
            found = {term.name: term.gradient() for term in self.terms}
            if penalty.after_step:  # by then, other penalties will have added theirs
                found = {name: one if one is None else one.clone() for name, one in found.items()}
            self._gradients = {name: one if scale is None else one / scale for name, one in found.items() if one is not None}
        if penalty.remembers and ((not self._shared and not self._states) or step % penalty.interval(self._clock) == 0):
            everyone = [self._complete(term, term.read(), step) for term in self.terms]
            states, self._shared = penalty.refresh(everyone)
            self._states = {term.name: state for term, state in zip(self.terms, states, strict=True)}
        if not penalty.pulls:
            return
        for term, seen in self._seen(step):
            if penalty.wants_gradient and seen.gradient is None:
                continue  # what got no gradient is not stepped
            yield from term.pull_back(penalty.gradient(seen))

    def after_step(self, step: int, rates: Mapping[nn.Parameter, float]) -> None:
        """Take the penalty's own step."""
        due = 1 if self.penalty.remembers else self.penalty.interval(self._clock)
        if (step + 1) % due:
            return
        for term, seen in self._seen(step, rates):
            parameter = term.parameter
            if parameter in rates and not (self.penalty.wants_gradient and seen.gradient is None):
                assert parameter is not None
                term.write(self.penalty.step(seen, rates[parameter] * due))
        self._gradients = {}

    def _seen(self, step: int, rates: Mapping[nn.Parameter, float] | None = None) -> Iterator[tuple[Term, Penalized]]:
        """Yield each term with what the penalty may look at; a parameter that belongs to two groups twice.

        It is read when it is asked for, so that what was written between two of them is seen, and norms are those of before the
        first tensor of a group.
        """
        for term in self.terms:
            yield term, self._complete(term, term.read(), step)
        for group in self.groups:
            norms = group.norms(lambda term, seen: self._normed(term, self._complete(term, seen, step), rates))
            for part, seen in group.read(norms):
                yield part, self._complete(part, seen, step)

    def _normed(self, term: WeightTerm, seen: Penalized, rates: Mapping[nn.Parameter, float] | None) -> Tensor:
        """Return the weight whose norms count."""
        inner = getattr(self.penalty, "inner", None)
        if rates is None or self.penalty.apply != "proximal" or inner is None:
            return seen.weight
        found: Tensor = inner(seen, rates.get(term.parameter, 0.0))
        return found

    def _complete(self, term: Term, seen: Penalized, step: int) -> Penalized:
        return replace(
            seen,
            density=self._density,
            ramp=self.penalty.ramp(step, self._clock),
            gradient=self._gradients.get(term.name),
            state=self._states.get(term.name, {}),
            shared=self._shared,
        )

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any] | None:
        """Return what the penalty remembers."""
        if not self.penalty.remembers:
            return None
        return {"shared": _copied(self._shared), "terms": {name: _copied(state) for name, state in self._states.items()}}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from what it remembered."""
        if state is None:
            return
        devices = {term.name: term.read().weight.device for term in self.terms}
        first = next(iter(devices.values()))
        self._shared = {name: value.to(first, copy=True) for name, value in state["shared"].items()}
        self._states = {name: {k: v.to(devices[name], copy=True) for k, v in one.items()} for name, one in state["terms"].items()}


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def _of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
