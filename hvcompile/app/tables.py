"""The tables that the command line prints."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from hvcompile.explanation.condensed import condensed

if TYPE_CHECKING:
    from hvcompile.app.bench.results import Result as BenchResult
    from hvcompile.app.bench.results import Spread
    from hvcompile.app.compare import FileComparison
    from hvcompile.app.generate import Result
    from hvcompile.app.metrics import Comparison, Quality
    from hvcompile.dump.bisect import Bisection
    from hvcompile.explanation.explain import Explanation


def bisection_table(found: Bisection) -> Table:
    """Lay out the stages that were run, and the worst of each stage's figures."""
    table = Table(title=str(found.folder), title_justify="left")
    for heading in ("stage", "what"):
        table.add_column(heading, overflow="fold")
    for heading in ("differs by", "relative", "allowed", "not finite"):
        table.add_column(heading, justify="right")
    for place, stage in enumerate(found.stages):
        worst = max(stage.figures, key=lambda figure: figure.relative, default=None)
        mark = " <-" if found.finding and found.finding.stage == stage.name else ""
        cells = ("", "", "")
        if worst is not None and place:
            cells = (f"{worst.largest:.3g}", f"{worst.relative:.3g}", f"{stage.tolerance:g}")
        table.add_row(
            Text(stage.name + mark), Text(stage.what), *cells, str(sum(figure.not_finite for figure in stage.figures))
        )
    return table


def summary(result: Result) -> Table:
    """Lay out the closing table of a generation; with ``--compare``, two columns."""
    runs = [result.run] + ([result.comparison.plain] if result.comparison else [])
    table = Table(show_header=result.comparison is not None)
    table.add_column("")
    for run in runs:
        table.add_column(run.steps[0].backend, justify="right")
    table.add_row("seconds in all", *(f"{run.seconds:.2f}" for run in runs))
    table.add_row("seconds compiling", *(f"{run.compile_seconds:.2f}" for run in runs))
    table.add_row("seconds a step after", *(_number(run.step_seconds, ".4f") for run in runs))
    table.add_row("steps computed", *(str(len(run.steps) - run.num_reused) for run in runs))
    table.add_row("steps reused", *(str(run.num_reused) for run in runs))
    table.add_row("graphs", str(result.graphs))
    table.add_row("recompiles", str(result.recompiles))
    if result.comparison is not None:
        _add_comparison(table, result.comparison)
    num_frames, height, width, _ = result.run.frames.shape
    table.add_row("clip", _clip(width, height, num_frames))
    table.add_row("output", Text(str(result.output), overflow="fold"))
    if result.sheet is not None:
        table.add_row("contact sheet", Text(str(result.sheet), overflow="fold"))
    if result.report is not None:
        table.add_row("report", Text(str(result.report), overflow="fold"))
    return table


