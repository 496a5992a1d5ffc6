"""The report: one HTML file that shows what was made of a model and how a run of it went.

The file holds all that it needs, loads nothing, and runs no script; it reads on a screen of any width, light or dark,
and on paper.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import difflib
import functools
import importlib.util
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hvcompile import outputs
from hvcompile.errors import InputError
from hvcompile.explanation import figures, listing, pictures
from hvcompile.explanation.condensed import condensed
from hvcompile.explanation.explain import Explanation
from hvcompile.explanation.listing import Line, Listing, Stage
from hvcompile.explanation.media import media as read_media
from hvcompile.journal import JournalRow
from hvcompile.runtime.state import Stats
from hvcompile.version import __version__

HEADING = "hvcompile report"
SUFFIXES = (".html", ".htm")
CONTEXT = 3
"""Unchanged lines in sight around a change."""
IN_SIGHT = 21
"""Changed lines in a row that are in sight; of more, the middle is folded."""
KEPT_LINES = 4000
"""Folded lines that a report holds in all; beyond it they are only counted."""
MOST_CHARTS = 8
"""Generations with a chart, the latest; others are in the table."""
MOST_STEPS = 250
"""Steps of a generation that are drawn, the latest."""
MOST_ROWS = 60
"""Generations in the table, the latest."""


def check(path: Path) -> None:
    """Raise InputError where no report can be written at ``path``; asks before any work is done."""
    if importlib.util.find_spec("jinja2") is None:
        raise InputError("a report needs jinja2, which is not installed: pip install 'hvcompile[cli]'")
    outputs.check(path, name="html", kind="HTML file", suffixes=SUFFIXES)


def write(
    path: str | Path,
    *,
    explanation: Explanation | None = None,
    stats: Stats | None = None,
    title: str = HEADING,
    facts: Mapping[str, str] | None = None,
    media: Mapping[str, str | Path] | None = None,
) -> None:
    """Write a report as one HTML file; a file that is there is replaced.

    Args:
        path: ends in ``.html``.
        explanation: from ``hvcompile.explain``: adds the trunk, the graph before and after every pass, and costs.
        stats: from ``hvcompile.stats``: adds what each step did, and the journal of the passes as they ran.
        title: the heading, such as the model's name; plain text, as all that is handed in here.
        facts: what else to say under the heading: label -> text.
        media: clips and pictures to show: label -> file. The report holds them, unless one is over 24 MiB.

    Raises:
        InputError: nothing to show is given, the file can't be written at ``path``, or jinja2
            is not installed.

    """
    path = Path(path)
    check(path)
    if explanation is None and stats is None and not media:
        raise InputError("a report needs something to show: give explanation, stats or media")
    import jinja2  # the backend does without it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hvcompile.explanation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": figures.with_prefix,
        "bytes": functools.partial(figures.with_prefix, unit="B"),
        "signed": figures.signed,
        "condensed": condensed,
    }
    files = {label: Path(file) for label, file in (media or {}).items()}
    content = _content(explanation, stats, title, facts or {}) | {"media": list(read_media(files))}
    text = environment.get_template("report.html").render(content)
    with outputs.replacing(path) as part:
        part.write_text(text, "utf-8")


def _content(
    explanation: Explanation | None, stats: Stats | None, title: str, facts: Mapping[str, str]
) -> dict[str, Any]:
    """Everything that the template shows."""
    journals = stats.journal if stats is not None else [list(explanation.journal)] if explanation is not None else []
    threshold = pictures.threshold_of(row.options for rows in journals for row in rows)
    runs = pictures.generations(stats.steps) if stats is not None else []
    charted = [(run, run.latest(MOST_STEPS)) for run in runs[-MOST_CHARTS:]]
    budget = _Budget(KEPT_LINES)
    return {
        "title": title,
        "heading": HEADING,
        "facts": facts,
        "explanation": explanation,
        "stats": stats,
        "saved": _saved(explanation, stats),
        "threshold": threshold,
        "runs": runs[-MOST_ROWS:],
        "num_runs": len(runs),
        "is_repeated": any(run.number > 1 for run in runs),
        "charts": [
            (
                run,
                shown,
                {name: pictures.chart(shown, threshold, width) for name, width in pictures.CHART_WIDTHS.items()},
            )
            for run, shown in charted
        ],
        "trunk": pictures.trunk(explanation) if explanation is not None and explanation.kinds else None,
        "journals": [(names, [(row, sum(row.op_changes.values())) for row in rows]) for names, rows in _same(journals)],
        "changes": [_change(*pair, budget) for pair in itertools.pairwise(explanation.stages)] if explanation else [],
        "describe": pictures.describe,
        "written": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        "versions": f"hvcompile {__version__}, torch {torch.__version__}",
    }


def _saved(explanation: Explanation | None, stats: Stats | None) -> float | None:
    """The share of operations that reused steps did not do."""
    if explanation is None or stats is None or not explanation.flops or not stats.hits + stats.misses:
        return None
    return stats.hits / (stats.hits + stats.misses) * (1 - explanation.reused_flops / explanation.flops)


def _same(journals: Sequence[list[JournalRow]]) -> list[tuple[str, list[JournalRow]]]:
    """Each distinct journal with the graphs that it is of: a recompile mostly repeats what was done before."""
    groups: dict[str, tuple[list[int], list[JournalRow]]] = {}
    for number, rows in enumerate(journals, 1):
        groups.setdefault(repr(rows), ([], rows))[0].append(number)
    if len(groups) == 1:
        return [("", journals[0])]
    return [(", ".join(map(str, numbers)), rows) for numbers, rows in groups.values()]


@dataclasses.dataclass
class _Budget:
    """How many folded lines the file may still hold."""

    left: int

    def take(self, lines: Sequence[Any]) -> bool:
        """Whether these may be held; if so, they are counted."""
        if len(lines) > self.left:
            return False
        self.left -= len(lines)
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fold:
    """Lines out of sight: how many, what they are, and the lines themselves, empty where the file does not hold them.

    ``kind`` is "same", "removed", "added", or empty in a graph that is new.
    """

    kind: str
    count: int
    label: str
    lines: tuple[Line, ...] = ()


Piece = Line | Fold


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a comparison: pieces left and right, or one fold over both.

    ``kind`` is "same", "fold", "changed" (both sides hold fragments of text with whether they differ) or "replaced".
    """

    kind: str
    before: Sequence[Any] = ()
    after: Sequence[Any] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphChange:
    """One graph before and after a pass; ``is_new`` where there was none before, and then only ``listing`` is set."""

    name: str
    is_new: bool
    rows: tuple[Row, ...] = ()
    listing: tuple[Piece, ...] = ()
    num_removed: int = 0
    num_added: int = 0
    num_changed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """What one pass did to a program: counts of operations that changed, and each graph that did."""

    before: str
    name: str
    op_changes: tuple[tuple[str, int], ...]
    graphs: tuple[GraphChange, ...]
    unchanged: tuple[str, ...]


