import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from niwaki.component import REGISTRY, build
from niwaki.errors import InputError
from niwaki.granularity import Block, Element, OutputChannel
from niwaki.growth import (
    AllGrowth,
    ConstantDecay,
    CosineDecay,
    GradientGrowth,
    LinearDecay,
    PowerDecay,
    RandomGrowth,
    dropped,
)
from niwaki.layout import Layout
from niwaki.saliency import Observation, Random

shares = st.floats(0.0, 1.0)


def reducer(granularity, *shape):
    layout = Layout(("output", "input", "kernel", "kernel")[: len(shape)], shape)
    return lambda values: granularity.reduce(values, layout)


# --- how many are dropped


@given(shares, st.integers(0, 10**12))
def test_dropped_is_the_exact_product_rounded_down(fraction, active):
    exact = Fraction(fraction) * active
    count = dropped(fraction, active)
    assert 0 <= count <= active
    # The product is rounded to float64 before it is rounded down: it may reach the next whole number from just below it.
    assert count == math.floor(exact) or (count == math.floor(exact) + 1 and count - exact <= exact * Fraction(1, 2**52))


@pytest.mark.parametrize(
    ("fraction", "active", "count"),
    [(0.3, 10, 3), (0.3, 9, 2), (0.5, 1, 0), (1.0, 7, 7), (0.0, 7, 0), (0.3, 100_000_010, 30_000_003), (0.1, 2**24 + 10, 1677722)],
)
def test_dropped_counts(fraction, active, count):
    assert dropped(fraction, active) == count


def test_dropped_does_not_count_in_float32():
    # In float32 the product rounds up to 29; in float64 it is 28.999999999999996.
    assert dropped(0.29, 100) == 28


@pytest.mark.parametrize(("fraction", "active"), [(1.1, 5), (-0.1, 5), (math.nan, 5), (0.5, -1)])
def test_dropped_refuses_what_is_no_share(fraction, active):
    with pytest.raises(InputError, match=r"must be in \[0, 1\]"):
        dropped(fraction, active)


# --- decay


@given(shares, st.integers(0, 1000), st.sampled_from([0.5, 1.0, 3.0]))
def test_decays_follow_their_equations(initial, thousandths, exponent):
    progress = thousandths / 1000
    left = 1 - Fraction(thousandths, 1000)
    assert ConstantDecay(initial=initial).at(progress) == initial
    assert LinearDecay(initial=initial).at(progress) == pytest.approx(float(Fraction(initial) * left), abs=1e-15)
    cosine = initial * math.sin(math.pi / 2 * float(left)) ** 2  # (1 + cos x) / 2 = cos(x / 2)^2
    assert CosineDecay(initial=initial).at(progress) == pytest.approx(cosine, abs=1e-15)
    power = PowerDecay(initial=initial, exponent=exponent).at(progress)
    assert power**2 == pytest.approx(float(Fraction(initial) ** 2 * left ** int(2 * exponent)), abs=1e-14)


@pytest.mark.parametrize("decay", [CosineDecay(initial=0.3), LinearDecay(initial=0.3), PowerDecay(initial=0.3)])
def test_decays_begin_at_the_initial_fraction_and_end_at_zero(decay):
    assert decay.at(0.0) == 0.3
    assert decay.at(1.0) == 0.0
    values = [decay.at(i / 100) for i in range(101)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("progress", [-0.01, 1.01, math.nan])
def test_decay_refuses_progress_outside_the_schedule(progress):
    with pytest.raises(InputError, match=r"progress must be in \[0, 1\]"):
        CosineDecay().at(progress)


# --- what a recipe says


def test_a_fraction_is_a_number_a_name_or_a_component():
    assert build("growth", {"gradient": {"fraction": 0.25}}).fraction == ConstantDecay(initial=0.25)
    assert build("growth", {"gradient": {"fraction": 1}}).fraction == ConstantDecay(initial=1.0)
    assert build("growth", {"gradient": {"fraction": "linear"}}).fraction == LinearDecay(initial=0.3)
    assert build("growth", {"gradient": {"fraction": {"cosine": 0.5}}}).fraction == CosineDecay(initial=0.5)
    assert build("growth", {"random": {"fraction": {"power": {"initial": 0.5, "exponent": 2}}}}).fraction == PowerDecay(
        initial=0.5, exponent=2.0
    )
    assert RandomGrowth(fraction=CosineDecay(initial=0.1)).fraction.at(0.0) == 0.1


def test_defaults_are_those_of_set_and_rigl():
    assert build("growth", "random") == RandomGrowth(fraction=0.3, at_update="step", initial_mask="random")
    rigl = build("growth", {"gradient": {"fraction": {"cosine": {"initial": 0.3}}, "at_update": "skip_step"}})
    assert rigl == build("growth", "gradient")
    assert rigl.needs == {"gradient"}
    assert RandomGrowth().needs == frozenset()


def test_only_growths_that_exchange_pieces_grow():
    growing = {"random", "gradient", "momentum", "locality", "rewiring"}
    assert {name: cls.grows for name, cls in REGISTRY["growth"].items()} == {name: name in growing for name in {"none", "all", *growing}}


@pytest.mark.parametrize(
    "data",
    [
        "none",
        "all",
        "random",
        {"random": {"fraction": 0.5, "initial_mask": "saliency"}},
        {"gradient": {"fraction": 0.3}},
        {"gradient": {"fraction": {"cosine": {"initial": 0.5}}, "at_update": "step"}},
        {"gradient": {"fraction": "power"}},
        {"gradient": {"fraction": {"power": {"exponent": 2.0}}}},
    ],
)
def test_data_round_trip(data):
    assert build("growth", data).to_data() == data


def test_data_with_defaults_says_everything():
    rest = {"initial_mask": "random", "initial_value": "zero", "threshold": None}
    assert build("growth", "gradient").to_data(defaults=True) == {
        "gradient": {"fraction": {"cosine": {"initial": 0.3}}, "at_update": "skip_step", **rest}
    }
    assert build("growth", "random").to_data(defaults=True) == {"random": {"fraction": 0.3, "at_update": "step", **rest}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"gradient": {"fraction": 1.5}}, r"growth\.gradient\.fraction: decay\.constant\.initial: .*less than or equal to 1"),
        ({"gradient": {"fraction": True}}, r"growth\.gradient\.fraction: decay: unknown component 'True'"),
        ({"gradient": {"fraction": "cosin"}}, r"unknown component 'cosin'; did you mean 'cosine'"),
        ({"gradient": {"fraction": {"power": {"exponent": 0}}}}, r"decay\.power\.exponent: .*greater than 0"),
        ({"gradient": {"at_update": "skip"}}, r"growth\.gradient\.at_update: .*'skip_step'.*got 'skip'"),
        ({"random": {"initial_mask": "zeros"}}, r"growth\.random\.initial_mask"),
        ({"none": {"fraction": 0.3}}, r"unknown field 'fraction'; it has no fields"),
    ],
)
def test_wrong_fields_are_refused_in_one_line(data, message):
    with pytest.raises(InputError, match=message) as caught:
        build("growth", data)
    assert "\n" not in str(caught.value)


