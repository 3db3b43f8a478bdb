"""The league: what ``niwaki sweep examples/league.yaml`` wrote into sweep.json, as a table, a picture and relations between methods."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from niwaki.catalogue import METHODS
from niwaki.report.drawing import INK, MARKERS, QUIET, RULE, SERIES, drawn, label_ends, new, standalone

FOLDER = Path(__file__).resolve().parent.parent / "results" / "league"
PICTURES = {"fashion_mnist": "league.svg"}
"""What is drawn -> its file in docs/."""

SMALL = "as_many_as_"
"""How the models of small_dense.py begin: the sparsity follows that leaves as many weights."""

FAMILIES = {
    "before training": ("init", "stat"),
    "dropped and grown": ("dyn",),
    "gradually": ("grad", "alt", "rt"),
    "continuously": ("cont",),
    "after training": ("it", "post"),
}
"""What a family is called -> the survey's codes of *when* in the catalogue."""

REWOUND = "rewound"
"""Methods that are no names of the catalogue: the files in examples/league/."""

EXPECTED: tuple[tuple[str, tuple[str, str]], ...] = (
    ("RigL ≥ SET", ("rigl", "set")),
    ("SET ≥ static, Erdős-Rényi", ("set", "static_erk")),
    ("static: Erdős-Rényi ≥ uniform", ("static_erk", "static_uniform")),
    ("late rewinding ≥ random reinitialization", ("rewinding", "random_reinitialization")),
    ("late rewinding ≥ rewinding to the start", ("rewinding", "rewinding_to_the_start")),
    ("large and sparse (GMP) ≥ small and dense", ("gmp", "small dense")),
    ("large and sparse (RigL) ≥ small and dense", ("rigl", "small dense")),
)
"""What the survey and the papers lead one to expect, the better one first."""

Rows = dict[int, dict[str, Any]]
"""Seed -> a run, as sweep.json has it."""


@dataclass(frozen=True)
class League:
    """The runs of a league.

    Attributes:
        cells: method -> sparsity that was asked for (None where the method decides) -> its runs.
        dense: seed -> accuracy of the dense network after the whole training.
        epochs: of the whole training.
    """

    cells: Mapping[str, Mapping[float | None, Rows]]
    dense: Mapping[int, float]
    epochs: float

    @property
    def sparsities(self) -> list[float]:
        """All that were asked for."""
        return sorted({sparsity for found in self.cells.values() for sparsity in found if sparsity is not None})

    def values(self, method: str, sparsity: float | None) -> dict[int, float]:
        """Return seed -> accuracy."""
        return {seed: row["headline"]["sparse"] for seed, row in self.cells.get(method, {}).get(sparsity, {}).items()}

    def means(self, sparsity: float) -> dict[str, float]:
        """Return the mean accuracy of each method over its seeds, the best first."""
        found = {method: fmean(values) for method in self.cells if (values := self.values(method, sparsity).values())}
        return dict(sorted(found.items(), key=lambda one: -one[1]))

    def ranked(self) -> dict[str, list[float]]:
        """Return the methods with the sparsities that they were run at: the best mean over all first, those with fewer of them last."""
        means = {sparsity: self.means(sparsity) for sparsity in self.sparsities}
        asked = {method: [s for s in self.sparsities if method in means[s]] for method in self.cells}
        order = sorted(
            (method for method in asked if asked[method]),
            key=lambda method: (-len(asked[method]), -fmean(means[s][method] for s in asked[method])),
        )
        return {method: asked[method] for method in order}

    def cost(self, method: str, sparsity: float | None) -> float:
        """Return the FLOPs of a method's training as a multiple of those of the whole dense one."""
        largest = max(
            row["found"]["dense_forward_flops"] for found in self.cells.values() for rows in found.values() for row in rows.values()
        )
        found = [row["found"] for row in self.cells[method][sparsity].values()]
        return fmean(one["training_flops"] * one["epochs"] * one["dense_forward_flops"] for one in found) / (self.epochs * largest)


