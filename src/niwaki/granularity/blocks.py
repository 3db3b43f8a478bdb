"""Pieces of one tensor: single weights, N:M patterns, blocks, vectors, kernels, and the channels of that tensor alone."""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from niwaki.component import construct
from niwaki.errors import InputError
from niwaki.granularity.base import Granularity, join, split
from niwaki.layout import Layout

Remainder = Literal["error", "pad", "skip"]
"""What to do with a dimension that the pieces do not divide: refuse, let the last piece be smaller, or leave the tensor dense."""

Role = Literal["stack", "group", "output", "input", "kernel"]


class Element(Granularity):
    """Single weights: unstructured sparsity.

    >>> from niwaki.layout import Layout
    >>> Element().grid(Layout(("output", "input"), (2, 3)))
    (2, 3)
    """

    name = "element"
    equation = "piece = one weight"
    source = "Hagiwara 1993; Han et al. 2015"

    def block(self, layout: Layout) -> tuple[int, ...]:
        """Return 1 along every dimension."""
        return (1,) * len(layout.shape)


class Divided(Granularity):
    """Pieces of a given length, which may fail to divide a dimension. A base class, itself not registered."""

    remainder: Remainder = "error"

    @classmethod
    def from_text(cls, text: str) -> Self | None:
        """Read the shorthands ``2:4`` (N:M along the inputs) and ``4x1`` (a block of 4 outputs by 1 input); None for other texts."""
        match = re.fullmatch(r"\s*(\d+)\s*([:x])\s*(\d+)\s*", text)
        if match is None:
            return None
        kind, first, second = (PatternNM, "n", "m") if match[2] == ":" else (Block, "rows", "columns")
        found = construct(kind, {first: match[1], second: match[3]}, f"granularity {text!r}")
        return found  # type: ignore[return-value]  # another class of the slot than the one that was asked

    def lengths(self) -> Mapping[str, int | None]:
        """Return how far a piece reaches along the last dimension of each role; None: all the way. Roles left out: 1."""
        raise NotImplementedError

    def block(self, layout: Layout) -> tuple[int, ...]:
        """Return the lengths, each along the last dimension of its role."""
        return _along(layout, self.lengths())

    def check(self, layout: Layout, name: str) -> bool:
        """Return whether every length divides its dimension, or may leave a rest; False when the tensor must stay dense.

        Raises:
            InputError: a length does not divide its dimension, and ``remainder`` is ``error``.
        """
        for role, length in self.lengths().items():
            at = _last(layout, role)
            size = 1 if at is None else layout.shape[at]
            if length is None or size % length == 0:
                continue
            if self.remainder == "error":
                raise InputError(
                    f"granularity {self.name}: {length} does not divide the {role} dimension of {name!r}, which is {size};"
                    " set remainder: pad (the last piece is smaller) or remainder: skip (the tensor stays dense)"
                )
            if self.remainder == "skip":
                return False
        return True


class PatternNM(Divided):
    """At most N of M consecutive weights along one dimension: semi-structured sparsity.

    Groups do not cross any other dimension; the positions of a kernel count as one dimension, in row-major order. Pieces are single
    weights: the pattern acts through ``protected``, which names the N that stay. A short last group of r weights keeps min(N, r).

    Source: NVIDIA 2020 (2:4); along the kernel: Niu et al. 2020 (4 of the 9 positions of a kernel).

    >>> import torch
    >>> from niwaki.layout import Layout
    >>> PatternNM(n=2, m=4).protected(torch.tensor([[3.0, 1.0, 1.0, 0.0]]), Layout(("output", "input"), (1, 4)))
    tensor([[ True,  True, False, False]])
    """

    name = "n_m"
    equation = "in each group of M weights at most N are kept"
    source = "NVIDIA 2020"

    n: int = Field(ge=1)
    m: int = Field(ge=1)
    dimension: Role = "input"

    @model_validator(mode="after")
    def _at_most_all(self) -> Self:
        if self.n > self.m:
            raise InputError(f"N:M keeps N of M weights, so N must not exceed M, got {self.n}:{self.m}")
        return self

    @property
    def sparsity(self) -> float:
        """``1 - N / M``."""
        return 1 - self.n / self.m

    def lengths(self) -> Mapping[str, int | None]:
        """Return the length of a group."""
        return {self.dimension: self.m}

    def block(self, layout: Layout) -> tuple[int, ...]:
        """Return 1 along every dimension: the pieces are single weights."""
        return (1,) * len(layout.shape)

    def check(self, layout: Layout, name: str) -> bool:
        """Return whether M divides the dimension, or may leave a rest; False when the tensor must stay dense.

        Raises:
            InputError: M does not divide the dimension, and ``remainder`` is ``error``.
        """
        return super().check(_one_kernel_dimension(layout), name)

    def protected(self, scores: Tensor, layout: Layout) -> Tensor:
        """Return which weights are among the N best of their group of M; equal scores keep the lower flat index.

        ``scores``: any float dtype, one for each weight. Returns bool of shape ``layout.shape``, contiguous.
        """
        view = _one_kernel_dimension(layout)
        block = _along(view, self.lengths())
        at = _last(view, self.dimension)
        # Adding +0.0 turns -0.0 into +0.0, which sorting by bits would tell apart.
        groups = split(scores.to(torch.float64) + 0.0, view.shape, block, -torch.inf)
        axis = 1 if at is None else 2 * at + 1
        best = groups.argsort(dim=axis, descending=True, stable=True).narrow(axis, 0, min(self.n, groups.shape[axis]))
        kept = torch.zeros(groups.shape, dtype=torch.bool, device=groups.device).scatter_(axis, best, True)
        return join(kept, view.shape).reshape(layout.shape)


