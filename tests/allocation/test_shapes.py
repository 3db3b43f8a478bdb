import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from niwaki.allocation import ErdosRenyi, ErdosRenyiKernel, Explicit, Global, Layer, Uniform, guard, largest_remainder
from niwaki.component import build
from niwaki.errors import InputError
from niwaki.layout import Layout, layout_of


def linear(name, outputs, inputs, pieces=None):
    return Layer(name, Layout(("output", "input"), (outputs, inputs)), outputs * inputs if pieces is None else pieces)


def convolution(name, outputs, inputs, kernel):
    shape = (outputs, inputs, kernel, kernel)
    return Layer(name, Layout(("output", "input", "kernel", "kernel"), shape), math.prod(shape))


def total_kept(sparsity, layers):
    return round((1 - sparsity) * sum(layer.pieces for layer in layers))


sparsities = st.floats(0.0, 1.0, exclude_max=True, allow_subnormal=False)
sizes = st.integers(1, 4000)
layer_lists = st.lists(st.tuples(sizes, sizes, st.integers(0, 7)), min_size=1, max_size=9).map(
    lambda shapes: [
        linear(f"layer{i}.weight", o, n) if k == 0 else convolution(f"layer{i}.weight", o, n, k) for i, (o, n, k) in enumerate(shapes)
    ]
)
anything_goes = st.sampled_from([Uniform(), ErdosRenyi(), ErdosRenyiKernel(), ErdosRenyiKernel(power=0.5), ErdosRenyiKernel(power=2.0)])


# --- largest remainder


def best_by_brute_force(quotas, total, limits):
    """Least squared distance to the quotas; among equals, the surplus at the lower indices."""
    choices = [range(min(math.ceil(q) + 1, limit) + 1) for q, limit in zip(quotas, limits, strict=True)]
    candidates = [c for c in itertools.product(*choices) if sum(c) == total]
    return list(
        min(candidates, key=lambda c: (sum((Fraction(n) - Fraction(q)) ** 2 for n, q in zip(c, quotas, strict=True)), [-n for n in c]))
    )


@given(st.lists(st.integers(0, 24), min_size=1, max_size=5), st.data())
def test_largest_remainder_is_the_nearest_whole_vector(eighths, data):
    quotas = [n / 8 for n in eighths]
    limits = [math.ceil(q) + data.draw(st.integers(0, 1)) for q in quotas]
    total = data.draw(st.sampled_from(sorted({math.floor(sum(quotas)), min(math.ceil(sum(quotas)), sum(limits))})))
    assert largest_remainder(quotas, total, limits) == best_by_brute_force(quotas, total, limits)


def test_largest_remainder_breaks_ties_by_the_lower_index():
    assert largest_remainder([0.5, 0.5, 0.5, 0.5], 2, [1, 1, 1, 1]) == [1, 1, 0, 0]
    assert largest_remainder([1.25, 1.75, 1.75], 5, [9, 9, 9]) == [1, 2, 2]


def test_largest_remainder_respects_limits_where_a_quota_exceeds_its_limit():
    assert largest_remainder([2.9, 0.1], 3, [2, 5]) == [2, 1]


@pytest.mark.parametrize(("quotas", "total", "limits"), [([1.0], 5, [3]), ([1.0], -1, [3]), ([0.0, 0.0], 4, [9, 9]), ([math.nan], 1, [3])])
def test_largest_remainder_refuses_what_does_not_fit(quotas, total, limits):
    with pytest.raises(InputError, match="cannot share"):
        largest_remainder(quotas, total, limits)


# --- exact totals


@given(anything_goes, layer_lists, sparsities)
@example(Uniform(), [linear("a", 1, 1)], 0.5)
@example(Uniform(), [linear("a", 1, 10), linear("b", 1, 10)], 0.9)
@example(ErdosRenyiKernel(), [linear("a", 3, 3)] * 4, 0.9)
def test_total_is_exact_and_within_each_layer(allocation, layers, sparsity):
    keep = allocation.keep(sparsity, layers)
    assert sum(keep) == total_kept(sparsity, layers)
    assert all(0 <= n <= layer.pieces for n, layer in zip(keep, layers, strict=True))


