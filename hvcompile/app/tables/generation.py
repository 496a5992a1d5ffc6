"""The tables of a generation, and of a comparison of two clips."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from hvcompile.explanation import figures

if TYPE_CHECKING:
    from hvcompile.app.compare import FileComparison
    from hvcompile.app.metrics import Comparison, Quality, Run
    from hvcompile.app.results import Batch, Result
    from hvcompile.runtime.state import Stats
    from hvcompile.torch_private.caching import Lookups


def summary(result: Result) -> Table:
    """Lay out the closing table of a generation; with ``--compare``, two columns."""
    runs = [result.run] + ([result.comparison.plain] if result.comparison else [])
    table = Table(show_header=result.comparison is not None)
    table.add_column("")
    for run in runs:
        table.add_column(run.steps[0].backend, justify="right")
    table.add_row("seconds in all", *(f"{run.seconds:.2f}" for run in runs))
    table.add_row("seconds compiling", *(f"{run.compile_seconds:.2f}" for run in runs))
    table.add_row("compiled code", *(compiled_code(run.graphs) for run in runs))
    table.add_row("seconds a step after", *(figures.number(run.step_seconds, ".4f") for run in runs))
    table.add_row("steps computed", *(str(len(run.steps) - run.num_reused) for run in runs))
    table.add_row("steps reused", *(str(run.num_reused) for run in runs))
    table.add_row("memory at most", *(_memory(run) for run in runs))
    _add_graphs(table, result.stats)
    if result.comparison is not None:
        _add_comparison(table, result.comparison)
    num_frames, height, width = result.run.size
    table.add_row("clip", _clip(width, height, num_frames))
    table.add_row("output", Text(str(result.output), overflow="fold"))
    if result.sheet is not None:
        table.add_row("contact sheet", Text(str(result.sheet), overflow="fold"))
    if result.report is not None:
        table.add_row("report", Text(str(result.report), overflow="fold"))
    return table


def compiled_code(graphs: Lookups) -> str:
    """Whether graphs were compiled, or found where earlier processes have put them."""
    counts = {"found": graphs.found, "compiled": graphs.compiled, "compiled and not kept": graphs.refused}
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "-"


def batch_tables(batch: Batch) -> list[Table]:
    """Lay out what became of several clips: a row each, and what they have in common."""
    clips = Table()
    for heading in ("seed", "prompt", "seconds", "reused", "output"):
        clips.add_column(heading, justify="right" if heading in ("seed", "seconds", "reused") else "left")
    for clip in batch.clips:
        made = Text(str(clip.job.output) if clip.error is None else f"failed: {clip.error}", overflow="fold")
        steps = f"{clip.run.num_reused} of {len(clip.run.steps)}" if clip.run is not None else "-"
        seconds = f"{clip.run.seconds:.2f}" if clip.run is not None else "-"
        clips.add_row(str(clip.job.seed), Text(clip.job.prompt, overflow="fold"), seconds, steps, made)
    table = Table(show_header=False)
    table.add_column("")
    made_count = sum(clip.error is None for clip in batch.clips)
    table.add_row("made", f"{made_count} of {len(batch.clips)}")
    _add_graphs(table, batch.stats)
    if batch.sheet is not None:
        table.add_row("contact sheet", Text(str(batch.sheet), overflow="fold"))
    return [clips, table]


def _add_graphs(table: Table, stats: Stats | None) -> None:
    if stats is None:
        table.add_row("graphs", "none: the model ran without a compiler")
        return
    table.add_row("graphs", str(stats.graphs))
    table.add_row("recompiles", str(stats.recompiles))
    if stats.eager_calls:
        table.add_row("calls that nothing compiled", str(stats.eager_calls))


def _memory(run: Run) -> str:
    return "-" if run.peak_bytes is None else figures.with_prefix(run.peak_bytes, "B")


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
        table.add_row(str(frame), figures.number(psnr, ".2f"), f"{ssim:.4f}", figures.number(change, ".2f"))
    return table


def _add_comparison(table: Table, comparison: Comparison) -> None:
    table.add_row("speed-up a step", figures.number(comparison.step_speedup, ".2f", "x"))
    table.add_row("speed-up in all", figures.number(comparison.total_speedup, ".2f", "x"))
    _add_quality(table, comparison.quality)


def _add_quality(table: Table, quality: Quality) -> None:
    table.add_row("PSNR", figures.number(quality.mean_psnr, ".2f", " dB"))
    table.add_row("PSNR, worst frame", figures.number(min(quality.psnr), ".2f", " dB"))
    table.add_row("SSIM", figures.number(quality.mean_ssim, ".4f"))
    table.add_row("SSIM, worst frame", figures.number(min(quality.ssim), ".4f"))
    table.add_row("temporal PSNR", figures.number(quality.mean_temporal_psnr, ".2f", " dB"))
    table.add_row("temporal PSNR, worst", figures.number(min(quality.temporal_psnr, default=None), ".2f", " dB"))


def _clip(width: int, height: int, num_frames: int) -> str:
    return f"{width}x{height}, {num_frames} frame{'' if num_frames == 1 else 's'}"
