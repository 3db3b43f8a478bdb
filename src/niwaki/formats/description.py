"""The description in a container file: how each tensor is stored, as one JSON string.

It is text with a check sum of its own at the end, so that a damaged description is told from a wrong one. docs/format.md specifies it.
"""

from __future__ import annotations

import json
import re
import zlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from niwaki.errors import InputError
from niwaki.formats.files import DTYPES, check_shape, raw_bytes, unique_json
from niwaki.masks import canonical_name
from niwaki.removed import Removed

VERSION = 1
MARK = '{"format":"niwaki",'
"""How every description begins: tells one that stands under a damaged name."""

SEPARATOR = "::"
"""Between a tensor's name and a part's; no tensor's own name has it."""

PARTS = {"dense": ("values",), "bitmap": ("positions", "values")}
"""Encoding -> the parts that it stores, each a plain tensor of the file."""


def component(name: str, encoding: str, part: str) -> str:
    """Return the name in the file of one part of a tensor; a dense tensor stands under its own name."""
    return name if encoding == "dense" else f"{name}{SEPARATOR}{part}"


class Entry(BaseModel):
    """How one tensor is stored."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    encoding: str
    dtype: str
    shape: list[int]
    masked: bool
    crc32: dict[str, int]


class Description(BaseModel):
    """How all tensors of a file are stored. ``tied`` maps further names of a tensor to the name that it is stored under.

    ``removed`` is what was taken out of the model; a file of a whole model does not have the field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["niwaki"] = "niwaki"
    version: Literal[1] = 1
    tensors: dict[str, Entry]
    tied: dict[str, str]
    removed: Removed = Field(default_factory=Removed)

    def to_text(self) -> str:
        """Return the compact JSON whose last field, ``crc32``, is the CRC-32 of all text before its comma."""
        data = self.model_dump(exclude=None if self.removed else {"removed"})
        body = json.dumps(data, ensure_ascii=False, separators=(",", ":"))[:-1]
        return f'{body},"crc32":{zlib.crc32(body.encode())}}}'

    @classmethod
    def from_text(cls, text: str, path: object) -> Description:
        """Read and check a description; ``path`` is named in errors.

        Raises:
            InputError: not what version 1 allows, or damaged.
        """
        try:
            data: Any = unique_json(text)
        except ValueError as error:
            raise InputError(f"{path}: the niwaki description is not valid JSON: {' '.join(str(error).split())}") from None
        if not isinstance(data, dict) or data.get("format") != "niwaki":
            raise InputError(f"{path}: the niwaki description is not a JSON object with format 'niwaki'")
        version = data.get("version")
        if type(version) is not int or version != VERSION:
            raise InputError(f"{path}: the file has version {version!r} of the format, this Niwaki reads version {VERSION}")
        match = re.fullmatch(r'(.*),"crc32":([0-9]+)\}', text, re.DOTALL)
        if match is None or zlib.crc32(match[1].encode()) != int(match[2]):
            raise InputError(f"{path}: the niwaki description is damaged: its check sum does not fit")
        del data["crc32"]
        try:
            description = cls.model_validate(data)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = " ".join(repr(part) for part in problem["loc"])
            raise InputError(f"{path}: the niwaki description is wrong at {where}: {problem['msg']}") from None
        description._check(path)
        return description

    def _check(self, path: object) -> None:
        for name, entry in self.tensors.items():
            where = f"{path}: {name!r}"
            check_name(name, path)
            if entry.encoding not in PARTS:
                raise InputError(f"{where}: unknown encoding {entry.encoding!r}; known are {', '.join(PARTS)}")
            if entry.dtype not in DTYPES:
                raise InputError(f"{where}: unknown data type {entry.dtype!r}; known are {', '.join(DTYPES)}")
            if entry.masked and entry.encoding == "dense":
                raise InputError(f"{where}: a masked tensor needs an encoding with positions, not 'dense'")
            if set(entry.crc32) != set(PARTS[entry.encoding]):
                raise InputError(f"{where}: check sums of {sorted(entry.crc32)}, expected {sorted(PARTS[entry.encoding])}")
            check_shape(entry.shape, where)
        for alias, name in self.tied.items():
            check_name(alias, path)
            if alias in self.tensors or name not in self.tensors:
                raise InputError(f"{path}: {alias!r}: tied to {name!r}, but the first must not be stored and the second must be")


def check_name(name: str, path: object) -> None:
    """Raise InputError for a name that no tensor in a container may have."""
    if name == "__metadata__" or SEPARATOR in name:
        raise InputError(f"{path}: {name!r} is reserved: a tensor's name must not be '__metadata__' and not contain '{SEPARATOR}'")
    if name != canonical_name(name):
        raise InputError(f"{path}: {name!r} has the prefix of a wrapper; files hold {canonical_name(name)!r}")
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise InputError(f"{path}: {name!r} is not valid Unicode")


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 (that of zlib) of a contiguous CPU tensor's bytes."""
    return zlib.crc32(raw_bytes(tensor))
