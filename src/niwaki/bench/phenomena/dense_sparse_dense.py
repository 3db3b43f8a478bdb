"""Dense-sparse-dense: what a sparse phase in the middle of a dense training brings, at equal epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from niwaki import catalogue
from niwaki.bench.phenomena.experiment import COLOURS, Experiment, Row, Setting, crossed, difference, grouped, panels, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPARSITIES = (0.3, 0.5)
"""Of the sparse phase: 30 % as in the paper, and more."""


def measure(case: Row, setting: Setting) -> dict[str, Any]:
    """Train the same initial weights on the same batches: dense, and with a sparse phase."""
    seed = case["seed"]
    accuracy = {"dense": setting.accuracy(setting.build(seed), seed)}
    for sparsity in SPARSITIES:
        recipe = catalogue.find("dsd").replace(sparsity=sparsity)
        accuracy[str(sparsity)] = setting.accuracy(setting.build(seed), seed, recipe=recipe)
    return {"accuracy": accuracy}


def summary(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return a line for each network and sparsity of the sparse phase, with the paired difference to the dense training."""
    lines = []
    for (network,), own in grouped(rows, "network").items():
        dense = [row["accuracy"]["dense"] for row in own]
        for sparsity in map(str, SPARSITIES):
            values = [row["accuracy"][sparsity] for row in own]
            better = sum(value > other for value, other in zip(values, dense, strict=True))
            lines.append(
                {
                    "network": network,
                    "sparse phase": f"{100 * float(sparsity):g} %",
                    "dense": share(dense),
                    "dense-sparse-dense": share(values),
                    "difference, points": difference(values, dense),
                    "better": f"{better} of {len(own)}",
                }
            )
    return lines


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """Draw the differences of all pairs."""
    found = grouped(rows, "network")
    for axis, ((network,), own) in zip(panels(figure, len(found)), found.items(), strict=True):
        for place, sparsity in enumerate(map(str, SPARSITIES)):
            gains = [100 * (row["accuracy"][sparsity] - row["accuracy"]["dense"]) for row in own]
            axis.plot([place] * len(gains), gains, "o", color=COLOURS[place], alpha=0.6)
            axis.plot([place - 0.15, place + 0.15], [sum(gains) / len(gains)] * 2, color="black")
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(SPARSITIES)), [f"{100 * s:g} %" for s in SPARSITIES])
        axis.set_xlabel("sparsity of the middle phase", fontsize=9)
        axis.set_ylabel("accuracy above the dense training, points", fontsize=9)
        axis.set_title(network, fontsize=10, loc="left")


DENSE_SPARSE_DENSE = Experiment(
    statement="The dense-sparse-dense gain (survey 3.2; Han et al. 2017): a dense network that was sparse for a while generalises better.",
    definitions=(
        "Both trainings have the same initial weights, batches, epochs and learning rates. dense-sparse-dense is the catalogue's dsd: the"
        " smallest weights of each layer are zero in the second third of the training, and return as zeros.",
        "Accuracy on the test data in per cent, mean ± half the range over the seeds. difference: mean of the differences seed by seed ±"
        " half of their 95 % confidence interval (Student). better: seeds in which the sparse phase helped.",
    ),
    networks=("lenet_300_100",),
    known=("lenet_300_100", "lenet_5", "digits_mlp", "digits_convnet"),
    seeds=5,
    settings={"epochs": 10},
    cases=crossed(),
    measure=measure,
    summary=summary,
    draw=draw,
)
