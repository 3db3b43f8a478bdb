"""One training through all stages of a recipe. It can stop after any step, and a new one goes on from there, equal to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from niwaki.calibration import forward
from niwaki.clock import Clock
from niwaki.collecting import uses_data
from niwaki.counter import key
from niwaki.errors import InputError, NiwakiError
from niwaki.gradient import Superset
from niwaki.masks import Masks
from niwaki.metrics.flops import forward_flops
from niwaki.metrics.training_flops import active_flops, step_flops
from niwaki.penalty import GroupLasso
from niwaki.pruning import pruned
from niwaki.ranks import mean
from niwaki.recipe import Prune, Recipe
from niwaki.recipe.fields import Restore
from niwaki.recipe.finish import Finish
from niwaki.recipe.stages import Leaf, StageRecipe, unroll, validates
from niwaki.sparsifier import Sparsifier
from niwaki.structured import Removed, compose, replay
from niwaki.tasks import Data, Task, Training
from niwaki.training import processes, rewinding
from niwaki.training.loop import (
    EVALUATION_BATCH,
    Batches,
    Evaluation,
    batches,
    evaluate,
    learning_rate_factor,
    make_optimizer,
    on,
    order,
    steps_per_epoch,
)
from niwaki.training.record import Dynamics, Epoch, Stage
from niwaki.training.resizing import Surroundings, resize
from niwaki.training.state import Counters, Interrupted, Trained, copied, other_buffers

STATISTICS_BATCHES = 16
"""Batches that a recipe gets for statistics before a stage's first step (a SNIP score, say)."""

SMALLEST_SCALE = 2.0**-24
"""Below this scale of the loss overflowing gradients are given up on."""

ASK_EVERY = 16
"""Steps between two questions to the other processes whether one of them was asked to stop."""

Progress = Callable[[int, int, Epoch | None], None]
"""Called with the steps done, the steps of the whole training, and the epoch that just ended, if one did."""