class Block(Divided):
    """Blocks of ``rows`` outputs by ``columns`` inputs, at one position of the kernel, within one group and one stacked matrix.

    Source: Narang et al. 2017; Kalchbrenner et al. 2018 (16x1).

    >>> from niwaki.layout import Layout
    >>> Block(rows=4, columns=1).grid(Layout(("output", "input"), (8, 3)))
    (2, 3)
    """

    name = "block"
    equation = "piece = rows x columns weights"
    source = "Narang et al. 2017"

    rows: int = Field(ge=1)
    columns: int = Field(ge=1)

    def lengths(self) -> Mapping[str, int | None]:
        """Return the rows along the outputs and the columns along the inputs."""
        return {"output": self.rows, "input": self.columns}


class Vector(Divided):
    """Runs of ``length`` consecutive weights along one dimension; without a length, the whole dimension.

    Along ``kernel`` they are rows of the kernel (its last dimension). The whole ``input`` is a stripe (one filter at one kernel
    position), the whole ``output`` one position in all filters.

    Source: Mao et al. 2017; stripes: Meng et al. 2020; whole outputs: Lebedev & Lempitsky 2015.

    >>> from niwaki.layout import Layout
    >>> Vector(dimension="kernel").grid(Layout(("output", "input", "kernel", "kernel"), (8, 3, 5, 5)))
    (8, 3, 5, 1)
    """

    name = "vector"
    equation = "piece = length consecutive weights along a dimension"
    source = "Mao et al. 2017"

    length: int | None = Field(default=None, ge=1)
    dimension: Role = "input"

    def lengths(self) -> Mapping[str, int | None]:
        """Return the length along the dimension."""
        return {self.dimension: self.length}


class Kernel(Granularity):
    """Whole kernels: all that connects one input channel with one output channel. Without kernel dimensions, single weights.

    >>> from niwaki.layout import Layout
    >>> Kernel().grid(Layout(("output", "input", "kernel", "kernel"), (8, 4, 3, 3)))
    (8, 4, 1, 1)
    """

    name = "kernel"
    equation = "piece = the kernel of one input and one output channel"
    source = "Mao et al. 2017"

    def block(self, layout: Layout) -> tuple[int, ...]:
        """Return the whole of the kernel dimensions, 1 elsewhere."""
        return _whole(layout, "kernel")


class OutputChannel(Granularity):
    """All weights into one output: a neuron, filter or output channel, or a hidden unit with all its gates.

    Outputs of stacked matrices are separate (query, key and value of attention), except where output *i* of all of them is one unit
    (the gates of an LSTM or GRU).

    >>> from niwaki.layout import Layout
    >>> OutputChannel().grid(Layout(("group", "input", "output", "kernel"), (2, 4, 3, 5)))
    (2, 1, 3, 1)
    """

    name = "output_channel"
    equation = "piece = all weights into one output channel"
    source = "Li et al. 2017"

    def block(self, layout: Layout) -> tuple[int, ...]:
        """Return the whole of the input and kernel dimensions, and of a shared stack; 1 elsewhere."""
        return _whole(layout, "input", "kernel", *_shared(layout))


class InputChannel(Granularity):
    """All weights out of one input channel; with groups, into the outputs of its group.

    Inputs of stacked matrices are separate (query, key and value of attention), except where the stack is shared (the gates of an
    LSTM or GRU).

    >>> from niwaki.layout import Layout
    >>> InputChannel().grid(Layout(("output", "input"), (8, 3)))
    (1, 3)
    """

    name = "input_channel"
    equation = "piece = all weights out of one input channel"
    source = "Wen et al. 2016"

    def block(self, layout: Layout) -> tuple[int, ...]:
        """Return the whole of the output and kernel dimensions, and of a shared stack; 1 elsewhere."""
        return _whole(layout, "output", "kernel", *_shared(layout))


def _shared(layout: Layout) -> tuple[str, ...]:
    return ("stack",) if layout.shared_stack else ()


def _whole(layout: Layout, *roles: str) -> tuple[int, ...]:
    """Return a block that takes the whole of every dimension with one of these roles, and 1 of the others."""
    return tuple(max(size, 1) if role in roles else 1 for role, size in zip(layout.roles, layout.shape, strict=True))


def _along(layout: Layout, lengths: Mapping[str, int | None]) -> tuple[int, ...]:
    """Return a block of the given length (None: the whole) along the last dimension of each role in ``lengths``, and 1 elsewhere."""
    block = [1] * len(layout.shape)
    for role, length in lengths.items():
        at = _last(layout, role)
        if at is not None:
            block[at] = max(layout.shape[at], 1) if length is None else length
    return tuple(block)


def _last(layout: Layout, role: str) -> int | None:
    """Return the index of the last dimension with this role."""
    return max((i for i, r in enumerate(layout.roles) if r == role), default=None)


def _one_kernel_dimension(layout: Layout) -> Layout:
    """Return the layout with the kernel's dimensions, always the last ones, as one."""
    if not layout.kernel:
        return layout
    before = len(layout.shape) - len(layout.kernel)
    return replace(layout, roles=(*layout.roles[:before], "kernel"), shape=(*layout.shape[:before], prod(layout.kernel)))
