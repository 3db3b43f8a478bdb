"""Random tickets: whether a mask that is found before training matters beyond how many weights it leaves each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from niwaki.bench.phenomena.experiment import (
    COLOURS,
    EVERYTHING,
    Experiment,
    Row,
    Setting,
    crossed,
    difference,
    grouped,
    panels,
    share,
    shuffled,
)
from niwaki.masks import Masks
from niwaki.recipe import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MASKS: Mapping[str, Mapping[str, Any]] = {
    "uniform": {"saliency": "random", "allocation": "uniform"},
    "erk": {"saliency": "random", "allocation": "erdos_renyi_kernel"},
    "snip": {"saliency": "snip", "allocation": "global"},
    "grasp": {"saliency": "grasp", "allocation": "global"},
    "synflow": {"saliency": "synflow", "allocation": "global", "schedule": {"one_shot": {"rounds": 100}}},
    "trained": {"saliency": "magnitude", "allocation": "global"},
}
"""How masks are found, on initial weights; ``trained``: by magnitude, after a dense training."""

SPARSITIES = (0.95, 0.99)

FRESH = 1000
"""Distance between the seed of the weights and that of fresh ones."""


def measure(case: Row, setting: Setting) -> dict[str, Any]:
    """Find a mask; train the initial weights with it, with its shuffled self, and other initial weights with it."""
    seed = case["seed"]
    masks = found(case["mask"], case["sparsity"], seed, setting)
    other = shuffled(masks, seed)
    return {
        "accuracy": {
            "found": setting.accuracy(setting.build(seed), seed, masks=masks),
            "shuffled": setting.accuracy(setting.build(seed), seed, masks=other),
            "fresh": setting.accuracy(setting.build(seed + FRESH), seed, masks=masks),
        },
        "kept": {name: int(mask.sum()) for name, mask in masks.items()},
        "overlap": (masks & other).active / masks.active,
    }


def found(mask: str, sparsity: float, seed: int, setting: Setting) -> Masks:
    """Return the masks that a way of ``MASKS`` finds."""
    model = setting.build(seed)
    if mask == "trained":
        setting.accuracy(model, seed)
    return setting.prune(model, Recipe(sparsity=sparsity, target=EVERYTHING, **MASKS[mask]), seed).masks


def summary(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return a line for each network, sparsity and mask, with the paired differences that shuffling and fresh weights make."""
    lines = []
    for (network, sparsity, mask), own in grouped(rows, "network", "sparsity", "mask").items():
        arms = {arm: [row["accuracy"][arm] for row in own] for arm in ("found", "shuffled", "fresh")}
        lines.append(
            {
                "network": network,
                "sparsity": f"{100 * sparsity:g} %",
                "mask": mask,
                "as found": share(arms["found"]),
                "shuffled": share(arms["shuffled"]),
                "difference, points": difference(arms["shuffled"], arms["found"]),
                "fresh weights": share(arms["fresh"]),
                "difference of these": difference(arms["fresh"], arms["found"]),
            }
        )
    return lines


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """Draw what shuffling changes, seed by seed: a panel for each network and sparsity."""
    cases = grouped(rows, "network", "sparsity")
    for axis, ((network, sparsity), own) in zip(panels(figure, len(cases)), cases.items(), strict=True):
        masks = grouped(own, "mask")
        for place, ((_,), same) in enumerate(masks.items()):
            for shift, arm, colour in ((-0.12, "shuffled", COLOURS[0]), (0.12, "fresh", COLOURS[1])):
                changes = [100 * (row["accuracy"][arm] - row["accuracy"]["found"]) for row in same]
                label = {"shuffled": "shuffled in each layer", "fresh": "fresh initial weights"}[arm] if place == 0 else None
                axis.plot([place + shift] * len(changes), changes, "o", color=colour, alpha=0.6, markersize=4, label=label)
                axis.plot([place + shift - 0.1, place + shift + 0.1], [sum(changes) / len(changes)] * 2, color=colour)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(masks)), [mask for (mask,) in masks], fontsize=8)
        axis.set_ylabel("change of accuracy, points", fontsize=9)
        axis.set_title(f"{network}, {100 * sparsity:g} %", fontsize=10, loc="left")
        axis.legend(fontsize=8, frameon=False)


RANDOM_TICKETS = Experiment(
    statement="Random tickets (survey 3.4; Su et al. 2020, Frankle et al. 2021): of a mask that is found before training only the number of"
    " weights in each layer matters, not which ones they are, nor the values that they were chosen by.",
    definitions=(
        "A mask of all layers is found on initial weights, which are then trained with it. shuffled: the active places of every layer are"
        " drawn anew, as many as before. fresh weights: the mask as found, on other initial weights.",
        "uniform and erk are random masks with equal shares, and with those of Erdős-Rényi-kernel: what shuffling and fresh weights change"
        " there is chance. trained: the largest weights after a dense training, on the initial weights: a mask that no method knows before"
        " training, and what the comparison can see.",
        "Accuracy on the test data in per cent, mean ± half the range over the seeds; differences to the mask as found, seed by seed, ±"
        " half of their 95 % confidence interval (Student).",
    ),
    networks=("lenet_300_100",),
    known=("lenet_300_100", "lenet_5", "digits_mlp", "digits_convnet"),
    seeds=3,
    settings={"epochs": 2, "examples": 512},
    cases=crossed(sparsity=SPARSITIES, mask=tuple(MASKS)),
    measure=measure,
    summary=summary,
    draw=draw,
)
