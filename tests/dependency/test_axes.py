"""Axes against explicit lists of indices: every expression is written out, index by index.

Leaves of one index are left out of comparisons between expressions: nothing can be removed from them, and products drop them.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niwaki.dependency.axes import Axis, Misaligned, concatenated, factor, mark, part_of, pin, positions, product, split, unify

Entry = frozenset[tuple[int, int]]
"""Which units an entry belongs to: (leaf, index)."""


def written_out(axis: Axis) -> list[Entry]:
    """Enumerate an expression: a sum one after the other, a product as nested loops."""
    root = axis.root
    if root.kind == "leaf":
        return [frozenset({(id(root), i)}) for i in range(root.size)]
    parts = [written_out(part) for part in root._parts]
    if root.kind == "sum":
        return list(itertools.chain(*parts))
    return [frozenset().union(*combination) for combination in itertools.product(*parts)]


def from_positions(axis: Axis) -> list[Entry]:
    entries: list[set[tuple[int, int]]] = [set() for _ in range(axis.size)]
    for leaf, units in positions(axis):
        assert units.shape == (axis.size,)
        assert units.dtype == torch.int64
        for entry, unit in zip(entries, units.tolist(), strict=True):
            if unit >= 0:
                entry.add((id(leaf), unit))
    return [frozenset(entry) for entry in entries]


def removable(axis: Axis) -> list[Entry]:
    """Write an expression out without its leaves of one index."""
    single = {id(leaf) for leaf in axis.leaves() if leaf.size == 1}
    return [frozenset(one for one in entry if one[0] not in single) for entry in written_out(axis)]


def check(*axes: Axis) -> None:
    for axis in axes:
        assert len(written_out(axis)) == axis.size
        assert from_positions(axis) == written_out(axis)


expressions = st.recursive(
    st.sampled_from([2, 3, 4, 6, 8, 12]).map(Axis),
    lambda inner: st.lists(inner, min_size=2, max_size=3).flatmap(lambda parts: st.sampled_from([product(parts), concatenated(parts)])),
    max_leaves=5,
).filter(lambda axis: axis.size <= 400)


@given(expressions)
def test_positions_of_random_expressions(axis: Axis) -> None:
    check(axis)


@given(expressions, st.data())
def test_split_is_the_first_indices_and_the_rest(axis: Axis, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, axis.size - 1))
    try:
        first, rest = split(axis, size)
    except Misaligned:
        return check(axis)
    check(axis, first, rest)
    assert (first.size, rest.size) == (size, axis.size - size)
    assert removable(first) + removable(rest) == removable(axis)


@given(expressions, st.data())
def test_part_of_is_a_slice(axis: Axis, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, axis.size - 1))
    stop = data.draw(st.integers(start + 1, axis.size))
    try:
        part = part_of(axis, start, stop)
    except Misaligned:
        return
    assert removable(part) == removable(axis)[start:stop]


@given(expressions, st.data())
def test_factor_is_rows_and_columns(axis: Axis, data: st.DataObject) -> None:
    inner_size = data.draw(st.sampled_from([n for n in range(1, axis.size + 1) if axis.size % n == 0]))
    try:
        outer, inner = factor(axis, inner_size)
    except Misaligned:
        return check(axis)
    check(axis)
    rows, columns = removable(outer), removable(inner)
    assert (len(rows), len(columns)) == (axis.size // inner_size, inner_size)
    assert [row | column for row in rows for column in columns] == removable(axis)


@given(st.lists(expressions, min_size=2, max_size=4), st.data())
def test_unified_axes_are_written_out_alike_whatever_else_happens(pool: list[Axis], data: st.DataObject) -> None:
    pairs = []
    for _ in range(4):
        a, b = data.draw(st.sampled_from(pool)), data.draw(st.sampled_from(pool))
        if a.size != b.size:
            b = Axis(a.size)
            pool.append(b)
        if data.draw(st.booleans()) and b.size % 2 == 0 and b.kind == "leaf":
            factor(b, 2)
        try:
            unify(a, b)
        except Misaligned:
            continue
        pairs.append((a, b))
    check(*pool)
    for a, b in pairs:
        assert removable(a) == removable(b)


def test_a_view_as_heads_refines_what_it_was_unified_with() -> None:
    rows, columns = Axis(12), Axis(12)
    unify(rows, columns)
    heads, inner = factor(rows, 4)
    assert (heads.size, inner.size) == (3, 4)
    [(_, by_head), (_, by_dim)] = positions(columns)
    assert by_head.tolist() == [i // 4 for i in range(12)]
    assert by_dim.tolist() == [i % 4 for i in range(12)]


def test_gates_that_are_multiplied_share_their_units() -> None:
    rows, hidden = Axis(12), Axis(3)
    before = rows
    for _ in range(3):
        gate, rows = split(rows, 3)
        unify(gate, hidden)
    unify(rows, hidden)
    [*same] = positions(before)
    assert len({leaf for leaf, _ in same}) == 1
    together = torch.stack([units for _, units in same]).amax(dim=0)
    assert together.tolist() == [0, 1, 2] * 4


def test_a_product_with_itself_lists_a_leaf_twice() -> None:
    axis = Axis(2)
    [(a, rows), (b, columns)] = positions(product([axis, axis]))
    assert a is b
    assert rows.tolist() == [0, 0, 1, 1]
    assert columns.tolist() == [0, 1, 0, 1]


def test_reasons_and_marks_survive_refinement_and_unification() -> None:
    a, b = Axis(6), Axis(6)
    pin(a, "first")
    pin(a, "second")
    mark(b, "seen")
    factor(b, 3)
    unify(a, b)
    assert {leaf.pinned for leaf in a.leaves()} == {"first"}
    assert {leaf.marks for leaf in b.leaves()} == {frozenset({"seen"})}


def test_axes_of_one_index_and_empty_products() -> None:
    unify(product([]), product([]))
    unify(Axis(1), product([]))
    assert positions(product([])) == []
    assert product([]).size == 1


def test_what_does_not_fit_is_misaligned() -> None:
    with pytest.raises(Misaligned):
        unify(Axis(2), Axis(3))
    with pytest.raises(Misaligned):
        split(product([Axis(2), Axis(3)]), 2)
    with pytest.raises(Misaligned):
        factor(concatenated([Axis(2), Axis(4)]), 3)
    with pytest.raises(Misaligned):
        unify(product([Axis(2), Axis(3)]), concatenated([Axis(2), Axis(4)]))
