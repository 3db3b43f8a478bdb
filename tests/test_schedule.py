import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from niwaki.clock import Clock, Time
from niwaki.component import build
from niwaki.errors import InputError
from niwaki.schedule import (
    Adaptive,
    Constant,
    Cosine,
    Cubic,
    Exponential,
    Iterative,
    Linear,
    Listed,
    MaskStability,
    OneShot,
    Phases,
    Polynomial,
    RisingLoss,
    ThresholdRamp,
    Validation,
)

RAMPS = [Linear, Cubic, Polynomial, Exponential, Cosine]
CLOCK = Clock(total_steps=1000, steps_per_epoch=10, tokens_per_step=64)


def steps(n):
    return f"{n} steps"


def updates(schedule, sparsity, clock=CLOCK, until=None):
    until = schedule.last(clock) + 50 if until is None else until
    answers = ((step, schedule.at(step, sparsity, clock)) for step in range(until))
    return {step: value for step, value in answers if value is not None}


sparsities = st.floats(0.0, 1.0, exclude_max=True)
spans = st.tuples(st.integers(0, 200), st.integers(1, 300)).map(lambda pair: (pair[0], pair[0] + pair[1]))


# --- ramps


def linear_exact(initial, final, progress):
    return initial + (final - initial) * progress


def cubic_exact(initial, final, progress):
    left = 1 - progress
    return final + (initial - final) * left * left * left


@pytest.mark.parametrize(("ramp", "exact"), [(Linear, linear_exact), (Cubic, cubic_exact)])
@given(initial=sparsities, final=sparsities, length=st.integers(1, 400), begin=st.integers(0, 99))
def test_linear_and_cubic_are_their_polynomials(ramp, exact, initial, final, length, begin):
    schedule = ramp(initial=initial, begin=steps(begin), end=steps(begin + length), every="1 steps")
    for step, value in updates(schedule, final).items():
        expected = exact(Fraction(initial), Fraction(final), Fraction(step - begin, length))
        assert abs(Fraction(value) - expected) < Fraction(1, 10**15)


def test_the_polynomial_test_can_tell_degrees_apart():
    assert cubic_exact(Fraction(0), Fraction(8, 10), Fraction(1, 2)) == Fraction(7, 10)
    assert Cubic(end="100 steps", every="50 steps").at(50, 0.8, CLOCK) == pytest.approx(0.7, abs=1e-15)


@given(initial=sparsities, final=sparsities, degree=st.sampled_from([1, 2, 3, 4]), step=st.integers(1, 99))
def test_a_polynomial_of_any_degree(initial, final, degree, step):
    found = Polynomial(degree=degree, initial=initial, end="100 steps", every="1 steps").at(step, final, CLOCK)
    left = Fraction(100 - step, 100) ** degree
    assert abs(Fraction(found) - (Fraction(final) + (Fraction(initial) - Fraction(final)) * left)) < Fraction(1, 10**15)


@given(initial=st.floats(0, 0.99), final=st.floats(0, 0.99), count=st.integers(2, 60))
def test_exponential_keeps_the_same_share_of_the_density_at_every_update(initial, final, count):
    values = list(updates(Exponential(initial=initial, end=steps(7 * count), every="7 steps"), final).values())
    factor = ((1 - final) / (1 - initial)) ** (1 / count)
    assert len(values) == count + 1
    for earlier, later in itertools.pairwise(values):
        assert (1 - later) / (1 - earlier) == pytest.approx(factor, rel=1e-12)


@given(initial=sparsities, final=sparsities, length=st.integers(1, 200))
def test_cosine_follows_the_squared_half_angle(initial, final, length):
    for step, value in updates(Cosine(initial=initial, end=steps(length), every="1 steps"), final).items():
        risen = math.sin(math.pi / 2 * step / length) ** 2  # (1 - cos x) / 2 = sin(x / 2)^2
        assert value == pytest.approx(initial * (1 - risen) + final * risen, abs=1e-14)


