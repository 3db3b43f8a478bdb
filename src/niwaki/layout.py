"""What each dimension of a weight means, for every module class that Niwaki prunes.

A weight of shape ``[d0, d1, ...]`` is read as a view with named roles: ``stack`` (matrices stacked along the outputs, such as the
four gates of an LSTM), ``group`` (of a grouped convolution), ``output``, ``input`` and ``kernel``. The view splits dimensions but
never reorders them, so the flat index of an element is the same in the weight and in its view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from niwaki.errors import InputError

ROLES = ("stack", "group", "output", "input", "kernel")


@dataclass(frozen=True)
class Layout:
    """The roles of a weight's dimensions after splitting.

    Attributes:
        roles: one role for each dimension of the view, in memory order.
        shape: sizes of the view; its product is the number of elements of the weight.
        shared_stack: whether output *i* of all stacked matrices is one unit (the gates of an LSTM), rather than separate ones.
        embedding: whether the input is a vocabulary (excluded from the default target).
    """

    roles: tuple[str, ...]
    shape: tuple[int, ...]
    shared_stack: bool = False
    embedding: bool = False

    def __post_init__(self) -> None:
        assert len(self.roles) == len(self.shape), (self.roles, self.shape)
        assert set(self.roles) <= set(ROLES), self.roles

    @property
    def elements(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    def size(self, role: str) -> int:
        """Return the product of the sizes of all dimensions with this role (1 when there is none)."""
        return prod(n for r, n in zip(self.roles, self.shape, strict=True) if r == role)

    @property
    def outputs(self) -> int:
        """Output channels of the module: stacked matrices and groups counted."""
        return self.size("stack") * self.size("group") * self.size("output")

    @property
    def inputs(self) -> int:
        """Input channels of the module: groups counted."""
        return self.size("group") * self.size("input")

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of the kernel's dimensions, which are always the last ones; empty when there are none."""
        return tuple(n for r, n in zip(self.roles, self.shape, strict=True) if r == "kernel")


def _linear(module: nn.Module, name: str, shape: Sequence[int]) -> Layout:
    return Layout(("output", "input"), tuple(shape))


def is_transposed_linear(module: nn.Module) -> bool:
    """Return whether the module is the linear layer of Hugging Face GPT-2 (``Conv1D``), whose weight is [input, output].

    It is known by its name, so that ``transformers`` is not imported.
    """
    return any(f"{base.__module__}.{base.__qualname__}" == "transformers.pytorch_utils.Conv1D" for base in type(module).__mro__)


def _transposed_linear(module: nn.Module, name: str, shape: Sequence[int]) -> Layout:
    return Layout(("input", "output"), tuple(shape))


def _convolution(module: Any, name: str, shape: Sequence[int]) -> Layout:
    groups = module.groups
    return _grouped(("output", "input"), groups, shape)


def _transposed_convolution(module: Any, name: str, shape: Sequence[int]) -> Layout:
    return _grouped(("input", "output"), module.groups, shape)


