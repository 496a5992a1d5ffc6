"""A pass's table in fewer rows: layers that differ in their block's number alone become one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
COUNT = "count"
"""The column that says how many rows a row stands for."""


def condensed(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put rows together that are alike but for the first number in their first column, a path, and for figures.

    Args:
        table: rows of equal columns; the first names a layer, whole numbers are amounts, other numbers are measured.

    Returns:
        Rows of the same columns, all as text but for amounts, which are summed, and ``COUNT``: paths with the numbers
        that they stand for, ``blocks.0-2,5.to_q``, and of what was measured the least and the most.

    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in table:
        path, *others = row.values()
        texts = [item for item in others if not isinstance(item, (int, float)) and item is not None]
        # Only paths with one number more than others can be told apart by it: the rest of the path stays.
        groups.setdefault((_NUMBER.sub("*", path, count=1), *texts), []).append(row)
    return [_merged(rows) for rows in groups.values()]


def _merged(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    name, *columns = rows[0]
    numbers = [int(found.group()) for row in rows if (found := _NUMBER.search(row[name]))]
    path = _NUMBER.sub(_spans(numbers), rows[0][name], count=1) if len(set(numbers)) > 1 else rows[0][name]
    return {name: path, COUNT: len(rows)} | {column: _together([row[column] for row in rows]) for column in columns}


def _spans(numbers: Iterable[int]) -> str:
    """Whole numbers in few words: ``0-2,5``."""
    found = []
    for _, members in itertools.groupby(enumerate(sorted(set(numbers))), lambda item: item[1] - item[0]):
        held = [number for _, number in members]
        found.append(str(held[0]) if len(held) == 1 else f"{held[0]}-{held[-1]}")
    return ",".join(found)


def _together(held: Sequence[Any]) -> Any:
    figures = [item for item in held if isinstance(item, float)]
    if figures:
        least, most = f"{min(figures):.3g}", f"{max(figures):.3g}"
        return least if least == most else f"{least} .. {most}"
    if all(isinstance(item, int) for item in held):
        return sum(held)
    return "" if held[0] is None else str(held[0])
