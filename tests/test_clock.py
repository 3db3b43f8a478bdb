import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niwaki.clock import UNITS, Clock, Time
from niwaki.errors import InputError

CLOCK = Clock(total_steps=1000, steps_per_epoch=391, tokens_per_step=2048)


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("1000 steps", 1000, "steps"),
        ("1 step", 1, "steps"),
        ("5 epochs", 5, "epochs"),
        ("1 epoch", 1, "epochs"),
        ("0.75 run", 0.75, "run"),
        (".5 run", 0.5, "run"),
        ("2 runs", 2, "run"),
        ("1e6 tokens", 1e6, "tokens"),
        ("2.5E-3 run", 0.0025, "run"),
        ("  10steps ", 10, "steps"),
    ],
)
def test_reads_a_number_and_a_unit(text, value, unit):
    assert Time.parse(text) == Time(value, unit)


@pytest.mark.parametrize(
    "text", ["", "10", "steps", "10 days", "-1 steps", "ten steps", "1,5 epochs", "1 0 steps", "nan run", "inf run", 10, 0.5, None, True]
)
def test_refuses_what_is_no_time(text):
    with pytest.raises(InputError, match="a time is a number with a unit, such as") as caught:
        Time.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("value", "unit"), [(-1.0, "steps"), (math.inf, "run"), (math.nan, "run"), (1.0, "days")])
def test_refuses_times_that_are_none(value, unit):
    with pytest.raises(InputError, match="a time is a finite number of at least 0 in one of steps, epochs, run, tokens"):
        Time(value, unit)


def test_refuses_a_number_that_overflows():
    with pytest.raises(InputError, match="a time is a finite number"):
        Time.parse("1e999 steps")


@given(st.floats(0, allow_infinity=False, allow_nan=False), st.sampled_from(UNITS))
def test_text_reads_back_as_the_same_time(value, unit):
    assert Time.parse(str(Time(value, unit))) == Time(value, unit)


@pytest.mark.parametrize(
    ("text", "same"), [("1000 steps", "1000 steps"), ("0.75 run", "0.75 run"), ("1e6 tokens", "1000000 tokens"), ("1 epoch", "1 epochs")]
)
def test_text_is_short(text, same):
    assert str(Time.parse(text)) == same


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("17 steps", 17),
        ("0.4 steps", 0),
        ("0.6 steps", 1),
        ("2 epochs", 782),
        ("0.1 epochs", 39),
        ("0.75 run", 750),
        ("1 run", 1000),
        ("0.0015 run", 2),  # 1.5 and 2.5 both round to the even 2
        ("0.0025 run", 2),
        ("1e6 tokens", 488),  # 488.28
        ("2048 tokens", 1),
    ],
)
def test_resolves_to_the_nearest_step(text, steps):
    assert CLOCK.steps(Time.parse(text)) == steps


@given(st.integers(1, 10**6), st.integers(0, 1000))
def test_fractions_of_a_run_are_within_half_a_step(total, thousandths):
    found = Clock(total_steps=total).steps(Time.parse(f"{thousandths / 1000} run"))
    assert isinstance(found, int)
    assert abs(found * 1000 - thousandths * total) <= 500


@pytest.mark.parametrize(("text", "field"), [("1 run", "total_steps"), ("1 epochs", "steps_per_epoch"), ("1 tokens", "tokens_per_step")])
def test_a_unit_that_is_not_known_names_what_to_pass(text, field):
    with pytest.raises(InputError, match=rf"the time '{text}' cannot be resolved: pass {field}= to the Sparsifier"):
        Clock().steps(Time.parse(text))


@pytest.mark.parametrize("unit", UNITS)
def test_zero_is_step_zero_in_any_unit(unit):
    assert Clock().steps(Time(0.0, unit)) == 0


@pytest.mark.parametrize("field", ["total_steps", "steps_per_epoch", "tokens_per_step"])
@pytest.mark.parametrize("value", [0, -5, 1.5, "10", True])
def test_refuses_lengths_that_are_no_count(field, value):
    with pytest.raises(InputError, match=f"{field} must be a whole number of at least 1, got"):
        Clock(**{field: value})


@pytest.mark.parametrize(("text", "steps"), [("0.01 epochs", 1), ("0.4 steps", 1), ("0 run", 0), ("2.6 epochs", 26), ("1 steps", 1)])
def test_an_interval_is_at_least_a_step(text, steps):
    assert Clock(total_steps=100, steps_per_epoch=10).interval(Time.parse(text)) == steps
