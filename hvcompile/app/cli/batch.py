"""``hvcompile batch``."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from hvcompile import outputs
from hvcompile.app import extras, quiet, store, tables
from hvcompile.app.cli.console import err, leaving, out
from hvcompile.app.cli.signature import taking
from hvcompile.app.request.batch import Request

if TYPE_CHECKING:
    from hvcompile.app.fleet import batch as engine


@taking(Request)
def batch(request: Request) -> None:
    """Make the videos of a file of prompts by several replicas side by side, on Ray.

    The same command goes on where it was broken off: manifest.jsonl, beside the videos, says what is done.

    Leaves with 1 where a video could not be made.
    """
    store.use_own()
    with leaving():
        extras.require("hvcompile batch", "cli", "diffusers", "ray")
        with quiet.importing("diffusers", "transformers"):
            from hvcompile.app.fleet import batch as engine

        quiet.hide_progress_bars()
        terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)  # then, too, the replicas are ended
        try:
            with contextlib.ExitStack() as stack:
                made = engine.batch(request, _tell_note if request.quiet else stack.enter_context(_Display()))
        finally:
            signal.signal(signal.SIGTERM, terminate)
        if request.json_file is not None:
            outputs.write_json(made.record(), request.json_file)
    for note in made.notes:
        err.print(Text(f"note: {note}"), soft_wrap=True)
    if not request.quiet:
        for table in tables.fleet_tables(made, request.output):
            out.print(table)
    for line, reason, _ in made.failures:
        err.print(Text(f"error: line {line.number}: {reason}"), soft_wrap=True)
    if made.failures:
        raise typer.Exit(1)


def _tell_note(event: str | engine.Progress | engine.Note) -> None:
    """Print a note, and nothing else."""
    from hvcompile.app.fleet.batch import Note

    if isinstance(event, Note):
        err.print(Text(f"note: {event.text}"), soft_wrap=True)


class _Display:
    """A bar of the lines, and a line a replica."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err)
        self._bar = self._progress.add_task("reading", total=None)

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: str | engine.Progress | engine.Note) -> None:
        """Show a phase in words, how far all is, or a note."""
        from hvcompile.app.fleet.batch import Progress as Far

        if isinstance(event, str):
            self._progress.update(self._bar, description=event)
        elif not isinstance(event, Far):
            _tell_note(event)
        else:
            text = tables.fleet_line(event)
            if err.is_terminal:
                text = "\n".join([text, *event.replicas])
            self._progress.update(self._bar, description=text, completed=event.done + event.failed, total=event.total)
