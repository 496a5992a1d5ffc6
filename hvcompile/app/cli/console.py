"""What the commands share: where they print, and how they leave where something is wrong."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import typer
from rich.console import Console, ConsoleDimensions
from rich.text import Text

from hvcompile.errors import InputError, OptionError, RunError, one_line, ours_below
from hvcompile.ranks import launch

log = logging.getLogger(__name__)

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
def in_one_line() -> Iterator[None]:
    """Within, what the system refuses ends the command with one line and exit code 2, and Ctrl-C with 130.

    The first is any OSError that nobody foresaw: of the screen, which may be a file on a full disk, of a file, or of
    what another library reads or writes. Its traceback goes to the log, for debugging.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        err.print("stopped")
        raise typer.Exit(130) from error
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader has seen enough, which typer knows of
            raise
        log.debug("ended by the system", exc_info=error)
        err.quiet = False
        err.print(Text(f"error: {_in_words(error)}"), soft_wrap=True)
        _give_up_unwritten()
        raise typer.Exit(2) from error


def _in_words(error: OSError) -> str:
    """What the system refused, and of which file, in one line."""
    file = f"{error.filename!r}: " if error.filename is not None else ""
    return " ".join(f"{file}{error.strerror or str(error) or type(error).__name__}".split())


def _give_up_unwritten() -> None:
    """Have Python write what it could not write to nowhere, or it would try again as it ends, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


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
    err.print(Text(f"error: {one_line(fault)}"), soft_wrap=True)
    raise typer.Exit(1 if isinstance(fault, RunError) else 2) from error
