"""``hvcompile tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from hvcompile.app import extras, quiet, store, tables
from hvcompile.app.cli.console import err, leaving_in_turn, let_first_rank_speak, out
from hvcompile.app.cli.display import Strip
from hvcompile.app.cli.signature import taking
from hvcompile.app.request.tune import Request

if TYPE_CHECKING:
    from hvcompile.app.metrics import Step
    from hvcompile.app.tuning import tune as engine


@taking(Request)
def tune(request: Request) -> None:
    """Find the cache's options that keep a fidelity or reach a speed, on clips of your own PROMPT or prompts.

    Every clip is made by plain torch.compile, and then with each setting of the cache that may be worth it. What was
    measured is kept: the same command goes on where it was broken off, and another goal measures only what is missing.

    Leaves with 1 where no setting meets the goal.
    """
    let_first_rank_speak()
    store.use_own()
    with leaving_in_turn():
        extras.require("hvcompile tune", "cli", "diffusers")
        if request.plot_file is not None:
            extras.require("--plot", "bench", modules=("matplotlib",))
        with quiet.importing("diffusers", "transformers"):
            from hvcompile.app.notes import written
            from hvcompile.app.tuning import plot
            from hvcompile.app.tuning import tune as engine

        request.check()
        quiet.hide_progress_bars()
        with _Display() as display:
            outcome = engine.tune(request, display)
        problems = [*outcome.problems]
        if outcome.rows:
            problems += written((request.plot_file, lambda path: plot.plot(outcome, path)))
    for note in outcome.notes:
        err.print(Text(f"note: {note}"), soft_wrap=True)
    for table in tables.tuning_tables(outcome, request.output):
        out.print(table)
    for problem in problems:
        err.print(Text(f"error: {problem}"), soft_wrap=True)
    _leave(outcome, request.output, problems)


def _leave(outcome: engine.Outcome, output: Path, problems: list[str]) -> None:
    """Say what is open, and leave with the code that says so."""
    if not outcome.rows:  # another rank than the first
        return
    if outcome.goal.is_open:
        err.print("note: no goal was given: the same command with --psnr, --worst-psnr or --speedup chooses")
    elif outcome.chosen is None:
        stale = f"; {output} is left as it was, of an earlier goal" if output.exists() else ""
        message = f"no setting meets the goal, so no options were written{stale}: the table has what each reaches"
        err.print(Text(f"error: {message}"), soft_wrap=True)
        raise typer.Exit(1)
    if problems:
        raise typer.Exit(2)


class _Display:
    """A bar of the clips that may have to be made, and the steps of the one that is being made."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err)
        self._bar = self._progress.add_task("starting", total=None)
        self._strip = Strip()
        self._what = ""

    def __enter__(self) -> _Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: str | Step | engine.Progress) -> None:
        """Show a phase, a step that is done, or how far all is."""
        from hvcompile.app.metrics import Step

        if isinstance(event, Step):
            self._progress.update(self._bar, description=f"{self._what}  {self._strip.after(event)}")
        elif not isinstance(event, str):
            self._what = event.what
            self._progress.update(self._bar, description=self._what, completed=event.done, total=event.most)