@given(anything_goes, layer_lists, st.lists(st.integers(1, 10**9), min_size=9, max_size=9), sparsities)
def test_total_is_exact_for_pieces_that_are_not_elements(allocation, layers, pieces, sparsity):
    layers = [Layer(layer.name, layer.layout, n) for layer, n in zip(layers, pieces, strict=False)]
    assert sum(allocation.keep(sparsity, layers)) == total_kept(sparsity, layers)


@given(anything_goes, layer_lists, sparsities, sparsities)
def test_lower_sparsity_keeps_no_fewer_in_any_layer_but_for_rounding(allocation, layers, one, other):
    low, high = sorted((one, other))
    more, fewer = allocation.keep(low, layers), allocation.keep(high, layers)
    assert all(a >= b - 1 for a, b in zip(more, fewer, strict=True))


def test_counts_need_float64():
    # In float32, 100 000 007 is 100 000 008 and 0.1 of it is off by several.
    assert Uniform().keep(0.9, [linear("a", 1, 100_000_007)]) == [10_000_001]


@given(layer_lists)
def test_zero_sparsity_keeps_everything(layers):
    for allocation in (Uniform(), ErdosRenyi(), ErdosRenyiKernel(), Explicit(layers={layers[0].name: 0.5})):
        assert allocation.keep(0.0, layers) == [layer.pieces for layer in layers]
    assert Explicit(layers={layers[0].name: 0.0}).keep(0.0, layers, final=0.0) == [layer.pieces for layer in layers]


def test_no_layers_keep_nothing():
    assert Uniform().keep(0.5, []) == []


@pytest.mark.parametrize("sparsity", [1.0, -0.1, math.nan, 90.0])
def test_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(InputError, match=r"allocation.uniform: sparsity must be in \[0, 1\)"):
        Uniform().keep(sparsity, [linear("a", 2, 2)])
    with pytest.raises(InputError, match=r"sparsity must be in \[0, 1\)"):
        Uniform().keep(0.5, [linear("a", 2, 2)], final=sparsity)


def test_global_is_joint_and_has_no_budgets_of_its_own():
    assert Global.joint
    assert not Uniform.joint
    with pytest.raises(InputError, match="joint selection"):
        Global().keep(0.5, [linear("a", 2, 2)])


# --- uniform


@given(layer_lists, sparsities)
def test_uniform_gives_every_layer_its_share_within_one(layers, sparsity):
    for n, layer in zip(Uniform().keep(sparsity, layers), layers, strict=True):
        assert abs(n - (1 - Fraction(sparsity)) * layer.pieces) < 1 + 1e-6


# --- Erdős-Rényi


def densities_by_bisection(rates, pieces, sparsity):
    """Solve sum min(1, e r) N = (1 - S) sum N for e, which is monotone in e."""
    budget = (1 - sparsity) * sum(pieces)
    low, high = 0.0, 2.0 / min(rates)
    for _ in range(2000):
        middle = (low + high) / 2
        if math.fsum(min(1.0, middle * r) * n for r, n in zip(rates, pieces, strict=True)) < budget:
            low = middle
        else:
            high = middle
    return [min(1.0, high * r) for r in rates]


def kernel_rate(shape):
    return sum(shape) / math.prod(shape)


@given(layer_lists, st.floats(0.0, 0.999), st.sampled_from([0.25, 1.0, 3.0]))
@example([linear("a", 4, 5), linear("b", 4, 5), linear("c", 100, 100), linear("d", 4, 5)], 0.9, 1.0)  # several at the largest rate
@example([linear("a", 1, 1), linear("b", 1, 1)], 0.5, 1.0)
def test_erdos_renyi_kernel_solves_its_equation(layers, sparsity, power):
    rates = [kernel_rate(layer.layout.shape) ** power for layer in layers]
    pieces = [layer.pieces for layer in layers]
    expected = densities_by_bisection(rates, pieces, sparsity)
    found = ErdosRenyiKernel(power=power).densities(sparsity, layers, sparsity)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for n, density, size in zip(ErdosRenyiKernel(power=power).keep(sparsity, layers), expected, pieces, strict=True):
        assert abs(n - density * size) < 1 + 1e-6 * size


