"""Filter pruning of pretrained networks at one budget of FLOPs: what six criteria, and Torch-Pruning, make of it after equal fine-tuning.

Every case starts from the same weights, is made really smaller, and is fine-tuned with the same recipe, batches and augmentation.
Results are written case by case, so that an interrupted measurement goes on.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from niwaki.dependency import Group, find_groups
from niwaki.errors import InputError
from niwaki.metrics.flops import forward_flops
from niwaki.metrics.latency import interleaved
from niwaki.recipe import Recipe
from niwaki.structured import shrink
from niwaki.structured.costs import FlopCost, unit_masks
from niwaki.structured.search import best, search, unit_scores
from niwaki.tasks import Data, Task, Training
from niwaki.tasks.files import required
from niwaki.tasks.images import CIFAR10
from niwaki.training.loop import batches, evaluate
from niwaki.training.trainer import Trainer

NETWORKS = ("resnet20", "resnet56")

CRITERIA: Mapping[str, Any] = {
    "filter_l1": {"magnitude": {"norm": "l1"}},
    "filter_l2": {"magnitude": {"norm": "l2"}},
    "norm_scale": "norm_scale",
    "fpgm": "similarity",
    "taylor": "taylor",
    "random": "random",
}
"""Criterion -> its saliency."""

ALLOCATIONS = ("uniform", "search")

NIWAKI, PEER = "niwaki", "torch-pruning"

SCORED_BATCHES = 10
"""Batches of training images that Taylor scores see."""

LATENCY_BATCHES = (1, 128)

DEFINITIONS = (
    "FLOPs: 2 per multiply-add of weights, per image, counted on the smaller network; ratios are to the dense network.",
    "uniform: every layer keeps the same share of its channels, the largest that meets the budget. search: niwaki.structured.search, by"
    " each channel's share of the scores of its layer (Taylor scores, changes of one loss, as they are).",
    "Channels inside residual blocks are removed (Li et al. 2017, He et al. 2019), whose number the option-A shortcuts leave free;"
    " Torch-Pruning, with uniform ratios, chooses its layers itself (all but the last).",
    "dense, removed, fine-tuned: accuracy on the 10,000 test images of the pretrained network, the smaller one, and it after fine-tuning.",
    "time: latency of a batch of 1 or 128 images (float32), as a share of the dense network's: medians, both taking turns in one process.",
)


@dataclass(frozen=True)
class Case:
    """What is removed, and by whom.

    Attributes:
        network: of the task's models.
        by: ``niwaki`` or ``torch-pruning``.
        criterion: of ``CRITERIA``.
        allocation: how many channels of each layer.
    """

    network: str
    by: str
    criterion: str
    allocation: str


def cases(networks: Sequence[str], criteria: Sequence[str], allocations: Sequence[str], makers: Sequence[str]) -> list[Case]:
    """Return all cases in the order in which they are measured: network by network, and side by side what is alike.

    >>> [case.by for case in cases(["resnet20"], ["fpgm"], ["uniform", "search"], ["niwaki", "torch-pruning"])]
    ['niwaki', 'torch-pruning', 'niwaki']
    """
    uniform = [(by, "uniform") for by in makers] if "uniform" in allocations else []
    searched = [(NIWAKI, "search")] if "search" in allocations and NIWAKI in makers else []
    return [
        Case(network, by, criterion, allocation)
        for network in networks
        for by, allocation in (*uniform, *searched)
        for criterion in criteria
    ]


def has_peer() -> bool:
    """Return whether Torch-Pruning can be imported."""
    return importlib.util.find_spec("torch_pruning") is not None


def run(
    chosen: Sequence[Case],
    folder: Path | None,
    out: Path,
    *,
    budget: float = 0.5,
    epochs: int = 3,
    seed: int = 0,
    rounds: int = 9,
    latencies: bool = False,
    progress: Callable[[int, int], None] | None = None,
    task: Task = CIFAR10,
) -> list[dict[str, Any]]:
    """Measure the cases that ``out`` does not hold yet, and return the rows of all chosen ones.

    Args:
        chosen: what to measure.
        folder: with the task's data, and ``models/cifar10_NETWORK.safetensors`` with the trained weights.
        out: a JSON file that grows by one row a case.
        budget: FLOPs of the smaller networks, as a share of the dense ones.
        epochs: of fine-tuning.
        seed: of everything random.
        rounds: of latency measurements.
        latencies: instead, measure the latencies of the cases that ``out`` holds anew; what is removed is the same each time.
        progress: called with the cases done and all cases.
        task: what to learn.

    Raises:
        InputError: data or weights are missing, or ``out`` was made with other settings.
    """
    training = Training(epochs=epochs, batch_size=128, learning_rate=0.02, weight_decay=1e-4, precision="bfloat16")
    settings = {"task": task.name, "budget": budget, "seed": seed, "rounds": rounds, "training": training.model_dump(exclude_unset=True)}
    rows = _read(out, settings)
    setting: _Setting | None = None
    for done, case in enumerate(chosen):
        if progress:
            progress(done, len(chosen))
        row = _row_of(rows, case)
        if (row is not None) == latencies:
            setting = _Setting(task, task.data(folder), folder, budget, training, seed) if setting is None else setting
            dense, smaller, seconds = _made(case, setting)
            measured = _latencies(dense, smaller, task.example(setting.data), rounds)
            if row is None:
                known = next((row["accuracy_dense"] for row in rows if row["network"] == case.network), None)
                row = _measure(case, setting, dense, smaller, known) | {"seconds_to_remove": seconds}
                rows.append(row)
            row |= measured
            _write(out, settings, rows)
    return [row for case in chosen if (row := _row_of(rows, case)) is not None]


def _row_of(rows: Iterable[dict[str, Any]], case: Case) -> dict[str, Any] | None:
    return next((row for row in rows if all(row[key] == value for key, value in vars(case).items())), None)


def stored(out: Path) -> list[dict[str, Any]]:
    """Return the rows that a file of results holds.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    rows: list[dict[str, Any]] = _content(out)["rows"]
    return rows


