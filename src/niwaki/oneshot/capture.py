"""What the blocks of a model are called with: every positional and keyword argument, caught while the model runs on data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from niwaki.calibration import Arguments, forward, pairs, preserved
from niwaki.errors import InputError
from niwaki.metrics.flops import observing
from niwaki.oneshot.store import Kept, Store

Batches = Iterable[tuple[Any, Any]]
Slot = int | str
"""Where an argument stands: number of a positional one, or name of a keyword."""


COMPARABLE = (str, int, float, bool, torch.Size, torch.dtype, torch.device)
"""Arguments that are the same when they are equal; others when they are one object."""


class _Reached(BaseException):
    """Ends a forward pass of which no more is needed; not an Exception, which a model might catch."""


@dataclass(frozen=True)
class Segment:
    """Blocks of which each reads what the one before wrote, so that one pass over the data catches what the first is called with.

    Attributes:
        names: paths of the blocks, in the order in which they are called.
        slot: the argument that each block but the first has from the one before.
        shared: whether all blocks have the same other arguments.
        calls: how often the (then only) block is called in a forward pass.
        reason: why it does not go on from the block before it; empty where there is none.
    """

    names: tuple[str, ...]
    slot: Slot = 0
    shared: bool = True
    calls: int = 1
    reason: str = ""


def primary(output: Any) -> Tensor | None:
    """Return the tensor that a block hands on: its output, or the first element of a tuple or list; None where that is no tensor."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _with_primary(output: Any, tensor: Tensor) -> Any:
    if isinstance(output, Tensor):
        return tensor
    all_ = [tensor, *output[1:]]
    return output._make(all_) if hasattr(output, "_make") else type(output)(all_)


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Run a model plainly, without gradients and caches, and leave it as it was: modes, buffers, random state and configuration."""
    with without_caches(model), preserved(model), observing(model), torch.no_grad():
        yield


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Tell a model of Hugging Face transformers not to keep the keys and values of its attention from call to call."""
    configs = {id(c): c for module in model.modules() for c in _configs(module) if getattr(c, "use_cache", False)}
    for config in configs.values():
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


def _configs(module: nn.Module) -> Iterator[Any]:
    """Yield the configurations of a module of Hugging Face transformers, and those inside."""
    config = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        yield config
        yield from (inner for inner in vars(config).values() if hasattr(inner, "to_dict"))


# ---------------------------------------------------------------- which blocks follow each other


@dataclass
class _Call:
    """One call of a block in a forward pass."""

    name: str
    given: Arguments
    linked: tuple[Slot, ...] = ()
    """Arguments that are what the call before wrote, unchanged since."""


def segments(model: nn.Module, names: Sequence[str], batch: Any) -> tuple[list[Segment], list[str]]:
    """Return how the blocks of a model are called on a batch, and blocks that are not.

    The model runs on the batch once, and once more for each segment of several blocks: their outputs are disturbed then, and blocks of
    which another argument changes with them begin a segment of their own.

    Args:
        model: any module.
        names: paths of the blocks.
        batch: inputs of a forward pass.

    Raises:
        InputError: none of the blocks is called, or one is called from within another.
    """
    calls = _trace(model, names, batch)
    never = [name for name in names if name not in {call.name for call in calls}]
    if not calls:
        raise InputError(f"blocks: none is called in a forward pass ({', '.join(names[:3])}, ...); name modules that are, in blocks=")
    counts = {name: sum(call.name == name for call in calls) for name in names}
    found: list[Segment] = []
    for call in {call.name: call for call in reversed(calls)}.values():
        found.insert(0, Segment((call.name,), calls=counts[call.name]))
    chained = [found[0]]
    first = {call.name: call for call in reversed(calls)}
    for one in found[1:]:
        last, call = chained[-1], first[one.names[0]]
        before = last.names[-1]
        slots = [slot for slot in call.linked if len(last.names) == 1 or slot == last.slot]
        once = one.calls == last.calls == 1
        if once and slots:
            chained[-1] = Segment((*last.names, *one.names), slots[0], reason=last.reason)
        else:
            repeated = one if one.calls > 1 else last
            why = f"it does not read what {before} wrote, as it was" if once else f"{repeated.names[-1]} is called several times"
            chained.append(Segment(one.names, calls=one.calls, reason=why))
    return [part for one in chained for part in _independent(model, one, first, batch)], never


