"""The tables of a tuning."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from hvcompile.explanation import figures

if TYPE_CHECKING:
    from pathlib import Path

    from hvcompile.app.tuning.tune import Outcome

HEADINGS = ("", "cache", "steps reused", "times as fast", "PSNR, dB", "worst clip", "SSIM", "temporal")
CHOSEN, BEST = "→", "*"


def tuning_tables(outcome: Outcome, output: Path) -> list[Table]:
    """Lay out what was measured, the settings that no other beats marked, and what was chosen."""
    from hvcompile.app.tuning.candidates import front

    best = front(outcome.rows)
    table = Table(
        caption=f"{CHOSEN} chosen, {BEST} no other reuses more steps at a higher PSNR", caption_justify="left"
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
    for candidate, row in outcome.rows.items():
        mark = CHOSEN if candidate == outcome.chosen else BEST if candidate in best else ""
        table.add_row(
            mark,
            str(candidate),
            f"{100 * row.reused:.1f} %",
            f"{row.speedup:.2f}",
            figures.number(row.psnr, ".2f"),
            figures.number(row.worst_psnr, ".2f"),
            f"{row.ssim:.4f}",
            figures.number(row.temporal_psnr, ".2f"),
        )
    if outcome.options is None:
        return [table]
    closing = Table(show_header=False)
    closing.add_column("")
    closing.add_row("options", Text(json.dumps(outcome.options), overflow="fold"))
    closing.add_row("written to", Text(str(output), overflow="fold"))
    return [table, closing]
