"""What masks cost a training step: the time in the sparsifier's hooks against a dense step.

Dense and masked models take turns, one step each, in one process, so that all see the same machine. The cost is reported twice: as the
difference between the medians of whole steps, and as the time measured directly around the sparsifier's hooks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from niwaki.catalogue import method
from niwaki.sparsifier import Sparsifier
from niwaki.tasks.networks import ResNet, Transformer

INTERVAL = 100
"""Optimizer steps between two updates of RigL, over which the cost of one is spread (Evci et al. 2020)."""

WARM_UP = 3
"""Steps of each model that do not count."""

DEFINITIONS = (
    "upkeep (hooks): median over steps without an update of the time inside the sparsifier's hooks / median dense step.",
    "upkeep (steps): (median masked step - median dense step) / median dense step; noisier, as it compares two whole steps.",
    "floor: two plain in-place passes over the target tensors, one for their weights and one for their gradients; no upkeep can be faster.",
    "AdamW is the fused one; torch's others take twice as long where second moments are zero, whoever makes them so.",
    f"update: median time inside the hooks on update steps beyond the others'; amortised over {INTERVAL} steps / median dense step.",
)


@dataclass(frozen=True)
class Workload:
    """A network with one batch, and the loss of a training step on it."""

    description: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def _token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def _transformer(batch: int, tokens: int) -> Workload:
    return Workload(
        f"decoder of 10.9 million parameters, batch {batch} of {tokens} tokens, fused AdamW",
        Transformer,
        lambda: (torch.randint(256, (batch, tokens)), torch.randint(256, (batch, tokens))),
        _token_loss,
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    )


WORKLOADS: Mapping[str, Workload] = {
    "resnet20": Workload(
        "ResNet-20, batch 128 of 3×32×32, SGD with momentum",
        ResNet,
        lambda: (torch.randn(128, 3, 32, 32), torch.randint(10, (128,))),
        F.cross_entropy,
        lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=5e-4),
    ),
    "transformer": _transformer(16, 256),
    "transformer_1k": _transformer(8, 128),
}
"""The upkeep of a network is the same for every batch, so a small batch (the last) is the hard case."""

METHODS = ("gmp", "rigl")


@dataclass
class _Trainer:
    """One model that takes steps, and what they took (seconds)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    sparsifier: Sparsifier | None = None
    in_hooks: float = 0.0
    ordinary: list[float] = field(default_factory=list)
    ordinary_hooks: list[float] = field(default_factory=list)
    update_hooks: list[float] = field(default_factory=list)

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Take one training step and note its time."""
        updates = (
            self.sparsifier is not None and self.sparsifier.recipe.schedule.at(self.sparsifier.step, 0.9, self.sparsifier.clock) is not None
        )
        self.in_hooks = 0.0
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        self.loss(self.model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        elapsed = time.perf_counter() - begin
        if updates:
            self.update_hooks.append(self.in_hooks)
        else:
            self.ordinary.append(elapsed)
            self.ordinary_hooks.append(self.in_hooks)

    def time_hooks(self) -> None:
        """Wrap the hooks that the sparsifier has registered with the optimizer and the parameters, so that their time adds up."""
        tables: list[MutableMapping[Any, Any]] = [self.optimizer._optimizer_step_pre_hooks, self.optimizer._optimizer_step_post_hooks]
        tables += [p._post_accumulate_grad_hooks for p in self.model.parameters() if p._post_accumulate_grad_hooks]
        for hooks in tables:
            for key, hook in hooks.items():
                hooks[key] = self._timed(hook)

    def _timed(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            result = hook(*args)
            self.in_hooks += time.perf_counter() - begin
            return result

        return timed


def run(
    workloads: Iterable[str] = tuple(WORKLOADS),
    *,
    sparsity: float = 0.9,
    rounds: int = 30,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure mask upkeep and return one row for each network and method.

    Args:
        workloads: names of ``WORKLOADS``.
        sparsity: of the masked models, from the first step on.
        rounds: steps of each model that count, after those that warm up. RigL updates in every fifth.
        progress: called with the rounds done and all rounds.
    """
    names = list(workloads)
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(names):

        def done(round_: int, before: int = i * (rounds + WARM_UP)) -> None:
            if progress:
                progress(before + round_, len(names) * (rounds + WARM_UP))

        rows += _measure(name, sparsity, rounds, done)
    return rows