def _trace(model: nn.Module, names: Sequence[str], batch: Any, disturb: Sequence[str] = ()) -> list[_Call]:
    """Return the calls of blocks in a forward pass, in order; the outputs of some blocks can be disturbed."""
    calls: list[_Call] = []
    inside: list[str] = []
    written: tuple[Tensor, Tensor] | None = None

    def enter(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if inside:
            raise InputError(f"blocks: {name!r} is called from within {inside[-1]!r}; blocks must not overlap")
        inside.append(name)
        linked: tuple[Slot, ...] = ()
        if written is not None:
            output, copy = written
            linked = tuple(slot for slot, value in _arguments(args, kwargs) if value is output and _equal(value, copy))
        leaves, spec = _flat((args, kwargs))
        args, kwargs = tree_unflatten([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        calls.append(_Call(name, Arguments(args, kwargs), linked))

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        nonlocal written
        inside.remove(name)
        tensor = primary(output)
        if name in disturb and tensor is not None and tensor.is_floating_point():
            tensor = tensor + (tensor.std() + 1.0) * torch.randn_like(tensor)
            output = _with_primary(output, tensor)
        written = None if tensor is None else (tensor, tensor.clone())
        return output

    with running(model), ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(partial(enter, name), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(partial(leave, name), with_kwargs=True).remove)
        forward(model, batch)
    return calls


def _independent(model: nn.Module, one: Segment, calls: dict[str, _Call], batch: Any) -> list[Segment]:
    """Cut a segment before each block of which another argument depends on the blocks before it in the segment."""
    if len(one.names) == 1:
        return [one]
    disturbed = {call.name: call for call in reversed(_trace(model, one.names, batch, one.names[:-1]))}
    parts: list[list[str]] = [[]]
    others = {name: _without(calls[name].given, one.slot) for name in one.names}
    for name in one.names:
        if parts[-1] and not _equal(others[name], _without(disturbed[name].given, one.slot)):
            parts.append([])
        parts[-1].append(name)
    return [
        Segment(
            tuple(part),
            one.slot,
            shared=all(_equal(others[part[0]], others[name]) for name in part),
            reason=one.reason if part is parts[0] else f"its other arguments depend on {parts[parts.index(part) - 1][-1]}",
        )
        for part in parts
    ]


def _flat(given: Any) -> tuple[list[Any], TreeSpec]:
    return tree_flatten(given, is_leaf=lambda value: isinstance(value, torch.Size))  # which would come back as a plain tuple


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Slot, Any]]:
    yield from enumerate(args)
    yield from kwargs.items()


def _without(given: Arguments, slot: Slot) -> list[tuple[Slot, Any]]:
    return [(name, value) for name, value in _arguments(given.args, dict(given.kwargs)) if name != slot]


def _equal(a: Any, b: Any) -> bool:
    """Return whether two arguments are the same: equal tensors (NaN like NaN) in equal containers."""
    (ours, spec), (theirs, other) = _flat(a), _flat(b)
    return spec == other and all(_same(x, y) for x, y in zip(ours, theirs, strict=True))


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a is b or (
            type(a) is type(b) and isinstance(a, str | int | float | bool | torch.Size | torch.dtype | torch.device) and a == b
        )
    if a is b:
        return True
    alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    return alike and bool(torch.eq(a, b).logical_or(a.isnan() & b.isnan() if a.is_floating_point() else torch.eq(a, b)).all())


# ---------------------------------------------------------------- what they are called with


@dataclass
class _Chunk:
    """One call of the first block of a segment, and the other arguments of all of them."""

    moving: Kept
    """The argument that each block has from the one before; the first argument that is a tensor where there is a single block."""
    others: list[tuple[list[Any], TreeSpec]]
    """Of each block (one where all share them): the leaves of its arguments, with None where the moving one is, and their structure."""
    at: int
    """Which leaf is the moving one."""


class Captured:
    """What the blocks of a segment are called with on data; :meth:`of` is data for one of them, :meth:`advance` walks to the next."""

    def __init__(self, segment: Segment, store: Store) -> None:
        self.segment, self.store = segment, store
        self._chunks: list[_Chunk] = []

    def __len__(self) -> int:
        return len(self._chunks)

    def of(self, name: str, device: torch.device | None = None) -> CapturedData:
        """Return the calls of a block as batches ``(Arguments, None)`` that can be read again and again; the walk must have come to it."""
        return CapturedData(self, name, device)

    def arguments(self, i: int, name: str, device: torch.device | None = None) -> Arguments:
        """Return a call of a block."""
        chunk = self._chunks[i]
        leaves, spec = chunk.others[0 if self.segment.shared else self.segment.names.index(name)]
        filled = [self.store.get(leaf) if isinstance(leaf, Kept) else leaf for leaf in leaves]
        filled[chunk.at] = self.store.get(chunk.moving)
        if device is not None:
            filled = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in filled]
        args, kwargs = tree_unflatten(filled, spec)
        return Arguments(args, kwargs)

    def advance(self, i: int, output: Any) -> None:
        """Put the output of a block in the place of its input: what the next block is called with.

        Raises:
            InputError: the output is no tensor, and no tuple that begins with one.
        """
        tensor = primary(output)
        if tensor is None:
            raise InputError(f"blocks: a block of {self.segment.names[0]} ... returns {type(output).__name__}, not a tensor or a tuple")
        chunk = self._chunks[i]
        self.store.replace(chunk.moving, tensor.to(chunk.moving.device))

    def add(self, calls: Sequence[tuple[str, Arguments]]) -> None:
        """Add what the blocks are called with in a forward pass: the first block alone where all share their other arguments."""
        for name, given in calls:
            leaves, spec = _flat((given.args, dict(given.kwargs)))
            at = self._moving(given, leaves, name)
            if name == self.segment.names[0]:
                self._chunks.append(_Chunk(self.store.put(leaves[at]), [], at))
            chunk = self._chunks[-1]
            if at != chunk.at:
                raise InputError(
                    f"blocks: {name!r} is called with other arguments than {self.segment.names[0]!r}; name the blocks one by one"
                )
            kept = [None if i == at else self.store.put_shared(x) if isinstance(x, Tensor) else x for i, x in enumerate(leaves)]
            chunk.others.append((kept, spec))

    def _moving(self, given: Arguments, leaves: Sequence[Any], name: str) -> int:
        """Return which leaf is handed from block to block: the first tensor for a single block."""
        wanted: Any = None
        if len(self.segment.names) > 1:
            wanted = dict(_arguments(given.args, dict(given.kwargs))).get(self.segment.slot)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and (wanted is None or leaf is wanted):
                return i
        raise InputError(f"blocks: {name!r} is called without tensors; name modules that are called with one")

    def drop(self) -> None:
        """Forget everything."""
        for chunk in self._chunks:
            self.store.drop(chunk.moving)
        self._chunks.clear()
        self.store.clear()


