"""The progress of a generation on the screen."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hvcompile.app.cli.console import err

if TYPE_CHECKING:
    from hvcompile.app.metrics import Step

COMPUTED, REUSED = "█", "·"
STRIP = 32
"""Marks in sight; of a longer run, the latest."""


class Strip:
    """The steps of a run in a line: a mark a step, how many were reused, the last difference."""

    def __init__(self) -> None:
        self._marks = ""

    def after(self, step: Step) -> str:
        """The line with one more step, which begins a run if it is the first of one."""
        self._marks = ("" if step.index == 0 else self._marks) + (REUSED if step.reused else COMPUTED)
        marks = self._marks
        strip = marks.ljust(step.num_steps)[max(0, len(marks) - STRIP) :][:STRIP]
        text = f"{step.backend} {strip} {len(marks)}/{step.num_steps}, {marks.count(REUSED)} reused"
        is_known = step.difference is not None and math.isfinite(step.difference)
        return f"{text}, last {step.difference:.3f}" if is_known else text


def tiles(event: str) -> str:
    """What is told of a tile, with a bar."""
    found = re.fullmatch(r"decoding (\d+) of (\d+) tiles", event)
    if found is None:
        return event
    done, total = int(found[1]), int(found[2])
    width = min(total, STRIP)
    filled = done * width // total
    return f"decoding {COMPUTED * filled}{REUSED * (width - filled)} {done}/{total} tiles"


class Display:
    """The progress of a generation: a line a run."""

    def __init__(self, console: Console = err) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console)
        self.phase = self.progress.add_task("starting", total=None)
        self.run = self.phase
        self.strip = Strip()
        self.word = ""

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.update(self.phase, visible=False)
        self.progress.stop()

    def __call__(self, event: str | Step) -> None:
        """Show a phase (text) or a step that is done."""
        if isinstance(event, str):
            word = event.partition(" ")[0]
            if word == self.word == "decoding":  # a tile more: the time is that of all of them
                self.progress.update(self.phase, description=tiles(event))
            else:
                self.progress.reset(self.phase, description=event, visible=True)
            self.word = word
            return
        self.word = ""
        if event.index == 0:
            self.run = self.progress.add_task("", total=event.num_steps)
            # its time is that of its first step too, which was shown as a phase
            self.progress.tasks[-1].start_time = self.progress.tasks[0].start_time
            self.progress.update(self.phase, visible=False)
        self.progress.update(self.run, advance=1, description=self.strip.after(event))