def _measure(name: str, sparsity: float, rounds: int, progress: Callable[[int], None]) -> list[dict[str, Any]]:
    workload = WORKLOADS[name]
    torch.manual_seed(0)
    batch = workload.batch()
    dense = _trainer(workload, None, sparsity, rounds)
    masked = {name: _trainer(workload, name, sparsity, rounds) for name in METHODS}
    everyone = [dense, *masked.values()]
    for round_ in range(rounds + WARM_UP):
        for trainer in everyone[round_ % len(everyone) :] + everyone[: round_ % len(everyone)]:  # nobody always comes after the same one
            trainer.step(batch)
        if round_ == WARM_UP - 1:
            for trainer in everyone:
                trainer.ordinary, trainer.ordinary_hooks, trainer.update_hooks = [], [], []
        progress(round_ + 1)
    dense_step = statistics.median(dense.ordinary)
    return [_row(name, workload, method_name, sparsity, dense_step, trainer, dense) for method_name, trainer in masked.items()]


def _trainer(workload: Workload, name: str | None, sparsity: float, rounds: int) -> _Trainer:
    torch.manual_seed(0)
    model = workload.build()
    trainer = _Trainer(model, workload.optimizer(model.parameters()), workload.loss)
    if name is None:
        return trainer
    total = rounds + WARM_UP
    schedule: Any = {"constant": {"every": "5 steps", "end": "1 run"}}
    if name == "gmp":  # pruned to the full sparsity at once: the cost of keeping masks does not depend on when they came
        schedule = {"one_shot": {"at": "0 run"}}
    trainer.sparsifier = Sparsifier(model, method(name, sparsity=sparsity, schedule=schedule), total_steps=total).attach(trainer.optimizer)
    trainer.time_hooks()
    return trainer


def _row(
    name: str, workload: Workload, method_name: str, sparsity: float, dense_step: float, masked: _Trainer, dense: _Trainer
) -> dict[str, Any]:
    hooks = statistics.median(masked.ordinary_hooks)
    floor = _floor(masked)
    row: dict[str, Any] = {
        "network": name,
        "description": workload.description,
        "method": method_name,
        "sparsity": sparsity,
        "threads": torch.get_num_threads(),
        "steps": len(masked.ordinary),
        "dense_step_ms": 1e3 * dense_step,
        "masked_step_ms": 1e3 * statistics.median(masked.ordinary),
        "hooks_ms": 1e3 * hooks,
        "floor_ms": 1e3 * floor,
        "upkeep_by_hooks": hooks / dense_step,
        "upkeep_by_steps": statistics.median(masked.ordinary) / dense_step - 1,
        "update_ms": None,
        "update_amortised": None,
    }
    if masked.update_hooks:
        extra = statistics.median(masked.update_hooks) - hooks
        row |= {"update_ms": 1e3 * extra, "update_amortised": extra / INTERVAL / dense_step}
    return row


def _floor(masked: _Trainer) -> float:
    """Return the seconds of two plain passes over the target tensors, in place: the memory's share in clearing them."""
    assert masked.sparsifier is not None
    parameters = dict(masked.model.named_parameters())
    targets = [parameters[name].detach() for name in masked.sparsifier.masks]
    others = [tensor.clone() for tensor in targets]
    seconds = []
    for _ in range(11):
        begin = time.perf_counter()
        torch._foreach_mul_(targets, 1.0)
        torch._foreach_mul_(others, 1.0)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return the rows as a table for people."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for header in ("network", "method"):
        result.add_column(header)
    for header in ("dense step", "masked step", "in hooks", "floor", "upkeep (hooks)", "upkeep (steps)", "update", "amortised"):
        result.add_column(header, justify="right")
    for row in rows:
        update = ("-", "-") if row["update_ms"] is None else (f"{row['update_ms']:.1f} ms", f"{100 * row['update_amortised']:.2f} %")
        result.add_row(
            row["network"],
            row["method"],
            f"{row['dense_step_ms']:.1f} ms",
            f"{row['masked_step_ms']:.1f} ms",
            f"{row['hooks_ms']:.2f} ms",
            f"{row['floor_ms']:.2f} ms",
            f"{100 * row['upkeep_by_hooks']:.2f} %",
            f"{100 * row['upkeep_by_steps']:+.2f} %",
            *update,
        )
    return result
