"""One target tensor under a recipe: its mask, and how it enters and leaves an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from niwaki.binding import Bound
from niwaki.errors import InputError
from niwaki.masks import Masks, bits_of, clear_, local
from niwaki.pieces import Part
from niwaki.recipe import Recipe
from niwaki.relaxation import Moment

MASK_KINDS = ("pruned", "blocked", "cut", "ever_active")


@dataclass
class Now:
    """Where a run is; one object that all tensors of a sparsifier share.

    Attributes:
        step: optimizer steps taken.
        progress: share of the run that has passed, in [0, 1]; 0 where its length is not known.
    """

    step: int = 0
    progress: float = 0.0


class Gates(Protocol):
    """What a tensor sees of the gates of its pieces (:class:`niwaki.gates.Gates`)."""

    sample: Tensor
    mode: Tensor

    def scores(self) -> Tensor:
        """Return the learned score of each piece."""


class MaskedTensor:
    """The state of one target tensor; every tensor here has this rank's shape of the layout's view.

    Attributes:
        pruned: True where the mask is (inactive); None while nothing was selected.
        blocked: True where the gradient is zeroed: ``pruned``, or what is outside the superset.
        cut: True where a selection pruned beside a relaxation that decides itself.
        ever_active: True where the tensor was active at some time; None while that is everywhere.
        latent: the weight that is trained, where the parameter holds a published one.
        own: the relaxation's own trainable parameters.
        gates: the gates whose pieces the tensor has elements of, its part in each, and whether they multiply its weights.
        dropped: True where the element is left out of the coming step, of a relaxation that samples; None where nothing is.
    """

    def __init__(self, bound: Bound, recipe: Recipe, seed: int, now: Now | None = None) -> None:
        self.bound, self.recipe = bound, recipe
        self._seed, self._now = seed, now or Now()
        self.pruned: Tensor | None = None
        self.blocked: Tensor | None = None
        self.cut: Tensor | None = None
        self.ever_active: Tensor | None = None
        self.latent: Tensor | None = None
        self.own: dict[str, nn.Parameter] = {}
        self.gates: list[tuple[Gates, Part, bool]] = []
        self.dropped: Tensor | None = None
        self._bits: Tensor | None = None  # of the mask, where gradients and weights are cleared with it at every step
        self._hook: RemovableHandle | None = None
        self._published_gradient: Tensor | None = None
        self._published_version = local(bound.parameter)._version
        self._pulled: tuple[Tensor, dict[str, Tensor | None]] | None = None
        self._added: dict[str, Tensor] = {}
        self._gated_gradient: Tensor | None = None
        if recipe.relaxation.keeps_dense_weights:
            weight = bound.view(bound.parameter).clone(memory_format=torch.contiguous_format)
            self.latent = recipe.relaxation.initial_latent(weight, bound.here, self.moment)
            initial = recipe.relaxation.parameters(self.latent, bound.layout, bound.name, seed)
            if bound.group is not None and any(value.numel() > 1 and value.shape != self.latent.shape for value in initial.values()):
                raise InputError(
                    f"relaxation: {recipe.relaxation.name!r} learns numbers for the rows of {bound.name}, which is sharded; say per: tensor"
                )
            self.own = {name: nn.Parameter(value) for name, value in initial.items()}
            if recipe.relaxation.decides:
                self.publish()

    # ------------------------------------------------------------------ looking

    @property
    def weight(self) -> Tensor:
        """The weight that is trained."""
        return self.bound.view(self.bound.parameter) if self.latent is None else self.latent

    @property
    def gradient(self) -> Tensor | None:
        """The gradient of the weight that is trained: of a latent one after :meth:`pull_back`."""
        if self.latent is not None:
            return None if self._pulled is None else self._pulled[0]
        gradient = self.bound.parameter.grad
        return None if gradient is None else self.bound.view(gradient.to_dense() if gradient.is_sparse else gradient)

    def penalized(self, what: str, weight: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        """Return what a penalty of the relaxation is about, differentiable.

        Args:
            what: ``gate``, ``active`` (how probably), ``divergence`` or ``threshold``.
            weight: in the place of the latent one.
            own: in the place of the own parameters.

        Raises:
            InputError: the relaxation has no such thing.
        """
        relaxation = self.recipe.relaxation
        if what == "threshold":
            if "threshold" not in own:
                raise InputError(f"penalty.threshold: relaxation {relaxation.name!r} learns no thresholds; choices: dynamic_threshold")
            return own["threshold"]
        hooks = {"gate": relaxation.gates, "active": relaxation.expected_active, "divergence": relaxation.divergence}
        return hooks[what](weight, own)

    @property
    def score(self) -> Tensor:
        """The relaxation's learned score of every element; pieces that have gates have scores of their own."""
        return self.recipe.relaxation.score(self.weight, self._own_values())

    @property
    def republishes(self) -> bool:
        """Whether every step publishes anew, after all own parameters have moved: a sample, another moment, or gates."""
        return bool(self.gates) or self.recipe.relaxation.mode_differs

    @property
    def noisy(self) -> bool:
        """Whether its noise is added to what its module returns."""
        return self.latent is not None and self.recipe.relaxation.variance(self.latent, self._own_values()) is not None

    def kept(self, pruned: Tensor | None) -> Tensor:
        """Return the complement of a mask of pruned elements."""
        if pruned is None:
            return torch.ones(self.bound.here.shape, dtype=torch.bool, device=local(self.bound.parameter).device)
        return ~pruned

    def in_parameter_shape(self, mask: Tensor) -> Tensor:
        """Return a mask in the shape of this rank's part of the parameter."""
        return mask.view(local(self.bound.parameter).shape)

    @property
    def moment(self) -> Moment:
        """When the relaxation is asked for what a step trains with."""
        return self._moment(False)

    def _moment(self, evaluating: bool) -> Moment:
        return Moment(self.bound.name, self._seed, self._now.step, self.bound.start, self._now.progress, evaluating)

    def _own_values(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.own.items()}

    def _write(self, values: Tensor) -> None:
        here = local(self.bound.parameter)
        here.copy_(values.view(here.shape))

    # ------------------------------------------------------------------ gradients

    def watch_gradient(self, accumulated: Callable[[MaskedTensor], None]) -> None:
        """Call ``accumulated(self)`` whenever a gradient has been accumulated, if the parameter requires gradients."""
        if self._hook is None and self.bound.parameter.requires_grad:
            self._hook = self.bound.parameter.register_post_accumulate_grad_hook(lambda _: accumulated(self))  # type: ignore[no-untyped-call]

    def unwatch(self) -> None:
        """Take the gradient hook off."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def mask_gradient(self) -> None:
        """Zero the gradient of what does not learn."""
        gradient = self.bound.parameter.grad
        if self._bits is None or gradient is None:
            return
        if gradient.is_sparse:
            clear_(gradient._values(), self._bits[tuple(gradient._indices())])
        else:
            clear_(local(gradient.detach()), self._bits)

    # ------------------------------------------------------------------ around a step

    def adopt_writes(self) -> None:
        """Take over what somebody else has written into the parameter since it was published, such as a checkpoint."""
        if self.latent is None or local(self.bound.parameter)._version == self._published_version:
            return
        here = self.bound.view(self.bound.parameter)
        self.latent = torch.where(here == self._published(), self.latent, here)
        self.publish()

    def pull_back(self) -> None:
        """Pull the gradient of the published weight back to the latent one and to the own parameters."""
        gradient = self.bound.parameter.grad
        self.end_step()
        if self.latent is None or gradient is None:
            return
        published = self.bound.view(gradient.to_dense() if gradient.is_sparse else gradient)
        acting = [part.expand(gates.sample, 1.0) for gates, part, acts in self.gates if acts]
        self._gated_gradient = published if acting else None
        for gate in acting:
            published = published * gate
        for_weight, for_own = self.recipe.relaxation.pull_back(self.latent, self._own_values(), published, self._moment(False))
        if self.dropped is not None:
            for_weight = for_weight.masked_fill(self.dropped, 0.0) * self.recipe.relaxation.scale
        for value in for_own.values():
            if value is not None and self.bound.group is not None and value.shape != self.latent.shape:
                dist.all_reduce(value, group=self.bound.group)
        self._pulled = for_weight, for_own

    def gate_gradient(self, gates: Gates) -> Tensor | None:
        """Return for each element the gradient of its gate, after :meth:`pull_back`."""
        if self.latent is None or self._gated_gradient is None:
            return None
        result = self._gated_gradient * self.latent
        for other, part, acts in self.gates:
            if acts and other is not gates:
                result = result * part.expand(other.sample, 1.0)
        return result

    def own_gradient(self, name: str) -> Tensor | None:
        """Return the gradient of one of the own parameters, after :meth:`pull_back`.

        What a forward pass that used the parameter has left in it counts too.
        """
        found = [] if self._pulled is None or self._pulled[1].get(name) is None else [self._pulled[1][name]]
        found += [one for one in (self._added.get(name), self.own[name].grad) if one is not None]
        return torch.stack([one.to(self.own[name].dtype) for one in found if one is not None]).sum(dim=0) if found else None

    def add_gradient(self, pull: Tensor) -> None:
        """Add to the gradient of the latent weight, after :meth:`pull_back`."""
        if self._pulled is not None:
            for_weight, for_own = self._pulled
            self._pulled = for_weight + pull.view(for_weight.shape), for_own

    def add_own_gradient(self, name: str, pull: Tensor) -> None:
        """Add to the gradient of one of the own parameters, after :meth:`pull_back`."""
        before = self._added.get(name)
        self._added[name] = pull if before is None else before + pull

    def enter_step(self) -> None:
        """Give the optimizer the latent weight in the parameter's place, and its gradient."""
        parameter = self.bound.parameter
        if self.latent is None or self._pulled is None:
            return
        for_weight = self._pulled[0]
        self._published_gradient = parameter.grad
        if not self.recipe.gradient.weights_learn:
            parameter.grad = None
            return
        if self.blocked is not None:
            for_weight = for_weight.masked_fill(self.blocked, 0.0)
        self._write(self.latent)
        parameter.grad = torch.empty_like(parameter)
        local(parameter.grad).copy_(for_weight.view(local(parameter).shape))

    def leave_step(self) -> None:
        """Project the weight after the optimizer's step, or take the latent one back and publish."""
        parameter = self.bound.parameter
        if self.latent is None:
            self.project()
        elif self._published_gradient is not None:
            if self.recipe.gradient.weights_learn:
                self.latent.copy_(self.bound.view(parameter))
            parameter.grad, self._published_gradient = self._published_gradient, None
            if not self.republishes:
                self.publish()

    def constrain(self) -> None:
        """Bring the own parameters back to where the relaxation wants them, after a step."""
        if self.own:
            assert self.latent is not None
            for name, value in self.recipe.relaxation.constrain(self.latent, self._own_values()).items():
                self.own[name].copy_(value)

    def end_step(self) -> None:
        """Let go of what only the step needed."""
        self._pulled, self._gated_gradient, self._added = None, None, {}

    def project(self) -> None:
        """Set pruned weights to zero."""
        if self._bits is not None:
            clear_(local(self.bound.parameter.detach()), self._bits)

    def publish(self, evaluating: bool = False) -> None:
        """Copy what the relaxation makes of the latent weight into the parameter: a step's sample, or the mode to evaluate with."""
        published = self._published(evaluating)
        self._write(published)
        self._published_version = local(self.bound.parameter)._version
        if self.recipe.relaxation.decides:
            if self.cut is not None and self.recipe.selects:
                self.pruned = self.cut
            else:
                gone = self._gone(published if evaluating or not self.republishes else self._published(evaluating=True))
                self.pruned = gone if self.cut is None else gone | self.cut

    def restore(self, published: Tensor) -> None:
        """Put back what was published for the coming step, given in the parameter's shape."""
        self._write(published)
        self._published_version = local(self.bound.parameter)._version

    def _gone(self, mode: Tensor) -> Tensor:
        """Return what the relaxation has decided to mask: where one of the gates is closed, not where an open one has a weight of zero."""
        if not self.gates:
            return mode == 0
        closed = torch.zeros_like(mode, dtype=torch.bool)
        for gates, part, _ in self.gates:
            closed |= part.expand(gates.mode, 1.0) == 0
        return closed

    def _published(self, evaluating: bool = False) -> Tensor:
        assert self.latent is not None
        relaxation = self.recipe.relaxation
        keep = self.kept(self.cut if relaxation.decides else self.pruned)
        published = relaxation.publish(self.latent, self._own_values(), keep, self._moment(evaluating))
        for gates, part, acts in self.gates:
            gate = part.expand(gates.mode if evaluating else gates.sample, 1.0)
            if acts:
                published = published * gate
            if acts or evaluating:
                published = published.masked_fill(gate == 0, 0.0)
        if self.dropped is None or evaluating:
            return published
        return (published * relaxation.scale).masked_fill_(self.dropped, 0.0)

    # ------------------------------------------------------------------ masks and checkpoints

    def rewrite(self, weight: Tensor) -> None:
        """Put other values in the place of the weight that is trained."""
        if self.latent is None:
            self._write(weight)
        else:
            self.latent.copy_(weight)

    def set_masks(self, keep: Tensor, learns: Tensor | None, before_training: bool) -> Tensor | None:
        """Take a new mask and bring the weight in line with it.

        Args:
            keep: True where active.
            learns: True where the gradient is used; None for everywhere.
            before_training: whether no step was taken with another mask.

        Returns:
            where the optimizer's slots must be fresh: what learns and did not, or did and no longer does.
        """
        before = self.blocked
        self.pruned = ~keep
        self.blocked = None if learns is None else self.pruned if learns is keep else ~learns
        if before_training:
            self.ever_active = keep
        elif self.ever_active is not None:
            self.ever_active = self.ever_active | keep
        if self.latent is None:
            self._bits = bits_of(self.in_parameter_shape(keep))
            self.project()
        else:
            self.cut = self.pruned if self.recipe.relaxation.decides else None
            self.publish()
        if self.blocked is None:
            return None
        return self.blocked if before is None else self.blocked ^ before

    def fold(self) -> None:
        """Keep the published or projected weight for good."""
        self.project()
        if self.latent is not None:
            self.publish(evaluating=True)
        self.latent, self.own, self.gates, self.dropped = None, {}, [], None
        self.unwatch()

    def state_dict(self) -> dict[str, Any]:
        """Return masks as packed bits, the latent weight and the own parameters."""
        masks = {kind: mask for kind in MASK_KINDS if (mask := getattr(self, kind)) is not None}
        return {
            "shape": list(self.bound.here.shape),
            "masks": Masks(masks).packed(),
            "latent": None if self.latent is None else self.latent.clone(),
            "own": {name: parameter.detach().clone() for name, parameter in self.own.items()},
        }

    def read(self, state: Mapping[str, Any]) -> Masks:
        """Check a state against this tensor and return its masks, without changing anything.

        Raises:
            InputError: the state has another shape.
        """
        shape = tuple(state["shape"])
        if shape != self.bound.here.shape:
            raise InputError(f"load_state_dict: {self.bound.name} has shape {shape} in the state and {self.bound.here.shape} in this model")
        return Masks.unpack(state["masks"], dict.fromkeys(state["masks"], shape))

    def load_state_dict(self, state: Mapping[str, Any], masks: Masks) -> None:
        """Take a state that was read before."""
        device = local(self.bound.parameter).device
        for kind in MASK_KINDS:
            setattr(self, kind, masks[kind].to(device) if kind in masks else None)
        if self.latent is None:
            self._bits = None if self.pruned is None else bits_of(self.in_parameter_shape(~self.pruned))
            self.project()
            return
        self.latent.copy_(state["latent"])
        for name, parameter in self.own.items():
            parameter.copy_(state["own"][name])
        self.publish()
