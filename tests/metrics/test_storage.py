import itertools
import math

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

from niwaki.errors import InputError
from niwaki.metrics import storage
from niwaki.metrics.storage import log2_choose, tensor_storage

K = 8

shapes = st.one_of(
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 9), st.integers(1, 17)),
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
)


@st.composite
def masks(draw) -> torch.Tensor:
    shape = draw(shapes)
    density = draw(st.sampled_from([0.0, 0.03, 0.2, 0.5, 0.9, 1.0]))
    return torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6)))) < density


def width(things: int) -> int:
    """The least width whose fields can tell this many things apart."""
    return next(bits for bits in itertools.count() if 2**bits >= things)


def delta_streams(flat: list[bool], bits: int) -> list[tuple[int, bool]]:
    """The fields of a delta encoding, one at a time: (distance, whether a real value follows)."""
    fields: list[tuple[int, bool]] = []
    last = -1
    for place, active in enumerate(flat):
        if place - last == 2**bits and not active and any(flat[place:]):
            fields.append((place - last, False))
            last = place
        elif active:
            fields.append((place - last, True))
            last = place
    assert all(1 <= distance <= 2**bits for distance, _ in fields)
    positions = itertools.accumulate(distance for distance, _ in fields)
    assert [p - 1 for p, (_, real) in zip(positions, fields, strict=True) if real] == [i for i, a in enumerate(flat) if a]
    return fields


@given(masks())
def test_positions_in_a_flat_row_equal_encodings_written_out(mask):
    flat = mask.flatten().tolist()
    n, m = len(flat), sum(flat)
    found = tensor_storage(mask, K)
    assert found["dense"].bits == n * K
    assert found["dense"].position_bits == 0
    assert (found["bitmap"].bits, found["bitmap"].position_bits) == (m * K + n, n)
    assert (found["COO"].bits, found["COO"].position_bits) == (m * (K + width(n)), m * width(n))
    places = [i for i, active in enumerate(flat) if active]
    distances = [b - a for a, b in itertools.pairwise([-1, *places])]
    field = width(max(distances, default=1))
    assert (found["delta"].bits, found["delta"].position_bits) == (m * (K + field), m * field)
    padded = [(len(fields), bits) for bits in range(min(1, field), field + 1) for fields in [delta_streams(flat, bits)]]
    stored, bits = min(padded, key=lambda pair: pair[0] * (K + pair[1]))
    assert (found["delta with zero padding"].bits, found["delta with zero padding"].position_bits) == (stored * (K + bits), stored * bits)


