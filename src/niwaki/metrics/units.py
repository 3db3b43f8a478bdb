"""Numbers with their units, for people."""

from __future__ import annotations

from math import isfinite

NOTHING = "-"
"""What stands where a number has no meaning."""


def show(value: float | None, unit: str) -> str:
    """Return a value with its unit: shares in per cent, sizes and FLOPs with a decimal prefix, and ``NOTHING`` for None.

    Args:
        value: the number.
        unit: ``share``, ``bytes``, ``bits``, ``FLOPs``, ``weights``, ``seconds``, ``milliseconds`` or ``number``.

    >>> show(0.98028, "share"), show(202872, "bytes"), show(100400, "FLOPs"), show(50610, "weights"), show(None, "share")
    ('98.03 %', '203 kB', '100 k', '50,610', '-')
    >>> show(1203200, "bits"), show(12.5, "seconds"), show(0.1234, "milliseconds"), show(0.25, "number"), show(203160.27, "number")
    ('1.20 Mbit', '12.5 s', '0.123 ms', '0.2500', '203,160')
    """
    if value is None:
        return NOTHING
    if not isfinite(value):
        return str(value)
    if unit == "share":
        return f"{100 * value:.2f} %"
    if unit in ("bytes", "bits"):
        return scaled(value) + {"bytes": "B", "bits": "bit"}[unit]
    if unit == "FLOPs":
        return scaled(value).rstrip()
    if unit == "weights":
        return f"{value:,.0f}"
    if unit == "seconds":
        return f"{value:.1f} s"
    if unit == "milliseconds":
        return f"{value:.3g} ms" if value < 1000 else f"{value:,.0f} ms"
    return plain(value)


def plain(value: float, sign: str = "") -> str:
    """Return a number without a unit: four decimals when it is small, fewer when it is large; ``sign="+"`` writes a plus too.

    >>> plain(0.21983), plain(41.01), plain(12415.3), plain(0.5, "+")
    ('0.2198', '41.0', '12,415', '+0.5000')
    """
    return f"{value:{sign},.{4 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"


def scaled(value: float) -> str:
    """Return three significant digits and a decimal prefix, such as ``1.20 M``.

    >>> scaled(1203200), scaled(999.6), scaled(999600), scaled(12)
    ('1.20 M', '1.00 k', '1.00 M', '12 ')
    """
    for prefix in ("", "k", "M", "G", "T", "P"):
        digits = 0 if prefix == "" or value >= 99.95 else 1 if value >= 9.995 else 2
        if round(value, digits) < 1000 or prefix == "P":
            return f"{value:.{digits}f} {prefix}"
        value /= 1000
    raise AssertionError
