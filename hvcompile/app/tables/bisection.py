"""The table of a bisection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from hvcompile.dump.bisect import Bisection


def bisection_table(bisection: Bisection) -> Table:
    """Lay out the stages that were run, and the worst of each stage's figures."""
    table = Table(title=str(bisection.folder), title_justify="left")
    for heading in ("stage", "what"):
        table.add_column(heading, overflow="fold")
    for heading in ("differs by", "relative", "allowed", "not finite"):
        table.add_column(heading, justify="right")
    for place, stage in enumerate(bisection.stages):
        worst = max(stage.figures, key=lambda figure: figure.relative, default=None)
        mark = " <-" if bisection.finding and bisection.finding.stage == stage.name else ""
        cells = ("", "", "")
        if worst is not None and place:
            cells = (f"{worst.largest:.3g}", f"{worst.relative:.3g}", f"{stage.tolerance:g}")
        table.add_row(
            Text(stage.name + mark), Text(stage.what), *cells, str(sum(figure.not_finite for figure in stage.figures))
        )
    return table