# --- scores


def test_all_pieces_come_back_alike():
    weight = torch.randn(4, 6, dtype=torch.float64)
    score = AllGrowth().score(Observation("w", weight), reducer(Block(rows=2, columns=3), 4, 6))
    assert torch.equal(score, torch.zeros(2, 2, dtype=torch.float64))


def test_gradient_growth_scores_elements_by_magnitude():
    gradient = torch.tensor([[3.0, -4.0], [0.0, -0.5]], dtype=torch.float64)
    score = GradientGrowth().score(Observation("w", torch.zeros(2, 2), gradient=gradient), reducer(Element(), 2, 2))
    assert score.tolist() == [[3.0, 4.0], [0.0, 0.5]]


def test_gradient_growth_sums_over_pieces():
    gradient = torch.randn(6, 4, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    score = GradientGrowth().score(Observation("w", gradient, gradient=gradient), reducer(OutputChannel(), 6, 4, 3, 3))
    expected = [sum(abs(g) for g in channel.flatten().tolist()) for channel in gradient]
    assert score.flatten().tolist() == pytest.approx(expected, rel=1e-14)


def test_gradient_growth_does_not_lose_small_addends_of_short_floats():
    gradient = torch.full((1, 1024), 2.0**-9, dtype=torch.bfloat16)
    gradient[0, 0] = 1.0
    score = GradientGrowth().score(Observation("w", gradient, gradient=gradient), lambda values: values.sum(1))
    assert score.item() == 1.0 + 1023 * 2.0**-9


def test_gradient_growth_names_the_tensor_without_a_gradient():
    with pytest.raises(InputError, match=r"body\.weight has no gradient"):
        GradientGrowth().score(Observation("body.weight", torch.zeros(2, 2)), reducer(Element(), 2, 2))


def random_score(shape=(40, 50), granularity=None, **fields):
    seen = Observation(**{"name": "w", "weight": torch.zeros(shape), "seed": 1, "step": 2} | fields)
    return RandomGrowth().score(seen, reducer(granularity or Element(), *shape))


@pytest.mark.parametrize("granularity", [Element(), Block(rows=3, columns=7, remainder="pad"), OutputChannel()])
def test_random_growth_is_uniform_for_pieces_of_any_size(granularity):
    score = random_score((1000, 50), granularity)
    assert stats.kstest(score.flatten().numpy(), "uniform").pvalue > 1e-3
    if isinstance(granularity, Block):  # the last row and column of the grid are cut to 1 element of 3 or 7
        assert stats.kstest(score[:, -1].numpy(), "uniform").pvalue > 1e-3


def test_random_growth_depends_on_what_it_is_for_and_on_nothing_else():
    first = random_score()
    torch.manual_seed(0)
    assert torch.equal(first, random_score(weight=torch.randn(40, 50)))
    for other in ({"seed": 3}, {"step": 3}, {"name": "v"}):
        assert (first == random_score(**other)).sum() == 0
    strided = torch.zeros(50, 40).t()
    assert torch.equal(first, random_score(weight=strided))


def test_random_growth_is_independent_of_the_random_saliency():
    seen = Observation("w", torch.zeros(40, 50), seed=1, step=2)
    saliency = Random().score(seen, reducer(Element(), 40, 50)).flatten().numpy()
    growth = random_score().flatten().numpy()
    assert abs(stats.pearsonr(saliency, growth).statistic) < 0.1


def test_random_growth_of_shards_agrees_with_the_whole():
    whole = random_score((8, 10), OutputChannel())
    low = random_score((3, 10), OutputChannel())
    high = random_score((5, 10), OutputChannel(), start=30)
    assert torch.equal(whole, torch.cat([low, high]))
    assert torch.equal(random_score((8, 10))[3:], random_score((5, 10), start=30))