def _change(before: Stage, after: Stage, budget: _Budget) -> Change:
    earlier = {listing.name: listing for listing in before.listings}
    counts = after.op_counts()
    counts.subtract(before.op_counts())
    changed, unchanged = [], []
    for now in after.listings:
        old = earlier.get(now.name)
        if old is None:
            changed.append(_new_graph(now, after.name, budget))
        elif old.lines == now.lines or [line.text for line in old.lines] == [line.text for line in now.lines]:
            unchanged.append(now.name)
        else:
            changed.append(_changed_graph(old, now, budget))
    return Change(
        before=before.name,
        name=after.name,
        op_changes=tuple(sorted(((op, n) for op, n in counts.items() if n), key=lambda item: (-abs(item[1]), item[0]))),
        graphs=tuple(changed),
        unchanged=tuple(unchanged),
    )


def _new_graph(listing: Listing, name: str, budget: _Budget) -> GraphChange:
    made = sum(line.tag == name for line in listing.lines)
    return GraphChange(
        name=listing.name, is_new=True, listing=tuple(_folded(listing.lines, "", budget)), num_added=made
    )


def _changed_graph(old: Listing, new: Listing, budget: _Budget) -> GraphChange:
    parts = listing.compare(old.lines, new.lines)
    rows: list[Row] = []
    blocks: dict[tuple[str, ...], str] = {}
    for place, part in enumerate(parts):
        if part.kind == "same":
            head = CONTEXT if place else 0
            tail = CONTEXT if place < len(parts) - 1 else 0
            rows += _unchanged(part.after, head, tail, budget)
        elif part.kind == "changed":
            fragments = _fragments(part.before[0].text, part.after[0].text)
            rows.append(Row(kind="changed", before=fragments[0], after=fragments[1]))
        else:
            gone = [*_without_repeats(part.before, blocks, budget)]
            rows.append(Row(kind="replaced", before=gone, after=[*_folded(part.after, "added", budget)]))
    kinds = collections.Counter(part.kind for part in parts)
    return GraphChange(
        name=new.name,
        is_new=False,
        rows=tuple(rows),
        num_removed=sum(len(part.before) for part in parts if part.kind == "replaced"),
        num_added=sum(len(part.after) for part in parts if part.kind == "replaced"),
        num_changed=kinds["changed"],
    )


