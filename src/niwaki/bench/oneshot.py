"""Criteria for single weights on trained networks: what each makes of it right after the cut, and after one epoch of recovery.

Every case starts from the same trained weights, and all methods see the same calibration examples. Results are written case by case, so
that an interrupted measurement goes on.
"""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich import box
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn

from niwaki.bench.results import Results
from niwaki.calibration import recalibrate_batchnorm
from niwaki.collecting import uses_data
from niwaki.errors import NiwakiError
from niwaki.masks import Masks
from niwaki.metrics.units import NOTHING, show
from niwaki.pruning import prune
from niwaki.recipe import Recipe
from niwaki.tasks import Data, Task, Training
from niwaki.tasks.files import required
from niwaki.tasks.images import CIFAR10, FASHION_MNIST
from niwaki.training.loop import batches, evaluate
from niwaki.training.trainer import Trainer

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
RECOVERED = (0.8, 0.9, 0.95)
"""Sparsities after which the network is trained further, with the first seed."""

SEEDS = 3
"""Draws of calibration examples."""

EXAMPLES, BATCH = 1024, 128
"""Calibration examples of a draw, and those of a batch."""


@dataclass(frozen=True)
class Method:
    """A criterion.

    Attributes:
        family: what it looks at: ``nothing``, ``weights``, ``gradients``, ``curvature`` of the loss, or the ``outputs`` of each layer.
        recipe: slots, without the sparsity.
    """

    family: str
    recipe: Mapping[str, Any]


GLOBAL = {"allocation": "global"}
UPDATED = {"allocation": "global", "compensation": "obs"}

METHODS: Mapping[str, Method] = {
    "random": Method("nothing", {"saliency": "random", "allocation": "uniform"}),
    "magnitude": Method("weights", {"saliency": "magnitude", **GLOBAL}),
    "lamp": Method("weights", {"saliency": "magnitude", "normalization": "lamp", **GLOBAL}),
    "synflow": Method("weights", {"saliency": "synflow", **GLOBAL, "schedule": {"one_shot": {"rounds": 100}}}),
    "snip": Method("gradients", {"saliency": "snip", **GLOBAL}),
    "grasp": Method("gradients", {"saliency": "grasp", **GLOBAL}),
    "obd_fisher": Method("curvature", {"saliency": {"obd": {"estimate": "fisher"}}, **GLOBAL}),
    "obd_gauss_newton": Method("curvature", {"saliency": {"obd": {"estimate": "gauss_newton"}}, **GLOBAL}),
    "woodfisher": Method("curvature", {"saliency": {"woodfisher": {"block": 2000, "gradients": 400}}, **UPDATED}),
    "mfac": Method("curvature", {"saliency": {"mfac": {"gradients": 512}}, **UPDATED}),
    "kfac_obs": Method("curvature", {"saliency": "kfac_obs", **UPDATED}),
    "wanda": Method("outputs", {"saliency": "wanda", "allocation": {"uniform": {"per": "row"}}}),
    "l_obs": Method("outputs", {"saliency": "l_obs", "allocation": "error_bound", "compensation": "obs"}),
    "sparsegpt": Method("outputs", {"saliency": "sparsegpt", "allocation": "uniform"}),
    "obc": Method("outputs", {"saliency": "obc", "allocation": "uniform"}),
}
"""Criterion -> what it is, in the order of what it looks at."""


@dataclass(frozen=True)
class Network:
    """A trained network.

    Attributes:
        task: with its data.
        model: of the task.
        recovery: training after the cut.
        trains: whether it is trained here, as the task says, where the data folder has no trained weights.
    """

    task: Task
    model: str
    recovery: Training
    trains: bool = False


NETWORKS: Mapping[str, Network] = {
    "lenet_300_100": Network(
        FASHION_MNIST, "lenet_300_100", Training(epochs=1, batch_size=128, learning_rate=0.02, weight_decay=1e-4), trains=True
    ),
    "resnet20": Network(
        CIFAR10, "resnet20", Training(epochs=1, batch_size=128, learning_rate=0.02, weight_decay=1e-4, precision="bfloat16")
    ),
}

DEFINITIONS = (
    "sparsity: of the weights of hidden layers; first convolution, last layer, biases and normalizations stay dense.",
    f"Methods that look at data see the same {EXAMPLES} training images without augmentation, another draw for each seed; gradients of the"
    " loss use their labels, woodfisher 400 and mfac 512 gradients of one image. Numbers are the mean over the seeds ± half their range.",
    "cut: accuracy on the 10,000 test images right after pruning. statistics anew: the same with batch normalization's statistics estimated"
    " anew on the calibration images. recovered: after one epoch of training with the mask fixed (first seed; learning rate 0.02, cosine).",
    "seconds: of pruning, with everything that it collects. memory: the largest resident memory while pruning, less that before."
    " statistics: bytes that these take by their shapes. All are the largest over seeds and sparsities.",
    "random, wanda, sparsegpt and obc prune all layers alike, l_obs by what a layer can bear, the others rank all weights together.",
    "woodfisher, mfac, kfac_obs, l_obs, sparsegpt and obc give the weights that stay new values; the others leave them.",
)

