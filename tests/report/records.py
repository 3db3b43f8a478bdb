"""Records of runs that never were, with numbers as real ones have them."""

from __future__ import annotations

from typing import Any

import numpy as np

from niwaki.tasks import Training
from niwaki.training.record import (
    Choices,
    Class,
    Dynamics,
    Epoch,
    Layer,
    Measure,
    Predictions,
    Record,
    Results,
    Stage,
    Storage,
    Stored,
)

EXAMPLES = 2000
CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SHAPES = [(16, 3, 3, 3), (16, 16, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3), (128, 256), (10, 128)]
STEPS = 50
"""Optimizer steps of an epoch."""


def accuracy_at(sparsity: float, method: str = "gmp") -> float:
    """An Occam's hill: a rise of half a point, a plateau, a collapse."""
    collapse = {"gmp": 0.965, "rigl": 0.98}.get(method, 0.94)
    return 0.90 + 0.006 * np.sin(np.pi * min(sparsity / 0.8, 1.0)) - 0.7 / (1 + np.exp((collapse - sparsity) * 250))


def record(
    method: str = "gmp",
    sparsity: float = 0.9,
    seed: int = 0,
    epochs: int = 12,
    *,
    task: str = "fashion_mnist",
    classes: bool = True,
    dynamics: bool = True,
    stages: list[Stage] | None = None,
    class_names: tuple[str, ...] = CLASSES,
    recipe: dict[str, Any] | None = None,
    notes: list[str] | None = None,
    latency: bool = True,
    **choices: Any,
) -> Record:
    """Return a finished run."""
    dense_random = np.random.default_rng(1000 + seed)
    random = np.random.default_rng([seed, int(1e4 * sparsity), len(method)])
    true = np.arange(EXAMPLES) % len(class_names)
    difficulty = dense_random.permutation((np.arange(EXAMPLES) + 0.5) / EXAMPLES)
    dense = _guess(true, difficulty, accuracy_at(0.0) + dense_random.normal(0, 0.001), len(class_names), dense_random)
    harder = difficulty + 0.03 * sparsity * (true == 6) + random.normal(0, 0.004, EXAMPLES)
    sparse = _guess(true, harder, accuracy_at(sparsity, method) + random.normal(0, 0.001), len(class_names), random)
    dense_accuracy, sparse_accuracy = float((dense == true).mean()), float((sparse == true).mean())
    elements = [int(np.prod(shape)) for shape in SHAPES]
    uses = [1024, 1024, 256, 256, 64, 64, 1, 1]
    active = [n if i in (0, 7) else max(1, round(n * (1 - sparsity) * (0.6 + 0.1 * i))) for i, n in enumerate(elements)]
    layers = [
        Layer(
            name=f"layers.{i}.weight",
            shape=list(shape),
            target=i not in (0, 7),
            elements=n,
            active=k,
            dense_flops=2.0 * n * u,
            sparse_flops=2.0 * k * u,
        )
        for i, (shape, n, k, u) in enumerate(zip(SHAPES, elements, active, uses, strict=True))
    ]
    chosen = Choices(
        **{
            "task": task,
            "data": "d" * 64,
            "model": "small_cnn",
            "method": method,
            "recipe": recipe if recipe is not None else _recipe(method, sparsity),
            "seed": seed,
            "training": Training(epochs=epochs, batch_size=64),
            **choices,
        }
    )
    total, kept = sum(elements), sum(active)
    flops = [sum(one.dense_flops for one in layers), sum(one.sparse_flops for one in layers)]
    measures = [
        _measure("accuracy", "share", "share of test examples whose largest output is their class", True, dense_accuracy, sparse_accuracy),
        _measure("loss", "number", "mean cross-entropy of the examples, in nats", False, 0.31, 0.31 + (dense_accuracy - sparse_accuracy)),
        _measure("sparsity of the targets", "share", "masked weights / weights of the targets", None, 0.0, sparsity),
        _measure("sparsity of all parameters", "share", "masked weights / elements of all parameters", None, 0.0, 1 - kept / total),
        _measure("active parameters", "weights", "elements of all parameters that are not masked", None, total, kept),
        _measure("file size", "bytes", "dense: plain; sparse: model.safetensors", False, 4 * total + 900, round(4.4 * kept) + 1100),
        _measure("forward FLOPs", "FLOPs", "2 per multiply-add, per example", False, *flops),
        _measure("training time", "seconds", "wall time of the training; varies", False, 12.3, 14.5),
    ]
    if latency:
        measures += [
            _measure("latency, batch 1", "milliseconds", "median of 30 interleaved forward passes of one example", False, 1.83, 1.79),
            _measure("latency, batch 64", "milliseconds", "median of 30 interleaved forward passes of 64 examples", False, 41.0, 40.2),
        ]
    n, m = total, kept
    results = Results(
        measures=measures,
        layers=layers,
        storage=[
            Storage(format="dense", bits=32 * n, position_bits=0, definition="n k: every weight, zeros too"),
            Storage(format="bitmap", bits=32 * m + n, position_bits=n, definition="m k + n: one bit for each position"),
            Storage(format="COO", bits=(32 + 17) * m, position_bits=17 * m, definition="m (k + ⌈log2 n⌉)"),
            Storage(format="CSR", bits=(32 + 9) * m + 5000, position_bits=9 * m + 5000, definition="m (k + ⌈log2 n_c⌉) + n_r ⌈log2 m⌉"),
            Storage(format="entropy bound", bits=32 * m + int(0.47 * n), position_bits=int(0.47 * n), definition="m k + log2 C(n, m)"),
        ],
        classes=[
            Class(
                name=name,
                examples=int((true == c).sum()),
                dense_recall=float((dense[true == c] == c).mean()),
                sparse_recall=float((sparse[true == c] == c).mean()),
            )
            for c, name in enumerate(class_names)
        ]
        if classes
        else [],
        predictions=Predictions(true=Predictions.pack(true), dense=Predictions.pack(dense), sparse=Predictions.pack(sparse))
        if classes
        else None,
        dense_history=_history(epochs, dense_accuracy, dense_random, 0.0, False),
        sparse_history=_history(epochs, sparse_accuracy, random, sparsity, dynamics),
        stages=stages if stages is not None else [Stage(number=1, says="gmp, 1 run", begin=0, end=STEPS * epochs, sparsity=sparsity)],
        masks_hash="a" * 64,
        notes=notes if notes is not None else ["layers.0.weight and layers.7.weight are no targets: first convolution, last layer"],
        model=Stored(file="model.safetensors", bytes=int(4.4 * m) + 1100, sha256="b" * 64),
    )
    machine = {"niwaki": "0.1.0", "python": "3.11.7", "torch": "2.9.0", "processor": "a processor", "threads": 2}
    return Record(identity=chosen.identity(), choices=chosen, environment=machine, results=results)


