"""The page: HTML made of strings, self-contained, with tables that can be saved as CSV and a switch between light and dark.

Whatever comes from a file passes through :func:`html.escape`. The page's own policy forbids every script but the one in it, and every
connection: it works from a folder, a mail or a web server alike.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path

from niwaki.metrics.units import NOTHING, show
from niwaki.report import drawing

_HERE = Path(__file__).parent

TOLD = "what it is"
"""A last column of this name explains the row; where the screen is narrow it stands below the row's other cells."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it shows.
        value: what the CSV has instead, where that is not the text: of a number all its digits.
        link: where the text leads.
    """

    text: str
    value: float | str | None = None
    link: str | None = None


Content = Cell | str


def number(value: float | None, unit: str = "number") -> Cell:
    """Return a cell that shows a number with its unit, and keeps all its digits.

    >>> number(1 / 3, "share")
    Cell(text='33.33 %', value=0.3333333333333333, link=None)
    """
    return Cell(show(value, unit), "" if value is None else value)


def count(value: int) -> Cell:
    """Return a cell with a whole number."""
    return Cell(f"{value:,}", value)


def yes(is_so: bool) -> Cell:
    """Return a cell that says yes, or nothing."""
    return Cell("yes" if is_so else "", "yes" if is_so else "no")


def table(
    name: str, caption: str, columns: Sequence[str], rows: Iterable[Sequence[Content]], *, about: str = "", folded: bool = False
) -> str:
    """Return a table whose first column names the rows; an empty string when there are none.

    Args:
        name: letters, digits and hyphens, used once in a page; the CSV file is called so.
        caption: what it shows, in a few words.
        columns: headers, one for each cell of a row.
        rows: cells.
        about: sentences below the caption.
        folded: whether it is hidden until it is asked for.
    """
    body = [list(row) for row in rows]
    if not body:
        return ""
    assert all(len(row) == len(columns) for row in body), f"table {name}: a row has not {len(columns)} cells"
    kinds = [_kind(column, [row[i] for row in body]) for i, column in enumerate(columns)]
    told = f' class=told style="--columns:{len(columns) - 1 - columns.count("unit")}"' if columns[-1] == TOLD else ""
    head = "".join(f"<th scope=col{kind}>{escape(column)}</th>" for column, kind in zip(columns, kinds, strict=True))
    lines = "\n".join("<tr>" + "".join(_cell(cell, i == 0, kinds[i]) for i, cell in enumerate(row)) + "</tr>" for row in body)
    words = f"<small>{escape(about)}</small>" if about else ""
    inner = (
        f'<div class=table role=region tabindex=0 aria-label="{escape(caption)}">'
        f"<table id={name}{told}><caption><span><b>{escape(caption)}</b>{words}</span></caption>"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>"
    )
    return f"<details><summary>{escape(caption)}</summary>{inner}</details>" if folded else inner


def _kind(name: str, cells: Sequence[Content]) -> str:
    """Return the class of a column: numbers stand at the right, sentences need width, units can be left out where there is none."""
    if name == "unit":
        return " class=u"
    if any(isinstance(cell, Cell) and isinstance(cell.value, float | int) for cell in cells):
        return " class=n"
    return " class=w" if any(len(cell.text if isinstance(cell, Cell) else cell) > 30 for cell in cells) else ""


def _cell(cell: Content, first: bool, kind: str) -> str:
    tag, scope = ("th", " scope=row") if first else ("td", "")
    if isinstance(cell, str):
        return f"<{tag}{scope}{kind}>{escape(cell)}</{tag}>"
    value = "" if cell.value is None else f' data-value="{escape(repr(cell.value) if isinstance(cell.value, float) else str(cell.value))}"'
    text = escape(cell.text) if cell.link is None else f'<a href="{escape(cell.link)}">{escape(cell.text)}</a>'
    return f"<{tag}{scope}{kind}{value}>{text}</{tag}>"


def section(title: str, *parts: str, about: str = "") -> str:
    """Return a section with a heading and a sentence about it, or nothing when all its parts are empty."""
    content = "\n".join(part for part in parts if part)
    if not content:
        return ""
    title = title[:1].upper() + title[1:]
    words = f"<p>{escape(about)}</p>" if about else ""
    return f"<section><h2>{escape(title)}</h2>{words}\n{content}</section>"


def group(title: str, *parts: str, about: str = "") -> str:
    """Return a part of a section, with a smaller heading; nothing when all its parts are empty."""
    content = "\n".join(part for part in parts if part)
    words = f"<p>{escape(about)}</p>" if about else ""
    return f"<h3>{escape(title)}</h3>{words}\n{content}" if content else ""


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def sentences(lines: Iterable[str]) -> str:
    """Return a list of plain sentences; nothing when there are none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def code(text: str) -> str:
    """Return text as it stands in a file."""
    return f'<pre tabindex=0 role=region aria-label="text of a file"><code>{escape(text)}</code></pre>'


def headline(items: Iterable[tuple[str, str, str, str]]) -> str:
    """Return big numbers: (name, value, smaller words below it, definition)."""
    boxes = "".join(
        f'<div title="{escape(definition)}"><dt>{escape(name)}</dt><dd><strong>{escape(value)}</strong> {escape(words)}</dd></div>'
        for name, value, words, definition in items
    )
    return f"<dl class=headline>{boxes}</dl>"


@dataclass(frozen=True)
class Picture:
    """A figure: the drawing, its caption, and what it shows in words for those who do not see it."""

    svg: str
    caption: str
    words: str


def pictures(*drawn: Picture | None) -> str:
    """Return figures in a grid that fits the width; None is left out."""
    figures = [
        f"<figure>{drawing.inline(one.svg, one.words)}<figcaption>{escape(one.caption)}</figcaption></figure>"
        for one in drawn
        if one is not None
    ]
    narrow = " narrow" if len(figures) in (3, 5, 6) or len(figures) > 8 else ""  # three in a row on a wide screen, else two
    return f'<div class="figures{narrow}">{"".join(figures)}</div>' if figures else ""


def beside(figures: str, *rest: str) -> str:
    """Return figures with tables beside them, where the width allows it."""
    return f"<div class=beside>{figures}<div>{''.join(rest)}</div></div>" if figures else "".join(rest)


def page(title: str, about: str, *sections: str) -> str:
    """Return the whole document.

    Args:
        title: its name.
        about: one line below the name.
        sections: what :func:`section` made; empty ones are left out.
    """
    shown = [one for one in sections if one]
    found = [re.match(r"<section><h2>(.*?)</h2>", one) for one in shown]
    links = "".join(f'<a href="#section{i}">{match[1]}</a>' for i, match in enumerate(found) if match)
    content = "\n".join(one.replace("<section>", f"<section id=section{i}>", 1) for i, one in enumerate(shown))
    script = _asset("page.js")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; img-src data:"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(title)} · Niwaki</title>
<style>
{drawing.css()}
{_asset("page.css")}</style>
</head>
<body>
<header><h1>{escape(title)}</h1><p>{escape(about)}</p><nav aria-label="Sections">{links}</nav></header>
<main>
{content}
</main>
<footer><p>Made by Niwaki from run.json alone. Where a number has no meaning stands {NOTHING}. CSV files have all digits.</p></footer>
<script>{script}</script>
</body>
</html>
"""


@cache
def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
