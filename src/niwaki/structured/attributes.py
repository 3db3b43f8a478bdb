"""Numbers of a model's own modules that must follow when units go, such as ``num_heads``.

No shape tells them. A number follows when its value is that of a size that changed, in a module that holds the changed tensors, or in an
object that such modules share; a table of names says which of those to change first, and the model's outputs say whether that was right.
If not, others are tried.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, takewhile
from typing import Any

from torch import nn

from niwaki.granularity import Kind
from niwaki.removed import named_modules, rule_of, set_attribute, settings_of

HEADS = frozenset(
    {"num_heads", "n_heads", "n_head", "nhead", "heads", "num_attention_heads", "attention_heads", "n_local_heads", "num_query_heads"}
    | {"num_q_heads", "encoder_attention_heads", "decoder_attention_heads"}
)
KEY_HEADS = frozenset({"num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv", "kv_heads", "num_key_heads", "num_value_heads"})
RATIOS = frozenset({"num_key_value_groups", "n_rep", "num_queries_per_kv", "kv_groups"})
HEAD_DIMS = frozenset({"head_dim", "attention_head_size", "size_per_head", "d_head", "dim_head", "head_size", "d_kv", "key_value_proj_dim"})
HEAD_WIDTHS = frozenset({"all_head_size", "inner_dim", "split_size", "attn_dim", "attention_dim", "q_size", "kv_size", "q_dim", "kv_dim"})
WIDTHS = ("dim", "size", "channel", "feature", "width", "planes", "hidden", "embed", "inner", "d_model", "d_ff", "n_embd", "units")
"""Parts of the names of widths."""

LAYERS = frozenset({"num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers", "num_blocks"})

Key = tuple[str, str]
"""Class and name of a number: what holds for one layer of a model holds for all."""

TRIALS = 64
"""Settings of the numbers of one removal that are tried: enough for each of ten, and each two of them."""


@dataclass(frozen=True)
class Change:
    """What a removal did to sizes.

    Attributes:
        kind: of the group.
        units: number of units before and after.
        widths: tensor that was cut -> sizes before and after: of the dimension, and of the group's part of it.
    """

    kind: Kind
    units: tuple[int, int]
    widths: Mapping[str, Mapping[int, int]]


@dataclass(frozen=True)
class Candidate:
    """A number that may have to follow.

    Attributes:
        path: of the attribute.
        key: of it and its like.
        old: its value.
        new: what it would become.
        likely: whether the table of names says so.
    """

    path: str
    key: Key
    old: int
    new: int
    likely: bool


def together(changes: Sequence[Change]) -> Change:
    """Return what removals of groups of the same kind and size do, as one."""
    widths = {tensor: {**sizes} for tensor, sizes in changes[0].widths.items()}
    for change in changes[1:]:
        for tensor, sizes in change.widths.items():
            widths.setdefault(tensor, {}).update(sizes)
    return Change(changes[0].kind, changes[0].units, widths)


def holders(change: Change) -> set[str]:
    """Return the names of the modules that hold changed tensors, inside the smallest one that holds all of them."""
    paths = [name.split(".")[:-1] for name in change.widths]
    common = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
    return {".".join(path[:depth]) for path in paths for depth in range(common, len(path) + 1)}


def owners(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Return what may have numbers for some modules, by path: they themselves, and objects that they may share, as a configuration."""
    modules = named_modules(model)
    found: dict[str, Any] = {name: modules[name] for name in sorted(names) if name in modules}
    first: dict[int, str] = {}  # the path of an object is that of the outermost module that has it
    for name, module in modules.items():
        for own, value in settings_of(module):
            first.setdefault(id(value), f"{name}.{own}" if name else own)
    objects = {first[id(value)]: value for module in list(found.values()) for _, value in settings_of(module)}
    return found | objects


def candidates(model: nn.Module, change: Change, names: Iterable[str]) -> list[Candidate]:
    """Return the numbers of modules, and of what they share with others, that may follow."""
    found = []
    for name, owner in owners(model, names).items():
        if rule_of(owner) is not None:
            continue
        inside = f"{name}." if name and isinstance(owner, nn.Module) else ""
        widths = {old: new for tensor, sizes in change.widths.items() if tensor.startswith(inside) for old, new in sizes.items()}
        for own, value in vars(owner).items():
            new = _after(own, value, change, widths)
            if new is not None and new != value and _can_be_set(owner, own):
                likely = isinstance(owner, nn.Module) and _likely(own, change.kind)
                found.append(Candidate(f"{name}.{own}" if name else own, (type(owner).__name__, own), value, new, likely))
    return found


def choose(model: nn.Module, found: Sequence[Candidate], chosen: frozenset[Key]) -> None:
    """Set the numbers with some keys to their new values, and the others to their old ones."""
    for candidate in found:
        set_attribute(model, candidate.path, candidate.new if candidate.key in chosen else candidate.old)


def attempts(found: Sequence[Candidate], start: frozenset[Key]) -> Iterator[frozenset[Key]]:
    """Yield keys of what may change together: those to start with, then with each one of all keys in or out, then each two, and so on."""
    keys = list(dict.fromkeys(candidate.key for candidate in found))
    return (start ^ frozenset(flipped) for count in range(len(keys) + 1) for flipped in combinations(keys, count))


def numbers(model: nn.Module, names: Iterable[str]) -> Iterator[str]:
    """Yield the numbers of modules that are not torch's own, for people."""
    modules = named_modules(model)
    for name in sorted(names):
        module = modules.get(name)
        own = {} if module is None else {key: value for key, value in vars(module).items() if type(value) is int and key[0] != "_"}
        if own and rule_of(modules[name]) is None:
            yield f"{name or 'the model'}: {', '.join(f'{key}={value}' for key, value in own.items())}"


def scaled(name: str, value: int, kind: Kind, units: tuple[int, int]) -> int | None:
    """Return what becomes of a number that counts heads, or None for another number.

    Query heads are as many as key heads, or a multiple.
    """
    before, after = units
    counts = {"head": HEADS | KEY_HEADS, "query_head": HEADS | RATIOS}.get(kind, frozenset())
    return value // before * after if name in counts and value % before == 0 else None


def _after(name: str, value: object, change: Change, widths: Mapping[int, int]) -> int | None:
    if type(value) is not int or value < 2 or name.startswith("_"):
        return None
    counted = scaled(name, value, change.kind, change.units)
    if counted is not None:
        return counted
    return change.units[1] if value == change.units[0] else widths.get(value)


def _can_be_set(owner: Any, name: str) -> bool:
    """Return whether an object is not frozen."""
    try:
        setattr(owner, name, getattr(owner, name))
    except Exception:  # each kind of frozen object raises its own
        return False
    return True


def _likely(name: str, kind: Kind) -> bool:
    if kind == "layer":
        return name in LAYERS
    if kind == "head":
        return name in HEADS | KEY_HEADS | HEAD_WIDTHS
    if kind == "query_head":
        return name in HEADS | RATIOS | HEAD_WIDTHS
    if kind == "head_dim":
        return name in HEAD_DIMS | HEAD_WIDTHS
    return name not in HEADS | KEY_HEADS | RATIOS | HEAD_DIMS | HEAD_WIDTHS | LAYERS and any(part in name for part in WIDTHS)