@dataclass
class Trainer:
    """Trains a model in place.

    The batches of an epoch depend on the seed and its number alone, and what is random inside a step (dropout, augmentation) on the
    seed and the step alone. So the state is small: the model, the optimizer, the sparsifier, and counters.

    Attributes:
        model: plain, on the device where it is to be trained.
        recipe: what the sparsifier does; None for a dense training.
        teacher: the trained dense model, for objectives that need one.
        memory: most bytes that statistics may take; None for no limit.
        build: returns the model with the initial weights of another seed, for stages that begin anew with random ones.
    """

    model: nn.Module
    task: Task
    data: Data
    training: Training
    seed: int
    recipe: Recipe | None = None
    teacher: nn.Module | None = None
    memory: int | None = None
    build: rewinding.Build | None = None
    leaves: tuple[Leaf, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.leaves = unroll(self.recipe or StageRecipe())
        self.steps_per_epoch = steps_per_epoch(self.data, self.training)
        run = self.steps_per_epoch * self.training.epochs
        tokens = self.data.tokens_per_example
        self.clock = Clock(max(run, 1), self.steps_per_epoch, tokens and tokens * self.training.batch_size)
        self.lengths = [(leaf.clock(self.clock).total_steps or 0) if leaf.length is not None and run else 0 for leaf in self.leaves]
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise InputError(f"--model: no parameter of this {type(self.model).__name__} requires gradients; there is nothing to train")
        if self.data.validation is None and (name := validates(self.recipe or StageRecipe())):
            raise InputError(f"schedule: {name!r} follows the loss of validation examples, and the data have none; give Data validation=")
        if any(leaf.restore is not None and leaf.restore.weights == "fresh" for leaf in self.leaves):
            rewinding.require_random(self.build, self.seed)
        self.device = next(self.model.parameters()).device
        self.now = Counters(horizon=run)
        self.masks = Masks()
        self.snapshots: dict[str, dict[str, Any]] = {}
        self.strengths: dict[str, float] = {}  # of penalties by their ratio to the loss: of all stages that share one, the first finds it
        self.removed = Removed()
        self.losses: list[Tensor] = []
        self.history: list[Epoch] = []
        self.stages: list[Stage] = []
        self.notes: list[str] = []
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.training.precision == "float16")
        self._order: tuple[int, Tensor] | None = None
        self._before = Masks()  # at the end of the last epoch
        self._take_model()
        self._dense_flops = self._flops.dense  # of the model before anything is taken out of it

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return sum(self.lengths)

    # ------------------------------------------------------------------ from the first step to the last

    def run(
        self,
        *,
        save: Callable[[Callable[[], dict[str, Any]]], None] | None = None,
        every: float = 30.0,
        stop: Callable[[], bool] = lambda: False,
        progress: Progress | None = None,
    ) -> Trained:
        """Train to the end, from wherever it is.

        Args:
            save: writes a checkpoint; called with a function that returns the state.
            every: seconds between checkpoints.
            stop: asked after each step; when it says so, the state is saved and Interrupted raised.
            progress: told about every step and every epoch.

        Raises:
            Interrupted: it was asked to stop.
            NiwakiError: the loss is not finite; the checkpoint stays.
        """
        began = saved_at = time.monotonic()
        before = self.now.seconds

        def keep() -> None:
            nonlocal saved_at
            self.now.seconds = before + time.monotonic() - began
            if save is not None:
                save(self.state)
            saved_at = time.monotonic()

        network = self._network()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            while self.now.leaf < len(self.leaves):
                leaf = self.leaves[self.now.leaf]
                if not self.now.entered:
                    self._enter(leaf, self.lengths[self.now.leaf])
                    network = self._network()
                while self.now.stage_step < self.lengths[self.now.leaf]:
                    self.model.train()
                    if not self._step(network, leaf):
                        continue
                    self._end_if_settled(leaf)
                    ended = self.now.step % self.steps_per_epoch == 0 or self.now.stage_step == self.lengths[self.now.leaf]
                    if ended:
                        self._close_epoch()
                    if progress is not None:
                        progress(self.now.step, self.total_steps, self.history[-1] if ended else None)
                    asked = stop() if processes.world_size() == 1 else self.now.step % ASK_EVERY == 0 and processes.any_process(stop())
                    if asked and self.now.step < self.total_steps:
                        keep()
                        raise Interrupted(f"interrupted at step {self.now.step:,} of {self.total_steps:,}")
                    if time.monotonic() - saved_at >= every:
                        keep()
                self._leave(leaf)
        keep()
        self._settle_average()
        self.now.seconds = before + time.monotonic() - began
        dense = step_flops(self._dense_flops, self._dense_flops) * self.now.step
        return Trained(
            history=self.history,
            stages=self.stages,
            masks=self.masks,
            removed=self.removed,
            notes=list(dict.fromkeys(self.notes)),
            seconds=self.now.seconds,
            flops_multiplier=self.now.flops / dense if dense else 1.0,
        )

    def _take_model(self) -> None:
        """Make what belongs to the model as it is now: optimizer, moving average, FLOPs of a dense forward pass."""
        self.optimizer = make_optimizer(self.model, self.training)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self._begin_average()
        self.sparsifier: Sparsifier | None = None
        self.example = on(self.device, tuple(self.task.example(self.data)))
        self._flops = forward_flops(self.model, self.example)
        self._step_flops: tuple[float, float] | None = None

    def _begin_average(self) -> None:
        decay = self.training.ema
        self.ema: AveragedModel | None = None
        if decay is not None:
            average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
            self.ema = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)

    def _network(self) -> nn.Module:
        if processes.world_size() == 1:
            return self.model
        return DistributedDataParallel(self.model, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    # ------------------------------------------------------------------ a step

    def _step(self, network: nn.Module, leaf: Leaf) -> bool:
        """Take a step; return whether it was taken: gradients that overflow have only made the loss's scale smaller."""
        now, world = self.now, processes.world_size()
        epoch, batch = divmod(now.step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, order(self.data.train, self.seed, epoch + 1)
        size = self.training.batch_size
        whole = self._order[1][batch * size : (batch + 1) * size]
        mine = whole.tensor_split(world)[processes.rank()]
        parts = [part for part in mine.tensor_split(self.training.accumulate) if len(part)] or [whole[:1]]
        torch.manual_seed(key(self.seed, now.step, f"noise of process {processes.rank()}"))
        generator = torch.Generator().manual_seed(key(self.seed, now.step, f"augmentation of process {processes.rank()}"))
        factor = learning_rate_factor(self.training, min(now.schedule_step, now.horizon), now.horizon)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        flops = self._flops_of_step()  # with the masks before this step's update
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        for part in parts:
            inputs, targets = self.data.train[part]
            if self.task.augment is not None:
                inputs = self.task.augment(inputs, generator)
            share = len(part) * world / len(whole) if len(mine) else 0.0
            last = part is parts[-1]
            waits = network.no_sync() if isinstance(network, DistributedDataParallel) and not last else nullcontext()
            with waits:
                loss = self._loss(network, leaf, on(self.device, inputs), on(self.device, targets)) * share
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        total = mean(total)
        if not math.isfinite(float(total)):
            raise NiwakiError(
                f"the loss became {float(total)} at step {now.step + 1:,} (epoch {epoch + 1}); a smaller learning rate may help"
            )
        if self.training.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() < scale:
            if scale < SMALLEST_SCALE:
                raise NiwakiError(f"the gradients overflow at step {now.step + 1:,} however the loss is scaled; choose another precision")
            return False
        if self.ema is not None:
            self.ema.update_parameters(self.model)
            for averaged, buffer in zip(self.ema.module.buffers(), self.model.buffers(), strict=True):
                if not buffer.is_floating_point():  # a count has no average
                    averaged.copy_(buffer)
        self.losses.append(total)
        now.flops += flops
        now.step, now.stage_step, now.schedule_step = now.step + 1, now.stage_step + 1, now.schedule_step + 1
        return True

    def _loss(self, network: nn.Module, leaf: Leaf, inputs: Any, targets: Any) -> Tensor:
        precision = getattr(torch, self.training.precision)
        with torch.autocast(self.device.type, precision, enabled=precision != torch.float32):
            outputs = forward(network, inputs)
            loss = self.task.loss(outputs, targets)
            if leaf.recipe.objective is None:
                return loss
            assert self.teacher is not None
            with torch.no_grad():
                taught = self.task.logits(forward(self.teacher, inputs))
            return leaf.recipe.objective.loss(loss, self.task.logits(outputs), taught)

    def _flops_of_step(self) -> float:
        """Return the FLOPs per example of the coming step, with the masks as they are now."""
        if self._step_flops is None:
            masks = self.masks if self.sparsifier is None else self.sparsifier.computing
            sparse = active_flops(self._flops, masks) if masks else self._flops.dense
            superset = self.sparsifier is not None and isinstance(self.sparsifier.recipe.gradient, Superset)
            self._step_flops = sparse, active_flops(self._flops, self.sparsifier.learning) if superset and self.sparsifier else sparse
        forward_flops, learning_flops = self._step_flops
        if self.sparsifier is not None and self.sparsifier.needs_dense_gradient:
            learning_flops = self._flops.dense
        return step_flops(forward_flops, learning_flops, dense_gradient=True)

    def _masks_changed(self, _: Masks) -> None:
        self._step_flops = None

    def _current_masks(self) -> Masks:
        return self.masks if self.sparsifier is None else self.sparsifier.masks

    # ------------------------------------------------------------------ an epoch

    def evaluate(self, model: nn.Module, classes: bool = False) -> Evaluation:
        """Return the metrics of a model on the test examples, and with ``classes`` the predicted ones."""
        text = self.data.tokens_per_example is not None
        batch = min(EVALUATION_BATCH, self.training.batch_size) if text else EVALUATION_BATCH
        return evaluate(model, self.task, self.data.test, classes=classes, batch=batch)

    def _averaged(self) -> nn.Module:
        """Return the moving average of the model, masked."""
        assert self.ema is not None
        self._current_masks().apply_(self.ema.module)
        return self.ema.module

    def _settle_average(self) -> None:
        """Give the model the averaged weights, if there are any."""
        if self.ema is not None:
            self.model.load_state_dict(self._averaged().state_dict())

    def _close_epoch(self) -> None:
        masks = self._current_masks()
        with self.sparsifier.evaluating() if self.sparsifier is not None else nullcontext():
            model = self.model if self.ema is None else self._averaged()
            found = self.evaluate(model) if processes.rank() == 0 else None
        before, self._before = self._before, masks
        moved = None
        if masks.keys() == before.keys() and masks.sparsity:
            ever = self.sparsifier.ever_active_share if self.sparsifier is not None else masks.density
            moved = Dynamics(overlap=masks.iou(before), pruned=(before - masks).active, grown=(masks - before).active, ever_active=ever)
        self.history.append(
            Epoch(
                epoch=self.now.step / self.steps_per_epoch,
                step=self.now.step,
                stage=self.leaves[self.now.leaf].number,
                train_loss=float(torch.stack(self.losses).mean(dtype=torch.float64)),
                learning_rate=self.optimizer.param_groups[0]["lr"],
                metrics=found.metrics if found else {},
                sparsity=masks.sparsity,
                dynamics=moved,
            )
        )
        self.losses = []

    # ------------------------------------------------------------------ a stage

    def _enter(self, leaf: Leaf, length: int) -> None:
        now = self.now
        now.entered, now.stage_step, now.begin = True, 0, now.step
        if length and now.schedule_step >= now.horizon:
            now.schedule_step, now.horizon = 0, length
        now.horizon = max(now.horizon, now.schedule_step + length)
        self._attach(leaf, length)
        masks = self._current_masks()
        if masks.keys() != self._before.keys():
            self._before = masks

    def _end_if_settled(self, leaf: Leaf) -> None:
        """Let a stage that waits for its masks end here once they act; the learning rate then starts anew in the next stage that trains."""
        if leaf.until is not None and self.sparsifier is not None and self.sparsifier.settled:
            self.lengths[self.now.leaf] = self.now.stage_step
            self.now.horizon = self.now.schedule_step

    def _attach(self, leaf: Leaf, length: int) -> None:
        """Build what the stage needs around the model as it is."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        if leaf.acts or self.masks:
            recipe = self._with_strength(leaf.recipe)
            self.sparsifier = Sparsifier(
                self.model,
                recipe,
                masks=self.masks or None,
                total_steps=max(length, 1),
                steps_per_epoch=self.steps_per_epoch,
                tokens_per_step=self.clock.tokens_per_step,
                seed=self.seed,
                data=self._statistics(recipe),
                loss=self.task.loss,
                validation=self._validation(recipe),
                example=self.example,
                memory=self.memory,
            )
            self.sparsifier.on_masks_changed(self._masks_changed)
            self.sparsifier.attach(self.optimizer)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self._step_flops = None

    def _with_strength(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the strength that an earlier stage has found for the same penalty, if one has."""
        penalty, strength = recipe.penalty, self.strengths.get(str(recipe.penalty))
        if strength is None or not isinstance(penalty, GroupLasso):
            return recipe
        return recipe.model_copy(update={"penalty": penalty.with_strength(strength)})

    def _validation(self, recipe: Recipe) -> Batches | None:
        """Return the validation examples for a recipe that follows the loss on them, and None for others."""
        if self.data.validation is None or not (recipe.selects and recipe.schedule.validates):
            return None
        self.notes.append(
            f"schedule {recipe.schedule.name!r} follows the loss of {len(self.data.validation):,} examples that are not trained on"
        )
        return Batches(self.data.validation, self.training.batch_size, self.device)

    def _statistics(self, recipe: Recipe | Prune) -> list[tuple[Any, Any]] | None:
        """Return a few batches for components that need what can only be seen on data, and None for others."""
        return self._some_batches() if uses_data(recipe) else None

    def _some_batches(self) -> list[tuple[Any, Any]]:
        """Return a few batches of training examples, the same whenever it is asked."""
        found = islice(batches(self.data.train, self.training.batch_size, self.seed, epoch=0), STATISTICS_BATCHES)
        return [(on(self.device, inputs), on(self.device, targets)) for inputs, targets in found]

    def _leave(self, leaf: Leaf) -> None:
        if self.sparsifier is not None:
            self.sparsifier.finalize()
            self.notes += self.sparsifier.notes
            if self.sparsifier.strength is not None:
                self.strengths[str(leaf.recipe.penalty)] = self.sparsifier.strength
        self.masks, self.sparsifier = self._current_masks(), None
        self._drop_own_groups()
        if leaf.prune is not None:
            data = self._statistics(leaf.prune)
            sparsifier = pruned(
                self.model,
                leaf.prune,
                self.masks,
                seed=self.seed,
                step=self.now.step,
                data=data,
                loss=self.task.loss,
                example=self.example,
                memory=self.memory,
            )
            self.masks = sparsifier.masks
            self.notes += sparsifier.notes
        if leaf.save is not None:
            self.snapshots[leaf.save] = {
                "weights": rewinding.values_of(self.model),
                "optimizer": copied(self.optimizer.state_dict()),
                "schedule": (self.now.schedule_step, self.now.horizon),
            }
        if leaf.restore is not None:
            self._restore(leaf.restore, leaf.number)
        if leaf.finish is not None:
            self._resize(leaf.finish)
        self._step_flops = None
        self.stages.append(Stage(number=leaf.number, says=leaf.says, begin=self.now.begin, end=self.now.step, sparsity=self.masks.sparsity))
        self.now.leaf, self.now.entered = self.now.leaf + 1, False

    def _drop_own_groups(self) -> None:
        """Take a relaxation's own parameters, which were folded, out of the optimizer."""
        mine = set(self.model.parameters())
        groups = [all(parameter in mine for parameter in group["params"]) for group in self.optimizer.param_groups]
        for group, kept in zip(self.optimizer.param_groups, groups, strict=True):
            if not kept:
                for parameter in group["params"]:
                    self.optimizer.state.pop(parameter, None)
        self.rates = [rate for rate, kept in zip(self.rates, groups, strict=True) if kept]
        self.optimizer.param_groups[:] = [group for group, kept in zip(self.optimizer.param_groups, groups, strict=True) if kept]

    def _restore(self, restore: Restore, stage: int) -> None:
        if restore.weights == "fresh":
            assert self.build is not None
            rewinding.give(self.model, rewinding.fresh_values(self.build, self.seed, stage, self.removed))
        elif restore.weights != "keep":
            rewinding.give(self.model, self.snapshots[restore.weights]["weights"])
        if restore.as_ == "signs":
            rewinding.take_signs(self.model, self.masks)
        if restore.weights != "keep":
            self.masks.apply_(self.model)
            self._begin_average()
        if restore.optimizer == "fresh":
            self.optimizer = make_optimizer(self.model, self.training)
        elif restore.optimizer != "keep":
            self.optimizer.load_state_dict(copied(self.snapshots[restore.optimizer]["optimizer"]))
        if restore.learning_rate != "keep":
            self.now.schedule_step, self.now.horizon = self.snapshots[restore.learning_rate]["schedule"]

    def _resize(self, finish: Literal["shrink"] | Finish) -> None:
        self._settle_average()  # the next average begins with the model of the other size
        seed = key(self.seed, self.now.step, "finish")
        around = Surroundings(self.example, self._dense_flops, self._some_batches, self.task.loss, seed)
        removed, self.masks, notes = resize(finish, self.model, self.masks, self.optimizer, around)
        self.notes += notes
        if not removed:
            return
        self.removed = compose(self.removed, removed)
        self.snapshots, self._before = {}, Masks()
        self._begin_average()
        self._flops = forward_flops(self.model, self.example)

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> dict[str, Any]:
        """Return everything that another trainer of the same settings needs to go on from here."""
        return {
            "counters": dict(vars(self.now)),
            "removed": self.removed.model_dump(),
            "model": self.model.state_dict(),
            "buffers": other_buffers(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "masks": dict(self.masks),
            "before": dict(self._before),
            "sparsifier": None if self.sparsifier is None else self.sparsifier.state_dict(),
            "snapshots": self.snapshots,
            "strengths": self.strengths,
            "losses": [float(loss) for loss in self.losses],
            "history": [epoch.model_dump(mode="json") for epoch in self.history],
            "stages": [stage.model_dump(mode="json") for stage in self.stages],
            "notes": self.notes,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state of a trainer with the same settings, in place of a fresh beginning."""
        self.now = Counters(**state["counters"])
        self.removed = Removed.of(state["removed"])
        if self.removed:
            replay(self.model, self.removed)
            self._take_model()
        self.masks = Masks(state["masks"]).to(self.device)
        self.strengths = state["strengths"]
        if self.now.entered:
            self._attach(self.leaves[self.now.leaf], self.lengths[self.now.leaf])
        self.model.load_state_dict(state["model"])
        for name, buffer in other_buffers(self.model).items():
            buffer.copy_(state["buffers"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.sparsifier is not None:
            self.sparsifier.load_state_dict(state["sparsifier"])
        self._before = Masks(state["before"]).to(self.device)
        self.snapshots = state["snapshots"]
        self.losses = [torch.tensor(loss, device=self.device) for loss in state["losses"]]
        self.history = [Epoch.model_validate(epoch) for epoch in state["history"]]
        self.stages = [Stage.model_validate(stage) for stage in state["stages"]]
        self.lengths[: len(self.stages)] = [stage.end - stage.begin for stage in self.stages]
        if self.now.entered:
            self._end_if_settled(self.leaves[self.now.leaf])
        self.notes = state["notes"]
        self._step_flops = None
