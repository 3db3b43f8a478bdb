"""Exact selection against a brute-force sort, over every dtype, order of memory, chunking and number of processes."""

import hashlib
import math
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from niwaki import selection
from niwaki.errors import InputError
from niwaki.selection import kept, select

FLOAT8 = [getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz") if hasattr(torch, name)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, *FLOAT8]

# Values that are hard to order: both zeros, denormal numbers, neighbours of 1, the largest and infinite ones.
SINGLE = [
    struct.unpack("<f", struct.pack("<I", bits))[0]
    for bits in (0, 1, 2, 0x7FFFFF, 0x800000, 0x3F7FFFFF, 0x3F800000, 0x7F7FFFFF, 0x7F800000)
]
SPECIAL = SINGLE + [-value for value in SINGLE]


def oracle(tensors, keep, eligible=None):
    """Sort all (-score, tensor, flat index) and keep the first."""
    ranked = []
    for number, tensor in enumerate(tensors):
        allowed = None if eligible is None or eligible[number] is None else eligible[number].tolist()
        flat = tensor.to(torch.float64).tolist()

        def walk(values, allowed, path, number=number):
            if isinstance(values, list):
                for position, value in enumerate(values):
                    walk(value, allowed if not isinstance(allowed, list) else allowed[position], (*path, position), number)
            elif allowed is None or allowed is True:
                ranked.append((-values, number, path))

        walk(flat, allowed, ())
    masks = [torch.zeros(tensor.shape, dtype=torch.bool) for tensor in tensors]
    for _, number, path in sorted(ranked)[:keep]:
        masks[number][path] = True
    return masks


def assert_same(got, expected):
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == torch.bool
        assert mine.is_contiguous()
        assert torch.equal(mine, theirs)


@pytest.fixture(params=["defaults", "fine", "coarse digits", "operators of torch"])
def limits(request, monkeypatch):
    """Shrink the limits, so that small tensors go through chunks, samples, brackets and histograms, and use torch's operators."""
    if request.param == "fine":
        shrunk = {"CHUNK_CPU": 5, "CHUNK_COPIED": 4, "SAMPLE": 7, "DIGIT_BITS": 3, "CANDIDATES": 2}
    elif request.param == "coarse digits":
        shrunk = {"CHUNK_CPU": 16, "CHUNK_COPIED": 11, "SAMPLE": 3, "DIGIT_BITS": 17, "CANDIDATES": 0}
    elif request.param == "operators of torch":
        shrunk = {"CHUNK_CPU": 9, "CHUNK_COPIED": 6, "SAMPLE": 20, "DIGIT_BITS": 8, "CANDIDATES": 4, "_array": lambda tensor: tensor}
    else:
        shrunk = {}
    for name, value in shrunk.items():
        monkeypatch.setattr(selection, name, value)


values = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32, allow_nan=False), st.sampled_from([1.0, 2.0, 3.0]))


@st.composite
def problems(draw):
    count = draw(st.integers(1, 4))
    tensors, eligible = [], []
    for _ in range(count):
        shape = draw(st.lists(st.integers(0, 5), min_size=0, max_size=3))
        size = math.prod(shape)
        tensors.append(torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=torch.float64).reshape(shape))
        allowed = draw(st.none() | st.lists(st.booleans(), min_size=size, max_size=size))
        eligible.append(None if allowed is None else torch.tensor(allowed, dtype=torch.bool).reshape(shape))
    total = sum(t.numel() if e is None else int(e.sum()) for t, e in zip(tensors, eligible, strict=True))
    return tensors, eligible, draw(st.integers(0, total))


