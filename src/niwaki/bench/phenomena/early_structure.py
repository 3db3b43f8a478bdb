"""Early structure: how soon in a training the largest weights are those that are the largest at its end."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from niwaki.bench.phenomena.experiment import COLOURS, EVERYTHING, Experiment, Row, Setting, crossed, grouped, panels
from niwaki.masks import Masks
from niwaki.recipe import Recipe
from niwaki.training.record import Epoch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPARSITIES = (0.5, 0.8, 0.9, 0.98)


def measure(case: Row, setting: Setting) -> dict[str, Any]:
    """Train a dense network; compare the mask of its largest weights after every epoch with that after the last one."""
    model = setting.build(case["seed"])
    kept: dict[float, list[Masks]] = {sparsity: [] for sparsity in SPARSITIES}
    accuracy: list[float] = []

    def look() -> None:
        for sparsity, masks in kept.items():
            recipe = Recipe(sparsity=sparsity, saliency="magnitude", allocation="uniform", target=EVERYTHING)
            masks.append(setting.prune(copy.deepcopy(model), recipe, case["seed"]).masks)

    def progress(_: int, __: int, epoch: Epoch | None) -> None:
        if epoch is not None:
            accuracy.append(epoch.metrics["accuracy"])
            look()

    look()
    setting.trained(model, case["seed"], progress=progress, learning_rate_schedule=case["learning_rate"])
    return {
        "accuracy": accuracy,
        "overlap": {str(s): [overlap(one, masks[-1]) for one in masks] for s, masks in kept.items()},
        "hamming": {str(s): [one.churn(masks[-1]) for one in masks] for s, masks in kept.items()},
    }


def overlap(masks: Masks, final: Masks) -> float:
    """Return the share of what is active in the end that is active now.

    >>> import torch
    >>> now, final = (Masks({"w": torch.tensor(bits)}) for bits in ([True, True, False, False], [True, False, True, False]))
    >>> overlap(now, final)
    0.5
    """
    return (masks & final).active / final.active


def summary(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return a line for each network, learning rate and sparsity: the share that is settled at the begin and after some epochs."""
    lines = []
    for (network, schedule), own in grouped(rows, "network", "learning_rate").items():
        epochs = len(own[0]["accuracy"])
        for sparsity in own[0]["overlap"]:
            curve = [fmean(values) for values in zip(*(row["overlap"][sparsity] for row in own), strict=True)]
            settled = next(epoch for epoch, value in enumerate(curve) if value >= 0.9)
            at = [0, *(epoch for epoch in (1, 2, 3, 5, 8) if epoch < epochs)]
            lines.append(
                {
                    "network": network,
                    "learning rate": schedule,
                    "sparsity": f"{100 * float(sparsity):g} %",
                    "by chance": f"{100 * (1 - float(sparsity)):.0f} %",
                    **{f"after {epoch}" if epoch else "initial": f"{100 * curve[epoch]:.1f} %" for epoch in at},
                    "90 % after": f"{settled} of {epochs}",
                }
            )
    return lines


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """Draw the overlap with the final mask over the epochs: a panel for each network and learning rate, a line for each sparsity."""
    found = grouped(rows, "network", "learning_rate")
    axes = panels(figure, len(found))
    for axis, ((network, schedule), own) in zip(axes, found.items(), strict=True):
        for colour, sparsity in zip(COLOURS, own[0]["overlap"], strict=False):
            curves = [[100 * value for value in row["overlap"][sparsity]] for row in own]
            epochs = range(len(curves[0]))
            means = [fmean(values) for values in zip(*curves, strict=True)]
            axis.plot(epochs, means, color=colour, marker=".", label=f"{100 * float(sparsity):g} %")
            low, high = ([limit(values) for values in zip(*curves, strict=True)] for limit in (min, max))
            axis.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
            axis.axhline(100 * (1 - float(sparsity)), color=colour, linestyle=":", linewidth=0.8)
        axis.set_title(f"{network}, {schedule} learning rate", fontsize=10, loc="left")
        axis.set_xlabel("epochs", fontsize=9)
        axis.set_ylabel("active in the end, and now, %", fontsize=9)
        axis.set_ylim(0, 102)
    axes[0].legend(title="sparsity", fontsize=8, title_fontsize=8, frameon=False, loc="lower right")


EARLY_STRUCTURE = Experiment(
    statement="Early structure adaptation (survey 3.6): which weights matter is settled in the first epochs of a training.",
    definitions=(
        "A dense network is trained. Before the training and after every epoch, the largest weights of each layer are taken, of every layer"
        " the same share. settled: of the weights that are among the largest in the end, the share that is among them now;"
        " by chance: what a random mask would have of them. Means over the seeds. With o settled at sparsity S, intersection over union is"
        " o / (2 - o), and the normalised Hamming distance 2 (1 - S) (1 - o): all masks have as many active weights.",
        "learning rate: cosine decays to zero, so that nothing can change in the last epochs whatever is learned; constant does not.",
        "90 % after: the first epoch after which at least 90 % are settled.",
    ),
    networks=("lenet_300_100", "digits_convnet"),
    known=("lenet_300_100", "lenet_5", "digits_mlp", "digits_convnet"),
    seeds=3,
    settings={"epochs": 10},
    cases=crossed(learning_rate=("cosine", "constant")),
    measure=measure,
    summary=summary,
    draw=draw,
)