@given(masks())
def test_rows_and_columns_equal_scipys_formats(mask):
    matrix = mask.reshape(len(mask) if mask.dim() > 1 else 1, -1).numpy()
    found = tensor_storage(mask, K, block=(2, 3))
    for name, made, across in (("CSR", scipy.sparse.csr_array(matrix), 1), ("CSC", scipy.sparse.csc_array(matrix), 0)):
        position_bits = len(made.indices) * width(matrix.shape[across]) + (len(made.indptr) - 1) * width(max(1, made.nnz))
        assert (found[name].bits, found[name].position_bits) == (made.nnz * K + position_bits, position_bits)
    filled = np.pad(matrix, [(0, -matrix.shape[0] % 2), (0, -matrix.shape[1] % 3)])
    made = scipy.sparse.csr_array(filled).tobsr((2, 3))
    position_bits = len(made.indices) * width(filled.shape[1] // 3) + (len(made.indptr) - 1) * width(max(1, len(made.indices)))
    assert (found["BSR 2×3"].bits, found["BSR 2×3"].position_bits) == (made.data.size * K + position_bits, position_bits)


@given(st.integers(0, 300), st.data())
def test_the_entropy_bound_counts_the_choices(n, data):
    m = data.draw(st.integers(0, n))
    assert log2_choose(n, m) == pytest.approx(math.log2(math.comb(n, m)), abs=1e-9)
    mask = torch.arange(n) < m
    assert tensor_storage(mask, K)["entropy bound"].position_bits == (math.comb(n, m) - 1).bit_length()  # ceil(log2 C(n, m))


def test_the_entropy_bound_of_small_tensors_is_exact():
    for n in range(60):
        for m in range(n + 1):  # C(n, 1) and C(n, n - 1) are powers of two now and then
            assert tensor_storage(torch.arange(n) < m, K)["entropy bound"].position_bits == (math.comb(n, m) - 1).bit_length()


def test_the_entropy_bound_is_about_the_binary_entropy():
    n, p = 10**8, 0.1
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert log2_choose(n, int(n * p)) == pytest.approx(n * entropy, rel=1e-6)


@pytest.mark.parametrize("dim", [0, 1])
def test_two_of_four_applies_along_one_dimension(dim):
    pattern = torch.tensor([True, False, True, False, False, False, True, True])
    mask = (pattern.expand(8, 8) if dim else pattern[:, None].expand(8, 8)) & (torch.rand(8, 8) > 0.1)
    mask[0] |= pattern[0] if dim == 0 else False
    found = tensor_storage(mask, K)
    assert (found["2:4"].bits, found["2:4"].position_bits) == (32 * K + 64, 64)  # two of each four are stored, 2 bits for each
    assert found["2:4, combinatorial"].position_bits == math.ceil(16 * math.log2(6))
    broken = mask.clone()
    broken[:4, :4] = ~torch.eye(4, dtype=torch.bool)  # three of each four, both ways
    assert "2:4" not in tensor_storage(broken, K)
    assert "2:4" not in tensor_storage(torch.zeros(3, 6, dtype=torch.bool), K)  # no dimension is a multiple of 4


def test_structured_removes_whole_outputs_and_inputs_only():
    mask = torch.ones(4, 5, 3, 3, dtype=torch.bool)
    mask[1] = False
    mask[:, 2:4] = False
    mask[:, :, 1] = False  # a row of the kernel is no output or input
    found = tensor_storage(mask, K)["structured"]
    assert (found.bits, found.position_bits) == (3 * 3 * 9 * K, 0)
    assert "structured" not in tensor_storage(torch.eye(4, dtype=torch.bool), K)
    assert tensor_storage(torch.zeros(4, 4, dtype=torch.bool), K)["structured"].bits == 0


# Survey 1.5: bits relative to dense for n = 10^8, k = 8, random positions, 10^4 columns, and the width of the padded delta.
SURVEY = {
    0.10: (1.025, 1.023, 1, 1.35, 2.48, 3.94, 0.959),
    0.20: (0.925, 0.938, 1, 1.20, 2.20, 3.50, 0.890),
    0.50: (0.625, 0.667, 2, 0.813, 1.38, 2.19, 0.625),
    0.70: (0.425, 0.438, 3, 0.525, 0.825, 1.31, 0.410),
    0.75: (0.375, 0.379, 4, 0.438, 0.688, 1.09, 0.351),
    0.80: (0.325, 0.309, 4, 0.375, 0.550, 0.875, 0.290),
    0.90: (0.225, 0.168, 5, 0.200, 0.275, 0.438, 0.159),
    0.95: (0.175, 0.0909, 6, 0.106, 0.138, 0.219, 0.0858),
    0.98: (0.145, 0.0402, 8, 0.045, 0.0553, 0.0875, 0.0377),
    0.99: (0.135, 0.0214, 9, 0.0238, 0.0278, 0.0438, 0.0201),
}


def expected(n: int, columns: int, sparsity: float) -> dict[str, float]:
    """Bits relative to dense in closed form, for random positions; the largest of m geometric distances is about ln m / -ln(1-p)."""
    p = 1 - sparsity
    m = n * p
    padded = min(m / (1 - (1 - p) ** (2**b)) * (K + b) for b in range(1, 20))
    longest = 1 + math.log(m) / -math.log(1 - p)
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    bits = {
        "bitmap": m * K + n,
        "delta with zero padding": padded,
        "delta": m * (K + math.ceil(math.log2(longest))),
        "CSR": m * (K + math.ceil(math.log2(columns))) + n / columns * math.ceil(math.log2(m)),
        "COO": m * (K + math.ceil(math.log2(n))),
        "entropy bound": m * K + n * entropy,
    }
    return {name: value / (n * K) for name, value in bits.items()}


@pytest.mark.parametrize("sparsity", SURVEY)
def test_counts_agree_with_the_surveys_table(sparsity):
    columns = ("bitmap", "delta with zero padding", "delta", "CSR", "COO", "entropy bound")
    row = SURVEY[sparsity]
    for name, value in zip(columns, (*row[:2], *row[3:]), strict=True):
        assert expected(10**8, 10**4, sparsity)[name] == pytest.approx(value, rel=0.01), name
    mask = torch.rand(1000, 2000, generator=torch.Generator().manual_seed(3)) >= sparsity  # the same at a size that takes no minutes
    found = tensor_storage(mask, K)
    for name, value in expected(mask.numel(), 2000, sparsity).items():
        if name != "delta":  # its width hangs on one element: compared with an encoding written out, above
            assert found[name].bits / (mask.numel() * K) == pytest.approx(value, rel=0.01), name
    padded = found["delta with zero padding"]
    assert round(padded.position_bits / (padded.bits - padded.position_bits) * K) == row[2]


def test_a_whole_model_stores_what_has_no_mask_dense():
    parameters = {
        "a": torch.zeros(8, 8),
        "b": torch.zeros(6, 6, dtype=torch.float16),
        "bias": torch.zeros(7),
    }
    two_of_four = torch.tensor([True, True, False, False]).repeat(8, 2)
    other = torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    rows = {row.format: row for row in storage(parameters, {"a": two_of_four, "b": other})}
    m = int(other.sum())
    assert rows["dense"].bits == 64 * 32 + 36 * 16 + 7 * 32
    assert rows["bitmap"].bits == 32 * 32 + 64 + m * 16 + 36 + 7 * 32
    assert rows["bitmap"].position_bits == 100
    assert rows["2:4"].bits == 32 * 32 + 64 + 36 * 16 + 7 * 32
    assert "1 of 2 masked tensors do not fit it and are stored dense" in rows["2:4"].definition
    assert "do not fit" not in rows["bitmap"].definition
    assert all(row.definition for row in rows.values())
    eight = {row.format: row for row in storage(parameters, {"a": two_of_four, "b": other}, value_bits=8)}
    assert eight["dense"].bits == (64 + 36 + 7) * 8
    assert eight["bitmap"].bits == 32 * 8 + 64 + m * 8 + 36 + 7 * 8
    assert {row.format for row in storage(parameters, {"b": torch.ones(6, 6, dtype=torch.bool)})}.isdisjoint({"2:4", "structured"})
    assert [row.format for row in storage(parameters, {})] == ["dense"]


def test_wrapped_names_are_the_models_own():
    (dense, bitmap, *_) = storage({"module._orig_mod.weight": torch.zeros(4, 4)}, {"weight": torch.eye(4, dtype=torch.bool)})
    assert (dense.bits, bitmap.bits) == (512, 4 * 32 + 16)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: storage({"a": torch.zeros(2, 2)}, {"b": torch.ones(2, 2) > 0}), "no such parameter"),
        (lambda: storage({"a": torch.zeros(2, 2)}, {"a": torch.ones(4) > 0}), r"shape \[4\], the model has shape \[2, 2\]"),
        (lambda: storage({"a": torch.zeros(2, 2)}, {}, value_bits=0), "at least 1"),
        (lambda: tensor_storage(torch.ones(2), 8), "bool tensor"),
        (lambda: tensor_storage(torch.ones(2) > 0, 0), "at least 1"),
        (lambda: tensor_storage(torch.ones(2) > 0, 8, block=(0, 4)), "at least 1"),
    ],
)
def test_bad_input_is_said(call, says):
    with pytest.raises(InputError, match=says):
        call()


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1, 1)])
def test_the_smallest_tensors_are_counted(shape):
    for mask in (torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)):
        found = tensor_storage(mask, K)
        assert found["dense"].bits == mask.numel() * K
        assert found["COO"].bits == int(mask.sum()) * K
        assert found["entropy bound"].bits == int(mask.sum()) * K