# The fixture only sets limits, and every example sees the same ones.
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems(), dtype=st.sampled_from([torch.float64, torch.float32]), functions=st.booleans())
def test_equals_sorting(limits, problem, dtype, functions):
    tensors, eligible, keep = problem
    tensors = [tensor.to(dtype) for tensor in tensors]
    scores = [lambda tensor=tensor: tensor.clone() for tensor in tensors] if functions else tensors
    assert_same(select(scores, keep, eligible=eligible), oracle(tensors, keep, eligible))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_at_every_count(limits, dtype):
    if dtype.itemsize == 1:
        every = torch.arange(256, dtype=torch.uint8).view(dtype)
        scores = every[~every.to(torch.float32).isnan()].repeat(2)
    else:
        generator = torch.Generator().manual_seed(0)
        scores = torch.randn(300, generator=generator, dtype=torch.float64).mul(2.0).round(decimals=1).to(dtype)
        scores[::50] = torch.finfo(dtype).smallest_normal / 2
        scores[1::50] = -torch.finfo(dtype).smallest_normal / 4
        scores[2::50], scores[3::50], scores[4::50], scores[5::50] = math.inf, -math.inf, 0.0, -0.0
    for keep in (0, 1, 2, 7, len(scores) // 2, len(scores) - 3, len(scores)):
        assert_same(select([scores[:100], scores[100:]], keep), oracle([scores[:100], scores[100:]], keep))


def test_mixed_dtypes_are_compared_exactly(limits):
    close = 1.0 + 2.0**-40
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([close, 0.5], dtype=torch.float64), torch.tensor([1.0], dtype=torch.bfloat16)]
    for keep in range(6):
        assert_same(select(tensors, keep), oracle(tensors, keep))
        assert_same(select([lambda t=t: t for t in tensors], keep), oracle(tensors, keep))


def test_neighbouring_float64_bits_are_told_apart(limits):
    scores = torch.tensor(np.arange(50, dtype=np.int64)[::-1].copy() + 0x3FF0000000000000).view(torch.float64)
    scores = torch.cat([-scores, scores])
    for keep in (1, 13, 50, 51, 77, 100):
        assert_same(select([scores], keep), oracle([scores], keep))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.5, 1e-45, math.inf, -math.inf])
def test_equal_scores_keep_the_lower_index(limits, value):
    tensors = [torch.full((4, 3), value), torch.full((0,), value), torch.full((5,), value)]
    for keep in range(18):
        flat = torch.cat([mask.flatten() for mask in select(tensors, keep)])
        assert flat.tolist() == [True] * keep + [False] * (17 - keep)


def test_zeros_of_both_signs_are_equal(limits):
    scores = torch.tensor([-0.0, 0.0, -1.0, -0.0, 0.0, 1.0])
    assert select([scores], 3)[0].tolist() == [True, True, False, False, False, True]


def test_denormal_numbers_are_ordered_even_when_flushed():
    scores = torch.arange(-20, 20, dtype=torch.int32).abs().view(torch.float32)
    expected = oracle([scores], 9)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    try:
        got = select([scores], 9)
    finally:
        torch.set_flush_denormal(False)
    assert_same(got, expected)


@pytest.mark.parametrize(
    "arrange",
    [
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.permute(2, 3, 1, 0),
        lambda t: t.transpose(0, 1)[:, ::2],
        lambda t: t[:, :1].expand(-1, 7, -1, -1),
        lambda t: t[1, 2, 1, 1],
        lambda t: torch.complex(t, t).conj().imag,
    ],
)
def test_order_of_memory_does_not_matter(limits, arrange):
    generator = torch.Generator().manual_seed(1)
    scores = arrange(torch.randint(-3, 4, (6, 4, 3, 3), generator=generator).float())
    allowed = torch.rand(scores.shape, generator=generator) < 0.8
    keep = int(allowed.sum()) // 3
    assert_same(select([scores], keep, eligible=[allowed]), oracle([scores], keep, [allowed]))


