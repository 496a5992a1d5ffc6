"""The videos that clients have asked a server for: what each is, whose it is, and what has become of it.

Each is a file of JSON and, once it is made, a file beside it, in a directory of the server's own. Their names are made
here; what a client sends is only looked up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from hvcompile import outputs
from hvcompile.app.request.ask import Ask
from hvcompile.errors import InputError, OutputError, one_line

log = logging.getLogger(__name__)

QUEUED, RUNNING, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"
LOCK = ".lock"
PREFIX = "hvcompile-serve-"
"""Of the temporary directories of servers."""
MOST_KEPT = 10_000
"""Videos that have ended and are kept, however young."""


@dataclass(kw_only=True)
class Job:
    """A video that a client asked for.

    Attributes:
        id: made at random.
        owner: a digest of the client's key.
        ask: what was asked for.
        model: of whom, by the name that clients know.
        made_for: a digest of all that makes it what it is, as ``request.ask.identity`` has it.
        status: as clients know it.
        created: seconds since the epoch, as the others, and parts of one.
        completed: when it ended.
        progress: percent.
        error: a code and a message, where it failed.
        suffix: of its file.
        attempts: how often it was begun.

    """

    id: str
    owner: str
    ask: Ask
    model: str
    made_for: str
    status: str = QUEUED
    created: float = 0.0
    completed: int | None = None
    progress: int = 0
    error: dict[str, str] | None = None
    suffix: str = ""
    attempts: int = 0

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will become of it."""
        return self.status in (COMPLETED, FAILED)


@dataclass(eq=False)
class Jobs:
    """All videos of a server.

    Args:
        directory: where they are kept. What is found there of an earlier process is taken over; what that one had not
            ended waits again.
        keep_seconds: for which one that has ended is kept.

    """

    directory: Path
    keep_seconds: float
    known: dict[str, Job] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what is there; raises InputError where another server has it."""
        self._lock = locked(self.directory)
        found = []
        for path in self.directory.glob("video_*.json"):
            try:
                content = json.loads(path.read_text())
                job = Job(**content | {"ask": Ask(**content["ask"])})
            except (OSError, ValueError, TypeError, KeyError) as error:
                log.warning("%s is damaged, so that its video is forgotten: %s", path, one_line(error))
                continue
            if job.status == RUNNING:
                job.status, job.progress = QUEUED, 0
            found.append(job)
        self.known.update((job.id, job) for job in sorted(found, key=lambda job: (job.created, job.id)))

    def create(self, ask: Ask, owner: str, model: str, made_for: str) -> Job:
        """Add a video; raises OutputError where the disk takes no more."""
        identity, now = f"video_{secrets.token_hex(16)}", time.time()
        job = Job(id=identity, owner=owner, ask=ask, model=model, made_for=made_for, created=now)
        self.save(job)
        self.known[job.id] = job
        return job

    def find(self, identity: str, owner: str) -> Job | None:
        """A client's own video; None where it has none of this name."""
        job = self.known.get(identity)
        return job if job is not None and secrets.compare_digest(job.owner, owner) else None

    def of(self, owner: str) -> Iterator[Job]:
        """A client's own videos, the youngest first."""
        return (job for job in reversed(self.known.values()) if job.owner == owner)

    def save(self, job: Job) -> None:
        """Keep what a video is at."""
        outputs.write_json(dataclasses.asdict(job), self.directory / f"{job.id}.json")

    def complete(self, job: Job, content: bytes, suffix: str) -> None:
        """Keep a video's file, and then that it is there; raises OutputError where the disk takes no more."""
        job.suffix = suffix
        with outputs.replacing(self.place(job)) as part:
            part.write_bytes(content)
        self._end(job, COMPLETED)
        job.progress = 100
        self.save(job)

    def fail(self, job: Job, code: str, message: str) -> None:
        """Keep why there is no video."""
        job.error = {"code": code, "message": message}
        self._end(job, FAILED)
        with contextlib.suppress(OutputError):
            self.save(job)

    def delete(self, job: Job) -> None:
        """Forget a video, and its file."""
        self.known.pop(job.id, None)
        for path in (self.place(job) if job.suffix else None, self.directory / f"{job.id}.json"):
            if path is not None:
                path.unlink(missing_ok=True)

    def expire(self) -> None:
        """Forget what has ended long ago, and the oldest of too many."""
        ended = [job for job in self.known.values() if job.has_ended]
        for number, job in enumerate(ended):
            is_old = time.time() - (job.completed or 0) > self.keep_seconds
            if is_old or number < len(ended) - MOST_KEPT:
                self.delete(job)

    def place(self, job: Job) -> Path:
        """Where a video's file is."""
        return self.directory / f"{job.id}{job.suffix}"

    def close(self) -> None:
        """Let another server have the directory."""
        self._lock.close()

    def _end(self, job: Job, status: str) -> None:
        job.status, job.completed = status, int(time.time())


def locked(directory: Path) -> BinaryIO:
    """Take a directory for this process until the file that is returned is closed, or the process ends.

    Raises:
        InputError: another server has it, or its lock can't be opened.

    """
    try:
        # A link that somebody put there is not followed.
        number = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputError(
            f"store {str(directory)!r} can't be locked ({error.strerror}): give a directory of your own"
        ) from error
    return _flocked(number, directory)


def _flocked(number: int, directory: Path) -> BinaryIO:
    file = os.fdopen(number, "ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError(
            f"store {str(directory)!r} is in use by another hvcompile serve: end that one, or give another directory"
        ) from error
    return file


def temporary() -> Path:
    """A temporary directory of this process, which nobody else may read.

    Those of servers of this user that were killed, and left theirs, are removed. Others share the place where they
    are: nothing is opened there, or removed, but directories of this user that nobody else can have written to.
    """
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError, InputError):  # another user's, or of a server that runs
            _remove_abandoned(path)
    return Path(tempfile.mkdtemp(prefix=PREFIX))  # of mode 0700


def _remove_abandoned(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _check_own(directory, 0o077)
        number = os.open(LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        with _flocked(number, path) as lock:
            _check_own(lock.fileno(), 0o022)
        shutil.rmtree(path)
    finally:
        os.close(directory)


def _check_own(number: int, barred: int) -> None:
    """Raise OSError where an open file is another user's, or others have one of the permissions ``barred``."""
    found = os.fstat(number)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & barred:
        raise PermissionError("it is another user's, or open to others")


def shown(job: Job) -> dict[str, Any]:
    """A video as clients know it."""
    ask = job.ask
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": job.status,
        "progress": job.progress,
        "created_at": int(job.created),
        "completed_at": job.completed if job.status == COMPLETED else None,
        "expires_at": None,
        "prompt": ask.prompt,
        "size": f"{ask.width}x{ask.height}",
        "seconds": f"{(ask.frames or 0) / ask.fps:g}",
        "error": job.error,
        "remixed_from_video_id": None,
    }
