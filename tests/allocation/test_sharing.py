import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niwaki.allocation import (
    Amc,
    DynamicProgramming,
    ErdosRenyi,
    ErrorBound,
    Evidence,
    Evolutionary,
    FlopsBudget,
    Layer,
    OutlierWeighted,
    Redistribution,
    Sensitivity,
    SmartRatio,
    Uniform,
    bounded,
    row_counts,
    solved,
)
from niwaki.errors import InputError
from niwaki.layout import Layout
from niwaki.saliency import Observation
from niwaki.statistics import Momentum

LIMITED = [
    Uniform(),
    ErdosRenyi(),
    SmartRatio(last=None),
    OutlierWeighted(),
    ErrorBound(),
    DynamicProgramming(levels=8, trials=4),
    Sensitivity(sparsities=[0.25, 0.5, 0.75]),
    Evolutionary(population=4, generations=2),
    Amc(episodes=3, explore=1),
]


def linear(name, outputs, inputs):
    return Layer(name, Layout(("output", "input"), (outputs, inputs)), outputs * inputs)


def evidence_for(layers, active, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(layer.layout.shape, generator=generator) for layer in layers]
    return Evidence(
        scores=scores.__getitem__,
        active=active,
        loss=lambda counts: sum(layer.pieces / (n + 1) for layer, n in zip(layers, counts, strict=True)),
        observe=lambda i: [],
        survivors=None,
    )


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5), st.floats(0.01, 0.95), st.data())
def test_no_layer_keeps_more_than_is_active_and_the_total_is_exact(shapes, sparsity, data):
    allocation = data.draw(st.sampled_from(LIMITED))
    layers = [linear(f"{i}.weight", *shape) for i, shape in enumerate(shapes)]
    active = [torch.rand(layer.layout.shape, generator=torch.Generator().manual_seed(i)) < 0.7 for i, layer in enumerate(layers)]
    total, room = round((1 - sparsity) * sum(layer.pieces for layer in layers)), sum(int(one.sum()) for one in active)
    evidence = evidence_for(layers, active)
    if total > room:
        with pytest.raises(InputError):
            allocation.keep(sparsity, layers, evidence=evidence)
        return
    keep = allocation.keep(sparsity, layers, evidence=evidence)
    assert sum(keep) == total
    assert all(0 <= n <= int(one.sum()) for n, one in zip(keep, active, strict=True))


@pytest.mark.parametrize(
    ("allocation", "said"),
    [
        (OutlierWeighted(), "allocation.outlier_weighted: it needs the scores of all pieces"),
        (FlopsBudget(flops=0.5), "allocation.flops_budget: it needs the FLOPs of a forward pass .* and the scores"),
        (Evolutionary(), r"allocation.evolutionary: it needs a loss over data \(data= and loss=\)"),
        (DynamicProgramming(error="layerwise", trials=1), "it needs a loss .* and the scores of all pieces and to see the weights"),
    ],
)
def test_missing_evidence_is_named(allocation, said):
    with pytest.raises(InputError, match=said):
        allocation.keep(0.5, [linear("a", 4, 4)])


def test_a_nan_score_is_named():
    scores = [torch.ones(16), torch.tensor([1.0, math.nan] * 8)]
    for allocation in (OutlierWeighted(), ErrorBound(), DynamicProgramming()):
        with pytest.raises(InputError, match="the scores of 'b' hold a NaN"):
            allocation.keep(0.5, [linear("a", 4, 4), linear("b", 4, 4)], evidence=Evidence(scores=scores.__getitem__))


def test_best_scores_are_those_of_active_pieces_and_equal_ones_stay_in_order():
    evidence = Evidence(scores=lambda i: torch.tensor([[2.0, 5.0], [5.0, 7.0]]), active=[torch.tensor([[True, True], [True, False]])])
    assert evidence.order(0, "a").tolist() == [1, 2, 0]
    assert evidence.best(0, "a").tolist() == [5.0, 5.0, 2.0]
    assert evidence.limits([linear("a", 2, 2)]) == [3]


# --- sharing


@given(st.lists(st.tuples(st.floats(0.0, 50.0), st.integers(0, 40)), min_size=1, max_size=7), st.floats(0.0, 1.0))
def test_bounded_quotas_meet_the_total_and_share_the_overflow_in_proportion(pairs, share):
    limits = [limit for _, limit in pairs]
    total = round(share * sum(limits))
    whole = math.fsum(q for q, _ in pairs)
    quotas = [q * total / whole for q, _ in pairs] if whole > 1e-3 else [total / len(pairs)] * len(pairs)
    result = bounded(quotas, total, limits)
    assert math.fsum(result) == pytest.approx(total, abs=1e-6)
    assert all(-1e-9 <= r <= limit + 1e-6 for r, limit in zip(result, limits, strict=True))
    scales = [r / q for r, q, limit in zip(result, quotas, limits, strict=True) if q > 1e-6 and r < limit - 1e-6]
    assert not scales or max(scales) == pytest.approx(min(scales), rel=1e-6)  # those with room: one factor
    for r, q, limit in zip(result, quotas, limits, strict=True):
        assert r >= min(q, limit) - 1e-6  # none has less than it would have had


