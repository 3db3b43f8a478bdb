"""Frozen records that refuse what they do not know, with errors of one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from niwaki.errors import InputError, did_you_mean

_STARTS_WITH_FIELD = re.compile(r"[a-z_]+(\[\d+\]|\.\w+)*: ")


class Strict(BaseModel):
    """A frozen record. Anything that is wrong is an InputError whose line starts with the path of the field."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise InputError(_one_line(error, type(self))) from None


def _one_line(error: ValidationError, cls: type[BaseModel]) -> str:
    """Say the first problem in one line that starts with the field's path."""
    problem = error.errors(include_url=False)[0]
    path = list(problem["loc"])
    if problem["type"] == "extra_forbidden":
        names = [field.alias or name for name, field in cls.model_fields.items()]
        return f"unknown field {str(path[-1])!r}; {did_you_mean(str(path[-1]), names)}"
    if problem["type"] == "missing":
        return f"{_dotted(path)}: this field is required"
    cause = problem.get("ctx", {}).get("error")
    if not isinstance(cause, InputError):
        return f"{_dotted(path)}: {problem['msg']}, got {problem['input']!r:.80}"
    message = str(cause)
    if path and re.match(rf"{re.escape(str(path[-1]))}\b", message):  # it names its field itself
        path.pop()
    if not path:
        return message
    return f"{_dotted(path)}{'.' if _STARTS_WITH_FIELD.match(message) else ': '}{message}"


def _dotted(path: Sequence[int | str]) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
