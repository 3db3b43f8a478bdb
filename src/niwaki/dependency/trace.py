"""What one forward pass shows of a model's dimensions.

The model runs once on the meta device, which has shapes and no values: that costs no memory and little time, and proves that what
happens does not depend on the data. Where it is impossible (values decide, as in routing to experts), a run on the real tensors takes
its place, and a note says so. Rules then say of every operation that the outputs depend on what it does with dimensions; what a model
computes and throws away couples nothing.

A run is watched rather than exported because it takes about a sixth of the time of ``torch.export``, and because what depends on values
cannot be exported. An exported program can be given in place of a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from niwaki.dependency import rules
from niwaki.dependency.axes import Misaligned
from niwaki.dependency.tape import Arguments, Number, Tape, record, without_values
from niwaki.dependency.tape import tensors_in as tensors_in
from niwaki.dependency.values import Call, Dim, Facts, Value, fresh, pin_all
from niwaki.errors import InputError

Example = tuple[Any, ...] | Mapping[str, Any] | Tensor
"""Positional arguments of a forward pass, or named ones, or the only one."""

Declared = Mapping[str, str | rules.Rule]
"""Operation (such as ``mylib::scale``) -> the ATen operation that it is like, or a rule of one's own."""


@dataclass(frozen=True, eq=False)
class Traced:
    """What a run showed: the dimensions of every parameter and buffer, and the facts."""

    dims: dict[str, tuple[Dim, ...]]
    facts: Facts


def trace(model: nn.Module, example: Example, declared: Declared | None = None) -> Traced:
    """Watch one forward pass in evaluation mode, without gradients; the model is left as it was.

    Raises:
        InputError: the model does not run on the example, or a declared rule is wrong.
    """
    known = {name: _like(name, said) for name, said in (declared or {}).items()}
    given = arguments(example)
    try:
        tape, note = record(*without_values(model, given)), ""
    except Exception as error:
        note = f"what runs may depend on the data; the groups are those of the example ({_first_line(error)})"
        tape = _on_data(model, given)
    traced = _understood(tape, known)
    if note:
        traced.facts.notes.insert(0, note)
    return traced


def arguments(example: Example) -> Arguments:
    """Return the positional and the named arguments of an example."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple | list):
        return tuple(example), {}
    return (example,), {}


def _on_data(model: nn.Module, given: Arguments) -> Tape:
    try:
        return record(model, given)
    except Exception as error:
        where = f"{type(model).__name__} does not run on it"
        raise InputError(f"example: {where}: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]


def _understood(tape: Tape, declared: Mapping[str, rules.Rule]) -> Traced:
    """Apply the rule of every operation that the outputs depend on, in order."""
    facts = Facts()
    own = {
        name: tuple(Dim(fresh(size).axis, frozenset({(name, i)})) for i, size in enumerate(tape.shapes[number]))
        for name, number in tape.own.items()
    }
    facts.ranks.update({name: 0 if name in tape.buffers else len(dims) for name, dims in own.items()})
    values = {number: Value(own[name], constant=True) for name, number in tape.own.items()}
    for number in tape.inputs:
        values[number] = Value(tuple(fresh(size, "it comes from the model's input") for size in tape.shapes[number]))

    def value(given: Any) -> Any:
        if isinstance(given, list):
            return [value(inner) for inner in given]
        if not isinstance(given, Number):
            return given
        if given not in values:
            reason = "it meets a tensor of the model that is neither parameter nor buffer"
            values[given] = Value(tuple(fresh(size, reason) for size in tape.shapes[given]), constant=True)
        return values[given]

    for operation in tape.needed():
        named = {name: value(given) for name, given in operation.named.items()}
        shapes = [tape.shapes[number] for number in operation.results]
        call = Call(operation.name, named, shapes, facts, operation.tags, operation.scaled)
        constant = all(one.constant for one in call.values())
        for number, dims in zip(operation.results, _applied(call, declared), strict=False):
            values[number] = Value(dims, True) if constant else _varying(dims)
        if operation.memory is not None and not constant and values[operation.memory].constant:  # it was written to
            for number, old in values.items():
                if tape.memory[number] == tape.memory[operation.memory]:
                    values[number] = _varying(old.dims)
    for number in tape.outputs:
        pin_all(value(number).dims, "it is part of the model's output")
    return Traced(own, facts)


def _varying(dims: tuple[Dim, ...]) -> Value:
    return Value(tuple(Dim(dim.axis) for dim in dims))


def _applied(call: Call, declared: Mapping[str, rules.Rule]) -> list[tuple[Dim, ...]]:
    """Return the dimensions of what an operation returns.

    Raises:
        InputError: the rule that was declared for it fails.
    """
    said = declared.get(call.name) or declared.get(call.name.removeprefix("aten::"))
    rule = said or rules.find(call)
    if rule is None:
        return rules.unknown(call)
    where = f"{call.name} on {' and '.join(str(value.shape) for value in call.values())}"
    try:
        found = rule(call)
    except Misaligned:
        return rules.misaligned(call)
    except Exception as error:
        what = f"{type(error).__name__}: {_first_line(error)}"
        if said is not None:
            raise InputError(f"rules: the rule that was declared for {where} failed: {what}") from error
        return rules.unknown(call, f"its rule does not cover this use ({what})")
    shapes = [tuple(dim.axis.size for dim in dims) for dims in found]
    if shapes != call.shapes[: len(shapes)] or len(shapes) < len(call.shapes):
        if said is not None:
            raise InputError(f"rules: the rule that was declared for {where} returns {shapes}, and the results are {call.shapes}")
        return rules.unknown(call, f"its rule does not cover this use (it returns {shapes}, and the results are {call.shapes})")
    return found


def _like(name: str, said: str | rules.Rule) -> rules.Rule:
    if not isinstance(said, str):
        return said
    known = {"pointwise": rules.pointwise, "same": rules.same}.get(said) or rules.named(said.removeprefix("aten::"))
    if known is None:
        raise InputError(f"rules: {name!r} is declared to be like {said!r}, which has no rule; say pointwise, same, or an ATen operation")
    return known