def _grouped(order: tuple[str, str], groups: int, shape: Sequence[int]) -> Layout:
    kernel = ("kernel",) * (len(shape) - 2)
    if groups == 1:
        return Layout((*order, *kernel), tuple(shape))
    return Layout(("group", *order, *kernel), (groups, shape[0] // groups, *shape[1:]))


def _embedding(module: nn.Module, name: str, shape: Sequence[int]) -> Layout:
    return Layout(("input", "output"), tuple(shape), embedding=True)


def _attention(module: nn.Module, name: str, shape: Sequence[int]) -> Layout:
    if name == "in_proj_weight":
        return Layout(("stack", "output", "input"), (3, shape[0] // 3, shape[1]))
    return Layout(("output", "input"), tuple(shape))


def _recurrent(module: Any, name: str, shape: Sequence[int]) -> Layout:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1) if isinstance(module, nn.RNNBase) else shape[0] // int(module.hidden_size)
    if gates == 1 or name.startswith("weight_hr"):
        return Layout(("output", "input"), tuple(shape))
    return Layout(("stack", "output", "input"), (gates, shape[0] // gates, shape[1]), shared_stack=True)


Rule = Callable[[Any, str, Sequence[int]], Layout]

TABLE: list[tuple[type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[nn.Module], bool], Callable[[str], bool], Rule]] = [
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), lambda n: n == "weight", _transposed_convolution),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), lambda n: n == "weight", _convolution),
    (nn.Linear, lambda n: n == "weight", _linear),
    (is_transposed_linear, lambda n: n == "weight", _transposed_linear),
    ((nn.Embedding, nn.EmbeddingBag), lambda n: n == "weight", _embedding),
    (nn.MultiheadAttention, lambda n: n in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"), _attention),
    ((nn.RNNBase, nn.RNNCellBase), lambda n: n.startswith("weight_"), _recurrent),
]
"""Class (or what tells it), which of its own parameters are weights, and the rule that gives their layout. The first match counts."""


def layout_of(module: nn.Module, name: str, shape: Sequence[int] | torch.Size) -> Layout | None:
    """Return the layout of the module's own parameter ``name``, or None when it is not a weight that the table knows.

    ``shape`` is the shape of the parameter, which may be a shard of the whole along its first dimension.

    Raises:
        InputError: the first dimension does not split into the module's groups or stacked matrices, which only a shard's may not.
    """
    for classes, matches, rule in TABLE:
        belongs = isinstance(module, classes) if isinstance(classes, type | tuple) else classes(module)
        if belongs and matches(name):
            layout = rule(module, name, shape)
            if layout.elements != prod(shape):
                raise InputError(
                    f"{type(module).__name__}.{name} of shape {tuple(shape)} does not split into the module's groups or stacked matrices;"
                    " a shard must hold whole ones"
                )
            return layout
    return None


def is_normalization(module: nn.Module) -> bool:
    """Return whether the module is a normalization, one of torch or one that is called so (``LlamaRMSNorm``, ``LayerNorm2d``)."""
    return any("Norm" in base.__name__ for base in type(module).__mro__)


def matrix(values: Tensor, layout: Layout) -> Tensor:
    """Return a tensor in the layout's view as matrices ``[groups, rows, columns]``: what ``y = W x`` multiplies with.

    Rows are outputs (stacked ones one below the other), columns are inputs and, of a convolution, kernel positions, in the order of
    ``torch.nn.functional.unfold``. It may be a copy; :func:`from_matrix` goes back.

    >>> matrix(torch.arange(6).view(3, 2), Layout(("input", "output"), (3, 2))).tolist()
    [[[0, 2, 4], [1, 3, 5]]]
    """
    sizes = [layout.size("group"), layout.size("stack") * layout.size("output"), layout.size("input") * prod(layout.kernel)]
    return values.reshape(layout.shape).permute(_matrix_order(layout)).reshape(sizes)


def from_matrix(values: Tensor, layout: Layout) -> Tensor:
    """Return matrices ``[groups, rows, columns]`` as a tensor in the layout's view."""
    order = _matrix_order(layout)
    back = [order.index(d) for d in range(len(order))]
    return values.reshape([layout.shape[d] for d in order]).permute(back)


def _matrix_order(layout: Layout) -> list[int]:
    rank = {"group": 0, "stack": 1, "output": 2, "input": 3, "kernel": 4}
    return sorted(range(len(layout.roles)), key=lambda d: (rank[layout.roles[d]], d))


def columns_view(values: Tensor, layout: Layout) -> Tensor:
    """Return ``[groups, columns]`` in the layout's view, with size 1 in the dimensions of outputs and stacks.

    ``columns`` are all columns of the matrix form, or the inputs alone (then the size is 1 in kernel dimensions too).
    """
    with_kernel = values.shape[-1] == layout.size("input") * prod(layout.kernel) and prod(layout.kernel) > 1
    wide = ("group", "input", "kernel") if with_kernel else ("group", "input")
    order = [d for d in _matrix_order(layout) if layout.roles[d] in wide]
    sizes = [layout.shape[d] for d in order]
    placed = values.reshape(sizes).permute([order.index(d) for d in sorted(order)])
    return placed.reshape([n if r in wide else 1 for r, n in zip(layout.roles, layout.shape, strict=True)])
