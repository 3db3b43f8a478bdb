"""What a trace knows of a tensor: the axis of every dimension, and which dimensions of which parameters it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from niwaki.dependency.axes import Axis, Misaligned, mark, pin, product, unify

Source = tuple[str, int]
"""A dimension of a parameter or buffer."""


class Dim(NamedTuple):
    """One dimension of a value; ``sources`` are the parameter dimensions it consists of, where the value depends on parameters alone."""

    axis: Axis
    sources: frozenset[Source] = frozenset()


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the trace.

    Attributes:
        dims: one for each dimension; of size 1, the empty product.
        constant: whether it depends on parameters and constants alone, not on the inputs.
    """

    dims: tuple[Dim, ...]
    constant: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes."""
        return tuple(dim.axis.size for dim in self.dims)


def fresh(size: int, pinned: str = "") -> Dim:
    """Return a dimension that has nothing to do with any other."""
    return Dim(product([]) if size == 1 else Axis(size, pinned))


@dataclass
class Facts:
    """What a trace collects besides the axes.

    Attributes:
        roles: parameter dimension, its axis, and ``output`` or ``input``: that a product makes it, or reads it.
        notes: sentences for the user.
        unknown: operations without a rule for what they were used for -> why, and the shapes that were first seen.
        ranks: number of dimensions of every parameter; 0 for buffers.
        placed: dimensions of parameters that were multiplied with other parameters.
    """

    roles: list[tuple[Source, Axis, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    placed: set[Source] = field(default_factory=set)


@dataclass
class Call:
    """One operation: its arguments, with a :class:`Value` for every tensor, and the shapes of what it returns.

    Attributes:
        name: such as ``aten::add`` (without the overload).
        named: all arguments by name.
        shapes: of the tensors that it returns, in order.
        facts: of the whole trace.
        tags: of the operation, such as ``pointwise``.
        scaled: whether it is part of an attention that takes its scale from the number of dimensions inside heads.
    """

    name: str
    named: dict[str, Any]
    shapes: list[tuple[int, ...]]
    facts: Facts
    tags: frozenset[str] = frozenset()
    scaled: bool = False

    def values(self) -> list[Value]:
        """Return the tensors among the arguments, those in lists too."""
        found: list[Value] = []
        for argument in self.named.values():
            entries = argument if isinstance(argument, list | tuple) else [argument]
            found += [entry for entry in entries if isinstance(entry, Value)]
        return found

    def couple(self, a: Axis, b: Axis) -> None:
        """Unify two axes; where that is impossible, pin both."""
        try:
            unify(a, b)
        except Misaligned:
            reason = f"{self.name} aligns parts of it that do not fit each other"
            pin(a, reason)
            pin(b, reason)

    def contract(self, a: Value, i: int, b: Value, j: int) -> None:
        """Note that a sum of products runs over dimension ``i`` of ``a`` and ``j`` of ``b``."""
        self.couple(a.dims[i].axis, b.dims[j].axis)
        if self.scaled and len(a.dims) > 2:
            pin(a.dims[i].axis, "attention is scaled by their number")
        if not a.constant and not b.constant:
            mark(a.dims[i].axis, "contracted")
        elif not a.constant or not b.constant:
            self.role((a if a.constant else b).dims[i if a.constant else j], "input")
        else:
            reads = self.reads(b, j)
            self._place(a.dims[i], "output" if reads else "input")
            self._place(b.dims[j], "input" if reads else "output")

    def reads(self, weight: Value, i: int) -> bool:
        """Return whether the second of two constant factors is a weight that reads the first (``x @ W.T``), not part of one (``B @ A``)."""
        places = [place for _, place in weight.dims[i].sources]
        return bool(places) and 0 not in places

    def role(self, dim: Dim, role: str) -> None:
        """Note what a product does with a parameter's dimension; what a product of constants did with it before counts."""
        self.facts.roles += [(source, dim.axis, role) for source in dim.sources if source not in self.facts.placed]

    def _place(self, dim: Dim, role: str) -> None:
        self.role(Dim(dim.axis, frozenset(source for source in dim.sources if self.facts.ranks[source[0]] > 1)), role)
        self.facts.placed |= dim.sources


def pin_all(dims: Sequence[Dim], reason: str) -> None:
    """Pin several dimensions."""
    for dim in dims:
        pin(dim.axis, reason)
