"""Curves of a measurement: accuracy over sparsity, a panel for each network and moment, a line for each method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

Curves = Mapping[str, Mapping[str, Mapping[float, list[float]]]]
"""Network -> method -> sparsity -> values."""

FAMILIES = {"nothing": "#8a8a8a", "weights": "#1f6fb4", "gradients": "#d1780f", "curvature": "#b3263a", "outputs": "#2e8540"}
"""What a method looks at -> its colour."""

STYLES = ("-", "--", "-.", ":", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
"""Lines of the methods of a family, in their order."""


def draw(moments: Mapping[str, Curves], families: Mapping[str, str], path: Path) -> None:
    """Write the figure to a file whose name says the format (SVG, PNG, PDF).

    Args:
        moments: what the values are (such as ``cut``) -> curves; those without values are left out. The method ``dense`` is a level.
        families: method -> what it looks at.
        path: of the file; it is replaced when the figure is complete.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    moments = {name: found for name, found in moments.items() if found}
    networks = sorted({network for found in moments.values() for network in found})
    figure = Figure(figsize=(1.5 + 4.4 * max(len(networks), 1), 3.4 * max(len(moments), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(max(len(moments), 1), max(len(networks), 1), squeeze=False)
    handles: dict[str, Artist] = {}
    for row, (moment, found) in zip(panels, moments.items(), strict=True):
        for panel, network in zip(row, networks, strict=True):
            if network not in found:
                panel.set_visible(False)
                continue
            handles |= _panel(panel, found[network], families)
            panel.set_title(f"{network}: {moment}", fontsize=10, loc="left")
    order = [name for name in ("dense", *families) if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside right upper", fontsize=8, frameon=False)
    temporary = path.with_name(f"{path.stem}.partial{path.suffix}")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)


def _panel(panel: Axes, methods: Mapping[str, Mapping[float, list[float]]], families: Mapping[str, str]) -> dict[str, Artist]:
    """Draw the curves of one network; return a handle for each method."""
    handles: dict[str, Artist] = {}
    sparsities = sorted({s for name, values in methods.items() if name != "dense" for s in values})
    at = {s: i for i, s in enumerate(sparsities)}  # evenly, as what happens between 0.9 and 0.98 is what counts
    for name, values in methods.items():
        if name == "dense":
            handles[name] = panel.axhline(100 * values[0.0][0], color="black", linewidth=0.8, label=name)
            continue
        family = families[name]
        style = STYLES[[other for other in families if families[other] == family].index(name) % len(STYLES)]
        points = sorted(values.items())
        means = [100 * fmean(v) for _, v in points]
        places = [at[s] for s, _ in points]
        [handles[name]] = panel.plot(places, means, color=FAMILIES[family], linestyle=style, marker=".", linewidth=1.3, label=name)
        panel.fill_between(
            places, [100 * min(v) for _, v in points], [100 * max(v) for _, v in points], color=FAMILIES[family], alpha=0.12, linewidth=0
        )
    panel.set_xticks(range(len(sparsities)), [f"{s:g}" for s in sparsities])
    panel.set_xlabel("sparsity", fontsize=9)
    panel.set_ylabel("accuracy, %", fontsize=9)
    panel.grid(axis="y", linewidth=0.3)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    return handles