@pytest.mark.parametrize("ramp", RAMPS)
@given(span=spans, every=st.integers(1, 400), initial=sparsities, final=sparsities)
@example(span=(0, 10), every=3, initial=0.1, final=0.1 + 1e-17)
@example(span=(0, 300), every=1, initial=0.0, final=5e-324)
def test_ramps_update_when_they_should_and_hit_both_ends_exactly(ramp, span, every, initial, final):
    begin, end = span
    schedule = ramp(initial=initial, begin=steps(begin), end=steps(end), every=steps(every))
    schedule.validate_with(CLOCK)
    found = updates(schedule, final)
    assert set(found) == {*range(begin, end, every), end}
    assert found[begin] == initial
    assert found[end] == final
    assert schedule.last(CLOCK) == end
    assert schedule.final(final) == final


@pytest.mark.parametrize("ramp", RAMPS)
@given(span=spans, every=st.integers(1, 50), ends=st.tuples(sparsities, sparsities).map(sorted))
@example(span=(0, 300), every=1, ends=[0.0, 0.1 + 1e-17])
def test_ramps_never_go_back_nor_beyond_their_end(ramp, span, every, ends):
    initial, final = ends
    schedule = ramp(initial=initial, begin=steps(span[0]), end=steps(span[1]), every=steps(every))
    values = list(updates(schedule, final).values())
    assert all(a <= b + 1e-15 for a, b in itertools.pairwise(values))
    assert initial == min(values)
    assert final == max(values)


@pytest.mark.parametrize("ramp", RAMPS)
def test_ramps_have_the_usual_defaults(ramp):
    schedule = ramp()
    assert set(updates(schedule, 0.9)) == {0, 100, 200, 300, 400, 500, 600, 700, 750}
    assert schedule.at(0, 0.9, CLOCK) == 0.0


def test_ramps_take_times_in_any_unit():
    schedule = build("schedule", {"cubic": {"initial": 0.05, "begin": "1 epochs", "every": "5 epochs", "end": "40 epochs"}})
    assert set(updates(schedule, 0.95)) == {10, 60, 110, 160, 210, 260, 310, 360, 400}
    by_tokens = Linear(begin="0.1 run", end="12800 tokens", every="640 tokens")
    assert set(updates(by_tokens, 0.5)) == {100, 110, 120, 130, 140, 150, 160, 170, 180, 190, 200}


def test_an_update_at_or_beyond_the_end_of_the_run_is_still_answered():
    assert Cubic(end="1 run").at(1000, 0.9, CLOCK) == 0.9
    assert OneShot(at="1 run").at(1000, 0.9, CLOCK) == 0.9
    assert Linear(end="2000 steps").at(2000, 0.9, CLOCK) == 0.9


# --- one shot, iterative, constant


def test_one_shot_is_one_update():
    assert updates(OneShot(), 0.9) == {0: 0.9}
    assert updates(OneShot(), 0.9, Clock(), until=10) == {0: 0.9}  # step 0 needs no length of the run
    schedule = build("schedule", {"one_shot": {"at": "0.5 run"}})
    assert updates(schedule, 0.9, until=1001) == {500: 0.9}
    assert schedule.last(CLOCK) == 500


@given(st.integers(1, 30), spans, st.floats(0.0, 0.999))
@example(4, (0, 4), 1e-16)
def test_iterative_removes_the_same_share_of_what_remains_in_every_round(rounds, span, final):
    begin, end = span
    schedule = Iterative(rounds=rounds, begin=steps(begin), end=steps(end))
    if end - begin < rounds:
        with pytest.raises(InputError, match="rounds do not fit"):
            schedule.validate_with(CLOCK)
        return
    schedule.validate_with(CLOCK)
    found = updates(schedule, final)
    assert list(found) == [begin + math.floor(Fraction(end - begin) * c / rounds) for c in range(1, rounds + 1)]
    assert found[end] == final
    assert schedule.last(CLOCK) == end
    for c, value in enumerate(found.values(), start=1):
        # The density to the power of the rounds is the final density to the power of the round.
        assert (1 - value) ** rounds == pytest.approx((1 - final) ** c, rel=1e-9, abs=1e-300)
        assert 0.0 <= value <= final


