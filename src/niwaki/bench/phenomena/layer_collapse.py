"""Layer collapse: at which compression a ranking of all weights at initialization leaves a layer without any."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import nn

from niwaki.bench.phenomena.experiment import COLOURS, EVERYTHING, Experiment, Row, Setting, crossed, grouped, panels, share
from niwaki.calibration import recalibrate_batchnorm
from niwaki.masks import Masks
from niwaki.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS: Mapping[str, Mapping[str, Any]] = {
    "random": {"saliency": "random"},
    "magnitude": {"saliency": "magnitude"},
    "snip": {"saliency": "snip"},
    "grasp": {"saliency": "grasp"},
    "synflow, 1 round": {"saliency": "synflow"},
    "synflow, 100 rounds": {"saliency": "synflow", "schedule": {"one_shot": {"rounds": 100}}},
}
"""Rankings of all weights together, before training."""

BY_GRADIENT = frozenset({"snip", "grasp"})

STEP = 0.5
"""Of the compressions that are tried first: powers of ten this far apart."""

HALVINGS = 5
"""How often the interval in which a layer is emptied first is halved: to a factor of 10^(1/64), 4 %."""

TRAINED = (10, 100, 1000)
"""Compressions at which small networks are trained."""


def measure(case: Row, setting: Setting) -> dict[str, Any]:
    """Find the critical compression of a ranking, and the accuracy of small networks at several compressions."""
    seed = case["seed"]
    model = setting.build(seed)
    if case["method"] in BY_GRADIENT:
        recalibrate_batchnorm(model, setting.seen(seed))  # scores are taken in evaluation mode, and should be those of the training

    def masks(compression: float) -> tuple[Masks, list[str]]:
        recipe = Recipe(sparsity=1 - 1 / compression, allocation="global", target=EVERYTHING, **METHODS[case["method"]])
        done = setting.prune(copy.deepcopy(model), recipe, seed)
        notes = [note for note in done.notes if "would have emptied" in note]
        return done.masks, [note.split(" of ")[1].split(",")[0] for note in notes]

    weights = [module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    largest = sum(weights) / len(weights)
    fine, collapsed = 1.0, math.inf
    emptied: list[str] = []
    while not emptied and fine < largest:
        tried = min(fine * 10**STEP, largest)
        found, emptied = masks(tried)
        fine, collapsed = (fine, tried) if emptied else (found.total / found.active, math.inf)
    for _ in range(HALVINGS if emptied else 0):
        middle = math.sqrt(fine * collapsed)
        found, names = masks(middle)
        fine, collapsed, emptied = (fine, middle, names) if names else (found.total / found.active, collapsed, emptied)
    return {
        "weights": sum(weights),
        "layers": len(weights),
        "largest": largest,
        "critical": fine,
        "emptied": emptied,
        "accuracy": {
            str(compression): setting.accuracy(setting.build(seed), seed, masks=masks(compression)[0])
            for compression in setting.settings["trained"].get(case["network"], ())
            if compression <= largest
        },
    }


def summary(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return a line for each network and method."""
    lines = []
    compressions = list(dict.fromkeys(compression for row in rows for compression in row["accuracy"]))
    for (network, method), own in grouped(rows, "network", "method").items():
        exponents = [math.log10(row["critical"]) for row in own]
        reached = all(row["critical"] == row["largest"] for row in own)
        emptied = list(dict.fromkeys(name.removesuffix(".weight") for row in own for name in row["emptied"]))
        span = "" if reached or len(own) == 1 else f" ({10 ** min(exponents):,.0f} to {10 ** max(exponents):,.0f})"
        lines.append(
            {
                "network": network,
                "ranking": method,
                "largest possible": f"{own[0]['largest']:,.0f}",
                "critical compression": f"{10 ** fmean(exponents):,.0f}{span}",
                "emptied first": ", ".join(emptied) or "none",
                **{f"at {c}": share([row["accuracy"][c] for row in own]) if own[0]["accuracy"] else "" for c in compressions},
            }
        )
    return lines


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """Draw the critical compressions of all networks, and the accuracies of those that were trained."""
    networks = grouped(rows, "network")
    trained = {name: own for (name,), own in networks.items() if own[0]["accuracy"]}
    axes = panels(figure, len(networks) + len(trained))
    for axis, ((network,), own) in zip(axes, networks.items(), strict=False):
        methods = grouped(own, "method")
        for place, ((_,), same) in enumerate(methods.items()):
            values = [row["critical"] for row in same]
            axis.plot(values, [place] * len(values), "o", color=COLOURS[place], alpha=0.7)
        axis.axvline(own[0]["largest"], color="black", linewidth=0.8, linestyle="--")
        axis.set_xscale("log")
        axis.set_yticks(range(len(methods)), [method for (method,) in methods], fontsize=8)
        axis.invert_yaxis()
        axis.set_xlabel("critical compression (dashed: the largest possible)", fontsize=9)
        axis.set_title(network, fontsize=10, loc="left")
    for axis, (network, own) in zip(axes[len(networks) :], trained.items(), strict=True):
        for place, ((method,), same) in enumerate(grouped(own, "method").items()):
            points = [(float(c), [100 * row["accuracy"][c] for row in same]) for c in same[0]["accuracy"]]
            axis.plot([c for c, _ in points], [fmean(v) for _, v in points], marker=".", color=COLOURS[place], label=method)
            axis.fill_between(
                [c for c, _ in points], [min(v) for _, v in points], [max(v) for _, v in points], color=COLOURS[place], alpha=0.12
            )
        axis.set_xscale("log")
        axis.set_xlabel("compression", fontsize=9)
        axis.set_ylabel("accuracy, %", fontsize=9)
        axis.set_title(f"{network}, trained", fontsize=10, loc="left")
        axis.legend(fontsize=7, frameon=False, loc="lower left")


LAYER_COLLAPSE = Experiment(
    statement="Layer collapse (survey 3.4; Tanaka et al. 2020): one ranking of all weights before training empties a layer long before the"
    " network is as small as it could be; SynFlow in many rounds does not.",
    definitions=(
        "compression: weights of all layers / weights that stay; all weights of convolutions and linear layers are ranked together.",
        "critical: the largest compression at which every layer keeps a weight by its rank alone. The allocation keeps one weight of a"
        " layer that it would empty, and says so in a note: a layer is emptied where there is such a note (in any round). Powers of 10^0.5"
        " are tried, then the interval is halved five times. Geometric mean over the seeds, their span in brackets.",
        "largest possible: weights / layers, one weight a layer. emptied first: the layers of the notes at the smallest compression"
        " that has any.",
        "snip and grasp see 256 training images, with batch normalization's statistics estimated on these; synflow sees none.",
        "at C: accuracy on the test data after a short training with the mask at compression C (one weight of an emptied layer stays), in"
        " per cent, mean ± half the range over the seeds.",
    ),
    networks=("lenet_300_100", "lenet_unbiased", "resnet20", "vgg16"),
    known=("lenet_300_100", "lenet_unbiased", "lenet_5", "resnet20", "vgg16", "digits_mlp", "digits_convnet"),
    seeds=2,
    settings={"epochs": 2, "examples": 256, "trained": {"lenet_300_100": list(TRAINED)}},
    cases=crossed(method=tuple(METHODS)),
    measure=measure,
    summary=summary,
    draw=draw,
)
