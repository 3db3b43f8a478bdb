"""Normalizations against NumPy, SciPy and the definitions, written as loops."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from niwaki.component import REGISTRY, build
from niwaki.errors import InputError
from niwaki.normalization import FlopsPenalty, Lamp, LayerL2, PerFlop, Rank, Unchanged

few = st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=30)
many = st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=30)


def lamp_by_definition(scores: list[float]) -> list[float]:
    """Every score over the sum of all that are not smaller; of equal ones, only those with a lower or the same index count."""
    return [
        s * s / math.fsum(t * t for j, t in enumerate(scores) if t > s or (t == s and j <= i)) if s > 0 else 0.0
        for i, s in enumerate(scores)
    ]


def removal_order(scores: list[float]) -> list[int]:
    """Return the indices from the piece that is kept longest to the first that goes: by score, then by lower index."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


@settings(deadline=None)
@given(scores=st.one_of(few, many).filter(lambda s: max(s) > 1e-100))
def test_lamp_equals_its_definition(scores):
    found = Lamp().normalize(torch.tensor(scores, dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), lamp_by_definition(scores), rtol=1e-12, atol=1e-300)
    assert found.max() == 1.0
    assert found[removal_order(scores)[0]] == 1.0


def test_lamp_equals_the_published_algorithm():
    """Sort ascending, divide each square by the sum of itself and all after it (Lee et al. 2021), in float64 NumPy."""
    weights = np.random.default_rng(0).standard_normal((40, 50))
    order = np.argsort(np.abs(weights), axis=None)
    squares = np.square(weights.ravel()[order])
    expected = np.empty(weights.size)
    expected[order] = squares / np.cumsum(squares[::-1])[::-1]
    found = Lamp().normalize(torch.from_numpy(np.abs(weights)))
    np.testing.assert_allclose(found.numpy(), expected.reshape(weights.shape), rtol=1e-12)


@settings(deadline=None)
@given(scores=st.one_of(few, many))
def test_lamp_and_rank_keep_the_order_and_its_ties(scores):
    for normalization in (Lamp(), Rank()):
        found = normalization.normalize(torch.tensor(scores, dtype=torch.float32)).tolist()
        assert removal_order(found) == removal_order([abs(s) for s in scores])


def test_lamp_keeps_the_order_of_many_scores():
    scores = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).abs()
    found = Lamp().normalize(scores)
    assert np.array_equal(np.lexsort((np.arange(100_000), -scores.numpy())), np.lexsort((np.arange(100_000), -found.numpy())))


@settings(deadline=None)
@given(scores=few.filter(lambda s: max(s) > 0), exponent=st.integers(-60, 60))
def test_lamp_does_not_depend_on_scale(scores, exponent):
    values = torch.tensor(scores, dtype=torch.float64)
    assert torch.equal(Lamp().normalize(values), Lamp().normalize(values * 2.0**exponent))


def test_lamp_of_denormals_huge_and_zero_scores():
    tiny = torch.tensor([1e-45, 3e-45, 0.0])
    np.testing.assert_allclose(Lamp().normalize(tiny).numpy(), [1 / 5, 1.0, 0.0], rtol=1e-12)  # 1 and 2 times 2^-149
    huge = torch.tensor([1e300, 2e300], dtype=torch.float64)
    np.testing.assert_allclose(Lamp().normalize(huge).numpy(), [1 / 5, 1.0], rtol=1e-12)
    zeros = Lamp().normalize(torch.tensor([0.0, -0.0, 0.0]))
    ones = Lamp().normalize(torch.ones(3))
    assert zeros.tolist() == ones.tolist() == [1.0, 1 / 2, 1 / 3]


@settings(deadline=None)
@given(scores=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30))
def test_layer_l2_equals_numpy(scores):
    values = np.asarray(scores, dtype=np.float64)
    norm = np.sqrt(np.square(values).sum())
    found = LayerL2().normalize(torch.tensor(scores, dtype=torch.float32)).numpy()
    if values.any():
        assert np.square(found).sum() == pytest.approx(1.0, rel=1e-12)
        np.testing.assert_allclose(found, values / norm, rtol=1e-12)
    else:
        assert not found.any()


@pytest.mark.parametrize("scale", [1e-300, 1e-45, 1.0, 1e300])
def test_layer_l2_neither_overflows_nor_underflows(scale):
    found = LayerL2().normalize(torch.tensor([3.0, -4.0], dtype=torch.float64) * scale)
    np.testing.assert_allclose(found.numpy(), [0.6, -0.8], rtol=1e-6)


