"""Recipes as YAML 1.2, both ways, with one-line errors.

In YAML 1.1 ``2:4`` is the number 124, ``1e-4`` a string and ``no`` false; here they are text, a number and text.
"""

from __future__ import annotations

from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, DocumentStartEvent

from niwaki.errors import InputError


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # keeps the order of the vocabulary
    yaml.default_flow_style = None  # innermost collections in one line
    yaml.width = 140
    yaml.allow_unicode = True
    return yaml


def parse(text: str, where: str) -> Any:
    """Return the data of one YAML 1.2 document; ``where`` names it in errors.

    Raises:
        InputError: not valid YAML, a key that stands twice, several documents, aliases, tags that would run code, or YAML 1.1.
    """
    try:
        for event in _yaml().parse(text):
            if isinstance(event, AliasEvent):
                line = event.start_mark.line + 1
                raise InputError(f"{where}, line {line}: aliases (*{event.anchor}) are not supported; write the value out")
            if isinstance(event, DocumentStartEvent) and event.version not in (None, (1, 2)):
                raise InputError(f"{where}: expected YAML 1.2, got %YAML {'.'.join(map(str, event.version))}")
        return _yaml().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}" if mark is not None else ""
        raise InputError(f"{where}{at}: {_first_line(error.problem or str(error))}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: not valid YAML: {_first_line(str(error))}") from None


def write(data: Any) -> str:
    """Return data as YAML 1.2."""
    out = StringIO()
    _yaml().dump(data, out)
    return out.getvalue()


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
