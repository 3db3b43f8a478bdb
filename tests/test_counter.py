"""Counter-based random numbers against a plain-integer SplitMix64 and against statistics."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from niwaki.counter import key, uniform

WORD = 2**64
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int) -> int:
    """Return the output of SplitMix64 (Steele, Lea, Flood 2014) for a state, in Python's unbounded integers."""
    z = state % WORD
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def test_published_sequence():
    # The first outputs for the seed 1234567, as given by Rosetta Code and used by several libraries' tests.
    outputs = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert uniform(1234567, 1, 5).tolist() == [(z >> 11) * 2.0**-53 for z in outputs]


@settings(deadline=None)
@given(stream=st.integers(-(2**63), 2**63 - 1), start=st.integers(0, 2**40), count=st.integers(0, 20))
def test_equals_splitmix64_in_plain_integers(stream, start, count):
    expected = [(splitmix64(stream + (start + i) * GOLDEN) >> 11) * 2.0**-53 for i in range(count)]
    found = uniform(stream, start, count)
    assert found.dtype == torch.float64
    assert found.tolist() == expected


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 100), max_size=4))
def test_shards_agree_with_the_whole(cuts):
    bounds = [0, *sorted(cuts), 100]
    parts = [uniform(42, a, b - a) for a, b in pairwise(bounds)]
    assert torch.equal(torch.cat(parts), uniform(42, 0, 100))


def test_key_is_blake2b_of_its_parts():
    # printf '7\0003\000layer.weight' | b2sum -l 64
    assert key(7, 3, "layer.weight") == int.from_bytes(bytes.fromhex("d066fe1a2bfa46c3"), "little", signed=True)


def test_keys_differ_in_every_part():
    keys = {key(seed, step, name) for seed in range(20) for step in range(20) for name in ("a", "b", "1a", "")}
    assert len(keys) == 20 * 20 * 4


@pytest.mark.parametrize("name", ["conv1.weight", "fc.weight"])
def test_numbers_are_uniform(name):
    values = uniform(key(0, 0, name), 0, 200_000).numpy()
    assert values.min() >= 0.0
    assert values.max() < 1.0
    # Standard errors: mean sqrt(1/12/n), variance sqrt(1/180/n); five of them.
    assert abs(values.mean() - 1 / 2) < 5 * (1 / 12 / values.size) ** 0.5
    assert abs(values.var() - 1 / 12) < 5 * (1 / 180 / values.size) ** 0.5
    assert stats.kstest(values, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 5 / values.size**0.5


def test_streams_are_uncorrelated():
    streams = [uniform(key(seed, step, name), 0, 50_000) for seed in (0, 1) for step in (0, 1) for name in ("a", "b")]
    correlations = np.corrcoef(torch.stack(streams).numpy())
    assert np.abs(correlations - np.eye(len(streams))).max() < 5 / 50_000**0.5


def test_pairs_fill_the_square():
    values = uniform(key(3, 1, "w"), 0, 128_000).reshape(-1, 2).numpy()
    counts, _, _ = np.histogram2d(values[:, 0], values[:, 1], bins=8, range=[[0, 1], [0, 1]])
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4
