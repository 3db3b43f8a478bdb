"""Dependency groups: which entries of which tensors can only be removed together.

A group is a list of *units* (channels, heads, blocks). Each unit owns entries of one dimension of several tensors: rows of the weights
that make it, columns of those that read it, and its places in biases, normalizations and buffers that ride along.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, overload

from torch import nn

from niwaki.dependency.axes import Axis, Misaligned, pin, positions, unify
from niwaki.dependency.layers import find_layers
from niwaki.dependency.member import COLUMNS, Group, Member, Role
from niwaki.dependency.trace import Declared, Example, Traced, trace
from niwaki.errors import InputError, did_you_mean
from niwaki.granularity import Kind
from niwaki.masks import canonical_name

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class Groups(Sequence[Group]):
    """The dependency groups of a model, in the order of its parameters.

    Printed, they are a table. A person can forbid removal (:meth:`veto`), state that dimensions go together (:meth:`couple`), and write
    notes (:meth:`annotate`); groups are then formed anew.

    Attributes:
        notes: what was seen while the model ran, such as operations without a rule.
    """

    def __init__(self, traced: Traced, layers: Sequence[Group] = ()) -> None:
        self._traced, self._layers = traced, list(layers)
        self._vetoes: dict[str, str] = {}
        self._words: dict[str, str] = {}
        self.notes: list[str] = list(traced.facts.notes)
        for name, why in traced.facts.unknown.items():
            self.notes.append(
                f"{name} {why}, so nothing that it touches can be removed; say what it is like with"
                f" find_groups(..., rules={{{name!r}: 'pointwise'}}), or name what goes together with couple()"
            )
        self._groups = self._form()

    @overload
    def __getitem__(self, index: int | str) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | str | slice) -> Group | list[Group]:
        """Return a group by its place or its name."""
        if isinstance(index, str):
            found = next((group for group in self._groups if group.name == index), None)
            if found is None:
                raise InputError(f"groups: no group is called {index!r}; {did_you_mean(index, [group.name for group in self])}")
            return found
        return self._groups[index]

    def __len__(self) -> int:
        return len(self._groups)

    def __repr__(self) -> str:
        return f"Groups({len(self)} groups, {len(self.removable)} removable)"

    def __str__(self) -> str:
        return table(self._groups)

    @property
    def removable(self) -> list[Group]:
        """Those of which units can be removed."""
        return [group for group in self._groups if group.removable]

    def of(self, name: str, dim: int | None = None) -> list[Group]:
        """Return the groups that have entries in a tensor, or in one dimension of it."""
        return [g for g in self._groups if any(m.name == name and dim in (None, m.dim) for m in g.members)]

    # ------------------------------------------------------------------ editing

    def veto(self, pattern: str, why: str = "vetoed") -> Groups:
        """Forbid removal from the groups whose name, or one of whose tensors, matches a glob; return the groups themselves.

        Raises:
            InputError: the pattern matches nothing.
        """
        self._matching(pattern)
        self._vetoes[pattern] = why
        self._groups = self._form()
        return self

    def annotate(self, pattern: str, note: str) -> Groups:
        """Write a note to the groups that match a glob; return the groups themselves."""
        self._matching(pattern)
        self._words[pattern] = note
        self._groups = self._form()
        return self

    def couple(self, first: tuple[str, int], second: tuple[str, int]) -> Groups:
        """State that two dimensions, each a tensor's name and the dimension's number, go together; return the groups themselves.

        For couplings that cannot be seen, such as those inside an operation without a rule.

        Raises:
            InputError: a dimension that no tensor has, sizes that differ, or one is vetoed and the other is not.
        """
        a, b = self._axis(first), self._axis(second)
        if a.size != b.size:
            raise InputError(
                f"couple: {first[0]} has {a.size} entries along dimension {first[1]}, and {second[0]} {b.size} along {second[1]}"
            )
        vetoed = [next((p for p in self._vetoes for g in self.of(*one) if _matches(g, p)), None) for one in (first, second)]
        if None in vetoed and vetoed != [None, None]:
            held, free, pattern = (first[0], second[0], vetoed[0]) if vetoed[0] else (second[0], first[0], vetoed[1])
            raise InputError(
                f"couple: the veto {pattern!r} ({self._vetoes[str(pattern)]}) forbids removal from {held}, which contradicts coupling it"
                f" with {free}, that is free; veto {free!r} as well, or take the veto back"
            )
        try:
            unify(a, b)
        except Misaligned as error:
            raise InputError(f"couple: {first} and {second} are made of parts that do not fit each other: {error}") from None
        self._groups = self._form()
        return self

    def allow(self, pattern: str) -> Groups:
        """Take a veto back; return the groups themselves."""
        if pattern not in self._vetoes:
            raise InputError(f"allow: there is no veto {pattern!r}; vetoes: {', '.join(self._vetoes) or 'none'}")
        del self._vetoes[pattern]
        self._groups = self._form()
        return self

    def _axis(self, dimension: tuple[str, int]) -> Axis:
        name, dim = dimension
        dims = self._traced.dims.get(name)
        if dims is None:
            raise InputError(f"couple: the model has no tensor {name!r}; {did_you_mean(name, list(self._traced.dims))}")
        if not 0 <= dim < len(dims):
            raise InputError(f"couple: {name!r} has {len(dims)} dimensions, so there is no dimension {dim}")
        return dims[dim].axis

    def _matching(self, pattern: str) -> list[Group]:
        found = [group for group in self._groups if _matches(group, pattern)]
        if not found:
            names = [group.name for group in self._groups]
            raise InputError(f"groups: {pattern!r} matches no group and no tensor of one; {did_you_mean(pattern, names)}")
        return found

    # ------------------------------------------------------------------ forming

    def _form(self) -> list[Group]:
        groups = [*_formed(self._traced), *self._layers]
        for pattern, why in self._vetoes.items():
            groups = [replace(g, reason=why) if _matches(g, pattern) and g.removable else g for g in groups]
        for pattern, note in self._words.items():
            groups = [replace(g, note=note) if _matches(g, pattern) else g for g in groups]
        return groups


def find_groups(
    model: nn.Module | ExportedProgram, example: Example | None = None, *, rules: Declared | None = None, layers: bool = False
) -> Groups:
    """Return the dependency groups of a model, from one forward pass.

    Args:
        model: left as it was. An exported program (``torch.export``) is taken too.
        example: positional arguments (a tuple, or the only one) or named ones (a mapping); an exported program brings its own.
        rules: operation -> the ATen operation it is like (``pointwise`` and ``same`` too), or a rule of one's own.
        layers: whether to look for residual blocks that can be taken out as a whole too; runs the blocks once more.

    Raises:
        InputError: the model does not run on the example, or a rule is wrong.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> print(find_groups(model, torch.ones(1, 3)))
    group  kind     units  made by  read by  along  removable
    0      channel  4      0        2        1      yes
    2      channel  2      2        -        1      no: it is part of the model's output
    """
    if not isinstance(model, nn.Module):
        args, kwargs = model.example_inputs or ((), {})
        if example is None and not (args and kwargs):
            example = args or kwargs
        model = model.module()
    if example is None:
        raise InputError("example: arguments of a forward pass are needed, such as (torch.randn(1, 3, 32, 32),)")
    traced = trace(model, example, rules)
    _pin_attention(model, traced)
    return Groups(traced, find_layers(model, example) if layers else ())


def _pin_attention(model: nn.Module, traced: Traced) -> None:
    """Pin what ``nn.MultiheadAttention`` computes from the width of its inputs, and so cannot have fewer of."""
    rigid = {"in_proj_weight": (0, 1), "q_proj_weight": (0, 1), "k_proj_weight": (0,), "v_proj_weight": (0,), "out_proj.weight": (0, 1)}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for own, chosen in rigid.items():
                dims = traced.dims.get(canonical_name(f"{path}.{own}".lstrip(".")), ())
                for dim in chosen[: len(dims)]:
                    pin(dims[dim].axis, "torch.nn.MultiheadAttention needs heads × dimensions = inputs")


def _matches(group: Group, pattern: str) -> bool:
    names = {group.name, *(member.name for member in group.members)}
    return any(name == pattern or fnmatchcase(name, pattern) or name.startswith(f"{pattern}.") for name in names)


HIDDEN = ("it counts positions of a kernel",)
"""Reasons of axes that nobody would think of removing."""

HIDDEN_FACTORS = ("its entries are taken apart", "it is picked by its index", "it counts what is stacked")
"""The same, of factors of a dimension: such as queries, keys and values in one weight."""


def _formed(traced: Traced) -> list[Group]:
    roles: dict[tuple[str, int, Axis], set[Role]] = {}
    for (name, dim), axis, role in traced.facts.roles:
        for leaf in axis.leaves():
            roles.setdefault((name, dim, leaf), set()).add(role)  # type: ignore[arg-type]
    members: dict[Axis, list[Member]] = {}
    inner: set[Axis] = set()  # the inner factor of two that count products of activations: several queries for a key
    within: set[Axis] = set()  # what is inside heads
    alone: set[Axis] = set()  # what is a whole dimension, or a term of one
    outer: set[Axis] = set()  # the outer factor of channels of which the inner ones can be removed too
    for name, dims in traced.dims.items():
        for dim, (axis, _) in enumerate(dims):
            alone |= {part.root for part in (axis.parts if axis.kind == "sum" else [axis])}
            for leaf, units in positions(axis):
                for role in sorted(roles.get((name, dim, leaf), {"along"}), reverse=True):
                    members.setdefault(leaf, []).append(Member(name, dim, units, role))
            for factors in _products(axis):
                batched = [f for f in factors if _has(f, "batched")]
                inner |= {leaf for f in batched[1:] for leaf in f.leaves()}
                within |= {leaf for f in factors if batched and f not in batched for leaf in f.leaves()}
                if _has(factors[0], "groups") and any(not leaf.pinned for f in factors[1:] for leaf in f.leaves()):
                    outer |= set(factors[0].leaves())
    groups: list[Group] = []
    taken: set[str] = set()
    for leaf, found in members.items():
        made = [m for m in found if m.role == "output"]
        if leaf.size < 2 or leaf.pinned in HIDDEN or (leaf.pinned in HIDDEN_FACTORS and leaf not in alone):
            continue
        if not any(m.role != "along" for m in found) or (leaf.pinned and not made):
            continue
        kind: Kind = "channel"
        if leaf.marks & {"contracted", "inside"} or leaf in within:
            kind = "head_dim"
        elif "batched" in leaf.marks:
            kind = "query_head" if leaf in inner else "head"
        elif leaf in outer - alone:
            kind = "channel_group"
        name = _name((made or found)[0], kind, taken)
        taken.add(name)
        reason = leaf.pinned or ("" if made else "no weight makes it")
        if not reason and "shifted" in leaf.marks and leaf.marks & {"contracted", "summed"}:
            reason = "it is summed over, and need not be zero there once masked"
        groups.append(Group(name, kind, leaf.size, tuple(found), reason, summed=bool(leaf.marks & {"contracted", "summed"})))
    return groups


def _products(axis: Axis) -> Iterator[list[Axis]]:
    if axis.kind == "product" and axis.parts:
        yield axis.parts
    if axis.kind != "leaf":
        for part in axis.parts:
            yield from _products(part)


def _has(axis: Axis, what: str) -> bool:
    return any(what in leaf.marks and not leaf.pinned for leaf in axis.leaves())


def _name(first: Member, kind: Kind, taken: set[str]) -> str:
    path, _, own = first.name.rpartition(".")
    name = path if own in ("weight", "bias") and path else first.name
    name = name if kind == "channel" else f"{name}:{kind}"
    if name in taken:
        entries = (first.units >= 0).nonzero().flatten()
        name = f"{name}[{int(entries[0])}:{int(entries[-1]) + 1}]"
    while name in taken:
        name += "'"
    return name


def table(groups: Sequence[Group]) -> str:
    """Return groups as text: what makes their units, what reads them, how many tensors ride along, and whether units can be removed."""
    rows = [COLUMNS, *(group.row() for group in groups)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
