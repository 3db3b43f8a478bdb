"""Recording one forward pass, operation by operation.

A dispatch mode sees every ATen operation, after autograd and after all composite operations were taken apart, so that a few rules cover
attention, recurrent layers, and whatever a model's own code does.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from niwaki.masks import canonical_name

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named."""


class Number(int):
    """A tensor on the tape. One that is written to has another number afterwards."""


@dataclass(frozen=True)
class Operation:
    """One operation on the tape, with numbers in place of tensors.

    Attributes:
        name: such as ``aten::add`` (without the overload).
        tags: of the operation, such as ``pointwise``.
        named: all arguments by name, ``self`` as ``input``.
        results: the tensors that it returns.
        memory: the argument that the results are views of, or that was written to.
        scaled: whether it is part of an attention that takes its scale from the number of dimensions inside heads.
    """

    name: str
    tags: frozenset[str]
    named: dict[str, Any]
    results: tuple[Number, ...]
    memory: Number | None
    scaled: bool


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What a forward pass did: its operations, and which tensors share memory. It holds no tensor.

    Attributes:
        own: parameter or buffer -> its number.
        buffers: names of the buffers among them.
        inputs: tensors among the arguments of the forward pass.
        outputs: tensors among what it returned.
        shapes: of every number.
        memory: of every number; equal where tensors are views of each other.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.own: dict[str, Number] = {}
        self.buffers: set[str] = set()
        self.inputs: list[Number] = []
        self.outputs: list[Number] = []
        self.operations: list[Operation] = []
        self.shapes: list[tuple[int, ...]] = []
        self.scaled = False
        self.memory: list[int] = []
        self._numbers: Any = WeakIdKeyDictionary()

    def number(self, tensor: Tensor) -> Number:
        """Return the number of a tensor."""
        if tensor not in self._numbers:
            self._new(tensor, len(self.memory))
        found: Number = self._numbers[tensor]
        return found

    def _new(self, tensor: Tensor, memory: int) -> Number:
        number = self._numbers[tensor] = Number(len(self.shapes))
        self.shapes.append(tuple(tensor.shape))
        self.memory.append(memory)
        return number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named = {name: self._numbered(value) for name, value in _named(func, args, kwargs).items()}
        outputs = func(*args, **kwargs)
        results = list(tensors_in(outputs))
        if results:
            source = next(numbers_in(named.get(_shares(func))), None)
            memory = [len(self.memory) + i if source is None else self.memory[source] for i in range(len(results))]
            numbers = tuple(self._new(result, m) for result, m in zip(results, memory, strict=True))
            self.operations.append(Operation(func._schema.name, _tags(func), named, numbers, source, self.scaled))
        return outputs

    def _numbered(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.number(value)
        if isinstance(value, list | tuple):
            return [self._numbered(inner) for inner in value]
        return value

    def needed(self) -> list[Operation]:
        """Return the operations that the outputs depend on, in order."""
        memory = {self.memory[number] for number in self.outputs}
        found = []
        for operation in reversed(self.operations):
            if any(self.memory[result] in memory for result in operation.results):
                found.append(operation)
                memory |= {self.memory[number] for number in numbers_in(operation.named)}
        return found[::-1]


def record(model: nn.Module, given: Arguments) -> Tape:
    """Run a model once in evaluation mode, without gradients; it is left as it was. Raises what the model raises."""
    args, kwargs = given
    tape = Tape()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        tape.own[canonical_name(name)] = tape.number(tensor)
    tape.buffers = {canonical_name(name) for name, _ in model.named_buffers()}
    tape.inputs = [tape.number(tensor) for tensor in tensors_in([args, kwargs])]
    with undisturbed(model), sdpa_kernel(SDPBackend.MATH), tape, _Calls(tape):
        outputs = model(*args, **kwargs)
    tape.outputs = [tape.number(tensor) for tensor in tensors_in(outputs)]
    return tape


def without_values(model: nn.Module, given: Arguments) -> tuple[nn.Module, Arguments]:
    """Return a copy of the model and of its arguments on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        twin: Tensor = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin
    args, kwargs = mapped(given, lambda tensor: tensor.to("meta"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of exported programs
        return copy.deepcopy(model, memo), (args, kwargs)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return arguments with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        inner = [mapped(one, change) for one in value]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return value


def tensors_in(outputs: Any) -> Iterator[Tensor]:
    """Yield the tensors in a model's outputs: in mappings, lists, tuples and dataclasses. What else is there is not looked into."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        yield from (tensor for value in outputs.values() for tensor in tensors_in(value))
    elif isinstance(outputs, list | tuple):
        yield from (tensor for value in outputs for tensor in tensors_in(value))
    elif is_dataclass(outputs) and not isinstance(outputs, type):
        yield from (tensor for field in fields(outputs) for tensor in tensors_in(getattr(outputs, field.name)))


def numbers_in(value: Any) -> Iterator[Number]:
    """Yield the numbers of tensors among arguments."""
    if isinstance(value, Number):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from numbers_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers_in(inner)


class _Calls(TorchFunctionMode):
    """Sees what calls in Python say and operations do not.

    Whether an attention takes its scale from the number of dimensions inside heads; and lists as indices, such as ``x[..., [-1], :]``, that
    are consecutive numbers, which are looked up as slices.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__:
            args = (args[0], _sliced(args[1]))
        scales = func is F.scaled_dot_product_attention and kwargs.get("scale") is None
        before = self.tape.scaled
        self.tape.scaled |= scales or func is F.multi_head_attention_forward
        try:
            return func(*args, **kwargs)
        finally:
            self.tape.scaled = before


def _sliced(index: Any) -> Any:
    """Return an index with a list of consecutive numbers, if that is the only thing that looks up entries, as a slice."""
    parts = index if isinstance(index, tuple) else (index,)
    lists = [part for part in parts if not isinstance(part, slice) and part is not None and part is not Ellipsis]
    if len(lists) != 1 or not isinstance(lists[0], list) or not all(type(entry) is int for entry in lists[0]):
        return index
    entries = lists[0]
    if not entries or entries != list(range(entries[0], entries[0] + len(entries))) or entries[0] < 0 <= entries[-1]:
        return index
    run = slice(entries[0], entries[-1] + 1 or None)
    return tuple(run if part is entries else part for part in parts)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Let a model run in evaluation mode without gradients, plainly; modes, buffers and random state are then as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.device.type != "meta"]
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    modes = [(module, module.training) for module in model.modules()]
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it and oneDNN have operations that do a whole layer
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags sets other flags too, and warns about GPUs that are not there
    for module, _ in modes:  # not model.eval(), which exported programs refuse
        module.training = False
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes:
            module.training = mode
        for buffer, before in buffers:
            buffer.data.copy_(before)


@cache
def _defaults(func: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((a.name, a.default_value if a.has_default_value() else None) for a in func._schema.arguments)


@cache
def _shares(func: Any) -> str:
    """Return the argument whose memory the results share, because the operation is a view of it or writes to it; else an empty name."""
    returned = {name for result in func._schema.returns if result.alias_info is not None for name in result.alias_info.before_set}
    for argument in func._schema.arguments:
        if argument.alias_info is not None and returned & set(argument.alias_info.before_set):
            return "input" if argument.name == "self" else str(argument.name)
    return ""


@cache
def _tags(func: Any) -> frozenset[str]:
    """Return the tags of an operation; one in place may have them only where it returns something new."""
    tags = {str(tag).rpartition(".")[2] for tag in func.tags}
    namespace, _, name = func._schema.name.partition("::")
    if name.endswith("_"):
        packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
        for overload in packet.overloads() if packet is not None else ():
            tags |= {str(tag).rpartition(".")[2] for tag in getattr(packet, overload).tags}
    return frozenset(tags)


def _named(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of an operation by the names of its schema."""
    found = dict(_defaults(func))
    names = list(found)
    found.update(zip(names, args, strict=False))
    found.update(kwargs)
    return {("input" if name == "self" else name): value for name, value in found.items()}
