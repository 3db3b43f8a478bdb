"""Reads a page as a browser would, without one."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """A page that was read: its tables by id, as rows of (text, exact value or None); all ids, links, headings and tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[tuple[str, str | None]]]] = {}
        self.captions: dict[str, str] = {}
        self.ids: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.tags: list[str] = []
        self.figures: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._table = ""
        self._cell: tuple[str | None] | None = None
        self._words = ""
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        self.links += [str(given[name]) for name in ("href", "src", "xlink:href") if given.get(name)]
        if tag == "svg":
            self.figures.append(str(given.get("aria-label", "")))
        if tag == "table":
            self._table = str(given["id"])
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self._cell, self._words = (given.get("data-value"),), ""
        elif tag in ("caption", "h1", "h2", "h3"):
            self._words = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes something else"
        if tag in ("td", "th"):
            assert self._cell is not None
            self.tables[self._table][-1].append((self._words, self._cell[0]))
        elif tag == "caption":
            self.captions[self._table] = self._words
        elif tag in ("h1", "h2", "h3"):
            self.headings.append(self._words)

    def handle_data(self, data: str) -> None:
        self.text += data
        self._words += data

    def column(self, table: str, header: str) -> list[str]:
        """Return a column of a table as its CSV has it."""
        head, *rows = self.tables[table]
        i = [text for text, _ in head].index(header)
        return [text if value is None else value for text, value in (row[i] for row in rows)]