@given(layer_lists, st.floats(0.0, 0.999))
def test_erdos_renyi_solves_its_equation(layers, sparsity):
    rates = [kernel_rate(layer.layout.shape[:2]) for layer in layers]
    expected = densities_by_bisection(rates, [layer.pieces for layer in layers], sparsity)
    assert ErdosRenyi().densities(sparsity, layers, sparsity) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_layer_above_one_becomes_dense_and_the_rest_is_solved_anew():
    layers = [linear("small", 10, 10), linear("large", 1000, 1000), linear("tiny", 2, 5)]
    # Rates 0.2, 0.002 and 0.7; budget 10121.1. e = 4.993 makes only "tiny" dense, then e = 5.0055 makes "small" dense too.
    assert ErdosRenyi().keep(0.98988, layers) == [100, 10121 - 110, 10]


def test_layers_that_tie_share_equally_when_none_needs_to_be_dense():
    layers = [linear("a", 10, 10), linear("b", 10, 10)]
    assert ErdosRenyiKernel().keep(0.5, layers) == [50, 50]


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(6, 10),
        nn.Conv1d(4, 6, 3),
        nn.Conv2d(8, 12, (3, 5), groups=4),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv3d(2, 4, 3),
        nn.ConvTranspose2d(8, 12, 3),
        nn.Embedding(20, 6),
    ],
    ids=str,
)
def test_rates_are_those_of_the_weights_own_shape(module):
    layout = layout_of(module, "weight", module.weight.shape)
    assert ErdosRenyiKernel().rate(layout) == pytest.approx(kernel_rate(module.weight.shape), rel=1e-15)
    assert ErdosRenyi().rate(layout) == pytest.approx(kernel_rate(module.weight.shape[:2]), rel=1e-15)


def test_rates_of_stacked_and_of_transposed_grouped_weights_count_all_outputs_and_the_inputs_that_one_of_them_sees():
    lstm = nn.LSTM(5, 7)
    assert ErdosRenyi().rate(layout_of(lstm, "weight_ih_l0", lstm.weight_ih_l0.shape)) == pytest.approx((28 + 5) / (28 * 5))
    attention = nn.MultiheadAttention(6, 2)
    assert ErdosRenyi().rate(layout_of(attention, "in_proj_weight", attention.in_proj_weight.shape)) == pytest.approx((18 + 6) / (18 * 6))
    transposed = nn.ConvTranspose2d(8, 12, 3, groups=4)  # weight [8, 3, 3, 3]: 12 outputs, each of 2 inputs
    rate = ErdosRenyiKernel().rate(layout_of(transposed, "weight", transposed.weight.shape))
    assert rate == pytest.approx((12 + 2 + 6) / (8 * 3 * 9))


def resnet50():
    """Shapes of the 53 convolutions and the classifier, with the number of output positions of each at 224 x 224."""
    table = [("conv1", (64, 3, 7, 7), 112 * 112)]
    inputs, size = 64, 56
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            output = size // 2 if stage > 1 and block == 0 else size
            table += [
                (f"{name}.conv1", (width, inputs, 1, 1), size**2),
                (f"{name}.conv2", (width, width, 3, 3), output**2),
                (f"{name}.conv3", (4 * width, width, 1, 1), output**2),
            ]
            if block == 0:
                table.append((f"{name}.downsample.0", (4 * width, inputs, 1, 1), output**2))
            inputs, size = 4 * width, output
    return [*table, ("fc", (1000, 2048), 1)]


@pytest.mark.parametrize(("sparsity", "erk", "uniform"), [(0.8, 0.42, 0.23), (0.9, 0.24, 0.13), (0.95, 0.12, 0.08)])
def test_resnet50_costs_what_the_rigl_authors_report(sparsity, erk, uniform):
    table = resnet50()
    roles = ("output", "input", "kernel", "kernel")
    layers = [Layer(name, Layout(roles[: len(shape)], shape), math.prod(shape)) for name, shape, _ in table]
    uses = [positions for *_, positions in table]
    dense = sum(layer.pieces * u for layer, u in zip(layers, uses, strict=True))
    assert len(table) == 54
    assert sum(layer.pieces for layer in layers) == 25_502_912
    assert 2 * dense == pytest.approx(8.2e9, rel=0.005)

    keep = ErdosRenyiKernel().keep(sparsity, layers)
    assert sum(keep) == round((1 - sparsity) * 25_502_912)
    assert sum(n * u for n, u in zip(keep, uses, strict=True)) / dense == pytest.approx(erk, abs=0.01)
    # Their uniform networks keep the first convolution dense.
    keep = [layers[0].pieces, *Uniform().keep(sparsity, layers[1:])]
    assert sum(n * u for n, u in zip(keep, uses, strict=True)) / dense == pytest.approx(uniform, abs=0.01)


