"""How many bits a masked tensor needs in each storage format, counted exactly from its mask.

A format stores the values of the active elements (and, in some formats, explicit zeros) and says where they are. With ``n`` elements, ``m``
of them active and ``k`` bits for a value, no lossless format needs fewer than ``m k + log2 C(n, m)`` bits for every mask of that many.
Headers (shapes, counts, field widths) are not counted.

Formats with rows and columns see a tensor as a matrix: its first dimension by all others; a vector is one row.

Source: Hoefler et al. 2021, the section on storage formats; Pooch & Nieder 1973 for most of the formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.masks import canonical_name, local

Bools = npt.NDArray[np.bool_]
Bits = tuple[int, int]
"""Bits of the values and bits of the positions."""

BLOCK = (4, 4)
"""Rows and columns of a block, when none are given."""


@dataclass(frozen=True)
class Format:
    """What one storage format needs.

    Attributes:
        format: its name.
        bits: values and positions together.
        position_bits: of these, the bits that say where the values belong; stored zeros count as values.
        definition: the formula, in words.
    """

    format: str
    bits: int
    position_bits: int
    definition: str


def tensor_storage(mask: Tensor, value_bits: int, *, block: tuple[int, int] = BLOCK) -> dict[str, Format]:
    """Return what a tensor with this mask needs in every format that applies to it, by the format's name.

    N:M formats apply where every group of M consecutive elements along one dimension has at most N active ones, and ``structured``
    where whole slices are masked.

    Args:
        mask: bool, True = active, any shape.
        value_bits: bits of one value.
        block: rows and columns of a BSR block.

    Raises:
        InputError: not a bool tensor, or a number below 1.

    >>> found = tensor_storage(torch.tensor([[True, False, False, True], [False, False, True, False]]), value_bits=8)
    >>> found["bitmap"].bits, found["COO"].bits, found["CSR"].bits
    (32, 33, 34)
    """
    if mask.dtype != torch.bool:
        raise InputError(f"storage: a mask must be a bool tensor (True = active), got {mask.dtype}")
    _check(value_bits, block)
    active = local(mask).detach().cpu().numpy()
    found = {}
    for name, (count, definition) in _formats(block).items():
        bits = count(active, value_bits)
        if bits is not None:
            found[name] = Format(name, sum(bits), bits[1], definition)
    return found


def storage(
    parameters: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    value_bits: int | None = None,
    block: tuple[int, int] = BLOCK,
) -> tuple[Format, ...]:
    """Return what all parameters of a model need together, format by format.

    A parameter without a mask, and one that a format does not apply to, is stored dense; the definition says how many masked ones that
    are. A format that applies to no masked parameter is left out, so without masks only ``dense`` is there.

    Args:
        parameters: name -> tensor, such as ``dict(model.named_parameters())``; only shapes and data types matter.
        masks: canonical parameter name -> bool tensor, True = active.
        value_bits: bits of one value; by default those of each parameter's data type.
        block: rows and columns of a BSR block.

    Raises:
        InputError: a mask that fits no parameter, or a number below 1.

    >>> weight, bias = torch.ones(4, 4), torch.ones(4)
    >>> [(row.format, row.bits) for row in storage({"weight": weight, "bias": bias}, {"weight": weight.tril() > 0})][:2]
    [('dense', 640), ('bitmap', 464)]
    """
    _check(value_bits, block)
    tensors = {canonical_name(name): local(tensor.detach()) for name, tensor in parameters.items()}
    for name, mask in masks.items():
        if name not in tensors or local(mask).shape != tensors[name].shape:
            expected = f"shape {list(tensors[name].shape)}" if name in tensors else "no such parameter"
            raise InputError(f"storage: the mask of {name!r} has shape {list(local(mask).shape)}, the model has {expected}")
    width = {name: 8 * tensor.element_size() if value_bits is None else value_bits for name, tensor in tensors.items()}
    dense = {name: tensor.numel() * width[name] for name, tensor in tensors.items()}
    by_tensor = {name: tensor_storage(mask, width[name], block=block) for name, mask in masks.items()}
    rows = []
    for name, (_, definition) in _formats(block).items():
        fitting = {tensor: formats[name] for tensor, formats in by_tensor.items() if name in formats}
        if not fitting and name != "dense":
            continue
        left = len(by_tensor) - len(fitting)
        note = f"; {left} of {len(by_tensor)} masked tensors do not fit it and are stored dense" if left else ""
        rest = sum(bits for tensor, bits in dense.items() if tensor not in fitting)
        rows.append(
            Format(
                format=name,
                bits=rest + sum(found.bits for found in fitting.values()),
                position_bits=sum(found.position_bits for found in fitting.values()),
                definition=definition + note,
            )
        )
    return tuple(rows)


def _check(value_bits: int | None, block: tuple[int, int]) -> None:
    if min(block) < 1 or (value_bits is not None and value_bits < 1):
        raise InputError(f"storage: the bits of a value and the sides of a block must be at least 1, got {value_bits} and {list(block)}")


# -- formats -------------------------------------------------------------------------------------------------------------------


def _formats(block: tuple[int, int]) -> dict[str, tuple[Callable[[Bools, int], Bits | None], str]]:
    """Return every format: how its bits are counted (None where it does not apply), and that in words."""
    rows, columns = block
    return {
        "dense": (_dense, "n k: every element is stored, no positions"),
        "bitmap": (_bitmap, "m k + n: one bit for each element"),
        "COO": (_coo, "m (k + ceil(log2 n)): the flat index of each active element"),
        "delta": (_delta, "m (k + ceil(log2 d)): the distance to the previous active element, in a field for the largest distance d"),
        "delta with zero padding": (
            _padded_delta,
            "(m + z) (k + b): distances in fields of b bits, where z stored zeros bridge distances above 2^b; the b that needs fewest bits",
        ),
        "CSR": (
            _csr,
            "m (k + ceil(log2 columns)) + rows ceil(log2 m): the column of each active element, and an offset for each row; the first"
            " dimension makes rows, all others columns",
        ),
        "CSC": (
            _csc,
            "m (k + ceil(log2 rows)) + columns ceil(log2 m): the row of each active element, and an offset for each column, of the matrix"
            " that CSR sees",
        ),
        f"BSR {rows}×{columns}": (
            partial(_blocked, block=block),
            f"CSR of the {rows}×{columns} blocks with an active element, their zeros stored; blocks that stick out are filled with zeros",
        ),
        "2:4": (
            partial(_two_of_four, group_bits=4.0),
            "n k / 2 + n: two values of each four consecutive elements along one dimension, 2 bits for the place of each",
        ),
        "2:4, combinatorial": (
            partial(_two_of_four, group_bits=math.log2(math.comb(4, 2))),
            "n k / 2 + n / 4 log2 6: two values of each four consecutive elements along one dimension, the group's choice of 6 coded",
        ),
        "structured": (
            _structured,
            "dense without the outputs and inputs (slices of the first two dimensions) that are masked as a whole, no positions",
        ),
        "entropy bound": (_entropy, "m k + log2 C(n, m): no lossless format needs less for every mask with m of n elements active"),
    }


def _dense(active: Bools, k: int) -> Bits:
    return active.size * k, 0


def _bitmap(active: Bools, k: int) -> Bits:
    return _count(active) * k, active.size


def _coo(active: Bools, k: int) -> Bits:
    m = _count(active)
    return m * k, m * _log2(active.size)


def _delta(active: Bools, k: int) -> Bits:
    jumps = _jumps(active)
    return len(jumps) * k, len(jumps) * _delta_width(jumps)


def _padded_delta(active: Bools, k: int) -> Bits:
    jumps = _jumps(active)
    widest = _delta_width(jumps)
    best: Bits | None = None
    # At least one bit, where there is any distance to tell: with none, "padding" would store every zero, which is the dense format.
    for width in range(min(1, widest), widest + 1):
        stored = len(jumps) + int((jumps >> width).sum())
        if best is None or stored * (k + width) < sum(best):
            best = stored * k, stored * width
    assert best is not None
    return best


def _csr(active: Bools, k: int) -> Bits:
    # The survey's formula. An offset can be m itself, which takes one bit more to write down when m is a power of two.
    rows, columns = _matrix(active).shape
    m = _count(active)
    return m * k, m * _log2(columns) + rows * _log2(m)


def _csc(active: Bools, k: int) -> Bits:
    return _csr(_matrix(active).T, k)


def _blocked(active: Bools, k: int, block: tuple[int, int]) -> Bits:
    matrix = _matrix(active)
    rows, columns = (-(-size // side) for size, side in zip(matrix.shape, block, strict=True))
    padded = np.zeros((rows * block[0], columns * block[1]), dtype=np.bool_)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    kept = np.asarray(padded.reshape(rows, block[0], columns, block[1]).any(axis=(1, 3)))
    return _csr(kept, k * block[0] * block[1])


def _two_of_four(active: Bools, k: int, group_bits: float) -> Bits | None:
    if not any(_at_most(active, 2, 4, axis) for axis in range(active.ndim)):
        return None
    return active.size // 2 * k, _rounded_up(active.size // 4 * group_bits)


def _at_most(active: Bools, n: int, m: int, axis: int) -> bool:
    """Return whether every group of m consecutive elements along an axis has at most n active ones; a smaller last group is none."""
    if active.size == 0 or active.shape[axis] % m:
        return False
    groups = np.moveaxis(active, axis, -1).reshape(-1, m)
    return int(groups.sum(axis=1).max()) <= n


def _structured(active: Bools, k: int) -> Bits | None:
    left = active
    for axis in range(min(2, active.ndim)):
        others = tuple(other for other in range(active.ndim) if other != axis)
        left = left.compress(active.any(axis=others), axis=axis)
    return None if left.size == active.size else (left.size * k, 0)


def _entropy(active: Bools, k: int) -> Bits:
    m = _count(active)
    return m * k, _rounded_up(log2_choose(active.size, m))


def log2_choose(n: int, m: int) -> float:
    """Return ``log2 C(n, m)``: the bits that say which m of n. It is about ``n H2(m / n)``, with ``H2(p) = -p log2 p - (1-p) log2(1-p)``.

    >>> round(log2_choose(4, 2), 12) == round(math.log2(6), 12)
    True
    """
    return max(0.0, (math.lgamma(n + 1) - math.lgamma(m + 1) - math.lgamma(n - m + 1)) / math.log(2))


def _jumps(active: Bools) -> npt.NDArray[np.int64]:
    """Return the distance of each active element to the previous one (of the first, to the place before the tensor), less 1."""
    return np.diff(np.flatnonzero(active), prepend=-1) - 1


def _delta_width(jumps: npt.NDArray[np.int64]) -> int:
    return _log2(int(jumps.max()) + 1) if len(jumps) else 0


def _matrix(active: Bools) -> Bools:
    rows = active.shape[0] if active.ndim > 1 else 1
    return active.reshape(rows, math.prod(active.shape[1:]) if active.ndim > 1 else active.size)


def _count(active: npt.NDArray[Any]) -> int:
    return int(np.count_nonzero(active))


def _log2(number: int) -> int:
    """Return ``ceil(log2 number)``: the bits that tell this many things apart."""
    return max(number - 1, 0).bit_length()


def _rounded_up(bits: float) -> int:
    return math.ceil(bits - 1e-6)  # what is a whole number is one after rounding errors as well
