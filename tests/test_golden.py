"""Golden text: what does not follow from the program is found."""

from __future__ import annotations

import golden
import pytest

PROGRAM = ["root:", "    a = add(x, 1)", "    b = mul(a, 2)", "    return (b,)", "body:", "    c = sub(x, y)"]


@pytest.mark.parametrize(
    "expected",
    [
        PROGRAM,
        ["root:", "    ...", "    return (b,)"],
        ["body:", "    c = sub(...)"],
        ["    a = add(...)", "    b = mul(a, ...)"],
        ["...", "    return (b,)", "...", "    c = sub(x, y)"],
    ],
)
def test_what_is_there(expected: list[str]) -> None:
    assert golden.difference(expected, PROGRAM) == ""


@pytest.mark.parametrize(
    "expected",
    [
        ["    a = add(x, 2)"],
        ["root:", "    b = mul(a, 2)"],  # they do not follow each other
        ["    b = mul(a, 2)", "...", "    a = add(x, 1)"],  # nor in this order
        ["    b = mul(a, ...), 3)"],
        ["body:", "    c = sub(x, y)", "    return"],
    ],
)
def test_what_is_not_there(expected: list[str]) -> None:
    assert golden.difference(expected, PROGRAM)