def test_iterative_at_ninety_per_cent_removes_a_fifth_in_each_of_ten_rounds():
    densities = [1 - s for s in updates(Iterative(), 0.9).values()]
    assert list(updates(Iterative(), 0.9)) == [75, 150, 225, 300, 375, 450, 525, 600, 675, 750]
    assert densities[0] == pytest.approx(0.7943282347242815)
    assert densities[-1] == 1 - 0.9


@given(spans, st.integers(1, 400), sparsities)
def test_constant_updates_until_its_end(span, every, final):
    begin, end = span
    schedule = Constant(begin=steps(begin), end=steps(end), every=steps(every))
    schedule.validate_with(CLOCK)
    found = updates(schedule, final, until=600)
    expected = [begin + i * every for i in range(401) if begin + i * every <= end]
    assert list(found) == expected
    assert set(found.values()) == {final}
    assert schedule.last(CLOCK) == expected[-1]


# --- phases and lists


ACDC = {"dense": [0, 15, 25, 35, 45, 55, 65, 75], "sparse": [10, 20, 30, 40, 50, 60, 70, 85], "unit": "epochs"}


def test_phases_are_dense_and_sparse_in_turn():
    schedule = build("schedule", {"phases": ACDC})
    schedule.validate_with(CLOCK)
    expected = {10 * epoch: 0.0 for epoch in ACDC["dense"]} | {10 * epoch: 0.9 for epoch in ACDC["sparse"]}
    assert updates(schedule, 0.9) == expected
    assert schedule.last(CLOCK) == 850
    assert schedule.final(0.9) == 0.9
    assert schedule.final(None) is None


def test_phases_that_end_dense_are_finally_dense():
    schedule = Phases(dense=[0, 0.6], sparse=[0.3], unit="run")
    assert updates(schedule, 0.3) == {0: 0.0, 300: 0.3, 600: 0.0}
    assert schedule.final(0.3) == 0.0
    assert Phases(dense=[], sparse=[5], unit="steps").final(0.3) == 0.3


def test_list_has_the_values_that_were_written():
    values = [0.75, 0.9375, 0.984375, 0.996, 0.999]
    schedule = build("schedule", {"list": {"sparsity": values, "every": "1 epochs"}})
    schedule.validate_with(CLOCK)
    assert updates(schedule, 0.5) == dict(zip([0, 10, 20, 30, 40], values, strict=True))
    assert schedule.last(CLOCK) == 40
    assert schedule.final(None) == schedule.final(0.5) == 0.999

    later = Listed(sparsity=[0.5, 0.25], every="3 steps", begin="0.1 run")
    assert updates(later, 0.9) == {100: 0.5, 103: 0.25}

    dated = build("schedule", {"list": {"sparsity": [0.5, 0.9], "at": ["7 steps", "0.5 run"]}})
    dated.validate_with(CLOCK)
    assert updates(dated, 0.5) == {7: 0.5, 500: 0.9}
    assert dated.last(CLOCK) == 500


def test_a_table_is_resolved_by_the_clock_that_is_asked():
    schedule = Phases(sparse=[2], unit="epochs")
    assert updates(schedule, 0.5, Clock(steps_per_epoch=3)) == {0: 0.0, 6: 0.5}
    assert updates(schedule, 0.5, Clock(steps_per_epoch=4)) == {0: 0.0, 8: 0.5}


# --- mask stability