def _unchanged(lines: tuple[Line, ...], head: int, tail: int, budget: _Budget) -> Iterator[Row]:
    if len(lines) <= head + tail + 1:
        yield Row(kind="same", before=lines, after=lines)
        return
    if head:
        yield Row(kind="same", before=lines[:head], after=lines[:head])
    middle = lines[head : len(lines) - tail]
    yield Row(kind="fold", before=(_fold(middle, "same", "unchanged lines", budget),))
    if tail:
        yield Row(kind="same", before=lines[-tail:], after=lines[-tail:])


def _fold(lines: tuple[Line, ...], kind: str, label: str, budget: _Budget) -> Fold:
    held = lines if budget.take(lines) else ()
    return Fold(kind=kind, count=len(lines), label=label if held else f"{label}, not in this file", lines=held)


def _folded(lines: tuple[Line, ...], kind: str, budget: _Budget) -> Iterator[Piece]:
    """Lines in sight, but of many only the first and the last."""
    if len(lines) <= IN_SIGHT + 4:
        yield from lines
        return
    yield from lines[: IN_SIGHT * 2 // 3]
    end = len(lines) - IN_SIGHT // 3
    yield _fold(lines[IN_SIGHT * 2 // 3 : end], kind, f"more {kind} lines" if kind else "more lines", budget)
    yield from lines[end:]


def _without_repeats(lines: tuple[Line, ...], seen: dict[tuple[str, ...], str], budget: _Budget) -> Iterator[Piece]:
    """Removed lines, where a block that did the same as one before is told of in a word.

    Args:
        lines: removed from a graph, in order.
        seen: operations of the blocks that were shown, with their path; gains those shown here.
        budget: of folded lines.

    """
    repeats: list[tuple[str, str, int]] = []  # path, what it repeats, lines

    def told() -> Iterator[Fold]:
        if repeats:
            first, last = repeats[0][0], repeats[-1][0]
            span = first if first == last else f"{first} .. {last}"
            count = sum(count for *_, count in repeats)
            yield Fold(kind="removed", count=count, label=f"lines of {span}, which repeat {repeats[0][1]}")
            repeats.clear()

    for block, group in itertools.groupby(lines, lambda line: line.block):
        held = tuple(group)
        repeated = _repeated(tuple(line.op for line in held), seen) if block else ""
        if repeats and repeats[-1][1] != repeated:
            yield from told()
        if repeated:
            repeats.append((block, repeated, len(held)))
            continue
        if block:
            seen[tuple(line.op for line in held)] = block
        yield from _folded(held, "removed", budget)
    yield from told()


def _repeated(operations: tuple[str, ...], seen: Mapping[tuple[str, ...], str]) -> str:
    """Path of the block that these operations repeat, if any; a last block may end early, where nothing reads on."""
    found = (path for known, path in seen.items() if known[: len(operations)] == operations)
    return next((path for path in found if len(operations) > 1), "")


def _fragments(before: str, after: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Two versions of a line in fragments, each with whether it differs."""
    words, new_words = (re.findall(r"[\w.]+|\W", text) for text in (before, after))
    old: list[tuple[str, bool]] = []
    new: list[tuple[str, bool]] = []
    for kind, start, stop, new_start, new_stop in difflib.SequenceMatcher(
        None, words, new_words, autojunk=False
    ).get_opcodes():
        old.append(("".join(words[start:stop]), kind != "equal"))
        new.append(("".join(new_words[new_start:new_stop]), kind != "equal"))
    return [item for item in old if item[0]], [item for item in new if item[0]]
