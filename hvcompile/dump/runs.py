"""The runs of a dump: what a process compiles into a directory lands in a folder of its own, ``run_1``, ``run_2``, ...

So a dump that is made again into the same directory is not mixed with the older one, and a bisection looks at the
latest. All graphs of a process land together, recompiled ones too. Of several ranks each has a directory, and its own
runs in it.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import shlex
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from hvcompile.errors import OptionError

RECORD = "run.json"
_MAKING = threading.Lock()


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Within, an OSError is an OptionError that says what to do."""
    try:
        yield
    except OSError as error:
        raise OptionError(
            f"can't write a dump into {str(directory)!r}: {error.strerror or error}. Give options['dump'] or the "
            "environment variable HVCOMPILE_DUMP a directory that this process may write to, or leave them out"
        ) from error


def own_run(directory: Path | None) -> Path | None:
    """The folder of this process in a directory of dumps, made at the first call; None for None.

    Raises:
        OptionError: the directory can't be written.

    """
    if directory is None:
        return None
    with _MAKING:
        return _new_run(directory.absolute(), os.getpid())


@functools.cache
def _new_run(directory: Path, process: int) -> Path:
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        number = 1 + max(_runs(directory), default=0)
        while True:
            folder = directory / f"run_{number}"
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
                continue
            started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            record = {"started": started, "command": shlex.join(sys.argv), "process": process}
            (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
            return folder


def latest(directory: Path) -> Path:
    """The folder of the latest run of a dump; the directory itself where it holds no runs."""
    runs = _runs(directory)
    return runs[max(runs)] if runs else directory


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return folder in _runs(folder.parent).values()


def describe(run: Path) -> str:
    """A run in words: which of how many, when it began, and what ran; empty where the folder is none of a run."""
    if not is_run(run):
        return ""
    runs = _runs(run.parent)
    try:
        record = json.loads((run / RECORD).read_text("utf-8"))
        began = f", begun {record['started']} by {record['command']}"
    except (OSError, ValueError, KeyError, TypeError):
        began = ""
    which = "the latest" if run == runs[max(runs)] else "an older one"
    return f"{run.name} of {str(run.parent)!r}, {which} of {len(runs)}{began}"


def _runs(directory: Path) -> dict[int, Path]:
    paths = directory.glob("run_*") if directory.is_dir() else ()
    return {int(path.name[4:]): path for path in paths if path.is_dir() and path.name[4:].isdecimal()}
