"""The tables of a bench."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from hvcompile.app.bench.contenders import CACHED, DIFFUSERS, EAGER, HVFAST
from hvcompile.app.bench.process import COMPUTED, REUSED
from hvcompile.explanation import figures

if TYPE_CHECKING:
    from hvcompile.app.bench.results import Result, Row, Spread


def bench_tables(result: Result) -> list[Table]:
    """Lay out what contenders took: speed, hvfast against each, and what else was seen of each."""
    tables = [_speed(result), _against(result), _seen(result), _steps(result), *_words(result)]
    return [table for table in tables if table.rows]


def _speed(result: Result) -> Table:
    headings = ["run, s", "times as fast\nas eager", "CPU\ntime", "step, ms:\ncomputed", "reused", "compile,\ns"]
    table = _plain_table("runs in turn: median (min-max over the rounds)", "contender", *headings)
    for row in result.rows:
        cells = [row.outcome, *[""] * (len(headings) - 1)]
        if not row.error:
            seconds = list(row.seconds.values())
            cells[0] = figures.number(statistics.median(seconds) if seconds else None, ".3f")
            if row.system != EAGER:
                cells[1] = _spread(result.ratio(EAGER, row.system))
                cells[2] = _median(result.ratio(EAGER, row.system, cpu=True))
            cells[3:5] = [_milliseconds(row.step_seconds(mark)) for mark in (COMPUTED, REUSED)]
            cells[5] = figures.number(row.compile_seconds, ".1f")
        table.add_row(row.system, *cells)
    return table


def _against(result: Result) -> Table:
    headings = ["a run", "CPU\ntime", "computed\nstep", "reused\nstep", "compile", "same\nsteps"]
    table = _plain_table("hvfast is so many times as fast", "as", *headings)
    ours = result.row(HVFAST)
    for row in result.rows:
        spread = result.ratio(row.system, HVFAST)
        if row.system == HVFAST or spread is None or ours is None:
            continue
        others = [result.ratio(row.system, HVFAST, cpu=True)]
        others += [result.ratio(row.system, HVFAST, mark) for mark in (COMPUTED, REUSED)]
        compiling = (row.compile_seconds or 0) / (ours.compile_seconds or math.inf) or None
        same = result.has_same_steps(row.system, HVFAST)
        table.add_row(row.system, _spread(spread), *map(_median, others), figures.number(compiling, ".2f"), _yes(same))
    return table


def _seen(result: Result) -> Table:
    headings = ["regions\na step", "graphs", "later", "MB:\ncompile", "running", "PSNR, dB", "SSIM"]
    table = _plain_table("what runs, what it takes, and what comes out", "contender", *headings)
    for row in _good(result.rows):
        quality = row.quality
        table.add_row(
            row.system,
            " / ".join(figures.number(row.num_regions(mark), "d") for mark in (COMPUTED, REUSED)),
            figures.number(row.graphs, "d"),
            "-" if row.cases is None else "+".join(str(case["graphs"]) for case in row.cases),
            figures.in_unit(row.compiling_bytes, "M", ".0f", unknown="-"),
            figures.in_unit(row.running_bytes, "M", ".0f", unknown="-"),
            figures.number(quality.mean_psnr if quality else None, ".2f"),
            figures.number(quality.mean_ssim if quality else None, ".4f"),
        )
    table.caption = "regions that a step runs: computed / reused"
    if (cases := next((row.cases for row in result.rows if row.cases), None)) is not None:
        table.caption += f"; later: graphs captured for {', '.join(case['case'] for case in cases)}"
    return table


def _steps(result: Result) -> Table:
    table = Table(title="steps: # computed, + partly, . reused", title_justify="left")
    for heading in ("contender", "steps", "reused", "as diffusers"):
        table.add_column(heading, overflow="fold")
    for row in _good(result.rows):
        reused = f"{len(row.steps) - row.steps.count(COMPUTED)} of {len(row.steps)}"
        is_comparable = row.system in CACHED and row.system != DIFFUSERS
        same = result.has_same_steps(row.system, DIFFUSERS) if is_comparable else None
        table.add_row(row.system, Text(row.steps or "unknown"), reused if row.steps else "-", _yes(same))
    return table


def _good(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not row.error]


def _words(result: Result) -> list[Table]:
    """How each contender runs, and why one failed."""
    how = Table(show_header=False, title="how each runs", title_justify="left")
    failed = Table(show_header=False, title="failed, and why", title_justify="left")
    for row in result.rows:
        if row.how:
            how.add_row(row.system, Text(row.how))
        if row.error and not row.is_interrupted:
            failed.add_row(row.system, Text(row.error))
        if row.cases_error:
            failed.add_row(f"{row.system}, other shapes", Text(row.cases_error))
    return [how, failed]


def _plain_table(title: str, first: str, *headings: str) -> Table:
    """A table whose figures stand in one line each, 80 columns wide at most."""
    table = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _spread(spread: Spread | None) -> str:
    return "-" if spread is None else f"{spread.median:.2f} ({spread.least:.2f}-{spread.largest:.2f})"


def _median(spread: Spread | None) -> str:
    return figures.number(None if spread is None else spread.median, ".2f")


def _milliseconds(seconds: float | None) -> str:
    return figures.number(None if seconds is None else 1e3 * seconds, ".1f")


def _yes(same: bool | None) -> str:
    return "-" if same is None else "yes" if same else "no"