def explanation_tables(explanation: Explanation, gpu: str) -> list[Table]:
    """Lay out an explanation: the trunk, the passes, what they do to each layer, and what a step costs."""
    trunk = Table(title="trunk", title_justify="left")
    for heading in ("blocks", "of them first .. last", "operations", "streams"):
        trunk.add_column(heading, overflow="fold")
    for kind in explanation.kinds:
        streams = "\n".join(f"{stream.name} {list(stream.shape)}" for stream in kind.streams)
        trunk.add_row(str(kind.count), Text(f"{kind.first} .. {kind.last}"), str(kind.num_operations), Text(streams))
    trunk.caption = (
        f"{explanation.num_prologue} operations before the blocks, {explanation.num_epilogue} after them"
        if explanation.kinds
        else f"none: {explanation.reason}"
    )

    passes = Table("pass", "would do", "would leave, and why", title="passes", title_justify="left")
    for row in explanation.journal:
        reasons = "\n".join(f"{what}: {why}" for what, why in row.report.declined)
        passes.add_row(row.name, Text("\n".join(row.report.matched) or "nothing"), Text(reasons))

    layers = []
    for row in explanation.journal:
        rows = condensed(row.report.table)
        if rows:
            table = Table(title=row.name, title_justify="left")
            for place, column in enumerate(rows[0]):  # names in full; reasons stand in full in the table of passes
                name, is_reason = column.replace("_", " "), column == "why"
                if is_reason:
                    table.add_column(name, overflow="ellipsis", no_wrap=True, max_width=14)
                else:
                    table.add_column(name, overflow="fold", min_width=22 if place == 0 else None)
            for item in rows:
                table.add_row(*(Text(str(held)) for held in item.values()))
            layers.append(table)

    cost = Table(
        title=f"a step that computes everything, in {explanation.dtype}, before the passes", title_justify="left"
    )
    cost.add_column("")
    for heading in ("TFLOP", "share", "GB moved", f"seconds at least, {gpu}"):
        cost.add_column(heading, justify="right")
    for part in explanation.costs:
        share = part.flops / explanation.flops if explanation.flops else 0.0
        cost.add_row(part.part, *_cost_row(part.flops, share, part.bytes, part.seconds))
    in_all = sum(part.bytes for part in explanation.costs)
    cost.add_section()
    cost.add_row("all", *_cost_row(explanation.flops, 1.0, in_all, explanation.seconds))
    reused = explanation.reused_flops
    if explanation.passed_seconds is not None:
        cost.add_row("the same after the passes", "", "", "", f"{explanation.passed_seconds:.3g}")
    if reused != explanation.flops:
        share, moved, seconds = reused / explanation.flops, explanation.reused_bytes, explanation.reused_seconds
        cost.add_row("a step that reuses, after the passes", *_cost_row(reused, share, moved, seconds))

    if explanation.depends_on_data:
        cost.caption = (
            "a length is known only when the model runs: it counts as the most that it can be, or as 1 where nothing "
            "bounds it"
        )

    memory = Table("", "GB", title="memory", title_justify="left")
    memory.add_row("weights", f"{explanation.weight_bytes / 1e9:.3g}")
    memory.add_row("kept from step to step, a generation", f"{explanation.state_bytes / 1e9:.3g}")
    memory.add_row("computed once and kept, a set of conditions", f"{explanation.derived_bytes / 1e9:.3g}")
    staging = f"{explanation.staging_bytes / 1e9:.3g}" if explanation.staging_bytes else "none"
    memory.add_row("sent and received at a time, a rank", staging)
    return [trunk, passes, *layers, cost, memory]


def _cost_row(flops: int, share: float, moved: int | None, seconds: float | None) -> tuple[str, ...]:
    gigabytes = "" if moved is None else f"{moved / 1e9:.3g}"
    return f"{flops / 1e12:.4g}", f"{share:.1%}", gigabytes, "" if seconds is None else f"{seconds:.3g}"


def bench_tables(result: BenchResult) -> list[Table]:
    """Lay out what contenders took: speed, hvfast against each, and what else was seen of each."""
    from hvcompile.app.bench.contenders import CACHED, DIFFUSERS, EAGER, HVFAST
    from hvcompile.app.bench.process import COMPUTED, REUSED

    headings = ["run, s", "times as fast\nas eager", "CPU\ntime", "step, ms:\ncomputed", "reused", "compile,\ns"]
    title = "runs in turn: median (min-max over the rounds)"
    speed = _plain_table(title, "contender", *headings)
    for row in result.rows:
        cells = ["failed" if row.error else "", *[""] * (len(headings) - 1)]
        if not row.error:
            seconds = list(row.seconds.values())
            cells[0] = _number(statistics.median(seconds) if seconds else None, ".3f")
            if row.system != EAGER:
                cells[1] = _spread(result.ratio(EAGER, row.system))
                cells[2] = _median(result.ratio(EAGER, row.system, cpu=True))
            cells[3:5] = [_milliseconds(row.step_seconds(mark)) for mark in (COMPUTED, REUSED)]
            cells[5] = _number(row.compile_seconds, ".1f")
        speed.add_row(row.system, *cells)

    headings = ["a run", "CPU\ntime", "computed\nstep", "reused\nstep", "compile", "same\nsteps"]
    against = _plain_table("hvfast is so many times as fast", "as", *headings)
    ours = result.row(HVFAST)
    for row in result.rows:
        spread = result.ratio(row.system, HVFAST)
        if row.system == HVFAST or spread is None or ours is None:
            continue
        others = [result.ratio(row.system, HVFAST, cpu=True)]
        others += [result.ratio(row.system, HVFAST, mark) for mark in (COMPUTED, REUSED)]
        compiling = (row.compile_seconds or 0) / (ours.compile_seconds or math.inf) or None
        same = result.has_same_steps(row.system, HVFAST)
        against.add_row(row.system, _spread(spread), *map(_median, others), _number(compiling, ".2f"), _yes(same))

    headings = ["regions\na step", "graphs", "later", "MB:\ncompile", "running", "PSNR, dB", "SSIM"]
    seen = _plain_table("what runs, what it takes, and what comes out", "contender", *headings)
    steps = Table(title="steps: # computed, + partly, . reused", title_justify="left")
    for heading in ("contender", "steps", "reused", "as diffusers"):
        steps.add_column(heading, overflow="fold")
    for row in result.rows:
        if row.error:
            continue
        quality = row.quality
        seen.add_row(
            row.system,
            " / ".join(_number(row.num_regions(mark), "d") for mark in (COMPUTED, REUSED)),
            _number(row.graphs, "d"),
            "-" if row.cases is None else "+".join(str(case["graphs"]) for case in row.cases),
            _megabytes(row.compiling_bytes),
            _megabytes(row.running_bytes),
            _number(quality.mean_psnr if quality else None, ".2f"),
            _number(quality.mean_ssim if quality else None, ".4f"),
        )
        reused = f"{len(row.steps) - row.steps.count(COMPUTED)} of {len(row.steps)}"
        is_comparable = row.system in CACHED and row.system != DIFFUSERS
        same = result.has_same_steps(row.system, DIFFUSERS) if is_comparable else None
        steps.add_row(row.system, Text(row.steps or "unknown"), reused if row.steps else "-", _yes(same))
    cases = next((row.cases for row in result.rows if row.cases), None)
    seen.caption = "regions that a step runs: computed / reused"
    if cases:
        seen.caption += f"; later: graphs captured for {', '.join(case['case'] for case in cases)}"

    return [table for table in (speed, against, seen, steps, *_words(result)) if table.rows]


