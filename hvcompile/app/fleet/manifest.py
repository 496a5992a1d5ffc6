"""The list of what a batch has done, beside its videos: a line is added when a file is whole and has its name."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from hvcompile import outputs
from hvcompile.app.request.batch import MANIFEST, Line
from hvcompile.errors import InputError, OutputError


class Manifest:
    """What is done in a directory; one process at a time has it, for as long as ``opened`` lasts.

    Attributes:
        done: the records of files that are there, by the file's name without its ending.

    """

    def __init__(self, directory: Path, file: BinaryIO) -> None:
        self._directory, self._file = directory, file
        self.done: dict[str, dict[str, Any]] = {}
        self._read()

    @classmethod
    @contextlib.contextmanager
    def opened(cls, directory: Path) -> Iterator[Manifest]:
        """Read the list of a directory, or begin one.

        Raises:
            InputError: another process makes videos there.

        """
        with (directory / MANIFEST).open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with this process, however it ends
            except OSError as error:
                raise InputError(
                    f"output {str(directory)!r} is in use by another hvcompile batch: wait for it, or give another "
                    "directory"
                ) from error
            yield cls(directory, file)

    def _read(self) -> None:
        """Take what stands there; of a line that a crash cut off, nothing."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._file.truncate(len(whole))
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                if record["error"] is None:
                    self.done[Path(record["output"]).stem] = record

    def has(self, line: Line) -> bool:
        """Whether a line's file was made, under the name that it has now, and is still there as it was."""
        record = self.done.get(line.stem)
        if record is None or record["id"] != line.identity:
            return False
        try:
            # Another line may have taken the name, and died before it wrote that down.
            content = (self._directory / record["output"]).read_bytes()
        except OSError:
            return False
        return bool(hashlib.sha256(content).hexdigest() == record["sha256"])

    def mixed(self, lines: Sequence[Line]) -> tuple[str, ...]:
        """A note where some lines' files were made by other devices or versions than others; else nothing."""
        records = [self.done[line.stem] for line in lines if line.stem in self.done]
        makers = Counter(", ".join(f"{key} {value}" for key, value in _maker(record).items()) for record in records)
        if len(makers) < 2:
            return ()
        told = "; ".join(f"{count} by {maker}" for maker, count in makers.most_common())
        return (f"the videos are not all by the same maker, so that their last bits may differ: {told}",)

    def store(self, line: Line, content: bytes, suffix: str, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Write a line's file, and then that it is done.

        Raises:
            OutputError: the disk is full, say; then there is no file, or the one that was there before.

        """
        name = f"{line.stem}{suffix}"
        with outputs.replacing(self._directory / name) as part, part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        digest = hashlib.sha256(content).hexdigest()
        record = self._record(line) | {"output": name, "bytes": len(content), "sha256": digest, "error": None}
        self._add(record | dict(figures))
        self.done[line.stem] = record | dict(figures)
        return self.done[line.stem]

    def fail(self, line: Line, reason: str, attempts: int) -> None:
        """Write why a line has no file; a later run tries it again."""
        self._add(self._record(line) | {"error": reason, "attempts": attempts})

    def _record(self, line: Line) -> dict[str, Any]:
        return {"id": line.identity, "line": line.number, "prompt": line.ask.prompt, "seed": line.ask.seed}

    def _add(self, record: Mapping[str, Any]) -> None:
        start = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(start)
            raise OutputError(f"{str(self._directory / MANIFEST)!r} can't be written ({error.strerror})") from error


def _maker(record: Mapping[str, Any]) -> dict[str, str]:
    return dict(record.get("maker") or {"version": "not told"})
