"""The list of what a batch has done, beside its videos: a line is added when a file is whole and has its name."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from hvcompile import outputs
from hvcompile.app.request.batch import MANIFEST, Line
from hvcompile.errors import InputError, OutputError

MOST_TOLD = 10
"""Damaged lines whose numbers are told."""


class Manifest:
    """What is done in a directory; one process at a time has it, for as long as ``opened`` lasts.

    Attributes:
        done: the records of files that are there, by the file's name without its ending.
        damaged: the numbers of its lines that can't be read; what they told of is not done.

    """

    def __init__(self, directory: Path, file: FileIO) -> None:
        self._directory, self._file = directory, file
        self.done: dict[str, dict[str, Any]] = {}
        self.damaged: list[int] = []
        with self._told("read"):
            self._read()

    @classmethod
    @contextlib.contextmanager
    def opened(cls, directory: Path) -> Iterator[Manifest]:
        """Read the list of a directory, or begin one.

        Raises:
            InputError: another process makes videos there.
            OutputError: the list can't be read or written.

        """
        path = directory / MANIFEST
        try:
            # With no buffer, what a full disk did not take is not tried again behind our back.
            unbuffered = path.open("a+b", buffering=0)
        except OSError as error:
            raise OutputError(
                f"{str(path)!r} can't be opened ({error.strerror}): make it yours to read and write, or give another "
                "directory"
            ) from error
        with unbuffered as file:
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
        for number, line in enumerate(whole.splitlines(), 1):
            record = _record(line)
            if record is None:
                self.damaged.append(number)
            elif record["error"] is None:
                self.done[Path(record["output"]).stem] = record

    def notes(self) -> tuple[str, ...]:
        """What a user should know of its lines that can't be read; nothing where there are none."""
        if not self.damaged:
            return ()
        told = ", ".join(map(str, self.damaged[:MOST_TOLD])) + (", ..." if len(self.damaged) > MOST_TOLD else "")
        return (
            f"{str(self._directory / MANIFEST)!r} has {len(self.damaged)} damaged lines ({told}): what they told of "
            "counts as not done",
        )

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
        record = self._begun(line) | {"output": name, "bytes": len(content), "sha256": digest, "error": None}
        self._add(record | dict(figures))
        self.done[line.stem] = record | dict(figures)
        return self.done[line.stem]

    def fail(self, line: Line, reason: str, attempts: int) -> None:
        """Write why a line has no file; a later run tries it again."""
        self._add(self._begun(line) | {"error": reason, "attempts": attempts})

    def _begun(self, line: Line) -> dict[str, Any]:
        return {"id": line.identity, "line": line.number, "prompt": line.ask.prompt, "seed": line.ask.seed}

    def _add(self, record: Mapping[str, Any]) -> None:
        content = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._told("written"):
            start = self._file.seek(0, os.SEEK_END)
            try:
                while content:
                    content = content[self._file.write(content) :]
                os.fsync(self._file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(start)
                raise

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Within, an OSError becomes one that says of what, and what to do."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{str(self._directory / MANIFEST)!r} can't be {what} ({error.strerror}): see to its disk, and give "
                "the same command to go on"
            ) from error


def _record(line: bytes) -> dict[str, Any] | None:
    """What a line of the list tells; None where it is damaged."""
    try:
        record = json.loads(line)
        texts = [record["id"]] if record["error"] is not None else [record[key] for key in ("id", "output", "sha256")]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    is_whole = all(isinstance(text, str) for text in texts)
    is_here = record["error"] is not None or (is_whole and Path(record["output"]).name == record["output"])
    return record if is_whole and is_here else None


def _maker(record: Mapping[str, Any]) -> dict[str, str]:
    told = record.get("maker")
    return told if isinstance(told, dict) and told else {"version": "not told"}
