from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from niwaki.metrics.units import scaled, show
from niwaki.report.words import change, difference, points, tick
from niwaki.training.record import Measure


def measure(unit: str, dense: float | None, sparse: float | None, better: bool | None = None) -> Measure:
    return Measure(name="x", unit=unit, definition="x", higher_is_better=better, dense=dense, sparse=sparse)


@given(st.floats(0, 1e17))
def test_a_scaled_number_has_three_digits_and_is_right(value):
    digits, prefix = scaled(value).split(" ")
    factor = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}[prefix]
    assert float(digits) * factor == pytest.approx(value, rel=0.0051, abs=0.51)
    assert prefix == "P" or (float(digits) < 1000 and len(digits.replace(".", "")) <= 3)
    assert prefix == "" or len(digits.replace(".", "")) >= 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (measure("share", 0.98, 0.975, True), "-0.50 points"),
        (measure("share", 0.0, 0.9), ""),
        (measure("bytes", 200.0, 50.0, False), "4.0× smaller"),
        (measure("bytes", 50.0, 100.0, False), "2.0× larger"),
        (measure("bytes", 50.0, 50.0, False), "the same"),
        (measure("bytes", 1010.0, 1000.0, False), "1.01× smaller"),
        (measure("FLOPs", 1000.0, 1030.0, False), "1.03× more"),
        (measure("milliseconds", 1.004, 1.0, False), "the same"),
        (measure("milliseconds", 1.0, 1.004, False), "the same"),
        (measure("milliseconds", 1.0, 1.006, False), "1.01× slower"),
        (measure("number", 1931.4, 62950.6, True), "+61,019"),
        (measure("bits", 50.0, 100.0, False), "2.0× larger"),
        (measure("FLOPs", 90.0, 60.0, False), "1.5× fewer"),
        (measure("FLOPs", 90.0, 0.0, False), ""),
        (measure("milliseconds", 1.02, 1.0, False), "1.02× faster"),
        (measure("milliseconds", 1.0, 1.5, False), "1.50× slower"),
        (measure("seconds", 1.0, 2.0, False), ""),
        (measure("number", 0.25, 0.5, False), "+0.2500"),
        (measure("number", 0.25, 0.5), ""),
        (measure("share", None, 0.5, True), ""),
        (measure("bytes", 3.0, None, False), ""),
    ],
)
def test_changes(given, said):
    assert change(given) == said


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (None, "bytes", "-"),
        (0.5, "share", "50.00 %"),
        (1234.0, "bits", "1.23 kbit"),
        (12.0, "bytes", "12 B"),
        (1.834, "milliseconds", "1.83 ms"),
        (12345.6, "milliseconds", "12,346 ms"),
        (float("inf"), "number", "inf"),
        (0.21983, "number", "0.2198"),
        (-41.04, "number", "-41.0"),
        (62950.6, "number", "62,951"),
        (3.25, "seconds", "3.2 s"),
    ],
)
def test_values_with_units(value, unit, said):
    assert show(value, unit) == said


def test_a_difference_has_its_standard_deviation():
    values = [0.01, 0.02, 0.06]
    around = sqrt(sum((value - 0.03) ** 2 for value in values) / 2)
    assert difference(values, "share") == f"+3.00 ± {100 * around:.2f} points"
    assert difference([-0.5], "number") == "-0.5000"
    assert points(0.0) == "+0.00 points"


@pytest.mark.parametrize(("value", "said"), [(0, "0"), (-2.5, "-2.5"), (999, "999"), (1000, "1 k"), (-25_000, "-25 k"), (1.2e9, "1.2 G")])
def test_ticks(value, said):
    assert tick(value) == said
