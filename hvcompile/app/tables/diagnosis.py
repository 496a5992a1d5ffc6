"""The table of what an environment has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from hvcompile.app.doctor import Finding

STYLES = {"ok": "green", "note": "yellow", "missing": "bold red"}


def diagnosis_table(findings: Sequence[Finding]) -> Table:
    """Lay out what was found, and what to do about what is amiss."""
    table = Table("", "", "found", "what to do")
    for item in findings:
        table.add_row(item.name, Text(item.status, STYLES[item.status]), Text(item.found), Text(item.advice))
    return table
