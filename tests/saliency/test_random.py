"""Random scores: a plain-integer SplitMix64, and what replicas and shards must agree on."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from niwaki.component import build
from niwaki.saliency import Observation, Random


def identity(values):
    return values


def rows(values):
    return values.sum(1, keepdim=True, dtype=torch.float64)


def expected(seed, step, name, count):
    state = int.from_bytes(hashlib.blake2b(f"{seed}\0{step}\0{name}".encode(), digest_size=8).digest(), "little")
    for _ in range(count):
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield ((z ^ (z >> 31)) >> 11) * 2.0**-53
        state = (state + 0x9E3779B97F4A7C15) % 2**64


@settings(deadline=None)
@given(seed=st.integers(0, 2**40), step=st.integers(0, 10**6), name=st.text(max_size=8))
def test_numbers_are_those_of_the_stream(seed, step, name):
    seen = Observation(name, torch.zeros(3, 4), seed=seed, step=step)
    whole = Random().score(seen, identity)
    assert whole.shape == (3, 4)
    assert whole.flatten().tolist() == list(expected(seed, step, name, 12))
    pieces = Random().score(seen, rows)
    assert pieces.shape == (3, 1)
    assert pieces.flatten().tolist() == list(expected(seed, step, name, 3))


@settings(deadline=None)
@given(cut=st.integers(0, 12))
def test_shards_agree_with_the_whole(cut):
    weight = torch.zeros(12)
    whole = Random().score(Observation("w", weight, seed=5, step=9), identity)
    first = Random().score(Observation("w", weight[:cut], seed=5, step=9), identity)
    second = Random().score(Observation("w", weight[cut:], seed=5, step=9, start=cut), identity)
    assert torch.equal(torch.cat([first, second]), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_weights_do_not_matter(dtype):
    nothing = torch.full((4, 4), torch.nan).to(dtype)
    zeros = torch.zeros(4, 4)
    assert torch.equal(Random().score(Observation("w", nothing), rows), Random().score(Observation("w", zeros), rows))


def test_streams_differ_in_seed_step_and_name():
    weight = torch.zeros(1000)
    streams = [
        Random().score(Observation(name, weight, seed=seed, step=step), identity)
        for name, seed, step in (("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1))
    ]
    for i, one in enumerate(streams):
        assert stats.kstest(one.numpy(), "uniform").pvalue > 1e-4
        for other in streams[:i]:
            assert (one != other).all()


def test_recipe():
    assert build("saliency", "random") == Random()
    assert Random().to_data() == "random"
