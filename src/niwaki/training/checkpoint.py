"""Checkpoints: any nested state of tensors, numbers and text as one safetensors file, written whole or not at all. Nothing is pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from niwaki.errors import InputError
from niwaki.formats import files

VERSION = "niwaki.checkpoint/1"


def save(path: Path, state: Any) -> None:
    """Write a state (dicts, lists, tuples, tensors, numbers, text, None) atomically.

    Raises:
        InputError, NiwakiError: the file cannot be written; an earlier one of that name is as it was.
    """
    tensors: dict[str, Tensor] = {}
    tree = _flatten(state, tensors)
    files.write(path, tensors, {"format": "pt", "checkpoint": VERSION, "state": json.dumps(tree, separators=(",", ":"))})


def load(path: Path) -> Any:
    """Return the state that :func:`save` wrote.

    Raises:
        InputError: the file is missing, damaged, or no checkpoint of this version.
    """
    with files.reading(path) as reader:
        if reader.metadata.get("checkpoint") != VERSION:
            raise InputError(f"{path}: not a checkpoint of this version ({VERSION})")
        tensors = {name: reader.read(name) for name in reader.names}
        try:
            return _unflatten(json.loads(reader.metadata["state"]), tensors)
        except (KeyError, TypeError, ValueError, RecursionError):
            raise InputError(f"{path}: a damaged checkpoint; delete it to begin anew") from None


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return JSON for a state. Containers are written as ``{kind: ...}``, so that keys may be numbers and tuples stay tuples."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[_flatten(key, tensors), _flatten(inner, tensors)] for key, inner in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_flatten(inner, tensors) for inner in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__}")


def _unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    [(kind, inner)] = tree.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {_unflatten(key, tensors): _unflatten(value, tensors) for key, value in inner}
    return {"list": list, "tuple": tuple}[kind](_unflatten(value, tensors) for value in inner)
