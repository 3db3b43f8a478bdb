"""Power law: how many connections the neurons of a network have after many random rewirings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from niwaki.bench.phenomena import tails
from niwaki.bench.phenomena.experiment import COLOURS, Experiment, Row, Setting, crossed, grouped, panels
from niwaki.masks import Masks
from niwaki.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPARSITY = 0.955
"""Of the two layers: 20 connections for each neuron that they join, as in the paper (epsilon = 20), so about 40 a neuron on each side."""

REMOVED: Mapping[str, str | None] = {"nothing": None, "random": "random", "smallest": "magnitude"}
"""What is removed at an update -> the saliency; as many connections grow at random."""


PLAUSIBLE, SIGNIFICANT = 0.1, 0.05
"""From which share of simulated data on a power law is not ruled out, and up to which p-value another distribution is better."""

SMALLEST_LAYER = 100
"""Neurons that a layer must have for a tail to be fitted."""


def measure(case: Row, setting: Setting) -> dict[str, Any]:
    """Rewire a network while it trains, and fit the tails of its neurons' numbers of connections."""
    model, seed, saliency = setting.build(case["seed"]), case["seed"], REMOVED[case["removed"]]
    shape = {"sparsity": SPARSITY, "allocation": "erdos_renyi"}
    accuracy = None
    if saliency is None:
        masks = setting.prune(model, Recipe(saliency="random", **shape), seed).masks
    else:
        epochs, every = setting.settings["epochs"], setting.settings["every"]
        updates = setting.steps(epochs) // every
        if saliency == "random":  # it looks at no weight, so nothing has to be learned between two updates
            epochs, every = updates // setting.steps(1) + 1, 1
        schedule = {"constant": {"every": f"{every} steps", "end": f"{updates * every} steps"}}
        recipe = Recipe(saliency=saliency, growth="random", schedule=schedule, **shape)
        trained = setting.trained(model, seed, recipe=recipe, epochs=epochs)
        masks = trained.masks
        if saliency != "random":
            accuracy = trained.history[-1].metrics["accuracy"]
    degrees = {name: found for name, found in connections(model, masks).items() if len(found) >= SMALLEST_LAYER}
    return {"accuracy": accuracy, "neurons": {name: described(n, setting.settings["simulated"], seed) for name, n in degrees.items()}}


def connections(model: nn.Module, masks: Masks) -> dict[str, NDArray[np.int64]]:
    """Return how many connections each neuron has: what goes out of the inputs, and what comes into and goes out of each hidden layer.

    >>> model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    >>> import torch
    >>> first, second = torch.tensor([[True, False, True], [False, False, True]]), torch.ones(2, 2, dtype=torch.bool)
    >>> masks = Masks({"0.weight": first, "1.weight": second})
    >>> {name: degrees.tolist() for name, degrees in connections(model, masks).items()}
    {'inputs, out': [1, 0, 2], 'hidden 1, in': [2, 1], 'hidden 1, out': [2, 2], 'hidden 2, in': [2, 2]}
    """
    names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found: dict[str, NDArray[np.int64]] = {}
    for number, name in enumerate(name for name in names if name in masks):
        mask = masks[name]
        found["inputs, out" if number == 0 else f"hidden {number}, out"] = mask.sum(dim=0).numpy()
        found[f"hidden {number + 1}, in"] = mask.sum(dim=1).numpy()
    return found


def described(degrees: NDArray[np.int64], simulated: int, seed: int) -> dict[str, Any]:
    """Return what there is to say of numbers of connections: moments, the best power law, and how others fit its tail."""
    law = tails.fit(degrees)
    return {
        "mean": float(degrees.mean()),
        "dispersion": float(degrees.var() / degrees.mean()),
        "largest": int(degrees.max()),
        "alpha": law.alpha,
        "smallest": law.smallest,
        "tail": law.tail / len(degrees),
        "distance": law.distance,
        "plausibility": tails.plausibility(degrees, law, simulated, seed),
        **{other: list(tails.compare(degrees, law, other)) for other in tails.OTHERS},
        "degrees": " ".join(f"{degree}:{count}" for degree, count in sorted(Counter(degrees.tolist()).items())),
    }


def verdict(rows: Sequence[Row]) -> str:
    """Say of fits to the same neurons whether the tail can be of a power law: by how many seeds it is not ruled out, and not worse.

    >>> verdict([{"plausibility": 0.3, "exponential": [1.5, 0.1], "poisson": [9.0, 0.0]}])
    '1 of 1'
    >>> verdict([{"plausibility": 0.3, "exponential": [-3.0, 0.002], "poisson": [9.0, 0.0]}])
    '0 of 1'
    """
    good = [row for row in rows if row["plausibility"] >= PLAUSIBLE and all(row[o][0] > 0 or row[o][1] > SIGNIFICANT for o in tails.OTHERS)]
    return f"{len(good)} of {len(rows)}"