@dataclass(frozen=True)
class CapturedData:
    """The calls of a block as batches of data."""

    captured: Captured
    name: str
    device: torch.device | None = None

    def __len__(self) -> int:
        return len(self.captured)

    def __iter__(self) -> Iterator[tuple[Arguments, None]]:
        for i in range(len(self.captured)):
            yield self.captured.arguments(i, self.name, self.device), None


def capture(model: nn.Module, segment: Segment, data: Batches, store: Store, seen: Callable[[], None] = lambda: None) -> Captured:
    """Run a model on data up to a segment, and return what its blocks are called with. The hooks come off without a trace.

    A forward pass ends where no more of it is needed: at the first block, or at the last one where each has other arguments.

    Args:
        model: any module.
        segment: of its blocks.
        data: batches ``(inputs, targets)``.
        store: where the arguments are kept.
        seen: called after each batch.

    Raises:
        InputError: there is no batch, or a block is not called on one.
    """
    names = segment.names[:1] if segment.shared else segment.names
    captured = Captured(segment, store)
    calls: list[tuple[str, Arguments]] = []

    def catch(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((name, Arguments(args, dict(kwargs))))
        captured.add(calls[-1:])
        if len(calls) == len(names) * segment.calls:
            raise _Reached

    with running(model), ExitStack() as hooks:
        for name in names:
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(partial(catch, name), with_kwargs=True).remove)
        for inputs, _ in pairs(data):
            calls.clear()
            with suppress(_Reached):
                forward(model, inputs)
            if not calls:
                raise InputError(f"blocks: {names[0]!r} is not called on a batch of the data; name blocks that always are")
            seen()
    return captured