# --- explicit


FOUR = [  # 100, 400, 300 and 200 pieces
    linear("stem.weight", 10, 10),
    linear("body.0.weight", 20, 20),
    linear("body.1.weight", 30, 10),
    linear("head.weight", 10, 20),
]


def test_explicit_layers_have_their_sparsity_and_the_others_absorb_the_rest():
    keep = Explicit(layers={"stem.weight": 0.0, "head.*": 0.8}).keep(0.8, FOUR)
    assert keep == [100, 34, 26, 40]  # 60 left for 400 and 300: 34.29 and 25.71


@given(layer_lists, st.data())
def test_explicit_total_is_exact_at_every_stage(layers, data):
    named = data.draw(st.lists(st.sampled_from(layers), unique_by=lambda x: x.name, min_size=1))
    allocation = Explicit(layers={layer.name: data.draw(st.floats(0.0, 0.99)) for layer in named})
    pieces = sum(layer.pieces for layer in layers)
    pruned = sum(Fraction(allocation.layers[layer.name]) * layer.pieces for layer in named)
    rest = pieces - sum(layer.pieces for layer in named)
    final = float((pruned + Fraction(data.draw(st.floats(0.0, 0.99))) * rest) / pieces)
    stage = final * data.draw(st.floats(0.0, 1.0))
    keep = allocation.keep(stage, layers, final=final)
    assert sum(keep) == total_kept(stage, layers)
    if final:
        for layer in named:
            n = keep[layers.index(layer)]
            assert abs(n - (1 - allocation.layers[layer.name] * stage / final) * layer.pieces) < 1 + 1e-6 * layer.pieces


def test_explicit_stages_scale_every_layer_alike():
    allocation = Explicit(layers={"stem.weight": 0.4, "head.weight": 0.6})
    # At the end 40 + 120 of 1000 are pruned by name, and 640 of 700 by the others; half way half of each.
    assert allocation.keep(0.8, FOUR) == [60, 34, 26, 80]
    assert allocation.keep(0.4, FOUR, final=0.8) == [80, 217, 163, 140]


def test_explicit_map_of_all_layers_decides_itself():
    everything = Explicit(layers={"stem.weight": 0.1, "body.*": 0.9, "head.weight": 0.5})  # 10 + 630 + 100 of 1000
    assert everything.keep(0.74, FOUR) == [90, 40, 30, 100]
    assert everything.keep(0.37, FOUR, final=0.74) == [95, 220, 165, 150]
    with pytest.raises(InputError, match=r"amounts to sparsity 0\.74, but 0\.8 is asked for") as caught:
        everything.keep(0.8, FOUR)
    assert "\n" not in str(caught.value)


def test_explicit_takes_back_the_total_that_its_error_names():
    odd = [linear("a", 1, 37), linear("b", 1, 1009), linear("c", 1, 3)]
    allocation = Explicit(layers={"a": 0.3, "b": 0.77, "c": 0.1})
    with pytest.raises(InputError, match="amounts to sparsity") as caught:
        allocation.keep(0.5, odd)
    total = float(str(caught.value).split("sparsity ")[1].split(",")[0])
    assert sum(allocation.keep(total, odd)) == total_kept(total, odd)


def test_explicit_refuses_a_total_that_the_other_layers_cannot_reach():
    allocation = Explicit(layers={"stem.weight": 0.0, "body.0.weight": 0.5})  # 200 of 1000 pruned, 500 silent
    for sparsity in (0.1, 0.7, 0.8):
        with pytest.raises(InputError, match=rf"can be between 0\.2 and 0\.7 \(exclusive\), but {sparsity} is asked for"):
            allocation.keep(sparsity, FOUR)
    assert allocation.keep(0.2, FOUR) == [100, 200, 300, 200]
    assert allocation.keep(0.69, FOUR) == [100, 200, 6, 4]


