"""``hvcompile generate``."""

from __future__ import annotations

import contextlib
from pathlib import Path

import typer
from rich.text import Text

from hvcompile.app import extras, quiet, store, tables
from hvcompile.app.cli.console import err, leaving_in_turn, let_first_rank_speak, out
from hvcompile.app.cli.display import Display
from hvcompile.app.cli.signature import taking
from hvcompile.app.request.generate import Request


@taking(Request)
def generate(request: Request) -> None:
    """Make a video of PROMPT, or a picture; what is not given is as the model likes it.

    Under torchrun all ranks share the work on one video, and the first one writes it.
    """
    let_first_rank_speak()
    store.use_own()
    with leaving_in_turn():
        extras.require("hvcompile generate", "cli", "diffusers")
        with quiet.importing("diffusers", "transformers"):
            from hvcompile.app import batch, generate  # diffusers takes seconds to import; --help must not

        request.check()
        quiet.hide_progress_bars()
        is_one = len(request.jobs(Path("out"))) == 1
        with contextlib.ExitStack() as stack:
            display = _silent if request.quiet else stack.enter_context(Display())
            made = generate.generate(request, display) if is_one else batch.generate_all(request, display)
    for note in made.notes:
        err.print(Text(f"note: {note}"), soft_wrap=True)
    failed = [] if isinstance(made, generate.Result) else [clip.error for clip in made.clips if clip.error is not None]
    if not request.quiet:
        shown = [tables.summary(made)] if isinstance(made, generate.Result) else tables.batch_tables(made)
        for table in shown:
            out.print(table)
    for error in (*(failed if request.quiet else ()), *made.problems):
        err.print(Text(f"error: {error}"), soft_wrap=True)
    if failed or made.problems:
        raise typer.Exit(1 if failed else 2)


def _silent(event: object) -> None:
    """Show nothing."""