KEY = ("network", "method", "sparsity", "seed")


@dataclass(frozen=True)
class Case:
    """One network, pruned once. Attributes: as in the rows."""

    network: str
    method: str
    sparsity: float
    seed: int


def cases(networks: Sequence[str], methods: Sequence[str], sparsities: Sequence[float], seeds: int) -> list[Case]:
    """Return all cases, those of the first seed first; what depends on no data and no seed has only that one.

    >>> [(case.method, case.seed) for case in cases(["resnet20"], ["magnitude", "snip"], [0.9], 2)]
    [('magnitude', 0), ('snip', 0), ('snip', 1)]
    """
    return [
        Case(network, method, sparsity, seed)
        for network in networks
        for seed in range(seeds)
        for method in methods
        for sparsity in sparsities
        if seed == 0 or method == "random" or uses_data(_recipe(method, sparsity))
    ]


def _recipe(method: str, sparsity: float) -> Recipe:
    return Recipe(sparsity=sparsity, **METHODS[method].recipe)


def run(
    chosen: Sequence[Case],
    folder: Path | None,
    out: Path,
    *,
    recover: Sequence[float] = RECOVERED,
    examples: int = EXAMPLES,
    memory: int | None = None,
    networks: Mapping[str, Network] = NETWORKS,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure the cases that ``out`` does not hold yet, and return the rows of all chosen ones.

    Args:
        chosen: what to measure.
        folder: with the tasks' data, and ``models/TASK_MODEL.safetensors`` with trained weights.
        out: a JSON file that grows by one row a case. A network that is trained first is kept beside it.
        recover: sparsities after which the network is trained further, in the cases of seed 0.
        examples: calibration examples.
        memory: most bytes that statistics may take.
        networks: name -> what it is.
        progress: called with the cases done and all cases.

    Raises:
        InputError: data or weights are missing, or ``out`` was made with other settings.
    """
    settings = {
        "examples": examples,
        "batch": min(BATCH, examples),
        "recover": list(recover),
        "memory": memory,
        "recovery": {name: network.recovery.model_dump(exclude_unset=True) for name, network in networks.items()},
    }
    results = Results(out, settings, DEFINITIONS, KEY)
    settled: dict[str, _Setting] = {}
    for done, case in enumerate(chosen):
        if progress:
            progress(done, len(chosen))
        if results.find(vars(case)) is None:
            if case.network not in settled:
                settled = {case.network: _setting(networks[case.network], folder, out.parent)}  # one data set at a time
            results.add({**vars(case), "family": METHODS[case.method].family, **_measured(case, settled[case.network], settings)})
    return [row for row in results.rows if any(all(row[name] == vars(case)[name] for name in KEY) for case in chosen)]


# -- one case ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setting:
    """What all cases of a network share."""

    network: Network
    data: Data
    model: nn.Module
    accuracy: float


def _setting(network: Network, folder: Path | None, cache: Path) -> _Setting:
    data = network.task.data(folder)
    model = trained(network, data, folder, cache)
    return _Setting(network, data, model, evaluate(model, network.task, data.test).metrics["accuracy"])


def trained(network: Network, data: Data, folder: Path | None, cache: Path) -> nn.Module:
    """Return a trained network: from the data folder, from the cache, or after the training that the task says.

    Raises:
        InputError: there are no weights, and it is not to be trained here.
    """
    task, name = network.task, f"{network.task.name}_{network.model}.safetensors"
    model = task.build(network.model, data, 0)
    kept = cache / name
    given = None if folder is None else folder / "models" / name
    if network.trains and (given is None or not given.is_file()):
        if not kept.is_file():
            Trainer(model, task, data, task.model(network.model)[1].training, 0).run()
            cache.mkdir(parents=True, exist_ok=True)
            temporary = kept.with_suffix(".partial")
            save_file(model.state_dict(), temporary)
            temporary.replace(kept)
        model.load_state_dict(load_file(kept))
    else:
        model.load_state_dict(load_file(required(folder, f"models/{name}", task=task.name, contents="trained weights")))
    return model.eval()


def _measured(case: Case, setting: _Setting, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Prune a copy of the network, and return what there is to say of it."""
    task, data, training = setting.network.task, setting.data, setting.network.recovery
    model = copy.deepcopy(setting.model)
    seen = list(islice(batches(data.train, settings["batch"], case.seed, 0), -(-settings["examples"] // settings["batch"])))
    try:
        with resident() as memory:
            done = prune(
                model,
                _recipe(case.method, case.sparsity),
                data=seen,
                loss=task.loss,
                blocks=None,
                memory=settings["memory"],
                seed=case.seed,
            )
    except NiwakiError as error:
        return {"error": str(error)}
    convolutional = any(isinstance(module, nn.Conv2d) for module in model.modules())
    if convolutional:  # in which it runs and trains faster
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    row = {
        "sparsity_reached": done.sparsity,
        "accuracy_dense": setting.accuracy,
        "accuracy_cut": evaluate(model, task, data.test).metrics["accuracy"],
        "accuracy_anew": None,
        "accuracy_recovered": None,
        "loss_before": done.loss_before,
        "loss_after": done.loss_after,
        "seconds": done.seconds,
        "memory": memory.peak,
        "statistics_bytes": done.statistics_bytes,
        "notes": list(done.notes),
    }
    again = copy.deepcopy(model)
    if recalibrate_batchnorm(again, seen):
        row["accuracy_anew"] = evaluate(again, task, data.test).metrics["accuracy"]
    if case.seed == 0 and case.sparsity in settings["recover"]:
        row["accuracy_recovered"] = _recovered(model, done.masks, task, data, training)
    return row


def _recovered(model: nn.Module, masks: Masks, task: Task, data: Data, training: Training) -> float:
    """Train a network further with its masks as they are, and return its accuracy."""
    trainer = Trainer(model, task, data, training, 0)
    trainer.masks = masks
    return trainer.run().history[-1].metrics["accuracy"]


# -- memory --------------------------------------------------------------------------------------------------------------------


@dataclass
class Resident:
    """Physical memory of this process, in bytes; ``peak`` is None where the system does not tell."""

    peak: int | None = None


@contextmanager
def resident() -> Iterator[Resident]:
    """Tell by how much the physical memory of the process rises inside the block at most; Linux counts it, elsewhere nothing is told.

    What was freed before is given back first, so that it does not hide what is needed.
    """
    found = Resident()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if _STATUS.exists() else None
    if trim is not None:
        trim(0)
    try:
        _FORGET.write_text("5", encoding="ascii")  # the largest so far is what it is now
        before = _kilobytes("VmRSS")
    except (OSError, KeyError):
        yield found
        return
    yield found
    found.peak = 1024 * max(_kilobytes("VmHWM") - before, 0)


_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _kilobytes(field: str) -> int:
    lines = (line.split(":") for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines())
    return int({name: value for name, value in lines if value.endswith("kB")}[field].split()[0])


# -- for people ----------------------------------------------------------------------------------------------------------------

WHEN = {"accuracy_cut": "cut", "accuracy_anew": "statistics anew", "accuracy_recovered": "recovered"}
"""Field of a row -> what people call it."""


def table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Return the rows as a table for people: a line for each network, method and moment, a column for each sparsity."""
    rows = list(rows)
    sparsities = sorted({row["sparsity"] for row in rows})
    result = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for header in ("network", "looks at", "method", "when"):
        result.add_column(header)
    for header in (*(f"{sparsity:g}" for sparsity in sparsities), "seconds", "memory", "statistics"):
        result.add_column(header, justify="right")
    for (network, method), own in _grouped(rows).items():
        failed = next((row["error"] for row in own if "error" in row), None)
        costs = [_largest(own, name) for name in ("seconds", "memory", "statistics_bytes")]
        shown = [show(value, unit) for value, unit in zip(costs, ("seconds", "bytes", "bytes"), strict=True)]
        for field, when in WHEN.items():
            cells = [_spread([row[field] for row in own if row["sparsity"] == s and row.get(field) is not None]) for s in sparsities]
            if any(cell != NOTHING for cell in cells):
                result.add_row(network, own[0]["family"], method, when, *cells, *shown)
        if failed is not None:
            result.add_row(network, own[0]["family"], method, f"failed: {failed}")
    return result


def curves(rows: Iterable[Mapping[str, Any]], field: str = "accuracy_cut") -> dict[str, dict[str, dict[float, list[float]]]]:
    """Return, for a plot, of each network and method the values at each sparsity, one for each seed; dense ones among the methods, at 0.

    >>> row = {"network": "net", "method": "snip", "sparsity": 0.5, "accuracy_dense": 1.0, "accuracy_cut": 0.75}
    >>> curves([row, {**row, "accuracy_cut": 0.25}])
    {'net': {'dense': {0.0: [1.0]}, 'snip': {0.5: [0.75, 0.25]}}}
    """
    found: dict[str, dict[str, dict[float, list[float]]]] = {}
    for (network, method), own in _grouped(rows).items():
        for row in own:
            if row.get(field) is not None:
                methods = found.setdefault(network, {"dense": {0.0: [row["accuracy_dense"]]}})
                methods.setdefault(method, {}).setdefault(row["sparsity"], []).append(row[field])
    return found


def _grouped(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["network"], row["method"]), []).append(row)
    order = list(METHODS)
    return dict(sorted(found.items(), key=lambda one: (one[0][0], order.index(one[0][1]))))


def _spread(values: Sequence[float]) -> str:
    """Return the mean of shares in per cent, ± half their range where there are several."""
    if not values:
        return NOTHING
    around = f" ±{50 * (max(values) - min(values)):.1f}" if len(values) > 1 else ""
    return f"{100 * fmean(values):.1f}{around}"


def _largest(rows: Iterable[Mapping[str, Any]], field: str) -> float | None:
    return max((row[field] for row in rows if row.get(field) is not None), default=None)