def test_candidates_are_drawn_until_the_end():
    schedule = MaskStability(begin="1 epochs", end="10 steps")
    assert updates(schedule, 0.5, Clock(steps_per_epoch=4)) == {4: 0.5, 8: 0.5, 10: 0.5}
    assert schedule.last(Clock(steps_per_epoch=4)) == 10
    assert [Constant().candidates, schedule.candidates] == [0, 5]
    assert Constant().accepts([])


def test_a_mask_acts_when_it_resembles_the_others_of_its_window():
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(200, generator=generator) < 0.5]
    for flips in (60, 30, 10, 10, 5, 0, 5, 0):
        changed = masks[-1].clone()
        changed[torch.randperm(200, generator=generator)[:flips]] ^= True
        masks.append(changed)
    schedule = MaskStability(window=4, distance=0.1)
    for n in range(1, len(masks) + 1):
        window = masks[max(n - 4, 0) : n]
        distances = [sum(a != b for a, b in zip(window[-1].tolist(), mask.tolist(), strict=True)) / 200 for mask in window[:-1]]
        assert schedule.accepts(masks[:n]) == (len(window) == 4 and max(distances) < 0.1)
    assert schedule.accepts(masks)
    assert not schedule.accepts(masks[:4])


def test_the_distance_itself_is_not_below_it():
    near, far = torch.zeros(10, dtype=torch.bool), torch.zeros(10, dtype=torch.bool)
    far[0] = True
    assert not MaskStability(window=2, distance=0.1).accepts([near, far])
    assert MaskStability(window=2, distance=0.11).accepts([near, far])


