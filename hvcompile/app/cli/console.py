"""What the commands share: where they print, and how they leave where something is wrong."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NoReturn

import typer
from rich.console import Console, ConsoleDimensions
from rich.text import Text

from hvcompile.errors import InputError, OptionError, RunError, ours_below
from hvcompile.ranks import launch

WIDE = 2**14
"""Columns where the output is no terminal: no table is as wide, so none is cut."""


class _Uncut(Console):
    """A console that is as wide as what is printed where that goes to a file or a pipe."""

    @property  # type: ignore[misc]  # nobody sets it here
    def size(self) -> ConsoleDimensions:
        """The columns and rows that there are."""
        if self.is_terminal:
            return super().size
        return ConsoleDimensions(WIDE, super().size.height)


out = _Uncut(highlight=False)
err = Console(stderr=True, highlight=False)


def let_first_rank_speak() -> None:
    """Print nothing on other ranks than the first."""
    out.quiet = err.quiet = launch.rank() > 0


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Within, an interrupt (Ctrl-C) ends the command with one line and exit code 130."""
    try:
        yield
    except KeyboardInterrupt as error:
        err.print("stopped")
        raise typer.Exit(130) from error


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Within, what the user gave wrong ends the command with one line and exit code 2; other errors pass."""
    try:
        yield
    except Exception as error:
        _leave(error)


@contextlib.contextmanager
def leaving_in_turn() -> Iterator[None]:
    """As ``leaving``, the first of several ranks before the others."""
    try:
        yield
    except Exception as error:
        if launch.rank() > 0 and isinstance(error, InputError | OptionError):
            # All ranks were given the same, and the first says what is wrong with it; torchrun then ends the others.
            time.sleep(launch.GRACE_SECONDS)
        err.quiet = False
        _leave(error)


def _leave(error: Exception) -> NoReturn:
    fault = ours_below(error)
    if fault is None:
        raise error
    err.print(Text(f"error: {' '.join(str(fault).split())}"), soft_wrap=True)
    raise typer.Exit(1 if isinstance(fault, RunError) else 2) from error