def test_explicit_first_pattern_counts():
    keep = Explicit(layers={"body.0.weight": 0.25, "body.*": 0.5}).keep(0.3, FOUR)
    assert keep[1:3] == [300, 150]


def test_explicit_pattern_without_effect_is_refused():
    with pytest.raises(InputError, match=r"'bodi.\*' matches no layer; the nearest names: body"):
        Explicit(layers={"bodi.*": 0.5}).keep(0.5, FOUR)
    with pytest.raises(InputError, match=r"'body.0.weight' decides no layer.*before"):
        Explicit(layers={"body.*": 0.5, "body.0.weight": 0.25}).keep(0.5, FOUR)


def test_explicit_checks_its_patterns_also_while_nothing_is_pruned_yet():
    with pytest.raises(InputError, match="matches no layer"):
        Explicit(layers={"nothing": 0.5}).keep(0.0, FOUR, final=0.5)


def test_explicit_refuses_a_stage_beyond_what_its_map_is_for():
    with pytest.raises(InputError, match=r"the map is for sparsity 0\.5; at 0\.9 'stem.weight' would need"):
        Explicit(layers={"stem.weight": 0.9}).keep(0.9, FOUR, final=0.5)


def test_data_round_trip():
    for data in ("uniform", "global", {"erdos_renyi_kernel": {"power": 0.5}}, {"explicit": {"layers": {"a.*": 0.5, "b": 0.0}}}):
        assert build("allocation", data).to_data() == data
    assert build("allocation", {"uniform": {"per": "tensor"}}) == Uniform()
    assert build("allocation", {"explicit": {"layers": {"a": 0.5}}}) == Explicit(layers={"a": 0.5})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"explicit": {"layers": {"a": 1.0}}}, r"allocation\.explicit\.layers\.a: .*less than 1, got 1\.0"),
        ({"explicit": {"layers": {}}}, r"allocation\.explicit\.layers: "),
        ("explicit", r"allocation\.explicit\.layers: this field is required"),
        ({"erdos_renyi_kernel": {"power": 0}}, r"allocation\.erdos_renyi_kernel\.power: .*greater than 0"),
        ({"uniform": {"per": "channel"}}, r"allocation\.uniform\.per: .*'tensor' or 'row'"),
        ({"erdos_renyi": {"power": 2}}, r"unknown field 'power'; it has no fields"),
    ],
)
def test_wrong_fields_are_refused_in_one_line(data, message):
    with pytest.raises(InputError, match=message) as caught:
        build("allocation", data)
    assert "\n" not in str(caught.value)


# --- guard


def test_guard_leaves_what_needs_nothing():
    assert guard([3, 2, 1], [linear(name, 2, 2) for name in "abc"]) == ([3, 2, 1], [])


def test_guard_takes_from_those_that_can_spare():
    layers = [linear("a", 10, 10), linear("b", 10, 10), linear("c", 10, 10)]
    assert guard([31, 0, 61], layers, minimum=9) == ([28, 9, 55], ["b"])  # 22 and 52 to spare: 9 * 22/74 = 2.7, 9 * 52/74 = 6.3
    assert guard([0, 1, 5], layers) == ([1, 1, 4], ["a"])


def test_guard_gives_a_small_layer_all_it_has():
    assert guard([0, 9], [linear("a", 1, 2), linear("b", 3, 4)], minimum=5) == ([2, 7], ["a"])


def test_guard_raises_the_total_only_when_it_must():
    layers = [linear(name, 2, 2) for name in "abc"]
    assert guard([0, 2, 0], layers) == ([1, 1, 1], ["a", "c"])
    assert guard([0, 0, 0], layers) == ([1, 1, 1], ["a", "b", "c"])


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=8), st.integers(0, 6))
def test_guard_is_exact(counts, minimum):
    keep = [min(pair) for pair in counts]
    layers = [Layer(str(i), Layout(("output", "input"), (1, max(pair))), max(pair)) for i, pair in enumerate(counts)]
    result, raised = guard(keep, layers, minimum)
    floors = [min(minimum, layer.pieces) for layer in layers]
    assert sum(result) == max(sum(keep), sum(floors))
    assert raised == [layer.name for n, low, layer in zip(keep, floors, layers, strict=True) if n < low]
    for new, old, low in zip(result, keep, floors, strict=True):
        assert new == low if old <= low else low <= new <= old
