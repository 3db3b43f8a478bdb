"""Results of a long measurement: rows in a JSON file that grows by one at a time, so that an interrupted measurement goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from niwaki.errors import InputError


class Results:
    """The rows of a file, each told by the values of its key.

    Args:
        path: JSON; a new file is made with the first row.
        settings: what all rows share. A file of other settings is refused.
        definitions: what the numbers mean.
        key: fields that tell rows apart.

    Raises:
        InputError: the file holds something else, or results of other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], definitions: Sequence[str], key: Sequence[str]) -> None:
        self.path, self.settings, self.definitions, self.key = path, dict(settings), list(definitions), tuple(key)
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            found = stored(path)
            if found["settings"] != self.settings:
                raise InputError(f"--out: {path} holds results of other settings ({found['settings']}); choose another file, or the same")
            self.rows = found["rows"]

    def find(self, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the row with this key, or None when it is not measured yet; one that failed counts as not measured."""
        return next((row for row in self.rows if "error" not in row and all(row[name] == wanted[name] for name in self.key)), None)

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in a row in place of one with the same key, and write the file: all of it or nothing."""
        self.rows = [other for other in self.rows if any(other[name] != row[name] for name in self.key)]
        self.rows.append(dict(row))
        content = {
            "settings": self.settings,
            "definitions": self.definitions,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "rows": self.rows,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def stored(path: Path) -> dict[str, Any]:
    """Return what a file of results holds: ``settings``, ``definitions`` and ``rows``.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--out: {path} cannot be read: {error}") from None
    if not isinstance(content, dict) or not {"rows", "settings"} <= content.keys():
        raise InputError(f"--out: {path} holds something else than results of this benchmark; choose another file")
    return content
