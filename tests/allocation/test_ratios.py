"""Budgets by a layer's place and by its own scores."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niwaki.allocation import ErrorBound, Evidence, Layer, OutlierWeighted, PrincipalFilters, SmartRatio, Uniform, UniformPlus
from niwaki.component import build
from niwaki.errors import InputError
from niwaki.layout import Layout
from niwaki.saliency import Observation
from niwaki.statistics import InputCovariance


def linear(name, pieces):
    return Layer(name, Layout(("output", "input"), (1, pieces)), pieces)


def convolution(name, pieces):
    return Layer(name, Layout(("output", "input", "kernel", "kernel"), (1, pieces, 1, 1)), pieces)


def scored(*scores):
    tensors = [torch.as_tensor(one, dtype=torch.float64) for one in scores]
    return Evidence(scores=tensors.__getitem__)


# --- uniform_plus


def test_uniform_plus_by_hand():
    layers = [convolution("stem", 100), convolution("body", 5000), linear("head", 900)]
    # 1200 stay: 100 of the stem, and 1100 of 5900 are less than a fifth, so 180 of the head and 920 of the body.
    assert UniformPlus().keep(0.8, layers) == [100, 920, 180]
    # 4200 stay: 4100 of 5900 is more than a fifth, so the head is as the others.
    assert UniformPlus().keep(0.3, layers) == [100, 3475, 625]


@given(st.lists(st.integers(50, 3000), min_size=3, max_size=8), st.floats(0.0, 0.9))
def test_uniform_plus_solves_its_equation(sizes, sparsity):
    layers = [convolution("first", sizes[0]), *(convolution(str(i), n) for i, n in enumerate(sizes[1:-1])), linear("last", sizes[-1])]
    total = (1 - sparsity) * sum(sizes)
    if sizes[0] + 0.2 * sizes[-1] > total:
        with pytest.raises(InputError, match="more than sparsity"):
            UniformPlus().keep(sparsity, layers)
        return
    keep = UniformPlus().keep(sparsity, layers)
    assert sum(keep) == (round(total) if sparsity else sum(sizes))
    assert keep[0] == sizes[0]
    assert keep[-1] >= 0.2 * sizes[-1] - 1
    middle = [n / size for n, size in zip(keep[1:-1], sizes[1:-1], strict=True)]
    assert max(middle) - min(middle) < 0.05  # alike, but for rounding
    assert keep[-1] / sizes[-1] >= min(middle) - 0.05


def test_uniform_plus_without_convolutions_has_no_dense_layer():
    assert UniformPlus().keep(0.5, [linear("a", 100), linear("b", 100)]) == [50, 50]


# --- smart_ratio


def test_smart_ratio_by_hand():
    layers = [linear(name, 1000) for name in "abcd"]
    # 300 stay in the last one; 500 of the others as 20 : 12 : 6.
    assert SmartRatio().keep(0.8, layers) == [263, 158, 79, 300]
    # 1500 in the others: 20 e = 789, 12 e = 474, 6 e = 237.
    assert SmartRatio().keep(0.55, layers) == [789, 474, 237, 300]
    # 2400: the first would have 1263, so it is dense, and 1400 are 12 : 6.
    assert SmartRatio().keep(0.325, layers) == [1000, 933, 467, 300]


def test_smart_ratio_is_at_the_same_fraction_of_its_end_all_the_way():
    layers = [linear(name, 1000) for name in "abcd"]
    assert SmartRatio().keep(0.4, layers, final=0.8) == [632, 579, 539, 650]  # each half way to what is above


def test_smart_ratio_says_when_the_last_layer_alone_is_too_much():
    with pytest.raises(InputError, match=r"0\.3 of 'b' is 0\.2727 of all pieces, more than sparsity 0\.9 leaves"):
        SmartRatio().keep(0.9, [linear("a", 100), linear("b", 1000)])
    assert SmartRatio(last=None).keep(0.9, [linear("a", 100), linear("b", 1000)]) == [25, 85]  # 6 * 100 e + 2 * 1000 e = 110


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=8), st.floats(0.0, 0.99), st.floats(0.0, 1.0))
def test_smart_ratio_totals_are_exact(sizes, final, stage):
    layers = [linear(str(i), n) for i, n in enumerate(sizes)]
    sparsity = final * stage
    if len(sizes) > 1 and final and 0.3 * sizes[-1] > (1 - final) * sum(sizes):
        return
    assert sum(SmartRatio().keep(sparsity, layers, final=final)) == round((1 - sparsity) * sum(sizes))


# --- outlier_weighted


def outliers(size, number):
    return torch.cat([torch.full((number,), 1000.0), torch.linspace(0.5, 1.0, size - number)])


def test_outlier_weighted_by_hand():
    layers = [linear(name, 1000) for name in "abc"]
    # Shares of outliers: 0, 0.01 and 0.05, with mean 0.02; the deviation of 0.03 is worth the whole band.
    evidence = scored(outliers(1000, 0), outliers(1000, 10), outliers(1000, 50))
    keep = OutlierWeighted(threshold=5.0, band=0.09).keep(0.7, layers, evidence=evidence)
    assert keep == [240, 270, 390]


def test_without_outliers_it_is_uniform():
    layers = [linear("a", 300), linear("b", 700)]
    evidence = scored(torch.linspace(1, 2, 300), torch.linspace(1, 2, 700))
    assert OutlierWeighted().keep(0.6, layers, evidence=evidence) == Uniform().keep(0.6, layers)


def test_tensors_of_a_block_have_one_sparsity():
    layers = [linear(f"layers.{i}.{name}.weight", 500) for i in range(2) for name in ("q", "k")]
    evidence = scored(*(outliers(500, n) for n in (0, 5, 10, 20)))
    keep = OutlierWeighted(band=0.1).keep(0.5, layers, evidence=evidence)
    assert keep == [200, 200, 300, 300]
    apart = OutlierWeighted(band=0.1, per="tensor").keep(0.5, layers, evidence=evidence)
    assert apart[0] < apart[1] < apart[2] < apart[3]


@given(
    st.lists(st.tuples(st.integers(20, 400), st.integers(0, 10)), min_size=1, max_size=6),
    st.floats(0.01, 0.97),
    st.floats(0.0, 0.4),
)
def test_no_layer_leaves_the_band(layers, sparsity, band):
    evidence = scored(*(outliers(*one) for one in layers))
    whole = [linear(str(i), size) for i, (size, _) in enumerate(layers)]
    keep = OutlierWeighted(band=band).keep(sparsity, whole, evidence=evidence)
    assert sum(keep) == round((1 - sparsity) * sum(size for size, _ in layers))
    for n, (size, _) in zip(keep, layers, strict=True):
        assert abs(n - (1 - sparsity) * size) <= band * size + 1 + 1e-9 * size


# --- error_bound


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8), min_size=1, max_size=4), st.floats(0.05, 0.95))
def test_error_bound_gives_the_least_largest_share(scores, sparsity):
    """The largest share of a layer's total that goes is the least that any counts with this total have."""
    layers = [linear(str(i), len(one)) for i, one in enumerate(scores)]
    total = round((1 - sparsity) * sum(len(one) for one in scores))
    keep = ErrorBound().keep(sparsity, layers, evidence=scored(*scores))
    assert sum(keep) == total
    if total < len(scores):
        return

    def share(one, n):
        values = sorted(one, reverse=True) if any(one) else [1] * len(one)
        return sum(values[n:]) / sum(values)

    best = {0: 0.0}  # counts so far -> the least largest share
    for one in scores:
        following = {}
        for before, worst in best.items():
            for n in range(1, len(one) + 1):
                value = max(worst, share(one, n))
                if value < following.get(before + n, math.inf):
                    following[before + n] = value
        best = following
    assert max(share(one, n) for one, n in zip(scores, keep, strict=True)) == pytest.approx(best[total], abs=1e-12)
    assert min(keep) >= 1


