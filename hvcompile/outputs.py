"""Files that the command line writes: checked before the work begins, replaced only when all went well."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hvcompile.errors import InputError, OutputError

LEAST_FREE = 2**16
"""Bytes; a disk with less is full."""


def check(path: Path, *, name: str, kind: str, suffixes: Sequence[str]) -> None:
    """Raise InputError where no file can be written at ``path``.

    Args:
        path: the file to be; may be there already.
        name: of the option that gave it.
        kind: what such a file is, in two words or so.
        suffixes: endings of such a file, the usual one first.

    """
    try:
        is_directory = path.is_dir()
    except OSError as error:  # a name that no file system takes
        raise InputError(f"{name} can't be used ({error.strerror or error}): give a shorter name") from error
    if is_directory:
        example = path / f"out{suffixes[0]}"
        raise InputError(f"{name} {str(path)!r} is a directory: give a file name, such as {example}")
    if path.suffix.lower() not in suffixes:
        raise InputError(f"{name} {str(path)!r} is no {kind}: give a name that ends in {', '.join(suffixes)}")
    if not path.parent.is_dir():
        raise InputError(f"{name} {str(path)!r}: there is no directory {str(path.parent)!r}: make it first")
    try:  # asking for permission says yes to root where the file system says no
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{name} {str(path)!r} can't be written ({reason}): give a place where you may") from error
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"{name} {str(path)!r} is write-protected: give another name")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file to write beside ``path``, which takes its place when the block ends without an error.

    Where ``path`` is a link, the file that it leads to is replaced.

    Raises:
        OutputError: for any OSError within; the file that was there is as it was.

    """
    try:
        path = path.resolve()
        with tempfile.TemporaryDirectory(prefix=".hvcompile-", dir=path.parent) as directory:
            part = Path(directory, path.name)
            yield part
            part.replace(path)
    except OutputError:
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        with contextlib.suppress(OSError):  # an encoder tells of a full disk in words of its own
            if shutil.disk_usage(path.parent).free < LEAST_FREE:
                reason = os.strerror(errno.ENOSPC)
        raise OutputError(f"{str(path)!r} can't be written ({reason})") from error


def keep_elsewhere(name: str, write: Callable[[BinaryIO], None], *, instead_of: Path) -> Path | None:
    """Write what would else be lost to the first place that takes it; None where no place does.

    Args:
        name: of the file; something is put before its ending where that is taken.
        write: writes the content to an open file.
        instead_of: the file that could not be written. Its directory is tried first, since something smaller may fit.

    """
    places = [instead_of.parent, Path.cwd(), Path(tempfile.gettempdir()), Path.home()]
    for place in dict.fromkeys(item.resolve() for item in places):
        kept: Path | None = None
        try:
            handle, text = tempfile.mkstemp(prefix=f"{Path(name).stem}-", suffix=Path(name).suffix, dir=place)
            kept = Path(text)
            with os.fdopen(handle, "wb") as file:
                write(file)
        except OSError:
            if kept is not None:
                kept.unlink(missing_ok=True)
        else:
            return kept
    return None


def write_json(record: Mapping[str, Any], path: Path) -> None:
    """Write ``record`` as JSON that any reader takes: a number that is not finite is an error, not a bare NaN."""
    with replacing(path) as part:
        part.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
