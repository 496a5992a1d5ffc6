"""Where the commands keep compiled code: a directory of their own, not one that a reboot empties."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Names the directory in which torch keeps compiled code; whoever sets it decides for the commands too."""


def place() -> Path:
    """The commands' own directory, as the XDG base directory specification has it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hvcompile", "compiled")


def use_own() -> None:
    """Keep compiled code in the commands' own directory, in this process and those that it starts."""
    os.environ.setdefault(VARIABLE, str(place()))


def current() -> str:
    """The directory in which compiled code is kept now."""
    return os.environ.get(VARIABLE, str(place()))


@contextlib.contextmanager
def fresh() -> Iterator[Path]:
    """Within, compiled code is kept in a new directory, which is then deleted."""
    before = os.environ.get(VARIABLE)
    with tempfile.TemporaryDirectory(prefix="hvcompile-", ignore_cleanup_errors=True) as directory:
        os.environ[VARIABLE] = directory
        try:
            yield Path(directory)
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before
