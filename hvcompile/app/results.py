"""What a generation gives back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvcompile.app import metrics
from hvcompile.app.request.jobs import Job
from hvcompile.runtime.state import Stats


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished generation; ``comparison``, ``sheet``, its picture, and ``report`` are None unless asked for.

    ``stats`` is of all denoisers together, and None where nothing was compiled, as with ``TORCHDYNAMO_DISABLE=1``.
    ``problems`` are files that could not be written beside the clip, a line each.
    """

    output: Path
    run: metrics.Run
    stats: Stats | None
    comparison: metrics.Comparison | None = None
    sheet: Path | None = None
    report: Path | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One of several generations: how it ran, without its frames, or why it failed."""

    job: Job
    run: metrics.Run | None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Several generations by one compiled pipeline; ``sheet`` shows all that were made, None where none was.

    ``problems`` are files that could not be written beside the clips, a line each.
    """

    clips: tuple[Clip, ...]
    stats: Stats | None
    sheet: Path | None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
