"""Drawing with matplotlib into SVG text that serves light and dark pages alike.

Figures are drawn in reserved colours that stand for roles (the text, a rule, the first series). In a page each becomes a CSS variable
that has a light and a dark value; on its own, a drawing gets the light values and a white background. The same numbers give the same bytes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import wraps
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, NamedTuple, ParamSpec

from niwaki.report.words import tick

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

P = ParamSpec("P")

WIDTH, HEIGHT = 4.2, 2.8
"""Of a figure, in inches: with text of 9.5 points it can still be read on a phone, scaled to the width of the screen."""


class Colour(NamedTuple):
    """A role: what matplotlib draws it in, and how it looks on a light and on a dark page."""

    drawn: str
    light: str
    dark: str


# Series colours are told apart with each of the common kinds of colour blindness (after Okabe & Ito 2008), darkened on white and
# lightened on black until they have a contrast of 3:1 or more; a marker or a label always says the same as the colour.
COLOURS = {
    "paper": Colour("#fe0100", "#ffffff", "#14171a"),
    "panel": Colour("#fe0101", "#f4f6f7", "#1d2226"),
    "ink": Colour("#fe0102", "#1b1f23", "#e8ebed"),
    "quiet": Colour("#fe0103", "#57606a", "#a3adb6"),
    "rule": Colour("#fe0104", "#d3d8dc", "#3b434a"),
    "first": Colour("#fe0105", "#0067a5", "#6cb8f0"),
    "second": Colour("#fe0106", "#c04a00", "#ff9d5e"),
    "third": Colour("#fe0107", "#007a5a", "#4fd1a5"),
    "fourth": Colour("#fe0108", "#9b3f8c", "#e79bd8"),
    "fifth": Colour("#fe0109", "#7d6200", "#e3c34d"),
    "sixth": Colour("#fe010a", "#4b5a8c", "#a9b6e8"),
}

INK, QUIET, RULE, PAPER = (COLOURS[role].drawn for role in ("ink", "quiet", "rule", "paper"))
SERIES = tuple(COLOURS[role].drawn for role in ("first", "second", "third", "fourth", "fifth", "sixth"))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # 6 colours and 7 markers: 42 series before a pair repeats

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "niwaki",
    "text.parse_math": False,  # names come from files, and may have dollars
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "axes.titlecolor": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": QUIET,
    "axes.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "figure.constrained_layout.use": True,
}


def css() -> str:
    """Return the colours as CSS variables."""
    return ":root { " + " ".join(f"--{role}: light-dark({one.light}, {one.dark});" for role, one in COLOURS.items()) + " }"


def drawn(draw: Callable[P, Figure]) -> Callable[P, str]:
    """Make a function that draws a figure into one that returns its SVG text, in Niwaki's style whatever matplotlib's settings are."""

    @wraps(draw)
    def text(*args: P.args, **kwargs: P.kwargs) -> str:
        from matplotlib import style

        with style.context(["default", _STYLE]):
            figure = draw(*args, **kwargs)
            out = StringIO()
            figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return _tidy(out.getvalue())

    return text


def new(height: float = HEIGHT) -> Figure:
    """Return an empty figure, which no window knows of."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    FigureCanvasSVG(figure)  # it makes itself the figure's canvas
    return figure


def inline(svg: str, words: str) -> str:
    """Return a drawing for a page: with CSS variables for colours, ids that no other drawing has, and what it shows in words."""
    prefix = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = _in_tags(svg, lambda tag: re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{prefix}-", tag))
    for role, one in COLOURS.items():
        svg = svg.replace(one.drawn, f"var(--{role})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(words)}" ', 1)


def standalone(svg: str) -> str:
    """Return a drawing as a file of its own: light colours on white."""
    for one in COLOURS.values():
        svg = svg.replace(one.drawn, one.light)
    background = f'<rect width="100%" height="100%" fill="{COLOURS["paper"].light}"/>'
    return '<?xml version="1.0" encoding="utf-8"?>\n' + re.sub(r"(<svg [^>]*>)", rf"\1\n{background}", svg, count=1)


def _tidy(svg: str) -> str:
    """Leave out what a browser does not need: declarations, comments, metadata, ids that nothing refers to, digits nobody sees."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = _in_tags(svg, lambda tag: re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", tag))
    svg = _in_tags(svg, lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag))
    return re.sub(r"\s*\n\s*", "\n", svg)


def _in_tags(svg: str, change: Callable[[str], str]) -> str:
    """Change tags, and leave the text between them alone."""
    return re.sub("<[^>]*>", lambda match: change(match[0]), svg)


def label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], gap: float = 0.1) -> None:
    """Write the name of each curve beside its end, moved apart where they would overlap.

    Args:
        axes: whose right edge the curves reach; its vertical scale and limits are final.
        ends: for each curve the last value, the text and the colour.
        gap: smallest distance between two texts, as a share of the axes' height.
    """
    (left, _), _ = axes.get_xlim(), axes.get_ylim()  # asking for the limits also settles them
    to_share = axes.transData - axes.transAxes
    order = sorted(range(len(ends)), key=lambda i: ends[i][0])
    places = [float(to_share.transform((left, ends[i][0]))[1]) for i in order]
    for place, i in zip(_apart(places, gap), order, strict=True):
        _, text, colour = ends[i]
        axes.annotate(
            text, (1, place), xycoords="axes fraction", xytext=(5, 0), textcoords="offset points", color=colour, va="center", fontsize=9
        )


def plain_logarithm(axis: Axis) -> None:
    """Let a logarithmic axis say its numbers plainly (0.2, 5, 3 k), at 1, 2 and 5 of each decade where there is room."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: tick(value))


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Move ascending places so that neighbours are ``gap`` apart at least, groups staying around their mean.

    >>> _apart([0.0, 0.5, 0.5], 0.25)
    [0.0, 0.375, 0.625]
    """
    groups: list[tuple[float, int]] = []  # (centre, members)
    for place in places:
        centre, members = place, 1
        while groups and centre - groups[-1][0] < gap * (members + groups[-1][1]) / 2:
            other, count = groups.pop()
            centre, members = (centre * members + other * count) / (members + count), members + count
        groups.append((centre, members))
    return [centre + gap * (i - (members - 1) / 2) for centre, members in groups for i in range(members)]
