"""Golden text: what a pass makes of a graph, held against the Given and Result of its docstring.

A docstring shows lines of the program's text, a graph at a time, under ``Given::`` and ``Result::``. Lines that follow
each other there follow each other in the program. A line ``...`` stands for any number of lines, and ``...`` within a
line for any text, so that a docstring shows what matters and can't drift from what the pass does.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence

from hvcompile.explanation.listing import Listing, stage
from hvcompile.pipeline import Pass
from hvcompile.trunk.trunk import Trunk


def text_of(trunk: Trunk) -> list[str]:
    """A program as lines: the name of each graph, and its lines with names that are numbered in the graph's order."""
    lines: list[str] = []
    for listing in stage("", trunk.module).listings:
        lines += [f"{listing.name}:", *(f"    {line}" for line in _renumbered(listing))]
    return lines


def _renumbered(listing: Listing) -> list[str]:
    """A graph's lines; Dynamo numbers its names by what it traced before."""
    counts: dict[str, int] = {}
    names: dict[str, str] = {}
    for line in listing.lines:
        stem = re.sub(r"(_\d+)+$", "", line.name)
        number = counts[stem] = counts.get(stem, -1) + 1
        names[line.name] = f"{stem}_{number}" if number else stem
    # Neither an operation, which a parenthesis follows, nor a method or the name of an argument.
    node = re.compile(r"(?<![.\w])[a-z]\w*\b(?![(=])")
    return [node.sub(lambda word: names.get(word[0], word[0]), line.text) for line in listing.lines]


def shown(kind: type[Pass], heading: str) -> list[str]:
    """The lines that a pass's docstring shows under a heading."""
    text = inspect.getdoc(kind) or ""
    match = re.search(rf"^{heading}::\n\n((?:    .*\n|\n)+)", text + "\n", re.MULTILINE)
    assert match is not None, f"{kind.__name__} shows no {heading}"
    return [line.removeprefix("    ") for line in match[1].rstrip().splitlines() if line]


def difference(expected: Sequence[str], program: Sequence[str]) -> str:
    """Why a program is not what is shown of it; empty where it is."""
    place, is_free = 0, True
    for line in expected:
        if line.strip() == "...":
            is_free = True
            continue
        pattern = re.compile(".*".join(map(re.escape, line.split("..."))))
        found = next((at for at in range(place, len(program)) if pattern.fullmatch(program[at])), None)
        if found is None or (found > place and not is_free):
            near = "\n".join(program[place:] if is_free else program[place : place + 3])
            return f"expected\n{line}\nin place of\n{near}"
        place, is_free = found + 1, False
    return ""


def check(kind: type[Pass], before: Sequence[str], after: Sequence[str], result: str = "Result") -> None:
    """Hold a program before and after a pass against the pass's docstring, which may show several results."""
    for heading, program in (("Given", before), (result, after)):
        reason = difference(shown(kind, heading), program)
        assert not reason, f"{heading} of {kind.__name__}: {reason}"
