"""The journal: what each pass did, what it left alone, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassReport:
    """What a pass did: what it matched, and what it left alone with the reason for each.

    ``unmet`` is what one of its options asks for that can't be had, with the reason: an error where the user asked for
    the pass. ``noted`` is what else a reader wants to know. ``table`` holds details: rows of equal columns, in order.
    """

    matched: tuple[str, ...] = ()
    declined: tuple[tuple[str, str], ...] = ()
    unmet: tuple[tuple[str, str], ...] = ()
    noted: tuple[str, ...] = ()
    table: tuple[Mapping[str, Any], ...] = ()

    @property
    def applied(self) -> bool:
        """Whether the pass changed the graph."""
        return bool(self.matched)


@dataclasses.dataclass(frozen=True)
class Declined:
    """Why something is left as it was: what a matcher or a check gives in place of a result.

    ``what`` is what the reason is about; empty for all that was looked at. ``cause`` is the exception that made it so,
    where nobody foresaw that one.
    """

    reason: str
    what: str = ""
    cause: Exception | None = dataclasses.field(default=None, compare=False)

    def report(self, where: str) -> PassReport:
        """The report of a pass that does nothing, for this reason."""
        return PassReport(declined=((self.what or where, self.reason),))


@dataclasses.dataclass(frozen=True, kw_only=True)
class JournalRow:
    """One line of the journal: a pass, its report, and how the number of each operation changed.

    ``section`` is the pass's key in ``options``, empty where it has none; ``is_exact`` and ``tolerance`` as in
    ``Pass``; ``options`` are the pass's fields.
    """

    name: str
    report: PassReport
    op_changes: dict[str, int]
    section: str = ""
    is_exact: bool = True
    tolerance: float = 0.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def line(self) -> str:
        """The row in one line, for the log."""
        done = "; ".join(self.report.matched) or "left the graph as it was"
        rest = [f"{what}: {why}" for what, why in (*self.report.unmet, *self.report.declined)]
        reasons = "; ".join([*rest, *self.report.noted])
        return f"{self.name}: {done}" + (f" ({reasons})" if reasons else "")
