"""Figures of horizontal bars: layers, formats, times and classes, each bar with its value in words. Bars start at 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from niwaki.metrics.units import scaled, show
from niwaki.report.drawing import INK, PAPER, QUIET, RULE, SERIES, drawn, new
from niwaki.report.words import tick
from niwaki.training.record import Class, Layer, Storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_BARS = 60
"""A figure with more bars cannot be read; the table beside it has all rows."""

DENSE, SPARSE, OWN_FILE, BOUND, LOSS = QUIET, SERIES[0], SERIES[2], SERIES[1], SERIES[1]


@drawn
def active_shares(layers: Sequence[Layer]) -> Figure:
    """Draw the active share of each layer."""
    return _bars(
        [layer.name for layer in layers],
        [100 * layer.active / layer.elements if layer.elements else 0.0 for layer in layers],
        [f"{100 * layer.active / layer.elements:.3g} %" if layer.elements else "" for layer in layers],
        "Active weights of the layer (%)",
    )


@drawn
def layer_sizes(layers: Sequence[Layer]) -> Figure:
    """Draw the weights of each layer, the active ones blue."""
    return _bars(
        [layer.name for layer in layers],
        [layer.active for layer in layers],
        [f"{scaled(layer.active).rstrip()} of {scaled(layer.elements).rstrip()}" for layer in layers],
        "Weights: active (blue) of all (grey)",
        behind=[layer.elements for layer in layers],
    )


@drawn
def layer_flops(layers: Sequence[Layer]) -> Figure:
    """Draw the forward FLOPs of each layer, the sparse ones blue."""
    return _bars(
        [layer.name for layer in layers],
        [layer.sparse_flops for layer in layers],
        [f"{scaled(layer.sparse_flops).rstrip()} of {scaled(layer.dense_flops).rstrip()}" for layer in layers],
        "FLOPs: sparse (blue) of dense (grey)",
        behind=[layer.dense_flops for layer in layers],
    )


@drawn
def storage_sizes(storage: Sequence[Storage], bound: Storage | None, file_bytes: int) -> Figure:
    """Draw what each format needs: values pale, positions strong; a line at the entropy bound, and the run's own file."""
    rows = sorted(storage, key=lambda row: row.bits)
    names = [row.format for row in rows]
    total = [row.bits / 8 for row in rows]
    values = [(row.bits - row.position_bits) / 8 for row in rows]
    file_at = next((i for i, size in enumerate(total) if size > file_bytes), len(rows))
    names.insert(file_at, "this file")
    total.insert(file_at, float(file_bytes))
    values.insert(file_at, float(file_bytes))
    figure = _bars(names, total, [scaled(size) + "B" for size in total], "Bytes: values (pale) and positions (strong)", pale=values)
    axes = figure.axes[0]
    axes.patches[file_at].set_facecolor(OWN_FILE)
    axes.patches[len(names) + file_at].set_alpha(0)
    axes.xaxis.set_major_formatter(lambda value, _: tick(value) + ("B" if value >= 1000 else ""))
    if bound is not None:
        axes.axvline(bound.bits / 8, color=BOUND, linewidth=1.2, linestyle="--")
        axes.set_xlabel(f"dashed line: entropy bound, {scaled(bound.bits / 8)}B", color=BOUND)
    return figure


@drawn
def times(rows: Sequence[tuple[str, float | None, float | None]], unit: str) -> Figure:
    """Draw (name, dense, sparse) times as pairs of bars."""
    flat = [(f"{name}, {which}", value, which) for name, *both in rows for which, value in zip(("dense", "sparse"), both, strict=True)]
    known = [(name, value, which) for name, value, which in flat if value is not None]
    figure = _bars([n for n, _, _ in known], [v for _, v, _ in known], [show(v, unit) for _, v, _ in known], unit.capitalize(), longest=32)
    for patch, (_, _, which) in zip(figure.axes[0].patches, known, strict=True):
        patch.set_facecolor(DENSE if which == "dense" else SPARSE)
    return figure


@drawn
def recall_changes(classes: Sequence[Class], overall: float) -> Figure:
    """Draw the change of recall of each class, and a line at the change of the accuracy over all classes."""
    changes = [100 * (one.sparse_recall - one.dense_recall) for one in classes]
    figure = _bars(
        [one.name for one in classes], changes, [f"{value:+.1f}" if value else "0" for value in changes], "Change of recall (points)"
    )
    axes = figure.axes[0]
    for patch, value in zip(axes.patches, changes, strict=True):
        patch.set_facecolor(LOSS if value < 0 else SPARSE)
    axes.axvline(0, color=QUIET, linewidth=0.8)
    axes.axvline(100 * overall, color=INK, linewidth=1.0, linestyle=":")
    axes.set_xlabel(f"dotted line: all classes together, {100 * overall:+.1f} points")
    return figure


def _bars(
    names: Sequence[str],
    values: Sequence[float],
    words: Sequence[str],
    title: str,
    *,
    behind: Sequence[float] | None = None,
    pale: Sequence[float] | None = None,
    longest: int = 22,
) -> Figure:
    """Draw horizontal bars, the first on top; ``behind`` in grey behind them, ``pale`` over their left part."""
    from matplotlib.ticker import MaxNLocator

    figure = new(height=max(1.3, 0.75 + 0.24 * len(names)))
    axes = figure.subplots()
    places = range(len(names))
    if behind is not None:
        axes.barh(places, behind, height=0.7, color=RULE)
    axes.barh(places, values, height=0.7, color=SPARSE)
    if pale is not None:
        axes.barh(places, pale, height=0.7, color=PAPER, alpha=0.55)
    reach = [max(value, other) for value, other in zip(values, behind or values, strict=True)]
    low, high = min(0.0, *reach), max(0.0, *reach)
    span = (high - low) or 1.0
    axes.set_xlim(
        low - 0.18 * span if low < 0 else 0, high if high > low else 1
    )  # room for words left of a bar; the layout makes it at the right
    for place, value, text in zip(places, reach, words, strict=True):
        side = -1 if value < 0 else 1
        axes.annotate(
            text,
            (value, place),
            xytext=(3 * side, 0),
            textcoords="offset points",
            va="center",
            ha="right" if side < 0 else "left",
            fontsize=9,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.8},
        )
    axes.set_yticks(places, [_short(name, longest) for name in names], color=INK, fontsize=9)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: tick(value))
    figure.suptitle(title, x=0.01, ha="left", fontsize=9.5)  # from the figure's edge: long names would push it out at the right
    return figure


def _short(name: str, longest: int) -> str:
    """Return a name without its middle when it is long.

    >>> _short("encoder.layers.11.attention.query.weight", 22)
    'encoder.la…uery.weight'
    """
    half = longest // 2
    return name if len(name) <= longest else f"{name[: half - 1]}…{name[len(name) - half + (longest + 1) % 2 - 1 :]}"