def read(name: str) -> League:
    """Return the league of results/league/NAME.json."""
    rows = [row for row in json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["runs"] if row["status"] == "done"]
    epochs = max(row["point"]["training"]["epochs"] for row in rows)
    cells: dict[str, dict[float | None, Rows]] = {}
    dense: dict[int, float] = {}
    for row in rows:
        point = row["point"]
        method, sparsity, model = Path(point["method"]).stem, point.get("sparsity"), str(point.get("model"))
        if model.startswith(SMALL):
            method, sparsity = "small dense", float(model.removeprefix(SMALL))
        elif point["training"]["epochs"] == epochs:
            dense[point["seed"]] = row["headline"]["dense"]
        cells.setdefault(method, {}).setdefault(sparsity, {})[point["seed"]] = row
    return League(cells, dense, epochs)


def family(method: str) -> str:
    """Return when a method masks, by the first *when* that the catalogue says of it."""
    if method == "small dense":
        return ""
    codes = METHODS[method].columns.when if method in METHODS else ()
    return next((name for name, members in FAMILIES.items() if codes and codes[0] in members), REWOUND)


# -- tables ----------------------------------------------------------------------------------------------------------------------


def table(name: str) -> str:
    """Return a line for each method, the best mean over all sparsities first: accuracies and what its training costs."""
    league = read(name)
    heads = ["", "method", "when", *(f"{100 * s:g} %" for s in league.sparsities), "training FLOPs", "epochs"]
    dense = f"{_spread(league.dense.values())} at 0 %"
    lines = [_line(heads), "|--:|---|---|" + "--:|" * (len(heads) - 3)]
    lines.append(_line(["", "dense", "", dense, *[""] * (len(league.sparsities) - 1), "1.00×", f"{league.epochs:g}"]))
    best = {s: next(iter(league.means(s))) for s in league.sparsities}
    for place, (method, asked) in enumerate(league.ranked().items(), 1):
        cells = [_spread(league.values(method, s).values()) for s in league.sparsities]
        cells = [f"**{cell}**" if best[s] == method else cell for s, cell in zip(league.sparsities, cells, strict=True)]
        cost = _range([f"{league.cost(method, s):.2f}" for s in (asked[0], asked[-1])])
        lines.append(_line([str(place), _named(method), family(method), *cells, f"{cost}×", _epochs(league, method, asked)]))
    seeds = _range(sorted(str(len(rows)) for found in league.cells.values() for rows in found.values()))
    return "\n".join([*lines, "", f"Seeds of a cell: {seeds}."])


def alone(name: str) -> str:
    """Return a line for each method that decides its sparsity: what it reached, and its accuracy beside the dense network of its seed."""
    league = read(name)
    heads = ["method", "sparsity reached", "accuracy", "change", "training FLOPs", "epochs"]
    lines = [_line(heads), "|---|" + "--:|" * (len(heads) - 1)]
    for method in [method for method in league.cells if None in league.cells[method]]:
        values = league.values(method, None)
        reached = _spread(row["found"]["sparsity"] for row in league.cells[method][None].values())
        change = _points([value - league.dense[seed] for seed, value in values.items() if seed in league.dense])
        cost = f"{league.cost(method, None):.2f}×"
        lines.append(_line([_named(method), f"{reached} %", _spread(values.values()), change, cost, _epochs(league, method, [None])]))
    return "\n".join(lines)


def relations(name: str) -> str:
    """Return a line for each expected relation: the difference in points, paired by seed, at each sparsity."""
    league = read(name)
    heads = ["expected", *(f"{100 * s:g} %" for s in league.sparsities)]
    lines = [_line(heads), "|---|" + "--:|" * (len(heads) - 1)]
    for words, (better, worse) in EXPECTED:
        cells = [_points(differences(league, better, worse, s), warn=True) for s in league.sparsities]
        if any(cells):
            lines.append(_line([words, *cells]))
    orders = [list(league.means(s)) for s in league.sparsities]
    lines.append(
        _line(["GMP strong everywhere", *(f"{order.index('gmp') + 1} of {len(order)}" if "gmp" in order else "" for order in orders)])
    )
    return "\n".join(lines)