def test_error_bound_refuses_what_is_no_error():
    for bad in (-1.0, math.inf):
        with pytest.raises(InputError, match="negative or infinite"):
            ErrorBound().keep(0.5, [linear("a", 2)], evidence=scored([1.0, bad]))


def test_error_bound_with_power_two_shares_squares():
    layers = [linear("a", 3), linear("b", 3)]
    evidence = scored([3.0, 2.0, 2.0], [10.0, 1.0, 1.0])  # shares that go first: 4/17, 1/102; then 8/17, 2/102
    assert ErrorBound(power=2.0).keep(0.5, layers, evidence=evidence) == [2, 1]


# --- pfa


def test_pfa_keeps_as_many_units_as_principal_components():
    rng = np.random.default_rng(0)
    spectra = [np.array([8.0, 4.0, 2.0, 1.0, 1.0]), np.array([90.0, 4.0, 3.0, 2.0, 1.0]), np.ones(10)]
    covariances = []
    for values in spectra:
        rotation, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
        covariances.append(torch.tensor(rotation @ np.diag(values) @ rotation.T))

    def observe(i):
        return [Observation("reader", torch.ones(1), statistics={InputCovariance(): covariances[i]})]

    layers = [linear(str(i), len(values)) for i, values in enumerate(spectra)]
    for total in range(3, 21):
        keep = PrincipalFilters().keep(1 - total / 20, layers, evidence=Evidence(observe=observe))
        assert sum(keep) == total
        # Some share of the variance explains the counts: those for it, or for it and a bit less.
        shares = [np.cumsum(values) / values.sum() for values in spectra]
        levels = np.unique(np.concatenate([[0.0], *shares]))
        needed = [[int((own < level - 1e-12).sum()) + (level > 0) for own in shares] for level in levels]
        assert any(all(low <= n <= high for low, n, high in zip(fewer, keep, more, strict=True)) for fewer, more in pairwise(needed)), (
            total,
            keep,
        )


def test_pfa_says_when_nothing_reads_a_layer():
    with pytest.raises(InputError, match="nothing reads 'a'"):
        PrincipalFilters().keep(0.5, [linear("a", 4)], evidence=Evidence(observe=lambda i: []))


def test_data_round_trip():
    for data in ("uniform_plus", {"smart_ratio": {"last": None}}, {"outlier_weighted": {"band": 0.05, "per": "tensor"}}, "pfa"):
        assert build("allocation", data).to_data() == data
    assert build("allocation", {"uniform": {"per": "row"}}).by_row
    assert not Uniform().by_row
