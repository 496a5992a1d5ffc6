"""Figures as text: known, unknown and infinite ones, prefixes of units, signs."""

from __future__ import annotations

import math

import pytest

from hvcompile.explanation import figures


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (math.inf, "identical"), (31.257, "31.26 dB"), (-math.inf, "identical")]
)
def test_number(value: float | None, text: str) -> None:
    assert figures.number(value, ".2f", " dB") == text


def test_in_unit() -> None:
    assert figures.in_unit(25.61e9, "G") == "25.6"
    assert figures.in_unit(1234.5e6, "M", ".0f") == "1234"
    assert figures.in_unit(None, "G") == ""
    assert figures.in_unit(None, "M", unknown="none") == "none"


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.34e12, "12.3_TB"), (1e15, "1_PB"), (-2.5e6, "-2.5_MB"), (1000, "1_kB"), (999, "999_B"), (0, "0_B")],
)
def test_with_prefix(value: float, text: str) -> None:
    assert figures.with_prefix(value, "B") == text.replace("_", "\N{NO-BREAK SPACE}")


def test_signed() -> None:
    assert [figures.signed(value) for value in (3, -3, 0)] == ["+3", "\N{MINUS SIGN}3", "0"]
