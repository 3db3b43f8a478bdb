"""Large and sparse against small and dense: networks of equally many weights, trained alike."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import nn

from niwaki import catalogue
from niwaki.bench.phenomena.experiment import COLOURS, Experiment, Row, Setting, crossed, difference, grouped, panels, perceptron, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPARSITIES = (0.8, 0.95, 0.98)


def measure(case: Row, setting: Setting) -> dict[str, Any]:
    """Prune a perceptron gradually, and train a dense one that has as many weights from the beginning."""
    seed = case["seed"]
    large = setting.build(seed)
    linear = [module for module in large.modules() if isinstance(module, nn.Linear)]
    inputs, hidden, outputs = linear[0].in_features, (linear[0].out_features, linear[1].out_features), linear[2].out_features
    done = setting.trained(large, seed, recipe=catalogue.find("gmp").replace(sparsity=case["sparsity"]))
    left = sum(parameter.numel() for parameter in large.parameters()) - sum(int((~mask).sum()) for mask in done.masks.values())
    widths = narrower(inputs, hidden, outputs, left)
    other = Setting(perceptron(inputs, widths, setting.network), setting.data, setting.settings)
    small = other.build(seed)
    return {
        "accuracy": {"large, sparse": done.history[-1].metrics["accuracy"], "small, dense": other.accuracy(small, seed)},
        "weights": {"large, sparse": left, "small, dense": sum(parameter.numel() for parameter in small.parameters())},
        "hidden": {"large, sparse": list(hidden), "small, dense": list(widths)},
    }


def narrower(inputs: int, hidden: tuple[int, int], outputs: int, weights: int) -> tuple[int, int]:
    """Return hidden widths in the same proportion with which a perceptron has most nearly that many parameters, biases included.

    >>> narrower(784, (300, 100), 10, 266610), narrower(784, (300, 100), 10, 30000)
    ((300, 100), (37, 12))
    """

    def size(widths: tuple[int, int]) -> int:
        first, second = widths
        return (inputs + 1) * first + (first + 1) * second + (second + 1) * outputs

    candidates = [(first, max(1, round(first * hidden[1] / hidden[0]))) for first in range(1, hidden[0] + 1)]
    return min(candidates, key=lambda widths: abs(size(widths) - weights))


def summary(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return a line for each network and sparsity."""
    lines = []
    for (network, sparsity), own in grouped(rows, "network", "sparsity").items():
        large, small = ([row["accuracy"][arm] for row in own] for arm in ("large, sparse", "small, dense"))
        lines.append(
            {
                "network": network,
                "sparsity": f"{100 * sparsity:g} %",
                "weights": f"{own[0]['weights']['large, sparse']:,}",
                "large and sparse": share(large),
                "small: hidden units": " and ".join(map(str, own[0]["hidden"]["small, dense"])),
                "its weights": f"{own[0]['weights']['small, dense']:,}",
                "small and dense": share(small),
                "difference, points": difference(large, small),
            }
        )
    return lines


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """Draw both accuracies over the number of weights."""
    found = grouped(rows, "network")
    for axis, ((network,), own) in zip(panels(figure, len(found)), found.items(), strict=True):
        for colour, arm in zip(COLOURS, ("large, sparse", "small, dense"), strict=False):
            points = sorted(
                (same[0]["weights"][arm], [100 * row["accuracy"][arm] for row in same]) for same in grouped(own, "sparsity").values()
            )
            places = [place for place, _ in points]
            axis.plot(places, [fmean(values) for _, values in points], color=colour, marker=".", label=arm)
            axis.fill_between(places, [min(v) for _, v in points], [max(v) for _, v in points], color=colour, alpha=0.15, linewidth=0)
        axis.set_xscale("log")
        axis.set_xlabel("weights and biases", fontsize=9)
        axis.set_ylabel("accuracy, %", fontsize=9)
        axis.set_title(network, fontsize=10, loc="left")
        axis.legend(fontsize=8, frameon=False)


LARGE_SPARSE = Experiment(
    statement="Large and sparse beats small and dense at equally many weights (survey 11.2; Zhu and Gupta 2018).",
    definitions=(
        "large and sparse: the catalogue's gmp, which prunes all layers but the last alike while the network trains. small and dense:"
        " hidden layers in the same proportion, so narrow that there are as many parameters (within one unit), trained for as many epochs"
        " on the same batches. Its forward pass has about as many multiply-adds; its training has fewer.",
        "Accuracy on the test data in per cent, mean ± half the range over the seeds; difference: mean of large less small, seed by seed, ±"
        " half of its 95 % confidence interval (Student).",
    ),
    networks=("lenet_300_100",),
    known=("lenet_300_100", "digits_mlp"),
    seeds=3,
    settings={"epochs": 6},
    cases=crossed(sparsity=SPARSITIES),
    measure=measure,
    summary=summary,
    draw=draw,
)
