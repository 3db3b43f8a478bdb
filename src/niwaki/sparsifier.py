"""The sparsifier: binds a model, its optimizers and a recipe, and acts at the step boundary.

Everything happens in the optimizers' own hooks, so that the model's keys, classes, forward and compiled graphs stay untouched:

- *while gradients accumulate*: the gradients of pruned weights are zeroed (so that clipping sees the active norm), unless the
  coming update needs the dense gradient;
- *before the step*: the mask update, if the schedule says so; relaxations pull the gradient back to their latent weights;
- *after the step*: weights are projected (or published), and slots of pruned and grown weights hold fresh values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from niwaki.binding import active_pieces, bind
from niwaki.calibration import forward, loss_gradients, preserved
from niwaki.clock import Clock
from niwaki.errors import InputError
from niwaki.gradient import Dense, Superset
from niwaki.granularity import Element
from niwaki.growth import DropAndGrow, NoGrowth
from niwaki.layout import Layout
from niwaki.masked import MaskedTensor
from niwaki.masks import Masks, canonical_name, equals_zero, local, shard
from niwaki.metrics.flops import weight_uses
from niwaki.own_parameters import add_own_parameters
from niwaki.ranks import require_same
from niwaki.recipe import Recipe
from niwaki.recipe.stages import StageRecipe
from niwaki.saliency import Observation
from niwaki.selection import kept
from niwaki.slots import forget_history, reset_slots
from niwaki.target import LeftOut, select_targets
from niwaki.update import Update, next_masks, starts_at_random, sum_counts

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
        loss: ``loss(model(inputs), targets)``, needed with ``data`` for gradients.

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
    ) -> None:
        if recipe.stages is not None:
            raise InputError("recipe: it has stages; build a sparsifier for each of niwaki.recipe.stages.unroll(recipe), or use niwaki run")
        self.model, self.recipe, self.seed = model, recipe, seed
        self.clock = Clock(total_steps, steps_per_epoch, tokens_per_step)
        self.step = 0
        """Optimizer steps taken so far; overflow-skipped steps of a gradient scaler do not count."""
        self.notes: list[str] = []
        """What a user should know: guards that acted, state that could not be reached, tensors left out."""
        for note in recipe.fit(self.clock):
            self._tell(note)
        self.left_out: list[LeftOut] = []
        self._tensors: dict[str, MaskedTensor] = {}
        masks = masks or Masks()
        masks.apply_(model)
        targets, self.left_out = select_targets(model, recipe.target) if recipe.acts else ([], [])
        for target in targets:
            bound = bind(target.name, target.parameter, target.layout, recipe.granularity)
            if isinstance(bound, str):
                self.left_out.append(LeftOut(target.name, bound))
            else:
                with torch.no_grad():
                    self._tensors[target.name] = MaskedTensor(bound, recipe, seed)
                if bound.group is not None and recipe.normalization.name not in ("none", "per_flop"):
                    name = recipe.normalization.name
                    raise InputError(f"normalization: {name!r} needs whole tensors, and {bound.name} is sharded; choices: none, per_flop")
        if not self._tensors and recipe.acts:
            raise InputError("target: the granularity leaves every target tensor dense; choose another granularity or remainder: pad")
        self._targets = list(self._tensors.values())
        self._take_masks(masks)
        if not self._tensors:
            raise InputError("recipe: it masks nothing, and there are no masks= to hold")
        self._by_parameter = {t.bound.parameter: t for t in self._tensors.values()}
        self._own = {p: (t, name) for t in self._tensors.values() for name, p in t.own.items()}
        if recipe.final_sparsity is not None and not recipe.allocation.joint:  # what it cannot give is told now, not at its first update
            recipe.allocation.keep(recipe.final_sparsity, [t.bound.layer for t in self._targets], recipe.final_sparsity)
        self._optimizers: list[Optimizer] = []
        self._held: list[frozenset[int]] = []
        self._handles: list[RemovableHandle] = []
        self._callbacks: list[MasksChanged] = []
        self._stepped: set[int] = set()
        self._round_is_open = False
        self._skips = False
        self._accumulated: set[Tensor] = set()  # parameters whose gradient was accumulated since the last optimizer step
        self._one_backward = False  # whether several optimizers were seen to step after one backward pass
        self._finalized = False
        self._selected_at: int | None = None
        self._uses: dict[str, float] | None = None
        self._gradient_needs = "gradient" in recipe.saliency.needs or "gradient" in recipe.growth.needs
        if "flops" in recipe.normalization.needs:
            if data is None:
                raise InputError(f"normalization: {recipe.normalization.name!r} needs data= to see how often each weight is used")
            batches = iter(data)
            batch = next(batches)
            data = chain([batch], batches) if batches is data else data
            with preserved(model), torch.no_grad():
                self._uses = weight_uses(model, lambda: forward(model, batch[0]))
        self._statistics = (data, loss)
        self._require_data_for_the_end()
        self._start_masks(data, loss)
        self._look_ahead()

    @torch.no_grad()
    def _take_masks(self, masks: Masks) -> None:
        """Start from masks, and hold those of tensors that the recipe does not act on.

        Raises:
            InputError: they mask more than the recipe asks for in the end, and nothing would grow back.
        """
        parameters = {canonical_name(name): parameter for name, parameter in self.model.named_parameters(remove_duplicate=False)}
        known = {t.bound.parameter: t for t in self._targets}
        for name, mask in masks.items():
            parameter = parameters[name]
            tensor = known.get(parameter)
            if tensor is None:
                layout = Layout(("output", *["input"] * (parameter.ndim - 1)), tuple(parameter.shape))
                bound = bind(name, parameter, layout, Element())
                assert not isinstance(bound, str)
                tensor = known[parameter] = self._tensors[name] = MaskedTensor(bound, NOTHING, self.seed)
            keep = shard(mask, parameter, f"masks: {name!r}").to(local(parameter).device).contiguous().view(tensor.bound.here.shape)
            if tensor.bound.group is None and bool(keep.all()):
                continue  # as if it had none, so that a growth may draw its own
            tensor.set_masks(keep, keep if tensor.recipe.gradient.masked else None, before_training=True)
        self._given = any(t.pruned is not None for t in self._targets)
        final = self.recipe.final_sparsity
        if self._given and final is not None and self._only_removes() and kept(final, self._pieces) > self._active_pieces():
            masked = 1.0 - self._active_pieces() / self._pieces
            raise InputError(
                f"sparsity: {final!r} is below that of the masks to start from, {masked:.6g}, and growth: none brings nothing back; choose"
                " a higher sparsity, or growth: all, random or gradient"
            )

    def _only_removes(self) -> bool:
        """Return whether what is pruned stays pruned."""
        return isinstance(self.recipe.growth, NoGrowth) and not self.recipe.relaxation.keeps_dense_weights

    @property
    def _pieces(self) -> int:
        return sum(t.bound.pieces for t in self._targets)

    def _active_pieces(self) -> int:
        bounds = [t.bound for t in self._targets]
        return sum(sum_counts([active_pieces(self.recipe.granularity, t.bound, t.pruned) for t in self._targets], bounds))

    # ------------------------------------------------------------------ what a user asks

    @property
    def masks(self) -> Masks:
        """The masks now: canonical parameter name -> bool tensor, True where active (this rank's part of a sharded parameter)."""
        return Masks({name: t.in_parameter_shape(t.kept(t.pruned)).clone() for name, t in self._tensors.items()})

    @property
    def sparsity(self) -> float:
        """Share of the targets' elements, and of held tensors', that is masked now (this rank's part of sharded parameters)."""
        total = sum(t.bound.here.elements for t in self._tensors.values())
        return sum(int(t.pruned.sum()) for t in self._tensors.values() if t.pruned is not None) / max(total, 1)

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
        add_own_parameters(self.recipe.relaxation, self._tensors.values(), optimizers, schedulers)
        for optimizer in optimizers:
            self._optimizers.append(optimizer)
            self._held.append(frozenset(id(p) for group in optimizer.param_groups for p in group["params"]))
            self._handles += [optimizer.register_step_pre_hook(self._before_step), optimizer.register_step_post_hook(self._after_step)]
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
            self._update_masks(closure)
            for tensor in self._tensors.values():
                tensor.pull_back()
        if self._skips:
            if closure is None:
                _drop_gradients(optimizer)
                return None
            return _with_closure(args, kwargs, lambda: _without_step(closure, optimizer))
        if closure is None and not self._stepped:
            for tensor in unmasked:  # a gradient that was assigned, or of a parameter that did not require gradients when it was attached
                tensor.mask_gradient()
                tensor.watch_gradient(self._on_gradient)
        for group in optimizer.param_groups:
            for tensor in self._of(group):
                tensor.enter_step(optimizer)
            for parameter in group["params"]:
                if parameter in self._own:
                    tensor, name = self._own[parameter]
                    parameter.grad = tensor.own_gradient(name)
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
                    tensor = self._own[parameter][0]
                    if id(tensor.bound.parameter) not in self._held[index]:  # its weight is stepped by another optimizer
                        tensor.publish()
        self._stepped.add(index)
        if frozenset().union(*self._held) == frozenset().union(*(self._held[i] for i in self._stepped)):
            self._close_round()

    def _close_round(self) -> None:
        self._round_is_open = False
        self.step += 1
        for tensor in self._tensors.values():
            tensor.end_step()
        if self.recipe.relaxation.keeps_dense_weights and not self._gradient_needs and self._sparsity_due() is not None:
            self._select(self._first)  # now, so that the coming forward sees the masks of the new weights and scores
        elif self.recipe.relaxation.decides:
            self._announce()
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Note whether the next step starts with an update that needs the gradients of pruned weights."""
        self._dense_gradient_next = self._gradient_needs and self._sparsity_due() is not None

    def _sparsity_due(self) -> float | None:
        """Return the sparsity of an update that is due before the next step, or None."""
        if self._selected_at == self.step:
            return None
        target = self.recipe.final_sparsity
        return None if target is None else self.recipe.schedule.at(self.step, target, self.clock)

    # ------------------------------------------------------------------ mask updates

    def _require_data_for_the_end(self) -> None:
        """Refuse a last selection that ranks by gradients after the last step, when there is none, unless it can collect them."""
        recipe, total = self.recipe, self.clock.total_steps
        if "gradient" not in recipe.saliency.needs or total is None or recipe.final_sparsity is None or None not in self._statistics:
            return
        if recipe.schedule.at(total, recipe.final_sparsity, self.clock) is not None:
            raise InputError(
                f"saliency: {recipe.saliency.name!r} ranks by gradients, and the schedule's last update is at the end of the run; pass"
                " data= and loss=, or end the schedule earlier"
            )

    @torch.no_grad()
    def _start_masks(self, data: Iterable[tuple[Any, Any]] | None, loss: Callable[[Any, Any], Tensor] | None) -> None:
        """Make the selection that is due before the first step, if what it needs is at hand."""
        if self._sparsity_due() is None:
            return
        needs = self.recipe.saliency.needs if self._first else self.recipe.saliency.needs | self.recipe.growth.needs
        if self._first and starts_at_random(self.recipe.growth):
            needs = frozenset()
        asking = self.recipe.saliency if "gradient" in self.recipe.saliency.needs else self.recipe.growth
        if "gradient" not in needs:
            self._select(self._first)
        elif data is not None:
            if loss is None:
                raise InputError(f"{asking.slot}: {asking.name!r} needs loss= with data=, called as loss(model(inputs), targets)")
            with preserved(self.model):
                loss_gradients(self.model, data, loss)
                self._select(self._first)
        else:
            self._tell(f"the first mask is chosen at the first step, from its gradients: {asking.slot} {asking.name!r} had no data=")

    @property
    def _first(self) -> bool:
        """Whether the coming selection makes the targets' first masks."""
        return self._selected_at is None and all(t.pruned is None for t in self._targets)

    def _update_masks(self, closure: Callable[[], Any] | None) -> None:
        """Update the masks before this step if the schedule says so."""
        if self._sparsity_due() is None:
            return
        if self._gradient_needs and closure is not None:
            with torch.enable_grad():
                closure()
        first = self._first
        self._select(first)
        self._skips = not first and self.recipe.skips_steps
        self._dense_gradient_next = False
        for tensor in self._tensors.values():
            if tensor.latent is None:
                tensor.mask_gradient()

    @torch.no_grad()
    def _select(self, first: bool, grows: bool = True) -> None:
        """Select the masks that are due, and bring weights, slots and gradients in line with them."""
        sparsity = self._sparsity_due()
        assert sparsity is not None
        tensors = self._targets
        if self._given and self._only_removes():
            sparsity = max(sparsity, 1.0 - self._active_pieces() / self._pieces)
        keep = self._next(sparsity, first, grows)
        learns = keep
        if isinstance(self.recipe.gradient, Superset):
            wider = self._next(self.recipe.gradient.outside(sparsity), first, grows)
            learns = [a | b for a, b in zip(keep, wider, strict=True)]
        require_same({t.bound.name: k for t, k in zip(tensors, keep, strict=True) if t.bound.group is None}, self.step)
        changed = False
        for tensor, mask, learn in zip(tensors, keep, learns, strict=True):
            changed = changed or not torch.equal(mask, tensor.kept(tensor.pruned))
            moved = tensor.set_masks(mask, learn if self.recipe.gradient.masked else None, self.step == 0)
            if moved is not None:
                self._freshen(tensor, moved)
        self._selected_at = self.step
        if changed:
            for optimizer in self._optimizers:
                forget_history(optimizer)
            self._announce()

    def _next(self, sparsity: float, first: bool, grows: bool) -> list[Tensor]:
        recipe, tensors = self.recipe, self._targets
        last = max(recipe.schedule.last(self.clock), 1)

        def observe(i: int, needs: frozenset[str]) -> Observation:
            tensor = tensors[i]
            score = tensor.score if "score" in needs else None
            return tensor.bound.observe(tensor.weight, score=score, need_gradient="gradient" in needs, seed=self.seed, step=self.step)

        def flops(i: int) -> float | None:
            if self._uses is None:
                return None
            bound = tensors[i].bound
            return 2.0 * self._uses[bound.name] * bound.layout.elements / bound.pieces

        update = Update(
            sparsity=sparsity,
            step=self.step,
            progress=min(self.step / last, 1.0),
            seed=self.seed,
            observe=lambda i: observe(i, recipe.saliency.needs),
            observe_growth=lambda i: observe(i, recipe.growth.needs),
            flops=flops,
            first=first,
            from_active=not recipe.relaxation.keeps_dense_weights
            and (isinstance(recipe.growth, NoGrowth) or (isinstance(recipe.growth, DropAndGrow) and not grows and not first)),
            grows=grows,
        )
        masks = next_masks(recipe, [t.bound for t in tensors], [t.pruned for t in tensors], update)
        for note in update.notes:
            self._tell(note)
        if self._given and update.from_active:  # masks that were given may cut through pieces
            masks = [mask & tensor.kept(tensor.pruned) for mask, tensor in zip(masks, tensors, strict=True)]
        return masks

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
                self._tensors[name].publish()
        try:
            yield
        finally:
            with torch.no_grad():
                for name, published in kept.items():
                    local(self._tensors[name].bound.parameter).copy_(published)

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
        first, last = self._first, self.recipe.schedule.last(self.clock)
        if self._sparsity_due() is not None:
            data, loss = self._statistics
            with preserved(self.model) if data is not None and loss is not None else nullcontext():
                if data is not None and loss is not None and "gradient" in self.recipe.saliency.needs:
                    loss_gradients(self.model, data, loss)
                self._select(first, grows=False)
        elif self.step < last and self.recipe.final_sparsity is not None:
            self._tell(f"finalized after {self.step} steps, before the schedule's end at step {last}")
        for tensor in self._tensors.values():
            tensor.fold()
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers, self._finalized, self._statistics = [], [], True, (None, None)
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
            "selected_at": self._selected_at,
            "notes": list(self.notes),
            "active_zeros": self._active_zeros({name: tensor.pruned for name, tensor in self._tensors.items()}),
            "tensors": {name: tensor.state_dict() for name, tensor in self._tensors.items()},
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
        fields = {"recipe": str, "seed": int, "step": int, "notes": list, "active_zeros": int, "tensors": Mapping}
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
        if not (self.recipe.relaxation.keeps_dense_weights or self._selected_at is None or self.step):
            self._refuse_pruned_weights(loaded, state["active_zeros"])
        for name, saved in theirs.items():
            mine[name].load_state_dict(saved, loaded[name])
        self.step, self._selected_at, self.notes = state["step"], state["selected_at"], list(state["notes"])
        self._round_is_open = False
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
        zeros = {name: equals_zero(tensor.weight) for name, tensor in self._tensors.items()}
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
