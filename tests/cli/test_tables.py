import pytest
from hypothesis import given
from hypothesis import strategies as st

from niwaki.cli.tables import _scaled, change
from niwaki.training.record import Measure


def measure(unit: str, dense: float, sparse: float, better: bool | None = None) -> Measure:
    return Measure(name="x", unit=unit, definition="x", higher_is_better=better, dense=dense, sparse=sparse)


@given(st.floats(0, 1e17))
def test_a_scaled_number_has_three_digits_and_is_right(value):
    digits, prefix = _scaled(value).split(" ")
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
        (measure("FLOPs", 90.0, 60.0, False), "1.5× fewer"),
        (measure("FLOPs", 90.0, 0.0, False), ""),
        (measure("seconds", 1.0, 2.0, False), ""),
    ],
)
def test_changes(given, said):
    assert change(given) == said
