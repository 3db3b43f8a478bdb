"""Budgets of FLOPs, energy and seconds, and the dynamic program."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from niwaki.allocation import DynamicProgramming, Evidence, FlopsBudget, LatencyBudget, LatencyTable, Layer, Uniform
from niwaki.allocation.costs import energy
from niwaki.allocation.levels import cheapest, filled, in_steps
from niwaki.component import build
from niwaki.errors import InputError
from niwaki.layout import Layout
from niwaki.saliency import Observation
from niwaki.statistics import InputGram


def linear(name, pieces):
    return Layer(name, Layout(("output", "input"), (1, pieces)), pieces)


def with_scores(sizes, seed=0, **fields):
    random = np.random.default_rng(seed)
    scores = [torch.tensor(random.gamma(1.0, 1.0 + i, size)) for i, size in enumerate(sizes)]
    return [linear(str(i), n) for i, n in enumerate(sizes)], scores, Evidence(scores=scores.__getitem__, **fields)


# --- FLOPs

layer_sets = st.lists(st.tuples(st.integers(200, 2000), st.floats(0.0, 50.0)), min_size=1, max_size=6)


@given(layer_sets, st.floats(0.02, 0.98), st.floats(0.0, 1.0), st.sampled_from(["global", "uniform"]), st.integers(0, 5))
def test_flops_are_within_one_percent_of_the_budget_or_it_cannot_be_reached(sets, share, others, ranking, seed):
    sizes, each = [n for n, _ in sets], [f for _, f in sets]
    targets = sum(n * f for n, f in sets)
    if targets < 1.0:
        return
    dense = targets * (1.0 + others)
    layers, scores, evidence = with_scores(sizes, seed, flops=each, dense_flops=dense)
    allocation = FlopsBudget(flops=share, ranking=ranking)
    least = (dense - targets + sum(each)) / dense
    if least > share + 1e-12:
        with pytest.raises(InputError, match=r"of the model's FLOPs is asked for, and these targets can leave between"):
            allocation.keep(1.0 - share, layers, evidence=evidence)
        return
    keep = allocation.keep(1.0 - share, layers, evidence=evidence)
    left = (dense - sum((size - n) * f for size, n, f in zip(sizes, keep, each, strict=True))) / dense
    assert min(keep) >= 1
    assert left <= share + 1e-9
    assert left > share - 0.01 or keep == sizes
    if ranking == "global":  # one ranking, but for the best of each layer: no piece that goes is better than one that stays
        kept = [s.sort(descending=True).values[1:n] for s, n in zip(scores, keep, strict=True)]
        gone = [s.sort(descending=True).values[n:] for s, n in zip(scores, keep, strict=True)]
        worst = min((float(s.min()) for s in kept if len(s)), default=math.inf)
        assert max((float(s.max()) for s in gone if len(s)), default=-math.inf) <= worst
    else:
        densities = [n / size for n, size in zip(keep, sizes, strict=True)]
        assert max(densities) - min(densities) < 0.02


def test_flops_follow_the_schedule():
    layers, _, evidence = with_scores([400, 900], flops=[10.0, 3.0], dense_flops=10_000.0)
    counts = [FlopsBudget(flops=0.5).keep(s, layers, final=0.5, evidence=evidence) for s in (0.0, 0.1, 0.3, 0.5)]
    assert counts[0] == [400, 900]
    for fewer, more in zip(counts[1:], counts[:-1], strict=True):
        assert all(a <= b for a, b in zip(fewer, more, strict=True))
    assert FlopsBudget(flops=0.25).budget == 0.25
    assert build("allocation", {"flops_budget": 0.25}) == FlopsBudget(flops=0.25)


def test_flops_of_units_are_those_of_what_is_left_together():
    """A chain 3 -> 40 -> 30 -> 5: a unit costs less once those that it reads are gone."""
    widths = [40, 30]

    def left(counts):
        return 2.0 * (3 * counts[0] + counts[0] * counts[1] + counts[1] * 5)

    each = [torch.full((40,), 2.0 * (3 + 30)), torch.full((30,), 2.0 * (40 + 5))]
    for allocation in (FlopsBudget(flops=0.3), DynamicProgramming(cost="flops", share=0.3, error="scores")):
        layers, _, evidence = with_scores(widths, flops=each, dense_flops=left(widths), flops_left=left)
        share = left(allocation.keep(0.7, layers, evidence=evidence)) / left(widths)
        assert 0.25 < share <= 0.3


def test_masked_pieces_are_neither_kept_nor_counted():
    layers, scores, _ = with_scores([100, 100])
    active = [torch.arange(100) < 50, torch.arange(100) < 80]
    evidence = Evidence(scores=scores.__getitem__, active=active, flops=[1.0, 1.0], dense_flops=200.0)
    assert sum(FlopsBudget(flops=0.5).keep(0.5, layers, evidence=evidence)) == 100
    assert FlopsBudget(flops=0.9).keep(0.1, layers, evidence=evidence) == [50, 80]


def test_units_of_different_cost_are_counted_one_by_one():
    layers = [linear("a", 4)]
    each = [torch.tensor([1.0, 10.0, 100.0, 1000.0])]
    evidence = Evidence(scores=lambda i: torch.tensor([1.0, 4.0, 3.0, 2.0]), flops=each, dense_flops=1111.0)
    assert FlopsBudget(flops=0.5).keep(0.5, layers, evidence=evidence) == [2]  # 10 and 100 stay; the next costs 1000
    assert FlopsBudget(flops=0.09).keep(0.91, layers, evidence=evidence) == [1]


# --- the dynamic program

level_tables = st.lists(st.lists(st.tuples(st.integers(-5, 40), st.integers(0, 12)), min_size=1, max_size=5), min_size=1, max_size=5)


@given(level_tables, st.integers(0, 40))
def test_levels_are_those_of_brute_force(tables, budget):
    errors = [[float(e) for e, _ in own] for own in tables]
    costs = [[c for _, c in own] for own in tables]
    found = cheapest(errors, costs, budget)
    feasible = [
        sum(own[level] for own, level in zip(errors, levels, strict=True))
        for levels in itertools.product(*(range(len(own)) for own in costs))
        if sum(own[level] for own, level in zip(costs, levels, strict=True)) <= budget
    ]
    if found is None:
        assert not feasible
        return
    assert sum(own[level] for own, level in zip(costs, found, strict=True)) <= budget
    assert sum(own[level] for own, level in zip(errors, found, strict=True)) == min(feasible)


@given(st.lists(st.lists(st.floats(0.0, 100.0), min_size=1, max_size=4), min_size=1, max_size=5), st.floats(1.0, 300.0))
def test_what_fits_in_steps_fits(costs, budget):
    steps, whole = in_steps(costs, budget, 1000)
    for levels in itertools.product(*(range(len(own)) for own in costs)):
        if sum(own[level] for own, level in zip(steps, levels, strict=True)) <= whole:
            assert sum(own[level] for own, level in zip(costs, levels, strict=True)) <= budget * (1 + 1e-6)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=5), st.integers(0, 300))
def test_filling_stops_where_it_would_not_fit(pairs, budget):
    counts, limits = [min(pair) for pair in pairs], [max(pair) for pair in pairs]
    if sum(counts) > budget:
        return
    result = filled(counts, limits, lambda more: sum(more) <= budget)
    assert all(low <= n <= high for low, n, high in zip(counts, result, limits, strict=True))
    assert min(budget, sum(limits)) - len(pairs) <= sum(result) <= budget


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.floats(0.01, 0.97), st.integers(0, 9))
def test_dynamic_programming_meets_the_total_and_loses_no_more_than_any_levels(sizes, sparsity, seed):
    layers, scores, evidence = with_scores(sizes, seed)
    total = round((1 - sparsity) * sum(sizes))
    keep = DynamicProgramming(levels=4).keep(sparsity, layers, evidence=evidence)
    assert sum(keep) == total
    assert all(0 <= n <= size for n, size in zip(keep, sizes, strict=True))

    def lost(counts):
        return sum(float(s.sort().values[: len(s) - n].sum()) for s, n in zip(scores, counts, strict=True))

    levels = [{size, 1, *(round(size * 0.01 ** (j / 3)) for j in range(4))} - {0} for size in sizes]
    feasible = [lost(counts) for counts in itertools.product(*levels) if sum(counts) <= total]
    assert not feasible or lost(keep) <= min(feasible) + 1e-9


def test_dynamic_programming_under_flops_prefers_what_is_cheap():
    layers, _, _ = with_scores([100, 100])
    evidence = Evidence(scores=lambda i: torch.ones(100), flops=[1.0, 9.0], dense_flops=1000.0)
    keep = DynamicProgramming(cost="flops", share=0.5).keep(0.5, layers, evidence=evidence)
    assert keep[0] == 100
    assert 490 <= keep[0] + 9 * keep[1] <= 500


def test_dynamic_programming_says_what_can_be_reached():
    layers, _, evidence = with_scores([10, 10], flops=[1.0, 1.0], dense_flops=100.0)
    with pytest.raises(InputError, match=r"0\.5 of the cost is asked for, and these targets can leave between 0\.82 and 1$"):
        DynamicProgramming(cost="flops", share=0.5).keep(0.5, layers, evidence=evidence)


@pytest.mark.parametrize("data", [{"cost": "flops"}, {"cost": "size", "share": 0.5}, {"share": 0.5}])
def test_a_share_goes_with_a_cost(data):
    with pytest.raises(InputError, match="share: it goes with cost: flops or energy"):
        DynamicProgramming(**data)
    with pytest.raises(InputError, match=r"allocation\.dynamic_programming: share: it goes with"):
        build("allocation", {"dynamic_programming": data})


def test_layerwise_errors_are_those_of_the_outputs():
    random = np.random.default_rng(3)
    weights, inputs = [random.normal(size=(4, 6)) for _ in range(2)], [random.normal(size=(6, 50)) * (1 + i) for i in range(2)]
    layout = Layout(("output", "input"), (4, 6))

    def observe(i):
        gram = torch.tensor(inputs[i] @ inputs[i].T / 50)[None]
        return [Observation("w", torch.tensor(weights[i]), layout=layout, statistics={InputGram(): gram})]

    layers = [Layer(name, layout, 24) for name in "ab"]
    evidence = Evidence(scores=lambda i: torch.tensor(np.abs(weights[i])), observe=observe)
    allocation = DynamicProgramming(error="layerwise", levels=3)
    assert allocation.statistics == (InputGram(),)

    def error(i, n):
        kept = np.zeros(24)
        order = np.argsort(-np.abs(weights[i]).ravel())[:n]
        kept[order] = weights[i].ravel()[order]
        difference = (weights[i] - kept.reshape(4, 6)) @ inputs[i]
        return (difference**2).sum() / ((weights[i] @ inputs[i]) ** 2).sum()

    for i in range(2):
        options = [[24, 12, 2, 1]] * 2
        assert allocation._errors(options, layers, evidence)[i] == pytest.approx([error(i, n) for n in options[i]], abs=1e-12)
    with pytest.raises(InputError, match="error: layerwise needs single weights"):
        allocation.keep(
            0.5, [Layer(name, layout, 12) for name in "ab"], evidence=Evidence(scores=lambda i: torch.ones(12), observe=observe)
        )


def test_trials_find_better_coefficients_and_are_never_worse():
    layers, _, _ = with_scores([100, 100, 100])
    wanted = (80, 30, 10)

    def loss(counts):
        return sum((n - w) ** 2 for n, w in zip(counts, wanted, strict=True)) / 1000

    evidence = Evidence(scores=lambda i: torch.ones(100), loss=loss, seed=1)
    plain = DynamicProgramming(error="quadratic").keep(0.6, layers, evidence=evidence)
    searched = DynamicProgramming(error="quadratic", trials=60).keep(0.6, layers, evidence=evidence)
    assert sum(plain) == sum(searched) == 120
    assert loss(searched) < 0.5 * loss(plain)
    assert searched == DynamicProgramming(error="quadratic", trials=60).keep(0.6, layers, evidence=evidence)


# --- energy


def test_energy_counts_multiply_adds_and_weights_from_memory():
    layers = [Layer("a", Layout(("output", "input"), (10, 10)), 50)]  # two weights a piece
    cost = energy(layers, Evidence(flops=[8.0], dense_flops=1e9))
    # 4 multiply-adds of 3.7 + 0.9 + 5 pJ, and two weights of 640 pJ.
    assert cost.total([7]) == pytest.approx(7 * (4 * 9.6 + 2 * 640.0))
    assert cost.dense == pytest.approx(cost.total([50]))
    scores = Evidence(scores=lambda i: torch.ones(50), flops=[8.0], dense_flops=1e9)
    assert DynamicProgramming(cost="energy", share=0.4).keep(0.6, layers, evidence=scores) == [20]
    with pytest.raises(InputError, match="the energy of units does not add up"):
        energy(layers, Evidence(flops=[8.0], dense_flops=1e9, flops_left=lambda counts: 1.0))


# --- latency

TABLE = LatencyTable(seconds=10.0, layers={"0": {0.0: 4.0, 0.5: 4.5, 0.8: 1.0}, "1": {0.0: 5.0, 1.0: 0.0}}, threads=2, machine="here")


@pytest.mark.parametrize(("sparsity", "seconds"), [(0.0, 4.0), (0.25, 4.0), (0.5, 4.0), (0.65, 2.5), (0.8, 1.0), (0.99, 1.0)])
def test_latencies_are_interpolated_and_never_rise(sparsity, seconds):
    assert TABLE.at("0", sparsity) == pytest.approx(seconds)


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6, 0.9])
def test_latency_budget_is_met_with_the_least_error_that_levels_allow(share):
    layers, scores, evidence = with_scores([200, 200], seed=2)
    keep = LatencyBudget(table=TABLE, share=share, levels=30).keep(1 - share, layers, evidence=evidence)

    def seconds(counts):
        return 1.0 + sum(TABLE.at(str(i), 1 - n / 200) for i, n in enumerate(counts))

    def lost(counts):
        return sum(float(s.sort().values[: 200 - n].sum()) for s, n in zip(scores, counts, strict=True))

    assert seconds(keep) <= share * 10.0 * (1 + 1e-9)
    levels = {200, 1, *(round(200 * 0.01 ** (j / 29)) for j in range(30))}
    # Steps of a budget may cost a ten-thousandth of it.
    feasible = [lost(counts) for counts in itertools.product(levels, levels) if seconds(counts) <= share * 10.0 * (1 - 1e-3)]
    assert lost(keep) <= min(feasible) + 1e-9


def test_latency_budget_reads_a_file_and_round_trips(tmp_path):
    layers, _, evidence = with_scores([200, 200])
    path = tmp_path / "table.json"
    TABLE.save(path)
    assert LatencyTable.load(path) == TABLE
    by_file = build("allocation", {"latency_budget": {"table": str(path), "share": 0.5}})
    inline = LatencyBudget(table=TABLE, share=0.5)
    assert by_file.keep(0.5, layers, evidence=evidence) == inline.keep(0.5, layers, evidence=evidence)
    assert build("allocation", inline.to_data()) == inline
    assert by_file.budget == 0.5


def test_tables_that_do_not_fit_are_refused(tmp_path):
    layers, _, evidence = with_scores([200, 200])
    with pytest.raises(InputError, match=r"none\.json: cannot be read"):
        LatencyBudget(table=str(tmp_path / "none.json"), share=0.5).keep(0.5, layers, evidence=evidence)
    (tmp_path / "bad.json").write_text('{"seconds": 1.0, "layers": {"a": {"0.5": 1.0}}}')
    with pytest.raises(InputError, match=r"bad\.json: is no table of latencies .*'a' needs the seconds at sparsity 0") as caught:
        LatencyTable.load(tmp_path / "bad.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"it has no latencies of '2'"):
        LatencyBudget(table=TABLE, share=0.5).keep(0.5, [*layers, linear("2", 9)], evidence=with_scores([200, 200, 9])[2])
    with pytest.raises(InputError, match="its layers take 9 s together, and the whole model only 5 s"):
        LatencyBudget(table=TABLE.model_copy(update={"seconds": 5.0}), share=0.5).keep(0.5, layers, evidence=evidence)
    with pytest.raises(InputError, match=r"can leave between 0\.2\d* and 1"):
        LatencyBudget(table=TABLE, share=0.1).keep(0.9, layers, evidence=evidence)
    with pytest.raises(InputError, match=r"allocation\.latency_budget\.table"):
        build("allocation", {"latency_budget": {"table": {"seconds": 0, "layers": {}}, "share": 0.5}})


def test_uniform_budgets_of_flops_are_uniform():
    layers, _, evidence = with_scores([1000, 3000], flops=[2.0, 2.0], dense_flops=8000.0)
    assert FlopsBudget(flops=0.3, ranking="uniform").keep(0.7, layers, evidence=evidence) == Uniform().keep(0.7, layers)
