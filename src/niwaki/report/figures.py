"""Figures of curves and points: each function takes numbers and returns SVG text (see :mod:`niwaki.report.drawing`).

The unit stands above the axis that it belongs to, at the left, where a phone shows it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, sqrt
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from niwaki.metrics.efficiency import Regions
from niwaki.report.drawing import INK, MARKERS, PAPER, QUIET, SERIES, WIDTH, drawn, label_ends, new, plain_logarithm
from niwaki.report.words import tick
from niwaki.training.record import Epoch, Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPARSE, PRUNED, GROWN = SERIES[0], SERIES[1], SERIES[2]
NEAR = 0.05
"""A trade-off shows what is within 5 points of the dense accuracy, and says how many are below."""

FEW = 30
"""Up to so many points a curve marks each of them."""


@drawn
def over_time(
    dense: Sequence[Epoch], sparse: Sequence[Epoch], metric: str, unit: str, stages: Sequence[Stage], epochs_per_step: float
) -> Figure:
    """Draw a metric of the dense and the sparse training, and below it the sparsity; dotted lines part the stages."""
    figure = new(height=3.7)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
    ends = []
    for epochs, name, colour, line in ((dense, "dense", INK, "--"), (sparse, "sparse", SPARSE, "-")):
        if epochs:
            values = [_scale(unit) * epoch.metrics[metric] for epoch in epochs]
            _curve(above, epochs, values, epochs_per_step, color=colour, linestyle=line)
            ends.append((values[-1], name, colour))
    label_ends(above, ends)
    above.set_title(_titled(metric, unit))
    _curve(below, sparse, [100 * epoch.sparsity for epoch in sparse], epochs_per_step, color=SPARSE)
    below.set_ylim(0, 104)
    below.set_yticks([0, 50, 100])
    below.set_title("Sparsity of the targets (%)")
    _epochs_below(below)
    _part_stages((above, below), stages, epochs_per_step)
    return figure


@drawn
def losses(dense: Sequence[Epoch], sparse: Sequence[Epoch], stages: Sequence[Stage], epochs_per_step: float) -> Figure:
    """Draw the training loss of both trainings, on a logarithmic axis."""
    figure = new()
    axes = figure.subplots()
    ends = []
    for epochs, name, colour, line in ((dense, "dense", INK, "--"), (sparse, "sparse", SPARSE, "-")):
        if epochs:
            values = [epoch.train_loss for epoch in epochs]
            _curve(axes, epochs, values, epochs_per_step, color=colour, linestyle=line)
            ends.append((values[-1], name, colour))
    if all(epoch.train_loss > 0 for epoch in (*dense, *sparse)):
        axes.set_yscale("log")
        plain_logarithm(axes.yaxis)
    label_ends(axes, ends)
    axes.set_title("Training loss")
    _epochs_below(axes)
    _part_stages((axes,), stages, epochs_per_step)
    return figure


@drawn
def movement(epochs: Sequence[Epoch], stages: Sequence[Stage], epochs_per_step: float) -> Figure:
    """Draw the weights that were grown (up) and pruned (down) in each epoch."""
    figure = new()
    axes = figure.subplots()
    known = [(epoch.step * epochs_per_step, epoch.dynamics) for epoch in epochs if epoch.dynamics is not None]
    at = [x for x, _ in known]
    width = 0.8 * min((b - a for a, b in pairwise(at) if b > a), default=1.0)
    axes.bar(at, [d.grown for _, d in known], width, color=GROWN)
    axes.bar(at, [-d.pruned for _, d in known], width, color=PRUNED)
    axes.axhline(0, color=QUIET, linewidth=0.8)
    low, high = min(-d.pruned for _, d in known), max(d.grown for _, d in known)
    room = 0.15 * max(high - low, 1)
    axes.set_ylim(low - room if low < 0 else 0, high + room)
    axes.text(0.99, 0.99, "grown ▲", color=GROWN, ha="right", va="top", transform=axes.transAxes, fontsize=9)
    axes.text(0.99, 0.02, "pruned ▼", color=PRUNED, ha="right", va="bottom", transform=axes.transAxes, fontsize=9)
    axes.yaxis.set_major_formatter(lambda value, _: tick(abs(value)))
    axes.set_title("Weights since the epoch before")
    _epochs_below(axes)
    _part_stages((axes,), stages, epochs_per_step)
    return figure


@drawn
def stability(epochs: Sequence[Epoch], stages: Sequence[Stage], epochs_per_step: float) -> Figure:
    """Draw how much of the mask stays from epoch to epoch, and the share of weights that was ever active."""
    figure = new()
    axes = figure.subplots()
    known = [epoch for epoch in epochs if epoch.dynamics is not None]
    overlap = [100 * epoch.dynamics.overlap for epoch in known if epoch.dynamics]
    ever = [100 * epoch.dynamics.ever_active for epoch in known if epoch.dynamics]
    active = [100 * (1 - epoch.sparsity) for epoch in known]
    axes.set_ylim(0, 104)
    for values, colour, line in ((overlap, SERIES[3], "-"), (ever, SERIES[0], "-"), (active, INK, ":")):
        _curve(axes, known, values, epochs_per_step, color=colour, linestyle=line)
    label_ends(axes, [(overlap[-1], "overlap", SERIES[3]), (ever[-1], "ever active", SERIES[0]), (active[-1], "active", INK)])
    axes.set_title("Share (%)")
    _epochs_below(axes)
    _part_stages((axes,), stages, epochs_per_step)
    return figure


@dataclass(frozen=True)
class Curve:
    """A metric over sparsity: for each sparsity its values, one for each seed."""

    name: str
    points: Mapping[float, Sequence[float]]


@drawn
def occams_hill(
    curves: Sequence[Curve], dense: Sequence[float], *, metric: str = "accuracy", unit: str = "share", regions: Regions | None = None
) -> Figure:
    """Draw a metric against sparsity: means over seeds with ± one standard error, and the dense mean as a dashed line.

    Every seed is a dot beside the mean. The horizontal axis is logarithmic in the active share, so that 90, 99 and 99.9 % are equally far
    apart. Where the curves fall far below the dense mean, a panel of its own shows what happens near it.

    Args:
        curves: one for each method.
        dense: the metric of the dense models, one for each seed.
        metric: its name.
        unit: ``share`` for per cent.
        regions: of the one curve there is, to be shaded.

    Source: Hoefler et al. 2021, figure 4; the name is from Rasmussen & Ghahramani 2001.
    """
    scale, centre = _scale(unit), _scale(unit) * fmean(dense)
    everything = [scale * value for curve in curves for values in curve.points.values() for value in values]
    near = 3 * max(0.01 * scale, scale * _standard_error(dense), max(everything) - centre)
    zoomed = unit == "share" and min(everything) < centre - 2 * near
    figure = new(height=(4.6 if zoomed else 3.0) + _room([curve.name for curve in curves]))
    panels = figure.subplots(2 if zoomed else 1, 1, sharex=True, squeeze=False)[:, 0]
    for axes in panels:
        axes.set_xscale("function", functions=(_to_activity, _from_activity))
        for i, curve in enumerate(curves):
            _draw_curve(axes, curve, scale, SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)])
        axes.axhline(centre, color=INK, linewidth=1.0, linestyle="--")
        axes.set_title(_titled(metric, unit) + (", near the dense mean" if zoomed and axes is panels[0] else ""))
    _sparsity_axis(panels[-1], [x for curve in curves for x in curve.points])
    if zoomed:
        panels[0].set_ylim(centre - near, max(*everything, centre) + near / 4)
    for axes in panels:
        label_ends(axes, [(centre, "dense", INK)])
        if regions is not None:
            _shade(axes, regions, named=axes is panels[0])
    if len(curves) > 1:
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower left", ncols=_columns(names))
    return figure


@dataclass(frozen=True)
class Point:
    """One point between two aims: a cost (less is better) and a metric (``spread`` is its standard deviation over seeds)."""

    series: str
    cost: float
    metric: float
    spread: float
    on_front: bool


@drawn
def trade_off(points: Sequence[Point], dense: Point, cost: str, metric: str, unit: str) -> Figure:
    """Draw a metric against a cost, on a logarithmic axis: filled marks are on the Pareto front, hollow ones are not."""
    from matplotlib.lines import Line2D

    scale = _scale(unit)
    looks = {
        name: (SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(dict.fromkeys(one.series for one in points))
    }
    looks["dense"] = (INK, "*")
    figure = new(height=3.0 + _room(list(looks)))
    axes = figure.subplots()
    front = sorted((one.cost, scale * one.metric) for one in (*points, dense) if one.on_front)
    axes.plot([x for x, _ in front], [y for _, y in front], color=QUIET, linewidth=1.0, linestyle="--", zorder=1)
    for one, name in [*((one, one.series) for one in points), (dense, "dense")]:
        colour, marker = looks[name]
        axes.errorbar(
            one.cost, scale * one.metric, scale * one.spread, color=colour, marker=marker, linestyle="", elinewidth=0.8, capsize=2,
            markerfacecolor=colour if one.on_front else PAPER, markersize=8 if one is dense else 5.5, zorder=2,
        )  # fmt: skip
    below = [one for one in points if one.metric < dense.metric - NEAR] if unit == "share" else []
    if below:
        least = scale * (dense.metric - NEAR)
        axes.set_ylim(bottom=least)
        axes.text(0.99, 0.02, f"▼ {len(below)} below {least:.3g} %", transform=axes.transAxes, ha="right", fontsize=9)
    axes.set_xscale("log")
    plain_logarithm(axes.xaxis)
    axes.set_title(_titled(metric, unit))
    axes.set_xlabel(cost)
    marks = [Line2D([], [], color=colour, marker=marker, linestyle="", markersize=6) for colour, marker in looks.values()]
    figure.legend(marks, list(looks), loc="outside lower left", ncols=_columns(list(looks)))
    return figure


def _draw_curve(axes: Axes, curve: Curve, scale: float, colour: str, marker: str) -> None:
    from matplotlib.transforms import ScaledTranslation

    at = sorted(curve.points)
    means = [scale * fmean(curve.points[x]) for x in at]
    errors = [scale * _standard_error(curve.points[x]) for x in at]
    seeds = [(x, scale * value) for x in at for value in curve.points[x] if len(curve.points[x]) > 1]
    beside = axes.transData + ScaledTranslation(4 / 72, 0, axes.figure.dpi_scale_trans)  # 4 points to the right
    axes.plot([x for x, _ in seeds], [y for _, y in seeds], ".", color=colour, alpha=0.8, markersize=6, transform=beside)
    if seeds:
        axes.update_datalim(seeds)  # matplotlib looks at no points that were moved
        axes.autoscale_view()
    axes.errorbar(at, means, errors, color=colour, marker=marker, capsize=2, elinewidth=1.0, label=curve.name)


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0


def _to_activity(sparsity: Any) -> Any:
    import numpy as np

    return -np.log10(np.maximum(1 - np.asarray(sparsity, dtype=float), 1e-5))


def _from_activity(place: Any) -> Any:
    import numpy as np

    return 1 - 10.0 ** -np.asarray(place, dtype=float)


def _sparsity_axis(axes: Axes, sparsities: Sequence[float]) -> None:
    """Put ticks at the least and the largest of the measured sparsities, and at those between that leave room for their labels."""
    low, high = _to_activity(min(sparsities)), _to_activity(max(sparsities))
    margin = 0.06 * max(float(high - low), 0.1)
    axes.set_xlim(_from_activity(low - margin), _from_activity(high + margin))
    shown: list[float] = []
    for mark in (min(sparsities), max(sparsities), *sorted(sparsities)):
        if all(abs(float(_to_activity(mark) - _to_activity(other))) > 0.1 * float(high - low) for other in shown):
            shown.append(mark)
    axes.set_xticks(shown, [f"{100 * mark:.4g}" for mark in shown])
    axes.minorticks_off()
    axes.set_xlabel("sparsity of the targets (%)")


def _shade(axes: Axes, regions: Regions, named: bool) -> None:
    """Shade the three regions, as far as they can be seen."""
    left, right = axes.get_xlim()
    begin_c = right if regions.c_begins is None else regions.c_begins
    end_a = begin_c if regions.a_ends is None else regions.a_ends
    for letter, begin, end, colour in (("A", left, end_a, GROWN), ("B", end_a, begin_c, SERIES[4]), ("C", begin_c, right, PRUNED)):
        begin, end = max(begin, left), min(end, right)
        if end > begin:
            axes.axvspan(begin, end, color=colour, alpha=0.13, linewidth=0, zorder=0)
            if named:
                axes.annotate(letter, (begin, 1), xycoords=("data", "axes fraction"), xytext=(4, -3), textcoords="offset points",
                              va="top", color=colour, fontweight="bold")  # fmt: skip


def _columns(names: Sequence[str]) -> int:
    """Return how many columns of a legend fit into the width of a figure."""
    return max(1, int(WIDTH * 72 / (5.5 * max(map(len, names)) + 40)))


def _room(names: Sequence[str]) -> float:
    """Return how many inches a legend needs beyond the few rows that every figure has room for."""
    return 0.17 * max(0, ceil(len(names) / _columns(names)) - 3) if names else 0.0


def _titled(metric: str, unit: str) -> str:
    return metric.capitalize() + (" (%)" if unit == "share" else "")


def _scale(unit: str) -> float:
    return 100.0 if unit == "share" else 1.0


def _curve(
    axes: Axes, epochs: Sequence[Epoch], values: Sequence[float], epochs_per_step: float, *, color: str, linestyle: str = "-"
) -> None:
    marker = "o" if len(epochs) <= FEW else ""
    axes.plot([epoch.step * epochs_per_step for epoch in epochs], values, marker=marker, markersize=3, color=color, linestyle=linestyle)


def _epochs_below(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epochs")
    first, last = axes.get_xlim()
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=last - first > 2, steps=[1, 2, 5, 10]))


def _part_stages(panels: Sequence[Axes], stages: Sequence[Stage], epochs_per_step: float) -> None:
    begins = [(stage.number, stage.begin * epochs_per_step) for stage in stages if stage.end > stage.begin]
    first, last = panels[0].get_xlim()
    for axes in panels:
        for _, begin in begins[1:]:
            axes.axvline(begin, color=QUIET, linewidth=0.8, linestyle=":")
        axes.set_xlim(first, last)
    if 1 < len(begins) <= 12:
        for number, begin in begins:
            panels[0].annotate(
                str(number), (max(begin, first), 1), xycoords=("data", "axes fraction"), xytext=(3, -1), textcoords="offset points",
                color=QUIET, fontsize=8, va="top",
            )  # fmt: skip
