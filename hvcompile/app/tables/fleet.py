"""The tables of a batch, and its line on the way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from hvcompile.app.fleet.batch import Batch, Progress


def fleet_tables(batch: Batch, output: Path) -> list[Table]:
    """Lay out what a batch has come to: a row a line that failed, if any, and the sums."""
    found = []
    if batch.failures:
        failures = Table()
        failures.add_column("line", justify="right")
        for heading in ("prompt", "attempts", "why it failed"):
            failures.add_column(heading)
        for line, reason, attempts in batch.failures:
            prompt = Text(line.ask.prompt[:60], overflow="fold")
            failures.add_row(str(line.number), prompt, str(attempts), Text(reason, overflow="fold"))
        found.append(failures)
    table = Table(show_header=False)
    table.add_row("made", f"{len(batch.records)} of {batch.lines}")
    if batch.skipped:
        table.add_row("made before", str(batch.skipped))
    if batch.failures:
        table.add_row("failed", str(len(batch.failures)))
    if batch.restarts:
        table.add_row("replicas begun anew", str(batch.restarts))
    steps = sum(item["steps"] for item in batch.records)
    table.add_row("steps", f"{steps}, {sum(item['reused'] for item in batch.records)} reused")
    table.add_row("seconds in all", f"{batch.seconds:.1f}")
    if batch.records:
        table.add_row("seconds a video", f"{batch.seconds / len(batch.records):.2f}")
    table.add_row("output", Text(str(output), overflow="fold"))
    return [*found, table]


def fleet_line(progress: Progress) -> str:
    """How far a batch is, in a line."""
    parts = [f"{progress.steps} steps"]
    if progress.steps:
        parts.append(f"{progress.reused / progress.steps:.0%} reused")
    if progress.made:
        parts.append(f"{progress.seconds / progress.made:.1f} s a video")
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    return ", ".join(parts)