# --- what is wrong


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"cubic": {"begin": "0.5 run", "end": "400 steps"}},
            r"cubic: end \(400 steps = step 400\) must come after begin \(0.5 run = step 500\)",
        ),
        ({"linear": {"begin": "5 steps", "end": "5 steps"}}, r"linear: end .* must come after begin"),
        ({"constant": {"begin": "1 run"}}, r"constant: end .* must come after begin"),
        ({"iterative": {"begin": "1 run"}}, r"iterative: end .* must come after begin"),
        ({"iterative": {"rounds": 800}}, r"iterative.rounds: 800 rounds do not fit into 750 steps"),
        ({"constant": {"every": "0 steps"}}, r"constant.every: must be longer than zero"),
        ({"list": {"sparsity": [0.5], "every": "0 epochs"}}, r"list.every: must be longer than zero"),
        (
            {"list": {"sparsity": [0.1, 0.5], "at": ["9 steps", "0 run"]}},
            r"list.at: times must increase, but 0 run \(step 0\) comes after 9 steps",
        ),
        ({"list": {"sparsity": [0.1, 0.5], "at": ["1 epochs", "10 steps"]}}, r"list.at: times must increase"),
        ({"phases": {"dense": [0], "sparse": [0.01], "unit": "epochs"}}, r"phases: two phases begin at step 0"),
        ({"mask_stability": {"begin": "1 run"}}, r"mask_stability: end .* must come after begin"),
        ({"mask_stability": {"every": "0 epochs"}}, r"mask_stability.every: must be longer than zero"),
    ],
)
def test_times_that_do_not_fit_the_run_are_refused_in_one_line(data, message):
    with pytest.raises(InputError, match=message) as caught:
        build("schedule", data).validate_with(CLOCK)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data", ["cubic", "iterative", "constant", {"one_shot": {"at": "0.5 run"}}, {"phases": {"sparse": [1], "unit": "run"}}]
)
def test_a_unit_that_the_run_cannot_resolve_is_refused(data):
    with pytest.raises(InputError, match="total_steps="):
        build("schedule", data).validate_with(Clock())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"linear": {"initial": 1.0}}, r"schedule\.linear\.initial: .*less than 1, got 1\.0"),
        ({"linear": {"initial": -0.1}}, r"schedule\.linear\.initial: .*greater than or equal to 0"),
        ({"linear": {"end": "soon"}}, r"schedule\.linear\.end: a time is a number with a unit"),
        ({"linear": {"end": 100}}, r"schedule\.linear\.end: a time is a number with a unit.*got 100"),
        ({"linear": {"evry": "1 steps"}}, r"unknown field 'evry'; did you mean 'every'"),
        ({"one_shot": {"moment": "1 steps"}}, r"unknown field 'moment'; choices: at"),
        ({"iterative": {"rounds": 0}}, r"iterative\.rounds: .*greater than or equal to 1"),
        ({"phases": {"sparse": [], "unit": "steps"}}, r"schedule\.phases: sparse needs at least one time"),
        ({"phases": {"dense": [0, 5, 4], "sparse": [2], "unit": "steps"}}, r"the times of dense must increase, got \[0, 5, 4\]"),
        ({"phases": {"dense": [0, 5], "sparse": [2, 5], "unit": "steps"}}, r"two phases begin at 5 steps"),
        ({"phases": {"dense": [0, 5, 5], "sparse": [2], "unit": "steps"}}, r"two phases begin at 5 steps"),
        ({"phases": {"dense": [-1], "sparse": [2], "unit": "steps"}}, r"a time is a finite number of at least 0"),
        ({"phases": {"sparse": [math.inf], "unit": "steps"}}, r"schedule\.phases"),
        ({"phases": {"sparse": [2], "unit": "days"}}, r"phases\.unit: .*'epochs'.*got 'days'"),
        ({"phases": {"sparse": [2]}}, r"phases\.unit: this field is required"),
        ({"list": {"sparsity": [0.5]}}, r"give either every or at"),
        ({"list": {"sparsity": [0.5], "every": "1 steps", "at": ["1 steps"]}}, r"give either every or at"),
        ({"list": {"sparsity": [0.5], "begin": "1 steps", "at": ["1 steps"]}}, r"begin goes with every"),
        ({"list": {"sparsity": [0.5, 0.6], "at": ["1 steps"]}}, r"equal length, got 2 and 1"),
        ({"list": {"sparsity": [0.5, 1.0], "every": "1 steps"}}, r"list\.sparsity\.1: .*less than 1"),
        ({"list": {"sparsity": [0.5], "every": "soon"}}, r"schedule\.list\.every: a time is a number with a unit"),
        ({"list": {"sparsity": [0.5], "at": ["soon"]}}, r"schedule\.list\.at\.0: a time is a number with a unit"),
        ({"list": {"sparsity": [], "every": "1 steps"}}, r"list\.sparsity: "),
        ({"mask_stability": {"window": 1}}, r"mask_stability\.window: .*greater than or equal to 2"),
        ({"mask_stability": {"distance": 0}}, r"mask_stability\.distance: .*greater than 0"),
    ],
)
def test_wrong_fields_are_refused_in_one_line(data, message):
    with pytest.raises(InputError, match=message) as caught:
        build("schedule", data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        "one_shot",
        {"one_shot": {"at": "0.5 run"}},
        {"iterative": {"rounds": 5}},
        {"cubic": {"initial": 0.05, "begin": "1 epochs", "end": "40 epochs", "every": "5 epochs"}},
        {"constant": {"every": "1 steps"}},
        {"phases": ACDC},
        {"list": {"sparsity": [0.5, 0.9], "at": ["7 steps", "0.5 run"]}},
        {"list": {"sparsity": [0.5, 0.9], "every": "1 epochs", "begin": "1e-07 run"}},
    ],
)
def test_data_round_trip(data):
    schedule = build("schedule", data)
    assert schedule.to_data() == data
    assert build("schedule", schedule.to_data(defaults=True)) == schedule


def test_times_may_be_given_as_objects():
    assert OneShot(at=Time(3.0, "epochs")) == OneShot(at="3 epochs")


# --- schedules that decide by what they see