def sweep() -> list[tuple[str, Record]]:
    """Return two methods at seven sparsities, three seeds each."""
    return [
        (f"{method}-{sparsity}-seed{seed}", record(method, sparsity, seed, epochs=4))
        for method in ("gmp", "rigl")
        for sparsity in (0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
        for seed in range(3)
    ]


def _recipe(method: str, sparsity: float) -> dict[str, Any]:
    growth = {"growth": "gradient"} if method == "rigl" else {}
    return {"sparsity": sparsity, "saliency": "magnitude", "schedule": {"constant": {"every": "100 steps", "end": "0.75 run"}}} | growth


def _measure(name: str, unit: str, definition: str, better: bool | None, dense: float, sparse: float) -> Measure:
    return Measure(name=name, unit=unit, definition=definition, higher_is_better=better, dense=dense, sparse=sparse)


def _guess(true: Any, difficulty: Any, accuracy: float, classes: int, random: Any) -> Any:
    return np.where(difficulty > accuracy, (true + random.integers(1, classes, len(true))) % classes, true)


def _history(epochs: int, final: float, random: Any, sparsity: float, dynamics: bool) -> list[Epoch]:
    history = []
    for i in range(1, epochs + 1):
        progress = i / epochs
        reached = sparsity * min(1.0, 1 - (1 - min(1.0, progress / 0.75)) ** 3)
        accuracy = final - 0.25 * (1 - progress) ** 3 + float(random.normal(0, 0.003)) * (i < epochs)
        moved = Dynamics(
            overlap=0.8 + 0.2 * progress,
            pruned=int(40000 * (1 - progress) * reached),
            grown=int(3000 * (1 - progress)),
            ever_active=1 - 0.3 * reached,
        )
        history.append(
            Epoch(
                epoch=i,
                step=STEPS * i,
                train_loss=1.9 * np.exp(-3 * progress) + 0.1,
                learning_rate=0.1 * (1 + np.cos(np.pi * progress)) / 2,
                metrics={"accuracy": accuracy, "loss": 1.2 - accuracy},
                sparsity=reached,
                dynamics=moved if dynamics and sparsity else None,
            )
        )
    return history