def _read(out: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not out.exists():
        return []
    found = _content(out)["settings"]
    if found != settings:
        raise InputError(f"--out: {out} holds results of other settings ({found}); choose another file, or the same settings")
    return stored(out)


def _content(out: Path) -> dict[str, Any]:
    try:
        content = json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--out: {out} cannot be read: {error}") from None
    if not isinstance(content, dict) or not {"rows", "settings"} <= content.keys():
        raise InputError(f"--out: {out} holds something else than results of this benchmark; choose another file")
    return content


def _write(out: Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_suffix(".partial")
    content = {
        "settings": settings,
        "definitions": DEFINITIONS,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(out)


# -- one case ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    """What all cases share."""

    task: Task
    data: Data
    folder: Path | None
    budget: float
    training: Training
    seed: int


def _made(case: Case, setting: _Setting) -> tuple[nn.Module, nn.Module, float]:
    """Return the dense network, the smaller one, and the seconds that it took to make it."""
    task, data = setting.task, setting.data
    dense = task.build(case.network, data, setting.seed)
    weights = required(setting.folder, f"models/{task.name}_{case.network}.safetensors", task=task.name, contents="trained weights")
    dense.load_state_dict(load_file(weights))
    dense.eval()
    scored = list(islice(batches(data.train, setting.training.batch_size, setting.seed, 0), SCORED_BATCHES))
    begin = time.perf_counter()
    by = _by_niwaki if case.by == NIWAKI else _by_peer
    smaller = by(dense, case, task, scored, task.example(data), setting.budget, setting.seed)
    return dense, smaller.eval(), time.perf_counter() - begin


def _measure(case: Case, setting: _Setting, dense: nn.Module, smaller: nn.Module, accuracy_dense: float | None) -> dict[str, Any]:
    """Fine-tune the smaller network, and return what there is to say of it."""
    task, data = setting.task, setting.data
    for model in (dense, smaller):  # in which both train and run faster
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = evaluate(smaller, task, data.test).metrics["accuracy"]
    trained = Trainer(smaller, task, data, setting.training, setting.seed).run()
    flops, whole = (forward_flops(model, task.example(data)).dense for model in (smaller, dense))
    return {
        **vars(case),
        "flops": flops,
        "flops_ratio": flops / whole,
        "parameters": _size(smaller),
        "parameters_ratio": _size(smaller) / _size(dense),
        "accuracy_dense": evaluate(dense, task, data.test).metrics["accuracy"] if accuracy_dense is None else accuracy_dense,
        "accuracy_before": before,
        "accuracy": trained.history[-1].metrics["accuracy"] if trained.history else before,
        "seconds_to_train": trained.seconds,
        "widths": {name: module.out_channels for name, module in smaller.named_modules() if isinstance(module, nn.Conv2d)},
    }


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _latencies(dense: nn.Module, smaller: nn.Module, example: tuple[Any, ...], rounds: int) -> dict[str, float]:
    found = {}
    for batch in LATENCY_BATCHES:
        inputs = torch.randn(batch, *example[0].shape[1:])
        with torch.no_grad():
            times = interleaved({"dense": partial(dense, inputs), "smaller": partial(smaller, inputs)}, rounds, warmup=3)
        found[f"latency_ms_{batch}"] = 1e3 * statistics.median(times["smaller"])
        found[f"latency_ratio_{batch}"] = statistics.median(times["smaller"]) / statistics.median(times["dense"])
    return found


def _by_niwaki(
    dense: nn.Module, case: Case, task: Task, scored: Sequence[tuple[Any, Tensor]], example: tuple[Any, ...], budget: float, seed: int
) -> nn.Module:
    groups = find_groups(dense, example)
    recipe = Recipe(granularity="channel", saliency=CRITERIA[case.criterion], sparsity=0.5)
    scores = unit_scores(dense, recipe, groups, data=scored, loss=task.loss, seed=seed)
    if case.allocation == "search":
        shares = scores if case.criterion == "taylor" else {name: values / values.sum() for name, values in scores.items()}
        masks = search(dense, shares, example, flops=budget, groups=groups).masks
    else:
        masks = unit_masks(dense, groups, _uniform(dense, scores, groups, example, budget))
    return shrink(dense, masks, example, groups=groups).model


def _uniform(
    dense: nn.Module, scores: Mapping[str, Tensor], groups: Sequence[Group], example: tuple[Any, ...], budget: float
) -> dict[str, Tensor]:
    """Return the best units of every group, the same share of all: the largest share that is within the budget."""
    chosen = [group for group in groups if group.name in scores]
    sizes = np.array([group.size for group in chosen])
    widths = np.unique(np.clip(np.rint(np.linspace(0, 1, 1001)[:, None] * sizes), 1, None).astype(np.int64), axis=0)
    costs = FlopCost.of(dense, chosen, example)(widths)
    within = np.where(costs <= budget, costs, -1.0)
    if within.max() < 0:
        raise InputError(f"--budget: {budget:g} of the FLOPs is less than one channel in every layer costs, {costs.min():.3g}")
    return {group.name: best(scores[group.name], int(width)) for group, width in zip(chosen, widths[within.argmax()], strict=True)}


# -- Torch-Pruning -------------------------------------------------------------------------------------------------------------


def _by_peer(
    dense: nn.Module, case: Case, task: Task, scored: Sequence[tuple[Any, Tensor]], example: tuple[Any, ...], budget: float, seed: int
) -> nn.Module:
    """Return what Torch-Pruning makes of the network at the largest FLOPs within the budget, by bisection of its pruning ratio."""
    peer = importlib.import_module("torch_pruning")
    importance: Mapping[str, Callable[[], Any]] = {
        "filter_l1": lambda: peer.importance.MagnitudeImportance(p=1),
        "filter_l2": lambda: peer.importance.MagnitudeImportance(p=2),
        "norm_scale": peer.importance.BNScaleImportance,
        "fpgm": peer.importance.FPGMImportance,
        "taylor": peer.importance.TaylorImportance,
        "random": peer.importance.RandomImportance,
    }
    whole = forward_flops(dense, example).dense

    def pruned(ratio: float) -> nn.Module:
        model = copy.deepcopy(dense)
        last = next(module for module in reversed(list(model.modules())) if isinstance(module, nn.Linear))
        pruner = peer.pruner.BasePruner(
            model, example[0], importance=importance[case.criterion](), pruning_ratio=ratio, ignored_layers=[last]
        )
        with _gradients(model, scored, task):
            pruner.step()
        return model

    low, high = 0.0, 1.0
    found = None
    with torch.random.fork_rng():
        for _ in range(8):
            torch.manual_seed(seed)
            middle = (low + high) / 2
            model = pruned(middle)
            if forward_flops(model, example).dense <= budget * whole:
                found, high = model, middle
            else:
                low = middle
    if found is None:
        raise InputError(f"--budget: Torch-Pruning cannot reach {budget:g} of the FLOPs")
    return found


@contextmanager
def _gradients(model: nn.Module, scored: Sequence[tuple[Any, Tensor]], task: Task) -> Iterator[None]:
    """Hold, inside the block, the gradient of the mean loss over the batches."""
    for inputs, targets in scored:
        (task.loss(model(inputs), targets) / len(scored)).backward()  # type: ignore[no-untyped-call]
    yield
    for parameter in model.parameters():
        parameter.grad = None


# -- for people ----------------------------------------------------------------------------------------------------------------


def table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return the rows as a table for people."""
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for header in ("network", "by", "criterion", "widths"):
        result.add_column(header)
    headers = ("FLOPs", "params", *(f"time {batch}" for batch in LATENCY_BATCHES), "dense", "removed", "fine-tuned")
    for header in headers:
        result.add_column(header, justify="right")
    for row in rows:
        result.add_row(
            *(row[key] for key in ("network", "by", "criterion", "allocation")),
            f"{row['flops_ratio']:.3f}x",
            f"{row['parameters_ratio']:.3f}x",
            *(f"{row[f'latency_ratio_{batch}']:.2f}x" for batch in LATENCY_BATCHES),
            *(f"{100 * row[key]:.2f} %" for key in ("accuracy_dense", "accuracy_before", "accuracy")),
        )
    return result