@pytest.mark.parametrize("kind", ["normal", "rounded", "narrow", "heavy", "float64", "periodic"])
def test_large_tensors_against_lexsort(kind, monkeypatch):
    """More scores than are partitioned directly, of distributions that suit the sample and that mislead it."""
    random = np.random.default_rng(3)
    size = 1_300_000
    scores = random.standard_normal(size).astype(np.float32)
    if kind == "rounded":
        scores = scores.round(1)
    elif kind == "narrow":
        scores = (1 + scores * 1e-6).astype(np.float32)
    elif kind == "heavy":
        scores = np.float32(10) ** (6 * scores)
    elif kind == "float64":
        scores = scores.astype(np.float64) + random.random(size)
    elif kind == "periodic":
        scores[:: 3**2] += 100
    sizes = [7, 400_000, 0, 899_993]
    parts = [torch.from_numpy(part) for part in np.split(scores, np.cumsum(sizes)[:-1])]
    order = np.lexsort((np.arange(size), -scores.astype(np.float64)))
    for keep in (1, size // 10, size - 2):
        expected = np.zeros(size, dtype=bool)
        expected[order[:keep]] = True
        got = torch.cat(select(parts, keep)).numpy()
        assert np.array_equal(got, expected)


def test_functions_are_called_once_a_pass_and_their_results_are_dropped():
    alive, most, calls = 0, 0, 0

    class Counted:
        def __init__(self):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    def score():
        nonlocal calls
        calls += 1
        tensor = torch.arange(10.0)
        tensor.counted = Counted()
        return tensor

    masks = select([score] * 5, 5)
    assert [int(mask.sum()) for mask in masks] == [1] * 5
    assert calls == 5 * 3  # survey, search, masks
    assert most == 1


def test_scores_that_change_between_passes_are_an_error():
    turn = iter(range(100))
    with pytest.raises(InputError, match="same scores on every pass"):
        select([lambda: torch.arange(10.0) + 3 * next(turn)], 4)


def test_memory_does_not_grow_with_the_scores(monkeypatch):
    """No temporary is larger than a chunk, the sample, the digits or the candidates."""
    for name, value in {"CHUNK_CPU": 1000, "SAMPLE": 500, "DIGIT_BITS": 9, "CANDIDATES": 800}.items():
        monkeypatch.setattr(selection, name, value)
    largest = 0
    concatenate = np.concatenate

    def watched(parts, *arguments, **options):
        nonlocal largest
        joined = concatenate(parts, *arguments, **options)
        largest = max(largest, joined.size)
        return joined

    monkeypatch.setattr(np, "concatenate", watched)
    scores = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    assert int(select([scores], 20_000)[0].sum()) == 20_000
    assert 0 < largest <= 800 + 1000


def test_scores_are_not_changed_and_may_require_gradients():
    scores = torch.nn.Parameter(torch.tensor([3.0, -1.0, 2.0]))
    before = scores.detach().clone()
    (mask,) = select([scores], 1)
    assert mask.tolist() == [True, False, False]
    assert torch.equal(scores, before)
    assert not mask.requires_grad


@pytest.mark.parametrize(
    ("scores", "keep", "options", "message"),
    [
        ([torch.ones(3), torch.tensor([1.0, math.nan])], 2, {"names": ["a", "conv.weight"]}, "^conv.weight: scores contain NaN"),
        ([torch.tensor([-math.nan], dtype=torch.float64)], 0, {}, r"^scores\[0\]: scores contain NaN"),
        ([torch.tensor([1.0, math.nan], dtype=torch.bfloat16)], 1, {"eligible": [torch.tensor([True, False])]}, "NaN"),
        ([torch.ones(3)], 4, {}, "3, got 4"),
        ([torch.ones(3)], -1, {}, "got -1"),
        ([torch.ones(3)], 3, {"eligible": [torch.tensor([True, False, True])]}, "2, got 3"),
        ([torch.ones(3)], 1, {"eligible": [torch.ones(2, dtype=torch.bool)]}, "eligible must be bool"),
        ([torch.ones(3)], 1, {"eligible": [torch.ones(3)]}, "eligible must be bool"),
        ([torch.ones(3)], 1, {"eligible": []}, "equally many"),
        ([torch.ones(3)], 1, {"names": ["a", "b"]}, "equally many"),
        ([torch.ones(3, dtype=torch.int64)], 1, {}, "floating"),
        ([torch.ones(3).to_sparse()], 1, {}, "dense"),
    ],
)
def test_bad_input_is_one_line(scores, keep, options, message):
    with pytest.raises(InputError, match=message) as caught:
        select(scores, keep, **options)
    assert "\n" not in str(caught.value)


def test_nothing_is_kept_of_nothing():
    assert select([], 0) == []
    assert select([torch.empty(0, 3)], 0)[0].shape == (0, 3)


@given(sparsity=st.floats(0, 1), pieces=st.integers(0, 10**7))
def test_kept_is_the_nearest_whole_number(sparsity, pieces):
    count = kept(sparsity, pieces)
    assert isinstance(count, int)
    assert 0 <= count <= pieces
    assert abs(count - (1 - Fraction(sparsity)) * pieces) <= Fraction(1, 2) + Fraction(pieces, 2**50)


def test_kept_rounds_halves_to_even():
    assert [kept(0.5, pieces) for pieces in (1, 3, 5, 7)] == [0, 2, 2, 4]
    assert kept(0.9, 10**8) == 10**7


@pytest.mark.parametrize(("sparsity", "pieces"), [(-0.1, 5), (1.1, 5), (math.nan, 5), (0.5, -1)])
def test_kept_refuses(sparsity, pieces):
    with pytest.raises(InputError):
        kept(sparsity, pieces)


def cases():
    """Scores with their eligible masks and how many are kept: ties across tensors and ranks, float64, a few finely told apart."""
    generator = torch.Generator().manual_seed(5)
    rounded = [torch.randn(shape, generator=generator).mul(3).round() for shape in ((4, 3, 5), (17,), (6, 2))]
    fine = [torch.randn(300, generator=generator), torch.randn(7, generator=generator).double()]
    allowed = [None, torch.rand(17, generator=generator) < 0.5, torch.rand(6, 2, generator=generator) < 0.5]
    return [
        *((rounded, None, keep) for keep in (0, 1, 8, 30, 60, 89)),
        *((rounded, allowed, keep) for keep in (10, 50)),
        *(([torch.zeros(9), -torch.zeros(9)], None, keep) for keep in (4, 12)),
        *(([torch.zeros(12)], [torch.arange(12) % 3 == 0], keep) for keep in (1, 2, 3)),
        *((fine, None, keep) for keep in (1, 30, 306)),
    ]


def shard(tensor, rank, ranks):
    """Cut into contiguous shards of unequal sizes along the flat order; the second of three ranks gets nothing."""
    flat = tensor.reshape(-1)
    weights = {1: [1.0], 2: [0.3, 1.0], 3: [0.6, 0.6, 1.0]}[ranks]
    ends = [0, *(round(len(flat) * weight) for weight in weights)]
    return flat[ends[rank] : ends[rank + 1]]


def digest(masks):
    return hashlib.sha256(b"".join(mask.numpy().tobytes() for mask in masks)).hexdigest()


def select_on_rank(rank, folder):
    """Select in groups of one, two and three of three processes, and store the masks of this rank's shards."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
    groups = {ranks: torch.distributed.new_group(list(range(ranks))) for ranks in (1, 2, 3)}
    for ranks, group in groups.items():
        if rank < ranks:
            torch.save(select_in_group(rank, ranks, group), Path(folder) / f"{rank} of {ranks}.pt")
    torch.distributed.destroy_process_group()


def select_in_group(rank, ranks, group):
    last = rank == ranks - 1
    results = []
    for tensors, eligible, keep in cases():
        mine = [shard(tensor, rank, ranks) for tensor in tensors]
        allowed = None if eligible is None else [None if mask is None else shard(mask, rank, ranks) for mask in eligible]
        results.append(select(mine, keep, eligible=allowed, group=group))
    with pytest.raises(InputError, match=r"^second: scores contain NaN"):  # on every rank, though only the last has it
        select([torch.ones(2), torch.tensor([math.nan if last else 1.0])], 1, names=["first", "second"], group=group)
    with pytest.raises(InputError, match=f"{2 * ranks}, got {2 * ranks + 1}"):
        select([torch.ones(2)], 2 * ranks + 1, group=group)
    # One rank alone has float64 scores, and knows it at once or learns it from a function.
    above_one = torch.tensor([1.0 + 2.0**-40], dtype=torch.float64)
    for scores in (above_one, lambda: above_one):
        assert bool(select([scores if last else torch.ones(1)], 1, group=group)[0]) == last
    return results


def test_result_does_not_depend_on_the_number_of_processes(tmp_path):
    multiprocessing.spawn(select_on_rank, args=(str(tmp_path),), nprocs=3)
    for ranks in (1, 2, 3):
        parts = [torch.load(tmp_path / f"{rank} of {ranks}.pt") for rank in range(ranks)]
        for number, (tensors, eligible, keep) in enumerate(cases()):
            alone = select(tensors, keep, eligible=eligible)
            shards = zip(*(part[number] for part in parts), strict=True)
            joined = [torch.cat(pieces).reshape(tensor.shape) for pieces, tensor in zip(shards, tensors, strict=True)]
            assert_same(joined, oracle(tensors, keep, eligible))
            assert digest(joined) == digest(alone)
