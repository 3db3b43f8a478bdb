"""The sparsifier: binds a model, its optimizers and a recipe, and acts at the step boundary.

Everything happens in the optimizers' own hooks, so that the model's keys, classes, forward and compiled graphs stay untouched:

- *while gradients accumulate*: the gradients of pruned weights are zeroed (so that clipping sees the active norm), unless the
  coming update needs the dense gradient;
- *before the step*: the mask update, if the schedule says so; relaxations pull the gradient back to their latent weights;
- *after the step*: weights are projected (or published), and slots of pruned and grown weights hold fresh values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from niwaki.binding import bind
from niwaki.calibration import recalibrate_batchnorm
from niwaki.clock import Clock
from niwaki.collecting import Statistics, Values, bytes_of, statistics_of
from niwaki.compensating import compensate
from niwaki.dependency import Example, Group
from niwaki.dropping import leave_out
from niwaki.errors import InputError
from niwaki.gates import Gates, make_gates
from niwaki.gradient import Dense, Selected
from niwaki.gradient_selection import keep_best_gradients
from niwaki.granularity import Grouped
from niwaki.interpose import Handle
from niwaki.masked import MaskedTensor, Now
from niwaki.masks import Masks, canonical_name, equals_zero, local, shard
from niwaki.metrics.units import show
from niwaki.own_parameters import add_own_parameters
from niwaki.pieces import Ranked, bounds_of
from niwaki.pull import Pull
from niwaki.ranking import find_groups_with, rank_targets
from niwaki.ranks import average_, require_same
from niwaki.recipe import Recipe
from niwaki.recipe.stages import StageRecipe
from niwaki.relaxation import Dropout
from niwaki.selector import Selector, reads_gradient
from niwaki.slots import forget_history, reset_slots
from niwaki.target import LeftOut
from niwaki.walking import walk
from niwaki.watching import StepWatch
from niwaki.weight_noise import add_noise

MasksChanged = Callable[[Masks], None]

NOTHING = StageRecipe()
"""What is held is under: hard masks, and no update."""


class Sparsifier:
    """Applies a recipe to a model while any training loop trains it.

    Args:
        model: any module, wrapped (``torch.compile``, DDP) or not; with FSDP2 build the sparsifier after ``fully_shard``.
        recipe: what to do; see :class:`niwaki.Recipe` and :func:`niwaki.method`. One with stages is carried out by ``niwaki run``, or
            by a sparsifier for each of :func:`niwaki.recipe.stages.unroll`.
        masks: to start from, such as those of an earlier stage. What they prune is pruned from the beginning, and stays so unless the
            recipe brings it back: with hard masks and no growth, updates choose only from what is active. They are the first masks of a
            growth that would draw its own. Tensors that are no targets of the recipe keep their masks to the end.
        total_steps: optimizer steps of the whole run; resolves times in ``run``.
        steps_per_epoch: optimizer steps of an epoch; resolves times in ``epochs``.
        tokens_per_step: tokens of a step; resolves times in ``tokens``.
        seed: of everything random; the result is the same on every rank.
        data: batches ``(inputs, targets)`` for statistics that an update before the first step needs. Without them an update that needs
            gradients waits for those of the first step.
        loss: ``loss(model(inputs), targets)``, needed with ``data`` for gradients, and with ``validation``.
        validation: batches ``(inputs, targets)`` of examples that are not trained on, for schedules that follow the loss on them.
        groups: the model's dependency groups, for a granularity whose pieces are their units (channels, heads, layers), such as
            :func:`niwaki.dependency.find_groups` returns, with what a person has vetoed or coupled. None: they are found here.
        example: arguments of a forward pass to find them with, a tuple or a dict of keyword arguments; by default the inputs of the
            first batch of ``data``.
        memory: most bytes that statistics (gradients, second moments, Kronecker factors) may take; None for no limit.
        progress: called with a sentence when masks begin to be selected: what they are ranked by, and the memory that it takes.

    Masks that the recipe wants from the start are applied here: build the sparsifier first, then load checkpoints.

    Raises:
        InputError: the recipe cannot be run on this model; one line that says what, where, and what would be right.

    >>> import torch, niwaki
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> sparsifier = niwaki.Sparsifier(model, niwaki.method("rigl", sparsity=0.75), total_steps=1000).attach(optimizer)
    >>> round(sparsifier.sparsity, 2)
    0.75
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        masks: Masks | None = None,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
        tokens_per_step: int | None = None,
        seed: int = 0,
        data: Iterable[tuple[Any, Any]] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
        validation: Iterable[tuple[Any, Any]] | None = None,
        groups: Sequence[Group] | None = None,
        example: Example | None = None,
        memory: int | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        if recipe.stages is not None:
            raise InputError("recipe: it has stages; build a sparsifier for each of niwaki.recipe.stages.unroll(recipe), or use niwaki run")
        self.model, self.recipe, self.seed = model, recipe, seed
        self.clock = Clock(total_steps, steps_per_epoch, tokens_per_step)
        self.step = 0
        """Optimizer steps taken so far; overflow-skipped steps of a gradient scaler do not count."""
        self._now = Now()
        self.notes: list[str] = []
        """What a user should know: guards that acted, state that could not be reached, tensors left out."""
        for note in recipe.fit(self.clock):
            self._tell(note)
        self.left_out: list[LeftOut] = []
        self._tensors: dict[str, MaskedTensor] = {}
        masks = masks or Masks()
        masks.apply_(model)
        if isinstance(recipe.granularity, Grouped) and recipe.acts and groups is None:
            groups, data = find_groups_with(model, recipe.granularity, example, data)
        self.ranked: list[Ranked] = []
        """What is ranked: the target tensors, or the dependency groups with their members."""
        if recipe.acts:
            self.ranked, self.left_out = rank_targets(model, recipe, groups)
        if isinstance(recipe.granularity, Grouped) and recipe.growth.name != "none":
            self._tell(
                f"growth {recipe.growth.name!r}: a unit that comes back is zero in all its tensors, where most networks pass it no"
                " gradient, so it hardly learns again; relaxation: latent keeps the weights of masked units"
            )
        for one in self.ranked:
            if one.processes is not None and recipe.normalization.name not in ("none", "per_flop"):
                name = recipe.normalization.name
                raise InputError(f"normalization: {name!r} needs whole tensors, and {one.name} is sharded; choices: none, per_flop")
        with torch.no_grad():
            for bound in bounds_of(self.ranked):
                self._tensors[bound.name] = MaskedTensor(bound, recipe, seed, self._now)
        self._targets = dict(self._tensors)
        if recipe.relaxation.anneals and total_steps is None:
            raise InputError(f"relaxation: {recipe.relaxation.name!r} changes over the run, so it needs its length: pass total_steps=")
        self._gates: list[Gates] = make_gates(recipe, self.ranked, self._targets, seed, self._now)
        self._take_masks(masks)
        if not self._tensors:
            raise InputError("recipe: it masks nothing, and there are no masks= to hold")
        self._by_parameter = {t.bound.parameter: t for t in self._tensors.values()}
        owners: list[MaskedTensor | Gates] = [*self._tensors.values(), *self._gates]
        self._own = {p: (owner, name) for owner in owners for name, p in owner.own.items()}
        self._optimizers: list[Optimizer] = []
        self._held: list[frozenset[int]] = []
        self._handles: list[RemovableHandle] = []
        self._noise: list[Handle] = []
        self._callbacks: list[MasksChanged] = []
        self._stepped: set[int] = set()
        self._round_is_open = False
        self._skips = False
        self._accumulated: set[Tensor] = set()  # parameters whose gradient was accumulated since the last optimizer step
        self._one_backward = False  # whether several optimizers were seen to step after one backward pass
        self._finalized = False
        self._gradient_needs = any(reads_gradient(component) for component in (recipe.saliency, recipe.growth, recipe.allocation))
        self._selects_at_once = recipe.growth.at_once or (recipe.relaxation.keeps_dense_weights and not self._gradient_needs)
        self._statistics = Statistics(model, recipe, data, loss, seed, validation)
        self._pull: Pull | None = None
        if recipe.penalty is not None:
            density = 1.0 - (recipe.final_sparsity or 0.0)
            self._pull = Pull(
                recipe.penalty,
                model,
                self.ranked,
                self._by_parameter,
                self._gates,
                density,
                self.clock,
                self._statistics,
                self._tell,
            )
        given = any(tensor.pruned is not None for tensor in self._targets.values())
        self._watch: StepWatch | None = None
        self._selector = Selector(
            recipe, self.ranked, self._targets, self._statistics, self.clock, seed, self._tell, given, self._watched_steps
        )
        asked = statistics_of(recipe, self.ranked) if recipe.acts else {}
        self.statistics_bytes = bytes_of(asked, memory)
        """Bytes that statistics take while masks are updated."""
        if any(request.source == "steps" for request in asked):
            self._watch = StepWatch(asked, self._targets)
        self._progress = progress
        self._start_masks()
        self._draw()
        self._look_ahead()

    @torch.no_grad()
    def _take_masks(self, masks: Masks) -> None:
        """Start from masks, and hold those of tensors that the recipe does not act on."""
        parameters = {canonical_name(name): parameter for name, parameter in self.model.named_parameters(remove_duplicate=False)}
        known = {t.bound.parameter: t for t in self._targets.values()}
        for name, mask in masks.items():
            parameter = parameters[name]
            tensor = known.get(parameter)
            if tensor is None:
                tensor = known[parameter] = self._tensors[name] = MaskedTensor(bind(name, parameter), NOTHING, self.seed)
            keep = shard(mask, parameter, f"masks: {name!r}").to(local(parameter).device).contiguous().view(tensor.bound.here.shape)
            if tensor.bound.group is None and bool(keep.all()):
                continue  # as if it had none, so that a growth may draw its own
            tensor.set_masks(keep, keep if tensor.recipe.gradient.masked else None, before_training=True)

    # ------------------------------------------------------------------ what a user asks

    @property
    def masks(self) -> Masks:
        """The masks now: canonical parameter name -> bool tensor, True where active (this rank's part of a sharded parameter)."""
        return Masks({name: t.in_parameter_shape(t.kept(t.pruned)).clone() for name, t in self._tensors.items()})

    @property
    def sparsity(self) -> float:
        """Share of the masked tensors' elements that is masked now (this rank's part of sharded parameters): of the targets, of all
        members of the groups whose units are masked, and of held tensors."""
        total = sum(t.bound.here.elements for t in self._tensors.values())
        return sum(int(t.pruned.sum()) for t in self._tensors.values() if t.pruned is not None) / max(total, 1)

    @property
    def computing(self) -> Masks:
        """Which weights the coming forward pass computes with: the masks, or what is not zero where a relaxation trains others."""
        if not self.recipe.relaxation.mode_differs:
            return self.masks
        return Masks({name: ~equals_zero(local(t.bound.parameter.detach())) for name, t in self._tensors.items()})

    @property
    def needs_dense_gradient(self) -> bool:
        """Whether the coming step uses the gradients of all weights: for an update that ranks by them, or because all of them learn."""
        relaxation = self.recipe.relaxation
        scored = relaxation.has_scores and not relaxation.decides
        return self._dense_gradient_next or (relaxation.keeps_dense_weights and (scored or isinstance(self.recipe.gradient, Dense)))

    @property
    def learning(self) -> Masks:
        """Which weights learn between updates: the active ones, or those of a superset."""
        blocked = {name: t.pruned if t.blocked is None else t.blocked for name, t in self._tensors.items()}
        return Masks({name: t.in_parameter_shape(t.kept(blocked[name])).clone() for name, t in self._tensors.items()})

    @property
    def ever_active_share(self) -> float:
        """Share of the target elements that were active at some time (the exploration rate of ITOP, Liu et al. 2021)."""
        total = sum(t.bound.here.elements for t in self._tensors.values())
        inactive = sum(int((~t.ever_active).sum()) for t in self._tensors.values() if t.ever_active is not None)
        return 1.0 - inactive / max(total, 1)

    @property
    def strength(self) -> float | None:
        """The strength that a penalty's ratio to the loss was turned into at the first step, or None."""
        return None if self._pull is None else self._pull.found

    @property
    def settled(self) -> bool:
        """Whether the masks that a schedule has waited for act, so that no others are chosen."""
        return self._selector.schedule_state.settled

    def on_masks_changed(self, callback: MasksChanged) -> None:
        """Call ``callback(masks)`` after every update that changed a mask."""
        self._callbacks.append(callback)

    # ------------------------------------------------------------------ attaching

    def attach(self, *optimizers: Optimizer, scheduler: Any | None = None) -> Sparsifier:
        """Act in the hooks of these optimizers from now on; a step is complete when all their parameters were stepped once.

        Args:
            optimizers: those that hold the model's parameters; may be called again with more, such as a copy, which has lost its hooks.
            scheduler: the learning-rate scheduler (or a list of them), if one was already made and the relaxation adds an own group.

        Raises:
            InputError: an optimizer is attached already, or its scheduler is needed and missing.
        """
        if self._finalized:
            raise InputError("attach: this sparsifier is finalized")
        schedulers = list(scheduler) if isinstance(scheduler, list | tuple) else [scheduler] * (scheduler is not None)
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise InputError(f"attach: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
            if any(optimizer is known for known in self._optimizers):
                raise InputError("attach: this optimizer is attached already")
            hooks = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values())
            others = [owner for owner in hooks if isinstance(owner, Sparsifier) and owner.recipe.acts]
            if others and self.recipe.acts and any(owner.recipe.skips_steps for owner in (self, *others)):
                raise InputError(
                    "attach: another sparsifier is attached to this optimizer, and one of the two skips steps, gradients included; say"
                    " at_update: step in its growth"
                )
        self._require_own_model("attach")
        held = {p for optimizer in (*self._optimizers, *optimizers) for group in optimizer.param_groups for p in group["params"]}
        if optimizers and not held & set(self._by_parameter) and any(p.requires_grad for p in self._by_parameter):
            raise InputError("attach: the optimizer holds none of the target parameters; make it for the model of this sparsifier")
        add_own_parameters(self.recipe.relaxation, self._tensors.values(), self._gates, optimizers, schedulers)
        taught = [tensor for tensor in self._tensors.values() if tensor.own] + [tensor for one in self._gates for tensor, _ in one.acting]
        for name in dict.fromkeys(tensor.bound.name for tensor in taught if not tensor.bound.parameter.requires_grad):
            self._tell(
                f"relaxation: {self.recipe.relaxation.name!r} learns by the gradient of {name}, which requires none; requires_grad_(True)"
                " gives it one, and gradient: frozen leaves the weights as they are"
            )
        for optimizer in optimizers:
            self._optimizers.append(optimizer)
            self._held.append(frozenset(id(p) for group in optimizer.param_groups for p in group["params"]))
            self._handles += [optimizer.register_step_pre_hook(self._before_step), optimizer.register_step_post_hook(self._after_step)]
        if not self._noise:
            self._noise = add_noise(self.model, (t for t in self._targets.values() if t.noisy))
        for tensor in self._tensors.values():
            tensor.watch_gradient(self._on_gradient)
            if tensor.blocked is not None:  # an optimizer that has stepped before may remember what is pruned now
                self._freshen(tensor, tensor.blocked)
        return self

    def _require_own_model(self, where: str) -> None:
        """Refuse a model whose parameters were exchanged for others since the sparsifier was built."""
        now = {canonical_name(name): parameter for name, parameter in self.model.named_parameters(remove_duplicate=False)}
        for name, tensor in self._tensors.items():
            if now.get(name) is not tensor.bound.parameter:
                raise InputError(
                    f"{where}: {name} of the model is not the parameter that the sparsifier was built for (load_state_dict(assign=True)"
                    " exchanges parameters); build the sparsifier after that"
                )

    def _on_gradient(self, tensor: MaskedTensor) -> None:
        if self._statistics.collecting:
            return
        self._accumulated.add(tensor.bound.parameter)
        if tensor.latent is None and (tensor.recipe is NOTHING or not self._dense_gradient_next):
            tensor.mask_gradient()

    # ------------------------------------------------------------------ the step

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is not None and self.recipe.relaxation.keeps_dense_weights:
            raise InputError(
                f"relaxation: {self.recipe.relaxation.name!r} cannot be trained with a closure, which sees weights between two steps; use"
                " an optimizer that steps without one, or relaxation: hard"
            )
        if closure is not None and isinstance(self.recipe.gradient, Selected):
            raise InputError(
                "gradient: 'selected' chooses among the gradients of a step, and a closure computes them inside the step; use an optimizer"
                " that steps without one, or gradient: active"
            )
        if _overflowed(optimizer):
            return None
        index = self._index(optimizer)
        if self._round_is_open:
            if not self._accumulated:
                self._one_backward = True
            if index in self._stepped or (self._accumulated and self._one_backward):  # a scaler has skipped the step of another one
                self._close_round()
        unmasked = [t for t in self._tensors.values() if t.latent is None and t.bound.parameter not in self._accumulated]
        self._accumulated.clear()
        if not self._round_is_open:
            self._round_is_open, self._skips, self._stepped = True, False, set()
            for tensor in self._tensors.values():
                tensor.adopt_writes()
            if self._watch is not None:
                self._watch.look(getattr(optimizer, "grad_scale", None))
            self._selector.gradient_scale = getattr(optimizer, "grad_scale", None)
            self._update_masks(closure)
            for tensor in self._tensors.values():
                tensor.pull_back()
            for gates in self._gates:
                gates.pull_back()
            average_([p.grad for p in self._own if p.grad is not None])  # of forward passes, which no wrapper synchronizes
            if isinstance(self.recipe.gradient, Selected):
                keep_best_gradients(self.recipe, self._targets.values())
            if self._pull is not None:
                self._pull.look(self.step, getattr(optimizer, "grad_scale", None))
        if self._skips:
            if closure is None:
                _drop_gradients(optimizer)
                return None
            return _with_closure(args, kwargs, lambda: _without_step(closure, optimizer))
        if closure is None and not self._stepped:
            for tensor in unmasked:  # a gradient that was assigned, or of a parameter that did not require gradients when it was attached
                tensor.mask_gradient()
                tensor.watch_gradient(self._on_gradient)
        if self._pull is not None:
            self._pull.before_step(optimizer)
        for group in optimizer.param_groups:
            for tensor in self._of(group):
                tensor.enter_step()
            for parameter in group["params"]:
                if parameter in self._own:
                    owner, name = self._own[parameter]
                    parameter.grad = owner.own_gradient(name)
        return None

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _overflowed(optimizer):
            return
        index = self._index(optimizer)
        for group in optimizer.param_groups:
            for tensor in self._of(group):
                tensor.leave_step()
            for parameter in group["params"]:
                if parameter in self._own and parameter.grad is not None:
                    parameter.grad = None
                    owner = self._own[parameter][0]
                    if isinstance(owner, MaskedTensor) and id(owner.bound.parameter) not in self._held[index]:
                        owner.publish()  # its weight is stepped by another optimizer
        self._stepped.add(index)
        if frozenset().union(*self._held) == frozenset().union(*(self._held[i] for i in self._stepped)):
            self._close_round()

    def _close_round(self) -> None:
        self._round_is_open = False
        if self._pull is not None and not self._skips:
            self._pull.after_step(self.step, self._optimizers)
        self.step += 1
        if not self._skips:
            walk(self.recipe, self._targets.values(), self._optimizers, self.seed, self.step)
        for tensor in self._tensors.values():
            tensor.end_step()
        for tensor in self._targets.values():
            tensor.constrain()
        for gates in self._gates:
            gates.constrain()
        self._draw()
        if self._selects_at_once and self._selector.due(self.step) is not None:
            self._select()  # now, so that the coming forward sees the masks of the new weights and scores
        elif self.recipe.relaxation.decides:
            self._announce()
        self._look_ahead()

    @torch.no_grad()
    def _draw(self) -> None:
        """Publish the weights of the coming step where they are another sample, of another moment, or have moved gates."""
        self._now.step = self.step
        self._now.progress = min(self.step / self.clock.total_steps, 1.0) if self.clock.total_steps else 0.0
        for gates in self._gates:
            gates.draw()
        if isinstance(self.recipe.relaxation, Dropout):
            leave_out(self.recipe.relaxation, self.ranked, self._tensors, self.seed, self.step)
        else:
            for tensor in self._targets.values():
                if tensor.latent is not None and tensor.republishes:
                    tensor.publish()

    def _look_ahead(self) -> None:
        """Note whether the next step starts with an update that needs the gradients of pruned weights."""
        followed = self.recipe.growth.every_gradient and self.step <= self.recipe.schedule.last(self.clock)
        self._dense_gradient_next = followed or (self._gradient_needs and self._selector.due(self.step) is not None)

    # ------------------------------------------------------------------ mask updates

    @torch.no_grad()
    def _start_masks(self) -> None:
        """Make the selection that is due before the first step, if what it needs is at hand."""
        if self._selector.due(self.step) is None:
            return
        asking = self._selector.asking()
        if asking is None:
            self._select()
        elif self._statistics.data is None:
            self._tell(f"the first mask is chosen at the first step, from its gradients: {asking.slot} {asking.name!r} had no data=")
        elif not self._statistics.has_loss:
            raise InputError(f"{asking.slot}: {asking.name!r} needs loss= with data=, called as loss(model(inputs), targets)")
        else:
            with self._statistics.gradients():
                self._select()

    def _update_masks(self, closure: Callable[[], Any] | None) -> None:
        """Update the masks before this step if the schedule says so."""
        if closure is not None and self.recipe.growth.every_gradient:
            raise InputError(
                f"growth: {self.recipe.growth.name!r} follows the gradients of all steps, and a closure computes them inside the step; use"
                " an optimizer that steps without one, or another growth"
            )
        if self._selector.due(self.step) is None:
            if self._dense_gradient_next:
                self._mask_gradients()
            return
        if self._gradient_needs and closure is not None:
            with torch.enable_grad():
                closure()
        first = self._selector.first
        self._select()
        self._skips = not first and self.recipe.skips_steps
        self._mask_gradients()

    def _mask_gradients(self) -> None:
        """Zero the gradients of pruned weights, which only statistics and updates have looked at."""
        self._dense_gradient_next = False
        for tensor in self._tensors.values():
            if tensor.latent is None:
                tensor.mask_gradient()

    @torch.no_grad()
    def _select(self, grows: bool = True) -> None:
        """Select the masks that are due, in as many rounds as the schedule says."""
        due = self._selector.due(self.step)
        assert due is not None
        rounds = self.recipe.schedule.sparsities(due)
        if len(rounds) > 1 and self._gradient_needs and not self._statistics.has_loss:
            raise InputError(f"schedule: {len(rounds)} rounds collect gradients anew in each, so they need data= and loss=")
        if getattr(self.recipe.schedule, "revive", False):
            self._selector.originals = {name: tensor.weight.clone() for name, tensor in self._targets.items()}
        selected = False
        for round_, sparsity in enumerate(rounds):
            if self._progress is not None:
                self._progress(self._says(round_, len(rounds)))
            with self._statistics.gradients() if round_ and self._gradient_needs else nullcontext():
                selected = self._select_once(grows, sparsity) or selected
        self._selector.originals = {}
        if selected and getattr(self.recipe.compensation, "recalibrates", False):
            assert self._statistics.data is not None
            recalibrate_batchnorm(self.model, self._statistics.data)

    def _select_once(self, grows: bool, sparsity: float) -> bool:
        """Select masks of a sparsity, and bring weights, slots and gradients in line with them; return whether they act."""
        selected = self._selector.select(self.step, grows, sparsity)
        if selected is None:
            return False
        keep, learns = selected.keep, selected.learns
        require_same({name: mask for name, mask in keep.items() if self._targets[name].bound.group is None}, self.step)
        for name, weight in (*self._selector.originals.items(), *selected.weights.items()):
            self._targets[name].rewrite(weight)
        if self.recipe.compensation is not None and not self._selector.originals:
            for note in compensate(self.model, self.recipe.compensation, self.ranked, self._targets, keep, selected.pieces, selected.seen):
                self._tell(note)
        changed = False
        for name, tensor in self._targets.items():
            changed = changed or not torch.equal(keep[name], tensor.kept(tensor.pruned))
            moved = tensor.set_masks(keep[name], learns[name] if self.recipe.gradient.masked else None, self.step == 0)
            if moved is not None:
                self._freshen(tensor, moved)
        if changed:
            for optimizer in self._optimizers:
                forget_history(optimizer)
            self._announce()
        return True

    def _says(self, round_: int, rounds: int) -> str:
        memory = f", statistics of {show(self.statistics_bytes, 'bytes')}" if self.statistics_bytes else ""
        return f"ranking by {self.recipe.saliency.name}{memory}" + (f", round {round_ + 1} of {rounds}" if rounds > 1 else "")

    def _watched_steps(self) -> Values:
        """Return the statistics of the steps so far."""
        return {} if self._watch is None else self._watch.values()

    def _freshen(self, tensor: MaskedTensor, where: Tensor) -> None:
        """Give slots of weights that start or stop learning the values of a fresh state."""
        for optimizer in self._optimizers:
            if tensor.bound.parameter in optimizer.state:
                for note in reset_slots(optimizer, tensor.bound.parameter, tensor.in_parameter_shape(where)):
                    self._tell(note)

    def _announce(self) -> None:
        if self._callbacks:
            masks = self.masks
            for callback in self._callbacks:
                callback(masks)

    # ------------------------------------------------------------------ the end

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Publish, inside the block, the weights to evaluate with: the mode of a relaxation that samples, instead of this step's draw."""
        if self._round_is_open:
            raise InputError("evaluating: a step is under way; evaluate between two steps of all attached optimizers")
        for tensor in self._tensors.values():
            tensor.adopt_writes()
        kept = {name: local(t.bound.parameter).clone() for name, t in self._tensors.items() if t.latent is not None}
        with torch.no_grad():
            for name in kept:
                self._tensors[name].publish(evaluating=True)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, published in ({} if self._finalized else kept).items():
                    self._tensors[name].restore(published)

    @torch.no_grad()
    def finalize(self) -> Sparsifier:
        """Make the last selection that is due, fold relaxations for good, and take every hook off. ``masks`` stay."""
        if self._finalized:
            return self
        if self._round_is_open:
            self._close_round()
        self._require_own_model("finalize")
        for tensor in self._tensors.values():
            tensor.adopt_writes()
        last = self.recipe.schedule.last(self.clock)
        if self._selector.due(self.step) is not None:
            collects = reads_gradient(self.recipe.saliency) and self._statistics.has_loss
            with self._statistics.gradients() if collects else nullcontext():
                self._select(grows=False)
        elif self.step < last and self.recipe.selects and not self._selector.schedule_state.settled:
            self._tell(f"finalized after {self.step} steps, before the schedule's end at step {last}")
        if self.recipe.schedule.validates and self.recipe.selects:
            looks = self._selector.schedule_state.validations
            updates = sum(look.fraction > 0.0 for look in looks)
            self.notes.append(
                f"schedule {self.recipe.schedule.name!r}: the validation loss asked for pruning in {updates} of {len(looks)} looks, to a"
                f" sparsity of {self.sparsity:.4g}"
            )
        for tensor in self._tensors.values():
            tensor.fold()
        for hook in self._handles:
            hook.remove()
        for handle in self._noise:
            handle.remove()
        self._handles, self._noise, self._optimizers, self._finalized = [], [], [], True
        self._statistics.data = self._statistics.validation = self._statistics.loss = None
        return self

    # ------------------------------------------------------------------ checkpoints

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs besides the model's and the optimizers' own state: tensors, numbers and text.

        Raises:
            InputError: called while a step is under way (not all attached optimizers have stepped).
        """
        if self._round_is_open:
            raise InputError("state_dict: a step is under way; save after all attached optimizers have stepped")
        for tensor in self._tensors.values():
            tensor.adopt_writes()
        return {
            "version": 1,
            "recipe": self.recipe.to_yaml(),
            "seed": self.seed,
            "step": self.step,
            "selected_at": self._selector.selected_at,
            "schedule": self._selector.schedule_state.state_dict(),
            "numbers": dict(self._selector.numbers),
            "strength": self.strength,
            "penalty": None if self._pull is None else self._pull.state_dict(),
            "watched": None if self._watch is None else self._watch.state_dict(),
            "notes": list(self.notes),
            "active_zeros": self._active_zeros({name: tensor.pruned for name, tensor in self._tensors.items()}),
            "tensors": {name: tensor.state_dict() for name, tensor in self._tensors.items()},
            "gates": {gates.name: gates.state_dict() for gates in self._gates},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; load the model's and the optimizers' state as well, the model's after building the sparsifier.

        Raises:
            InputError: the state is of another recipe, seed or model, or the model's weights were pruned by this sparsifier's first mask.
        """
        version = state.get("version") if isinstance(state, Mapping) else None
        if version != 1:
            raise InputError(f"load_state_dict: version {version!r} is unknown; this is version 1")
        fields = {"recipe": str, "seed": int, "step": int, "notes": list, "active_zeros": int, "schedule": Mapping, "tensors": Mapping}
        for field, kind in fields.items():
            if not isinstance(state.get(field), kind):
                raise InputError(f"load_state_dict: the state is damaged: {field!r} is missing or of the wrong kind")
        if state["recipe"] != self.recipe.to_yaml():
            raise InputError("load_state_dict: the state belongs to another recipe; build the sparsifier with the recipe it was saved with")
        if state["seed"] != self.seed:
            raise InputError(f"load_state_dict: the state has seed {state['seed']}, this sparsifier {self.seed}")
        theirs, mine = state["tensors"], self._tensors
        if set(theirs) != set(mine):
            odd = sorted(set(theirs) ^ set(mine))
            raise InputError(f"load_state_dict: the state belongs to another model; {odd[0]} is a target of only one of them")
        loaded = {name: mine[name].read(saved) for name, saved in theirs.items()}
        if not (self.recipe.relaxation.keeps_dense_weights or self._selector.selected_at is None or self.step):
            self._refuse_pruned_weights(loaded, state["active_zeros"])
        for name, saved in theirs.items():
            mine[name].load_state_dict(saved, loaded[name])
        for gates in self._gates:
            gates.load_state_dict(state["gates"][gates.name])
        self.step, self.notes = state["step"], list(state["notes"])
        self._selector.selected_at = state["selected_at"]
        self._selector.schedule_state.load_state_dict(state["schedule"])
        self._selector.numbers = dict(state["numbers"])
        if self._pull is not None and state.get("strength") is not None:
            self._pull.take_strength(state["strength"])
        if self._pull is not None and state.get("penalty") is not None:
            self._pull.load_state_dict(state["penalty"])
        if self._watch is not None and state.get("watched") is not None:
            self._watch.load_state_dict(state["watched"])
        self._round_is_open = False
        self._draw()
        self._look_ahead()
        self._announce()

    def _refuse_pruned_weights(self, loaded: Mapping[str, Masks], zeros: int) -> None:
        """Refuse a model that was loaded before this sparsifier was built: its first mask has already cut active weights away."""
        if self._active_zeros({name: masks.get("pruned") for name, masks in loaded.items()}) > zeros:
            raise InputError(
                "load_state_dict: the model's active weights are zero where a new sparsifier prunes; load the model's weights after"
                " building the sparsifier, not before"
            )

    def _active_zeros(self, pruned: Mapping[str, Tensor | None]) -> int:
        """Return how many weights are zero and not pruned by these masks."""
        # Not of vectors: biases and norm offsets begin at zero.
        zeros = {name: equals_zero(tensor.weight) for name, tensor in self._tensors.items() if tensor.weight.ndim > 1}
        masks = {name: torch.zeros_like(zero) if (mask := pruned[name]) is None else mask.to(zero.device) for name, zero in zeros.items()}
        return sum(int((zero & ~masks[name]).sum()) for name, zero in zeros.items())

    # ------------------------------------------------------------------ small helpers

    def _of(self, group: dict[str, Any]) -> list[MaskedTensor]:
        """Return the target tensors of an optimizer group."""
        return [self._by_parameter[p] for p in group["params"] if p in self._by_parameter]

    def _index(self, optimizer: Optimizer) -> int:
        return next(i for i, known in enumerate(self._optimizers) if known is optimizer)

    def _tell(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
            warnings.warn(note, stacklevel=2)


def hold(model: nn.Module, masks: Masks) -> Sparsifier:
    """Return a sparsifier that keeps masks while a model trains, and never updates them; attach it to the optimizers.

    Raises:
        InputError: there are no masks, or one whose name or shape the model does not have.

    >>> model = nn.Linear(3, 1)
    >>> kept = hold(model, Masks({"weight": torch.tensor([[True, False, True]])})).attach(torch.optim.SGD(model.parameters(), lr=0.1))
    >>> kept.sparsity == 1 / 3
    True
    """
    return Sparsifier(model, NOTHING, masks=masks)


def _overflowed(optimizer: Optimizer) -> bool:
    """Return whether a gradient scaler makes this (fused) step a no-op."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def _drop_gradients(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _without_step(closure: Callable[[], Any], optimizer: Optimizer) -> Any:
    loss = closure()
    _drop_gradients(optimizer)
    return loss


def _with_closure(args: tuple[Any, ...], kwargs: dict[str, Any], closure: Callable[[], Any]) -> tuple[Any, Any]:
    if len(args) > 1:
        return (args[0], closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": closure}
