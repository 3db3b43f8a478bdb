"""Hugging Face models: the configuration follows what was removed where it can say it, and a folder loads again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, combinations, islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from niwaki.dependency import Example
from niwaki.errors import InputError
from niwaki.granularity import Kind
from niwaki.removed import resolve, set_attribute
from niwaki.structured.attributes import HEAD_DIMS, HEADS, KEY_HEADS, LAYERS, WIDTHS, scaled
from niwaki.structured.running import difference, evaluating, run

IMPLIED = ("head_dim", "n_inner", "num_key_value_heads")
"""Fields that may be None, and then follow from others."""

TRIALS = 64
"""Settings of the configuration that are tried."""


def fit(model: nn.Module, counts: Sequence[tuple[Kind, int, int]], widths: Mapping[int, Sequence[int]]) -> dict[str, int]:
    """Set the fields of a model's configuration such that as many tensors as can be have the shapes that a new model would have.

    Args:
        model: smaller already.
        counts: kind of each group that became smaller, and its units before and after.
        widths: sizes of dimensions before -> after.

    Returns:
        path of each field that changed, such as ``config.intermediate_size`` -> its value; nothing for models without a configuration.
    """
    if not counts or not is_pretrained(model):
        return {}
    best: dict[str, int] = {}
    wrong = len(mismatched(model, {}))
    for chosen in islice(_settings(_options(model, counts, widths)), TRIALS):
        if not wrong:
            break
        count = len(mismatched(model, chosen))
        if count < wrong:
            best, wrong = chosen, count
    for path, value in best.items():
        set_attribute(model, path, value)
    return best


def save(model: nn.Module, folder: str | Path, example: Example) -> None:
    """Write a model into a folder that ``from_pretrained`` loads again to equal outputs.

    Raises:
        InputError: not a Hugging Face model, or no configuration of its class has these sizes; nothing is written.
    """
    if not is_pretrained(model):
        raise InputError(f"save_pretrained: {type(model).__name__} is no Hugging Face model; use niwaki.save(..., removed=...)")
    instead = "mask as much of every layer (allocation: uniform), or keep the removal with niwaki.save(model, path, removed=...)"
    wrong = mismatched(model, {})
    if wrong:
        name, (have, want) = next(iter(wrong.items()))
        raise InputError(
            f"save_pretrained: no {type(model.config).__name__} says these sizes: {name} is {have}, and would be {want} in a new model"
            f" (and {len(wrong) - 1} more); {instead}"
        )
    again = _built(model, {}, next(model.parameters()).device)
    again.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))
    again.load_state_dict(model.state_dict())
    with evaluating(model), evaluating(again):
        differs = difference(run(again, example), run(model, example))
    if differs:
        raise InputError(f"save_pretrained: a new model of this configuration computes something else ({differs}); {instead}")
    writer: Any = model
    writer.save_pretrained(folder)


def is_pretrained(model: nn.Module) -> bool:
    """Return whether a model is one of Hugging Face transformers, which is not imported for that."""
    return any(base.__module__ == "transformers.modeling_utils" and base.__name__ == "PreTrainedModel" for base in type(model).__mro__)


def mismatched(model: nn.Module, settings: Mapping[str, int]) -> dict[str, tuple[Any, Any]]:
    """Return the tensors of which a new model with these settings would have other shapes: name -> (here, there); None where missing."""
    try:
        fresh = {name: list(tensor.shape) for name, tensor in _built(model, settings, "meta").state_dict().items()}
    except Exception as error:  # configurations check themselves in their own ways
        return dict.fromkeys(model.state_dict(), (None, str(error)))
    own = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    names = {**own, **fresh}
    return {name: (own.get(name), fresh.get(name)) for name in names if own.get(name) != fresh.get(name)}


def _built(model: Any, settings: Mapping[str, int], device: torch.device | str) -> nn.Module:
    """Return a new model of the configuration with other settings; its weights are random."""
    holder = nn.Module()
    holder.config = copy.deepcopy(model.config)
    for path, value in settings.items():
        set_attribute(holder, path, value)
    with torch.random.fork_rng(), torch.device(device):
        built: nn.Module = type(model)(holder.config)
    return built


def _options(model: nn.Module, counts: Sequence[tuple[Kind, int, int]], widths: Mapping[int, Sequence[int]]) -> dict[str, list[int]]:
    """Return which fields may follow, and the values that they may then have, likely ones first."""
    units = {kind: dict.fromkeys((before, after) for one, before, after in counts if one == kind) for kind, _, _ in counts}
    options: dict[str, list[int]] = {}
    for path in _fields(model):
        owner, name = resolve(model, path)
        value = getattr(owner, name)
        if name in HEADS | KEY_HEADS and value is not None:
            found = [v for v in _counted(name, value, units) if v is not None]
        elif name in LAYERS or (name in HEAD_DIMS and value is not None):
            found = [after for before, after in units.get("layer" if name in LAYERS else "head_dim", {}) if before == value]
        elif value is None:
            heads = [before for kind in ("head", "query_head") for before, _ in units.get(kind, {})]
            found = [size // n for size in widths for n in heads if size % n == 0] if name == "head_dim" else list(chain(*widths.values()))
        else:
            found = list(widths.get(value, ()))
        found = [new for new in dict.fromkeys(found) if new != value]
        if found:
            options[path] = found
    return options


def _counted(name: str, value: int, units: Mapping[Kind, Iterable[tuple[int, int]]]) -> Iterator[int | None]:
    """Yield what may have become of a number of heads: of key heads, and of query heads for each of them, or of one of the two."""
    for heads in units.get("head", ()):
        for queries in units.get("query_head", ()):
            fewer = scaled(name, value, "head", heads)
            yield scaled(name, value if fewer is None else fewer, "query_head", queries)
    for kind in ("head", "query_head"):
        for pair in units.get(kind, ()):
            yield scaled(name, value, kind, pair)


def _fields(model: Any) -> Iterator[str]:
    """Yield the paths of the whole numbers of a configuration, and of its parts."""
    configs = {"config": model.config}
    configs |= {f"config.{name}": part for name, part in vars(model.config).items() if hasattr(part, "model_type")}
    for path, config in configs.items():
        for name, value in vars(config).items():
            known = name in HEADS | KEY_HEADS | HEAD_DIMS | LAYERS or any(part in name for part in WIDTHS)
            if known and (type(value) is int or (value is None and name in IMPLIED)):
                yield f"{path}.{name}"


def _settings(options: Mapping[str, Sequence[int]]) -> Iterator[dict[str, int]]:
    """Yield settings of the first value of each field: all of them, then with fewer and fewer, then each field's other values."""
    paths = list(options)
    for count in range(len(paths), 0, -1):
        for chosen in combinations(paths, count):
            yield {path: options[path][0] for path in chosen}
    for path in paths:
        for value in options[path][1:]:
            yield {path: value}
