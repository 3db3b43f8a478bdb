"""Strategies and comparisons that the tests of formats share."""

from collections.abc import Mapping
from math import prod

import torch
from hypothesis import strategies as st
from torch import Tensor

from niwaki.formats.files import DTYPES

ALL_DTYPES = list(DTYPES.values())


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


@st.composite
def any_tensor(draw: st.DrawFn) -> Tensor:
    """Any dtype, shape and bits: NaN payloads, -0.0, denormals and many zeros among them."""
    dtype = draw(st.sampled_from(ALL_DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    size = prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype == torch.bool:
        data = bytes(byte & 1 for byte in data)
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


@st.composite
def state_and_masks(draw: st.DrawFn) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    names = draw(st.lists(st.sampled_from(["a", "b.weight", "ö.bias", 'quote"\\name', "line\nbreak"]), unique=True, max_size=4))
    state = {name: draw(any_tensor()) for name in names}
    masks = {}
    for name, tensor in state.items():
        share = draw(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]))
        if share is not None and tensor.dtype != torch.float8_e8m0fnu:  # a format without a zero
            generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
            masks[name] = torch.rand(tensor.shape, generator=generator) < share
            as_bytes = tensor.reshape(-1).view(torch.uint8).reshape(*tensor.shape, tensor.element_size())
            as_bytes[~masks[name]] = 0
    return state, masks