@given(st.integers(0, 200), st.lists(st.integers(0, 30), min_size=1, max_size=9))
def test_rows_are_as_equal_as_their_limits_allow(total, limits):
    if total > sum(limits):
        with pytest.raises(InputError, match="cannot share"):
            row_counts(total, len(limits), limits)
        return
    counts = row_counts(total, len(limits), limits)
    assert sum(counts) == total
    assert all(0 <= n <= limit for n, limit in zip(counts, limits, strict=True))
    for n, limit in zip(counts, limits, strict=True):
        assert n == limit or n >= max(counts) - 1  # only a full row is behind the fullest by more than one


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 30))
def test_rows_without_limits_never_grow_when_the_total_falls(one, other, rows):
    more, fewer = row_counts(max(one, other), rows), row_counts(min(one, other), rows)
    assert more == sorted(more, reverse=True)
    assert more[0] - more[-1] <= 1
    assert all(a >= b for a, b in zip(more, fewer, strict=True))


def test_solved_finds_a_smooth_level_and_splits_a_jump():
    assert solved(lambda x: [3.0 - x, 5.0 - 2 * x], 0.0, 2.0, 5.0) == pytest.approx([2.0, 3.0])
    assert solved(lambda x: [1.0, 5.0 if x < 0.3 else 1.0], 0.0, 1.0, 3.5) == [1.0, 2.5]
    assert solved(lambda x: [2.0, 2.0], 0.0, 1.0, 4.0) == [2.0, 2.0]


# --- redistribution


def watched(weight, active, gradient=None):
    return [Observation("w", weight, gradient=gradient, active=active)]


def test_growth_follows_the_mean_size_of_active_weights():
    layers = [linear("a", 10, 10), linear("b", 10, 10)]
    on = torch.zeros(10, 10, dtype=torch.bool)
    on[:2] = True
    weights = [torch.where(on, -1.0, 9.0), torch.where(on, 3.0, 0.0)]  # what is masked does not count
    gradients = [torch.where(on, 4.0, 1.0), torch.where(on, -1.0, 8.0)]
    evidence = Evidence(survivors=[10, 10], observe=lambda i: watched(weights[i], on, gradients[i]))
    assert Redistribution(by="weight").keep(0.8, layers, evidence=evidence) == [10 + 5, 10 + 15]  # 20 to grow, as 1 to 3
    assert Redistribution(by="gradient").keep(0.8, layers, evidence=evidence) == [10 + 16, 10 + 4]
    assert Redistribution(by="nonzeros").keep(0.8, layers, evidence=evidence) == [20, 20]


def test_growth_follows_the_momentum_of_active_weights():
    layers = [linear("a", 10, 10), linear("b", 10, 10)]
    on = torch.zeros(10, 10, dtype=torch.bool)
    on[:2] = True
    moments = [torch.where(on, -3.0, 0.0), torch.where(on, 2.0, 9.0)]
    seen = [Observation("w", torch.ones(10, 10), active=on, statistics={Momentum(0.9): m.double()}) for m in moments]
    evidence = Evidence(survivors=[10, 10], observe=lambda i: [seen[i]])
    assert Redistribution().keep(0.8, layers, evidence=evidence) == [10 + 12, 10 + 8]  # 20 to grow, as 3 to 2
    assert Redistribution().statistics == (Momentum(0.9),)


def test_a_layer_takes_what_it_has_room_for_and_the_rest_goes_to_the_others_in_proportion():
    layers = [linear("a", 2, 5), linear("b", 10, 10), linear("c", 10, 10)]
    on = torch.ones(1, dtype=torch.bool)
    sizes = [100.0, 1.0, 2.0]
    evidence = Evidence(survivors=[8, 20, 20], observe=lambda i: watched(torch.tensor([sizes[i]]), on))
    # 80 of 210 pieces: 32 to grow, of which the first takes 2, all that is free, and the others 10 and 20.
    assert Redistribution(by="weight").keep(1 - 80 / 210, layers, evidence=evidence) == [10, 30, 40]


def test_without_survivors_the_first_masks_have_the_budgets_of_the_shapes():
    layers = [linear("a", 10, 90), linear("b", 10, 10)]
    evidence = Evidence(observe=lambda i: [])
    assert Redistribution(initial="erdos_renyi").keep(0.88, layers, evidence=evidence) == ErdosRenyi().keep(0.88, layers)
    assert Redistribution(by="weight").keep(0.9, layers, evidence=evidence) == Uniform().keep(0.9, layers)


def test_where_the_total_falls_below_the_survivors_every_layer_gives_the_same_share():
    layers = [linear("a", 10, 10), linear("b", 10, 10)]
    evidence = Evidence(survivors=[30, 90], observe=lambda i: [])
    assert Redistribution(by="survivors").keep(0.8, layers, evidence=evidence) == [10, 30]


def test_sizes_that_are_not_finite_are_refused():
    evidence = Evidence(survivors=[1], observe=lambda i: watched(torch.tensor([math.nan]), None))
    with pytest.raises(InputError, match="the mean absolute weight of 'a' is nan"):
        Redistribution(by="weight").keep(0.5, [linear("a", 4, 4)], evidence=evidence)
