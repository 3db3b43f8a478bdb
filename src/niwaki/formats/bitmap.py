"""The bitmap encoding: one bit for each position, then the values at the set bits.

It takes ceil(n / 8) + m * itemsize bytes for m of n values: fewer than dense below a density of 1 - 1 / (8 * itemsize).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from niwaki.errors import InputError
from niwaki.masks import as_integers, pack_bits, unpack_bits


def encode(tensor: Tensor, active: Tensor) -> dict[str, Tensor]:
    """Return ``positions`` (uint8 packed bits of ``active``) and ``values`` (1-D, the elements there in row-major order).

    Both tensors are contiguous, of one shape and on the CPU. Values keep every bit: NaN payloads, -0.0, zeros that are active.
    """
    values = as_integers(tensor).numpy()[active.numpy()]  # several times faster than torch.masked_select
    return {"positions": pack_bits(active), "values": torch.from_numpy(values.reshape(-1)).view(tensor.dtype)}


def decode(positions: Tensor, values: Tensor, shape: Sequence[int], name: str) -> tuple[Tensor, Tensor]:
    """Return the tensor and its active positions (bool); every other element is +0, all bits zero.

    Raises:
        InputError: bits that do not fit the shape, or not one value for each set bit.
    """
    active = unpack_bits(positions, shape, name)
    count = int(torch.count_nonzero(active))
    if tuple(values.shape) != (count,):
        raise InputError(f"{name}: {count} positions need as many values in one dimension, got shape {list(values.shape)}")
    tensor = torch.zeros(tuple(shape), dtype=values.dtype)
    as_integers(tensor).masked_scatter_(active, as_integers(values))
    return tensor, active


def has_bits(tensor: Tensor) -> Tensor:
    """Return where any bit is set: what must be stored when nothing says which elements are active (-0.0 is stored)."""
    return as_integers(tensor) != 0
