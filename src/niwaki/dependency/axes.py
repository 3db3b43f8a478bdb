"""Dimensions as expressions: which runs of indices are the same, whatever sums and products they appear in.

An :class:`Axis` is a *leaf* (indices that nothing tells apart), a *sum* of axes (concatenated) or a *product* of axes (row-major).
``unify`` states that two axes are the same run of indices; leaves are refined into sums or products as that requires:

- a view of 768 as (12, 64) refines a leaf into the product of two leaves, heads and head dimensions;
- splitting 4 H into four gates refines it into a sum, and multiplying the gates with each other unifies the four terms;
- concatenation is a sum, flattening a product, a residual sum unifies.

What is removed later are single indices of leaves; every dimension says by :func:`positions` which of its entries that means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor


class Misaligned(Exception):
    """Two axes cannot be written as sums and products of common parts."""


class Axis:
    """A run of indices. Two axes that were unified have the same :attr:`root`.

    Attributes:
        size: number of indices.
        pinned: why no index can be removed; empty when one can. Kept at leaves.
        marks: what was seen to happen along it, such as ``batched`` (it counts products of activations). Kept at leaves.
    """

    __slots__ = ("_kind", "_link", "_parts", "marks", "pinned", "size")

    def __init__(self, size: int, pinned: str = "") -> None:
        self.size = size
        self.pinned = pinned
        self.marks: frozenset[str] = frozenset()
        self._link: Axis | None = None
        self._kind = "leaf"
        self._parts: tuple[Axis, ...] = ()

    @property
    def root(self) -> Axis:
        """The axis that stands for all that were unified with this one."""
        axis = self
        while axis._link is not None:
            if axis._link._link is not None:
                axis._link = axis._link._link
            axis = axis._link
        return axis

    @property
    def kind(self) -> str:
        """``leaf``, ``sum`` or ``product``."""
        return self.root._kind

    @property
    def parts(self) -> list[Axis]:
        """The terms of a sum or the factors of a product, with nested sums in sums and products in products resolved."""
        root = self.root
        found: list[Axis] = []
        for part in root._parts:
            part = part.root
            found += part.parts if part._kind == root._kind else [part]
        return found

    def leaves(self) -> Iterator[Axis]:
        """Yield the leaves below, each as often as it occurs."""
        root = self.root
        if root._kind == "leaf":
            yield root
        for part in root._parts:
            yield from part.leaves()

    def __repr__(self) -> str:
        root = self.root
        if root._kind == "leaf":
            return f"{root.size}{'!' if root.pinned else ''}"
        return f"({(' + ' if root._kind == 'sum' else ' x ').join(map(repr, self.parts))})"


def _composed(kind: str, parts: Sequence[Axis], size: int) -> Axis:
    axis = Axis(size)
    axis._kind, axis._parts = kind, tuple(parts)
    return axis


def product(factors: Sequence[Axis]) -> Axis:
    """Return the axis of all combinations, the last factor running fastest; factors of size 1 say nothing and are dropped."""
    factors = [factor for factor in factors if factor.size != 1]
    return factors[0] if len(factors) == 1 else _composed("product", factors, prod(factor.size for factor in factors))


def concatenated(terms: Sequence[Axis]) -> Axis:
    """Return the axis of one term after the other."""
    terms = [term for term in terms if term.size]
    return terms[0] if len(terms) == 1 else _composed("sum", terms, sum(term.size for term in terms))


def pin(axis: Axis, reason: str) -> None:
    """State that no index of the axis can be removed. The first reason stays."""
    for leaf in axis.leaves():
        leaf.pinned = leaf.pinned or reason


def mark(axis: Axis, what: str) -> None:
    """Note what was seen to happen along an axis."""
    for leaf in axis.leaves():
        leaf.marks |= {what}


def _refine(leaf: Axis, kind: str, parts: Sequence[Axis]) -> None:
    for part in parts:
        part.pinned, part.marks = leaf.pinned, leaf.marks
    leaf._kind, leaf._parts = kind, tuple(parts)


def _link(leaf: Axis, other: Axis) -> None:
    leaf._link = other
    if leaf.pinned:
        pin(other, leaf.pinned)
    for what in leaf.marks:
        mark(other, what)


def unify(a: Axis, b: Axis) -> None:
    """State that two axes of the same size are the same indices.

    Raises:
        Misaligned: they have no common refinement; some of their parts may have been unified.
    """
    a, b = a.root, b.root
    if a is b:
        return
    if a.size != b.size:
        raise Misaligned(f"{a.size} and {b.size}")
    if a._kind == "leaf":
        _link(a, b)
    elif b._kind == "leaf":
        _link(b, a)
    elif a.size == 1:  # two empty products
        return
    elif a._kind == b._kind == "product":
        _unify_products(a, b)
    else:
        _unify_terms(a, b)


def _unify_products(a: Axis, b: Axis) -> None:
    inner = min(a.parts[-1].size, b.parts[-1].size)
    outer_a, inner_a = factor(a, inner)
    outer_b, inner_b = factor(b, inner)
    unify(inner_a, inner_b)
    unify(outer_a, outer_b)


def _unify_terms(a: Axis, b: Axis) -> None:
    """Unify a sum with a sum or a product, term by term."""
    left = a.parts if a._kind == "sum" else [a]
    right = b.parts if b._kind == "sum" else [b]
    while left:
        x, y = left.pop(0), right.pop(0)
        if x.size > y.size:
            x, rest = split(x, y.size)
            left.insert(0, rest)
        elif y.size > x.size:
            y, rest = split(y, x.size)
            right.insert(0, rest)
        unify(x, y)


def split(axis: Axis, size: int) -> tuple[Axis, Axis]:
    """Return the first ``size`` indices of an axis and the rest, refining it.

    Raises:
        Misaligned: the cut goes through the inner part of a product.
    """
    axis = axis.root
    assert 0 < size < axis.size
    if axis._kind == "leaf":
        _refine(axis, "sum", (Axis(size), Axis(axis.size - size)))
        return axis._parts[0], axis._parts[1]
    if axis._kind == "product":
        first, *others = axis.parts
        inner = prod(part.size for part in others)
        if size % inner:
            raise Misaligned(f"{size} of {axis!r}")
        before, after = split(first, size // inner)
        return product([before, *others]), product([after, *others])
    taken: list[Axis] = []
    left = axis.parts
    missing = size
    while missing:
        part = left.pop(0)
        if part.size > missing:
            part, rest = split(part, missing)
            left.insert(0, rest)
        taken.append(part)
        missing -= part.size
    return concatenated(taken), concatenated(left)


def part_of(axis: Axis, start: int, stop: int) -> Axis:
    """Return the indices from ``start`` up to ``stop``."""
    if stop < axis.size:
        axis, _ = split(axis, stop)
    if start > 0:
        _, axis = split(axis, start)
    return axis


def factor(axis: Axis, inner: int) -> tuple[Axis, Axis]:
    """Return an axis as a product: the outer factor, and the inner one of the given size, refining it.

    Raises:
        Misaligned: the axis has parts that ``inner`` does not fit.
    """
    axis = axis.root
    if inner == 1:
        return axis, product([])
    if inner == axis.size:
        return product([]), axis
    if axis.size % inner:
        raise Misaligned(f"{inner} in {axis!r}")
    if axis._kind == "leaf":
        _refine(axis, "product", (Axis(axis.size // inner), Axis(inner)))
        return axis._parts[0], axis._parts[1]
    if axis._kind == "product":
        *others, last = axis.parts
        if last.size == inner:
            return product(others), last
        if last.size > inner:
            outer, found = factor(last, inner)
            return product([*others, outer]), found
        if inner % last.size:
            raise Misaligned(f"{inner} in {axis!r}")
        outer, found = factor(product(others), inner // last.size)
        return outer, product([found, last])
    outers: list[Axis] = []
    common: Axis | None = None
    for part in axis.parts:
        outer, found = factor(part, inner)
        common = common or found
        unify(common, found)
        outers.append(outer if outer.size > 1 else Axis(1, "it is one of several parts of a concatenation"))
    assert common is not None
    return concatenated(outers), common


def positions(axis: Axis) -> list[tuple[Axis, Tensor]]:
    """Return for each leaf which of its indices every entry of the axis belongs to: int64 ``[axis.size]``, -1 for none.

    A leaf that is several factors of one product is listed once for each of them.
    """
    root = axis.root
    if root._kind == "leaf":
        return [(root, torch.arange(root.size))]
    found: list[tuple[Axis, Tensor]] = []
    if root._kind == "product":
        before, after = 1, root.size
        for part in root.parts:
            after //= part.size
            found += [(leaf, units.repeat_interleave(after).repeat(before)) for leaf, units in positions(part)]
            before *= part.size
        return found
    start = 0
    for part in root.parts:
        count: dict[Axis, int] = {}
        for leaf, units in positions(part):
            nth = count[leaf] = count.get(leaf, -1) + 1
            same = [known for known, _ in found if known is leaf]
            if nth == len(same):
                found.append((leaf, torch.full((root.size,), -1)))
            whole = [units_ for known, units_ in found if known is leaf][nth]
            whole[start : start + part.size] = units
        start += part.size
    return found
