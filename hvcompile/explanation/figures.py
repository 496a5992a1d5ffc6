"""Figures as text: numbers in a table, large ones with the prefix of their unit, and changes with their sign."""

from __future__ import annotations

import math

PREFIXES = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
"""Prefixes of units, the largest first."""


def number(value: float | None, form: str, unit: str = "") -> str:
    """Write a figure; "-" stands for one that is not known, "identical" for an infinite one (decibels of no error).

    Args:
        value: the figure.
        form: as after the colon in an f-string.
        unit: put behind it as it is.

    """
    if value is None:
        return "-"
    return "identical" if math.isinf(value) else f"{value:{form}}{unit}"


def in_unit(value: float | None, prefix: str, form: str = ".3g", unknown: str = "") -> str:
    """Write a figure in a unit that stands elsewhere, such as 12.3 for 12.3e9 under "GB"; ``prefix`` is its "G"."""
    return unknown if value is None else f"{value / PREFIXES[prefix]:{form}}"


def with_prefix(value: float, unit: str = "") -> str:
    """Write a large figure with the prefix of its unit, and a space that does not break: 12.3 TB."""
    for prefix, size in PREFIXES.items():
        if abs(value) >= size:
            return f"{value / size:.3g}\N{NO-BREAK SPACE}{prefix}{unit}"
    return f"{value:.3g}\N{NO-BREAK SPACE}{unit}"


def signed(value: int) -> str:
    """Write a change with its sign, by the sign for minus."""
    return f"+{value}" if value > 0 else f"\N{MINUS SIGN}{-value}" if value < 0 else "0"