@given(losses=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30), most=st.floats(0.01, 0.99), gain=st.floats(0.01, 100))
def test_the_adaptive_fraction_is_that_of_the_generalization_loss(losses, most, gain):
    schedule = Adaptive(most=most, gain=gain)
    for n in range(1, len(losses) + 1):
        seen = losses[:n]
        generalization_loss = 100 * (seen[-1] / min(seen) - 1)
        expected = most * (1 - 1 / (1 + gain * generalization_loss))
        found = schedule.fraction([Validation(loss) for loss in seen])
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-11)
        assert (found > 0) == (seen[-1] > min(seen))


def test_the_adaptive_fraction_at_the_published_settings():
    """A loss that is half a per cent above the best asks for half of the most, a third of what is left."""
    assert Adaptive().fraction([Validation(1.0), Validation(1.005)]) == pytest.approx(1 / 3, rel=1e-12)
    assert Adaptive().fraction([Validation(0.0), Validation(1e-9)]) == pytest.approx(2 / 3)
    with pytest.raises(InputError, match=r"a loss of -1 mean nothing; give a loss that is never negative"):
        Adaptive().fraction([Validation(-1.0)])


@given(losses=st.lists(st.integers(0, 4).map(float), min_size=1, max_size=40))
def test_a_rising_loss_prunes_and_then_waits_for_the_next_rise(losses):
    schedule, seen, since, pruned = RisingLoss(first=0.5, then=0.25), [], None, 0
    for loss in losses:
        expected = 0.0
        if since is not None and loss > since:
            expected = 0.25 if pruned else 0.5
            pruned += 1
        since = None if expected else loss  # what was measured before a pruning says nothing about the network after it
        fraction = schedule.fraction([*seen, Validation(loss)])
        assert fraction == expected
        seen.append(Validation(loss, fraction))


@given(span=spans, every=st.integers(1, 90))
def test_looks_are_regular_and_not_after_the_end(span, every):
    begin, end = span
    for schedule in (Adaptive, RisingLoss):
        made = schedule(begin=steps(begin), end=steps(end), every=steps(every))
        made.validate_with(CLOCK)
        assert set(updates(made, 0.9, until=end + 100)) == set(range(begin, end + 1, every))
        assert made.last(CLOCK) == max(range(begin, end + 1, every))


@given(begin=st.integers(0, 50), rest=st.tuples(st.integers(0, 80), st.integers(0, 80)).filter(any), share=st.floats(0.01, 0.99))
def test_thresholds_ramp_as_published(begin, rest, share):
    """The published slopes theta and phi, for a q of 0.7 and any interval f, of which they are the same."""
    ramp, end = begin + rest[0], begin + sum(rest)
    schedule = ThresholdRamp(begin=steps(begin), ramp=steps(ramp), end=steps(end), every="7 steps", share=share)
    schedule.validate_with(CLOCK)
    assert schedule.quantile == share
    assert set(updates(schedule, 0.0)) == {*range(begin, end, 7), end}
    q, f = 0.7, 7
    theta = 2 * q * f / (2 * (ramp - begin) + 3 * (end - ramp))
    phi = 1.5 * theta
    for step in updates(schedule, 0.0):
        epsilon = theta * (step - begin + 1) / f if step < ramp else (theta * (ramp - begin + 1) + phi * (step - ramp + 1)) / f
        assert q * schedule.threshold(step, CLOCK) == pytest.approx(epsilon, rel=1e-12)
    steady = [schedule.threshold(step, CLOCK) for step in range(begin, end + 1)]
    assert all(a < b for a, b in itertools.pairwise(steady))


def test_the_ramp_of_thresholds_must_be_in_order():
    with pytest.raises(InputError, match=r"ramp \(5 steps = step 5\) must lie between begin \(10 steps = step 10\) and end"):
        ThresholdRamp(begin="10 steps", ramp="5 steps", end="20 steps").validate_with(CLOCK)
    with pytest.raises(InputError, match=r"end .* must come after begin"):
        ThresholdRamp(begin="20 steps", ramp="20 steps", end="20 steps").validate_with(CLOCK)