@settings(deadline=None)
@given(scores=st.lists(st.one_of(st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf]), st.floats(-10, 10)), min_size=1, max_size=30))
def test_rank_equals_scipy(scores):
    # Reversed, the ordinal rank gives the lower index the higher rank among equals.
    expected = stats.rankdata(np.asarray(scores)[::-1], method="ordinal")[::-1] / len(scores)
    assert Rank().normalize(torch.tensor(scores, dtype=torch.float64)).tolist() == expected.tolist()


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0, 2.0])
def test_per_flop_divides_by_the_cost(power):
    scores = torch.tensor([0.0, 1.0, 6.0], dtype=torch.float64)
    found = PerFlop(power=power).normalize(scores, 18.0)
    np.testing.assert_allclose(found.numpy(), scores.numpy() / 18.0**power, rtol=1e-15)


def test_per_flop_keeps_neighbouring_float32_apart():
    scores = torch.tensor([1.0, 1.0 + 2.0**-23])
    found = PerFlop().normalize(scores, 3.0)
    assert found[0] < found[1]


@pytest.mark.parametrize("flops", [None, 0.0, -1.0, math.nan])
def test_per_flop_needs_flops(flops):
    with pytest.raises(InputError, match="FLOPs of a piece must be known") as caught:
        PerFlop().normalize(torch.ones(2), flops)
    assert "\n" not in str(caught.value)


def test_flops_penalty_subtracts_what_a_piece_costs():
    scores, cost = torch.tensor([3.0, 0.0, -4.0]), torch.tensor([1e6, 3e6, 0.0])
    found = FlopsPenalty(strength=0.01).normalize(scores, cost)
    assert found.tolist() == pytest.approx([0.6 - 0.01, -0.03, -0.8], rel=1e-12)
    assert FlopsPenalty(strength=0.0).normalize(scores, 5.0).tolist() == LayerL2().normalize(scores).tolist()
    for flops in (None, -1.0, math.nan):
        with pytest.raises(InputError, match="known and not negative"):
            FlopsPenalty().normalize(scores, flops)
    assert build("normalization", {"flops_penalty": 0.5}) == FlopsPenalty(strength=0.5)
    assert FlopsPenalty.needs == {"flops"}


def test_none_changes_nothing():
    scores = torch.tensor([1.0, torch.nan, -torch.inf], dtype=torch.bfloat16)
    assert Unchanged().normalize(scores) is scores


@pytest.mark.parametrize("normalization", [LayerL2(), Lamp(), Rank(), PerFlop(), FlopsPenalty()], ids=lambda n: n.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (4,), (2, 3, 2)], ids=str)
def test_shape_dtype_and_input(normalization, dtype, shape):
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = scores.clone()
    found = normalization.normalize(scores, 7.0)
    assert found.shape == scores.shape
    assert found.dtype == torch.float64
    assert torch.equal(scores.double(), before.double())


@pytest.mark.parametrize("normalization", [LayerL2(), Lamp(), Rank(), PerFlop(), FlopsPenalty()], ids=lambda n: n.name)
def test_strided_scores(normalization):
    scores = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(normalization.normalize(scores.to(memory_format=torch.channels_last), 2.0), normalization.normalize(scores, 2.0))


@pytest.mark.parametrize("normalization", [LayerL2(), Lamp(), PerFlop()], ids=lambda n: n.name)
def test_infinite_scores_stay_and_do_not_count(normalization):
    finite = normalization.normalize(torch.tensor([1.0, 2.0]), 2.0).tolist()
    found = normalization.normalize(torch.tensor([torch.inf, 1.0, -torch.inf, 2.0]), 2.0).tolist()
    assert found == [math.inf, finite[0], -math.inf, finite[1]]
    assert normalization.normalize(torch.tensor([torch.inf, -torch.inf]), 2.0).tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("normalization", [LayerL2(), Lamp(), Rank(), PerFlop(), FlopsPenalty()], ids=lambda n: n.name)
def test_nan_stays_for_the_selection_to_name(normalization):
    found = normalization.normalize(torch.tensor([1.0, torch.nan, 2.0]), 2.0)
    assert found.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("normalization", [Lamp(), PerFlop()], ids=lambda n: n.name)
def test_negative_scores_are_refused_where_they_have_no_meaning(normalization):
    with pytest.raises(InputError, match="must not be negative") as caught:
        normalization.normalize(torch.tensor([1.0, -1.0]), 2.0)
    assert "\n" not in str(caught.value)


def test_recipes():
    expected = {
        "none": Unchanged(),
        "layer_l2": LayerL2(),
        "lamp": Lamp(),
        "rank": Rank(),
        "per_flop": PerFlop(),
        "flops_penalty": FlopsPenalty(),
    }
    assert set(REGISTRY["normalization"]) == set(expected)
    for name, component in expected.items():
        assert build("normalization", name) == component
        assert component.to_data() == name
        assert component.equation
        assert component.source
    gentle = build("normalization", {"per_flop": {"power": 0.3}})
    assert build("normalization", gentle.to_data()) == gentle == PerFlop(power=0.3)
    assert PerFlop.needs == {"flops"}
    with pytest.raises(InputError, match="power"):
        build("normalization", {"per_flop": {"power": -1}})