def _words(result: BenchResult) -> list[Table]:
    """How each contender runs, and why one failed."""
    how = Table(show_header=False, title="how each runs", title_justify="left")
    failed = Table(show_header=False, title="failed, and why", title_justify="left")
    for row in result.rows:
        if row.how:
            how.add_row(row.system, Text(row.how))
        if row.error:
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
    return _number(None if spread is None else spread.median, ".2f")


def _milliseconds(seconds: float | None) -> str:
    return _number(None if seconds is None else 1e3 * seconds, ".1f")


def _megabytes(taken: int | None) -> str:
    return _number(None if taken is None else taken / 1e6, ".0f")


def _yes(held: bool | None) -> str:
    return "-" if held is None else "yes" if held else "no"


def comparison_summary(result: FileComparison, sheet: Path | None) -> Table:
    """Lay out the closing table of a comparison of two files."""
    table = Table(show_header=False)
    table.add_column("")
    table.add_row("clip", _clip(result.width, result.height, result.frames))
    _add_quality(table, result.quality)
    if sheet is not None:
        table.add_row("contact sheet", Text(str(sheet), overflow="fold"))
    return table


def each_frame(quality: Quality) -> Table:
    """Lay out the figures of every frame; the change is from the frame before."""
    table = Table()
    for heading in ("frame", "PSNR, dB", "SSIM", "PSNR of the change, dB"):
        table.add_column(heading, justify="right")
    changes = (None, *quality.temporal_psnr)
    for frame, (psnr, ssim, change) in enumerate(zip(quality.psnr, quality.ssim, changes, strict=True)):
        table.add_row(str(frame), _number(psnr, ".2f"), f"{ssim:.4f}", _number(change, ".2f"))
    return table


def _add_comparison(table: Table, comparison: Comparison) -> None:
    table.add_row("speed-up a step", _number(comparison.step_speedup, ".2f", "x"))
    table.add_row("speed-up in all", _number(comparison.total_speedup, ".2f", "x"))
    _add_quality(table, comparison.quality)


def _add_quality(table: Table, quality: Quality) -> None:
    table.add_row("PSNR", _number(quality.mean_psnr, ".2f", " dB"))
    table.add_row("PSNR, worst frame", _number(min(quality.psnr), ".2f", " dB"))
    table.add_row("SSIM", _number(quality.mean_ssim, ".4f"))
    table.add_row("SSIM, worst frame", _number(min(quality.ssim), ".4f"))
    table.add_row("temporal PSNR", _number(quality.mean_temporal_psnr, ".2f", " dB"))
    table.add_row("temporal PSNR, worst", _number(min(quality.temporal_psnr, default=None), ".2f", " dB"))


def _clip(width: int, height: int, num_frames: int) -> str:
    return f"{width}x{height}, {num_frames} frame{'' if num_frames == 1 else 's'}"


def _number(value: float | None, form: str, unit: str = "") -> str:
    if value is None:
        return "-"
    return "identical" if math.isinf(value) else f"{value:{form}}{unit}"