def differences(league: League, better: str, worse: str, sparsity: float) -> list[float]:
    """Return how much better one method is than another, for each seed that both have."""
    first, second = league.values(better, sparsity), league.values(worse, sparsity)
    return [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _named(method: str) -> str:
    return method if method == "small dense" else f"`{method}`"


def _epochs(league: League, method: str, asked: Sequence[float | None]) -> str:
    return _range([f"{row['found']['epochs']:.3g}" for s in asked for row in league.cells[method][s].values()])


def _range(words: Sequence[str]) -> str:
    return " … ".join(dict.fromkeys([words[0], words[-1]]))


def _spread(values: Iterable[float]) -> str:
    """Return the mean of shares in per cent, with half the range where there are several."""
    found = list(values)
    if not found:
        return ""
    return f"{100 * fmean(found):.2f}" + (f" ± {50 * (max(found) - min(found)):.2f}" if len(found) > 1 else "")


def _points(values: Sequence[float], warn: bool = False) -> str:
    """Return the mean difference and half its range; with ``warn`` in bold where every one of several is below zero."""
    if not values:
        return ""
    words = f"{100 * fmean(values):+.2f}" + (f" ± {50 * (max(values) - min(values)):.2f}" if len(values) > 1 else "")
    return f"**{words}**" if warn and len(values) > 1 and max(values) < 0 else words


# -- the picture -----------------------------------------------------------------------------------------------------------------


def picture(name: str) -> str:
    """Return Occam's hill of every family, as SVG: its methods in colour, all others behind them in grey."""
    league = read(name)
    means = {sparsity: league.means(sparsity) for sparsity in league.sparsities}
    curves = {method: [(s, 100 * means[s][method]) for s in asked] for method, asked in league.ranked().items()}
    groups = {group: [method for method in curves if family(method) == group] for group in (*FAMILIES, REWOUND)}
    shown = {group: members for group, members in groups.items() if members}
    return standalone(_drawn(shown, curves, league.sparsities, 100 * fmean(league.dense.values())))


@drawn
def _drawn(
    groups: Mapping[str, Sequence[str]], curves: Mapping[str, Sequence[tuple[float, float]]], sparsities: Sequence[float], dense: float
) -> Figure:
    figure = new()
    rows = ceil(len(groups) / 2)
    figure.set_size_inches(8.4, 3.3 * rows)
    panels = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False).flatten()
    at = {sparsity: place for place, sparsity in enumerate(sparsities)}  # evenly, as what happens between 0.9 and 0.98 is what counts
    low = max(min(y for points in curves.values() for _, y in points), dense - 12)
    for axes, (group, members) in zip(panels, groups.items(), strict=False):
        ends = [(dense, "dense", INK)]
        axes.axhline(dense, color=INK, linewidth=1.0, linestyle="--", zorder=2)
        for method, points in curves.items():
            places, values = [at[x] for x, _ in points], [y for _, y in points]
            if method in members:
                i = members.index(method)
                colour = SERIES[i % len(SERIES)]
                axes.plot(places, values, color=colour, marker=MARKERS[i % len(MARKERS)], linewidth=1.3, zorder=3)
            elif method == "small dense":
                colour = QUIET
                axes.plot(places, values, color=colour, linewidth=1.4, linestyle=":", zorder=2)
            else:
                axes.plot(places, values, color=RULE, linewidth=0.7, zorder=1)
                continue
            ends.append((max(values[-1], low), method, colour))
        axes.set_ylim(low, dense + 0.5)
        axes.set_xlim(-0.15, len(sparsities) - 0.85)
        axes.set_xticks(range(len(sparsities)), [f"{100 * s:g}" for s in sparsities])
        axes.set_title(f"{group}: accuracy (%)")
        label_ends(axes, ends, gap=0.055)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    figure.supxlabel("sparsity of the targets (%)", fontsize=9.5, color=QUIET)
    return figure
