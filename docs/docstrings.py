"""Shows docstrings in the reference as people read them in the code: examples as code, and references as names."""

import re
from typing import Any

from griffe import Extension, Object

EXAMPLE = re.compile(r"(?:^[ \t]*>>> .*(?:\n[ \t]*\S.*)*\n?)+", re.MULTILINE)
REFERENCE = re.compile(r":(?:class|func|meth|mod|attr):`~?([\w.]+)`")


class Docstrings(Extension):
    """Fences the examples of every docstring, and turns Sphinx references into code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite one docstring; griffe calls it for each object."""
        if obj.docstring is not None:
            text = REFERENCE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)