def summary(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return a line for each network, layer and what is removed."""
    lines = []
    for (network,), own in grouped(rows, "network").items():
        for neurons in own[0]["neurons"]:
            for (removed,), same in grouped(own, "removed").items():
                fits = [row["neurons"][neurons] for row in same]
                mean = {field: fmean(fit[field] for fit in fits) for field in ("dispersion", "alpha", "tail", "plausibility")}
                lines.append(
                    {
                        "network": network,
                        "neurons": neurons,
                        "removed": removed,
                        "variance / mean": f"{mean['dispersion']:.2f}",
                        "largest": f"{max(fit['largest'] for fit in fits)}",
                        "α": f"{mean['alpha']:.1f}",
                        "in the tail": f"{100 * mean['tail']:.0f} %",
                        "from": _range([fit["smallest"] for fit in fits]),
                        "p of the fit": f"{mean['plausibility']:.2f}",
                        **{f"against {other}": f"{fmean(fit[other][0] for fit in fits):+.1f}" for other in tails.OTHERS},
                        "power law": verdict(fits),
                    }
                )
    return lines


def _range(values: Sequence[int]) -> str:
    return "-".join(map(str, sorted({min(values), max(values)})))


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """Draw the share of neurons with at least so many connections, of the first seed: both axes logarithmic, a power law is a line."""
    from matplotlib.ticker import LogLocator

    first = [row for row in rows if row["seed"] == 0 and row["network"] == rows[0]["network"]]
    neurons = list(first[0]["neurons"])
    for axis, name in zip(panels(figure, len(neurons)), neurons, strict=True):
        for colour, row in zip(COLOURS, first, strict=False):
            fit = row["neurons"][name]
            degrees, counts = np.array([pair.split(":") for pair in fit["degrees"].split()], dtype=np.int64).T
            reach = counts[::-1].cumsum()[::-1] / counts.sum()
            axis.plot(degrees[degrees > 0], reach[degrees > 0], ".", color=colour, label=f"removed: {row['removed']}", markersize=4)
            places = np.arange(fit["smallest"], fit["largest"] + 1, dtype=np.float64)
            law = tails.hurwitz(fit["alpha"], places) / tails.hurwitz(fit["alpha"], float(fit["smallest"]))
            axis.plot(places, fit["tail"] * law, color=colour, linewidth=0.9)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylim(0.5 / counts.sum(), 1.5)
        axis.xaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axis.xaxis.set_minor_formatter("{x:.0f}")
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.tick_params(which="minor", labelsize=8)
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_xlabel("connections", fontsize=9)
        axis.set_ylabel("share of neurons with at least as many", fontsize=9)
        axis.legend(fontsize=8, frameon=False)


POWER_LAW = Experiment(
    statement="Power-law topology (survey 6.3; Mocanu et al. 2018): random regrowth with removal of small weights leads to numbers of"
    " connections that are distributed by a power law, with a few hubs.",
    definitions=(
        "A perceptron begins with random connections (Erdős-Rényi, sparsity 0.955, about 40 a neuron on each side; the last layer is"
        " dense). removed: at every update 30 % of the connections, the smallest or random ones, and as many grow at random; or"
        " nothing.",
        "Tails by Clauset, Shalizi and Newman 2009: α: the likeliest exponent. from: where the tail begins, by the smallest distance"
        " (Kolmogorov-Smirnov), with at least 50 neurons in it. p of the fit: share of simulated power laws that fit worse; below 0.1 it is"
        " ruled out. against: how much likelier the power law makes the tail than the likeliest exponential or Poisson distribution of the"
        " same tail, in standard deviations (Vuong 1989); negative where the other one is better.",
        "power law: in how many seeds it is neither ruled out nor significantly worse (5 %) than one of the others. A steep tail of few"
        " neurons is easily taken for one: a power law that means hubs has α of about 2 to 3 over a decade or more.",
        "variance / mean: 1 for Poisson. Everything else is a mean over the seeds; largest is over all of them.",
    ),
    networks=("wide",),
    known=("wide", "lenet_300_100", "digits_mlp"),
    seeds=2,
    settings={"epochs": 12, "every": 50, "simulated": 100},
    cases=crossed(removed=tuple(REMOVED)),
    measure=measure,
    summary=summary,
    draw=draw,
)
