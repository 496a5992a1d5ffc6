"""A batch: every line of a file made by replicas side by side, so that a run that is killed goes on where it stopped.

This process alone writes files. A replica hands back the content of one, so machines need share no disk; a file gets
its name when it is whole, and stands in the manifest after that.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hvcompile.app.fleet import cluster, pictures
from hvcompile.app.fleet.cluster import Needs
from hvcompile.app.fleet.manifest import Manifest
from hvcompile.app.fleet.replica import WAITING, Replica
from hvcompile.app.fleet.thread import BROKEN, BUSY, IDLE, Outcome
from hvcompile.app.fleet.todo import Task, Todo
from hvcompile.app.request.batch import Line, Request, raise_wrong
from hvcompile.errors import InputError, OutputError, RunError, one_line

PAUSE_SECONDS = 0.1
"""Between two looks at the replicas."""
MOST_STARTS = 3
"""How often in a row a replica may fail before it is idle, until it is given up."""
MOST_UNWRITTEN = 3
"""Files in a row that can't be written, until the run ends: a full disk does not empty itself."""
LATE_SECONDS = 60.0
"""After its time, how long a video may take to stop before its replica is ended: a step may be long."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a batch is.

    Attributes:
        done: lines that are made or were made before.
        failed: lines that are given up.
        total: lines.
        steps: that were done in this run.
        reused: of them.
        seconds: since it began.
        made: lines that were made in this run.
        replicas: a phrase each.

    """

    done: int
    failed: int
    total: int
    steps: int
    reused: int
    seconds: float
    made: int
    replicas: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a batch has come to.

    Attributes:
        lines: of the file.
        skipped: how many were made before.
        records: of the videos that were made in this run, as in the manifest, in the order of the lines.
        failures: line, reason and attempts of each that was given up.
        restarts: replicas that broke and were begun anew.
        seconds: of all.
        notes: what else the user should know.

    """

    lines: int
    skipped: int
    records: tuple[dict[str, Any], ...]
    failures: tuple[tuple[Line, str, int], ...]
    restarts: int
    seconds: float
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "lines": self.lines,
            "made_before": self.skipped,
            "made": len(self.records),
            "failed": [
                {"line": line.number, "prompt": line.ask.prompt, "error": reason, "attempts": attempts}
                for line, reason, attempts in self.failures
            ],
            "restarts": self.restarts,
            "notes": list(self.notes),
            "seconds": self.seconds,
            "steps": sum(item["steps"] for item in self.records),
            "steps_reused": sum(item["reused"] for item in self.records),
            "videos": list(self.records),
        }


@dataclass(frozen=True)
class Note:
    """Something that the user should know at once."""

    text: str


Observer = Callable[[str | Progress | Note], object]


def batch(request: Request, observe: Observer = lambda event: None) -> Batch:
    """Make what is not made yet of a request.

    Args:
        request: what to make.
        observe: told of phases, of progress, and of what the user should know.

    Raises:
        InputError, OptionError: the request or a line can't be met, or there is no cluster or no room in it.
        RunError: no replica can be had.
        OutputError: files can't be written.

    """
    request.check()
    lines = request.lines()
    with Manifest.opened(request.output) as manifest:
        for note in manifest.notes():
            observe(Note(note))
        left = [line for line in lines if not manifest.has(line)]
        run = Run(request, lines, left, manifest, observe)
        if left:
            observe("starting Ray")
            with cluster.joined(request) as needs:
                if needs.room < request.replicas:
                    observe(
                        Note(f"the cluster has room for {needs.room} of {request.replicas} replicas: they go on alone")
                    )
                run.all(needs)
        return run.batch()


@dataclass(eq=False)
class _Seat:
    """A replica's place in the fleet: who sits there, at which task, and how often in a row it has failed to start."""

    replica: Replica
    task: Task | None = None
    shape: str | None = None
    failures: int = 0
    began: float = field(default_factory=time.monotonic)
    steps: tuple[int, int] = (0, 0)


class Run:
    """One run of a batch."""

    def __init__(
        self, request: Request, lines: Sequence[Line], left: Sequence[Line], manifest: Manifest, observe: Observer
    ) -> None:
        self._request, self._base, self._lines, self._left = request, request.base, lines, left
        self._manifest, self._observe = manifest, observe
        self._todo = Todo(Task(line=line) for line in left)
        self._seats: list[_Seat] = []
        self._records: list[dict[str, Any]] = []
        self._failures: list[tuple[Line, str, int]] = []
        self._numbers = iter(range(1, 2**62))
        self._restarts, self._unwritten, self._steps, self._reused = 0, 0, 0, 0
        self._is_checked = False
        self._given_up: list[str] = []
        self._begin = time.monotonic()

    def all(self, needs: Needs) -> None:
        """Make what is left, and end the replicas whatever happens."""
        try:
            for _ in range(min(self._request.replicas, len(self._todo))):
                self._seats.append(_Seat(self._replica(needs)))
            while self._todo or any(seat.task for seat in self._seats):
                for seat in list(self._seats):
                    self._look_at(seat, needs)
                self._observe(self.progress())
                time.sleep(PAUSE_SECONDS)
        finally:
            for seat in self._seats:
                seat.replica.kill()

    def batch(self) -> Batch:
        """What has come of it."""
        return Batch(
            lines=len(self._lines),
            skipped=len(self._lines) - len(self._left),
            records=tuple(sorted(self._records, key=operator.itemgetter("line"))),
            failures=tuple(sorted(self._failures, key=lambda item: item[0].number)),
            restarts=self._restarts,
            seconds=time.monotonic() - self._begin,
            notes=self._manifest.mixed(self._lines),
        )

    def progress(self) -> Progress:
        """How far it is."""
        reports = [seat.replica.report for seat in self._seats if seat.task]
        return Progress(
            done=len(self._lines) - len(self._left) + len(self._records),
            failed=len(self._failures),
            total=len(self._lines),
            steps=self._steps + sum(report.step for report in reports),
            reused=self._reused + sum(report.reused for report in reports),
            seconds=time.monotonic() - self._begin,
            made=len(self._records),
            replicas=tuple(_phrase(seat) for seat in self._seats),
        )

    def _replica(self, needs: Needs) -> Replica:
        return Replica(next(self._numbers), self._base, self._request.ranks, needs)

    def _look_at(self, seat: _Seat, needs: Needs) -> None:
        """Take what a replica has made, give it more, or put another in its place."""
        replica = seat.replica
        outcome = replica.advance()
        if outcome is not None and seat.task is not None:
            task, seat.task = seat.task, None
            self._take(task, outcome, replica)
        if replica.state == BROKEN:
            self._replace(seat, needs)
        elif replica.state == IDLE and self._has_checked(replica):
            seat.failures = 0
            self._give(seat)
        elif replica.state == BUSY and self._is_stuck(seat):
            replica.fail(f"it did not stop {LATE_SECONDS:.0f} s after its time")

    def _is_stuck(self, seat: _Seat) -> bool:
        limit = self._request.timeout
        return limit is not None and time.monotonic() - seat.began > limit + LATE_SECONDS

    def _has_checked(self, replica: Replica) -> bool:
        """Before the first video, have the pipeline itself look at every line.

        Each replica that is idle is asked, so that one that is slow or dies holds up none of the others; the first
        answer counts.
        """
        if not self._is_checked:
            if replica.wrong is None:
                replica.check([line.ask for line in self._left])
                return False
            wrong = zip(self._left, replica.wrong, strict=True)
            raise_wrong(self._request.prompts, [f"line {line.number}: {reason}" for line, reason in wrong if reason])
            self._is_checked = True
        return True

    def _give(self, seat: _Seat) -> None:
        """Begin a replica's next task, if there is one for it."""
        others = [other.shape for other in self._seats if other is not seat and other.task and other.shape]
        # One that waits for room may wait for ever.
        alive = [other.replica.number for other in self._seats if other.replica.state != WAITING]
        task = self._todo.take(seat.replica.number, seat.shape, others, alive)
        if task is None:
            return
        task.attempts += 1
        task.tried.add(seat.replica.number)
        try:
            contents = pictures.packed(task.line.ask)
        except InputError as error:
            self._failed(task, one_line(error))
            return
        seat.task, seat.shape, seat.began = task, task.shape, time.monotonic()
        seat.replica.begin(next(self._numbers), task.line.ask, self._request.timeout, contents)

    def _take(self, task: Task, outcome: Outcome, replica: Replica) -> None:
        """Store what was made, or have it tried again."""
        made = outcome.made
        if made is None:
            late = f"it took over {self._request.timeout} s" if outcome.reason == "late" else outcome.reason
            self._failed(task, late)
            return
        self._steps, self._reused = self._steps + made.steps, self._reused + made.reused
        figures = made.figures() | {"replica": replica.number, "attempts": task.attempts, "ranks": self._request.ranks}
        try:
            self._records.append(self._manifest.store(task.line, made.content, made.suffix, figures))
            self._unwritten = 0
        except OutputError as error:
            self._unwritten += 1
            self._failures.append((task.line, one_line(error), task.attempts))
            if self._unwritten >= MOST_UNWRITTEN:
                raise OutputError(
                    f"{one_line(error)}: {MOST_UNWRITTEN} videos in a row were lost; free some space and give the same "
                    "command to go on"
                ) from error

    def _failed(self, task: Task, reason: str) -> None:
        task.reason = reason
        if task.attempts < self._request.attempts:
            self._todo.add(task)
        else:
            self._failures.append((task.line, reason, task.attempts))
            self._manifest.fail(task.line, reason, task.attempts)

    def _replace(self, seat: _Seat, needs: Needs) -> None:
        """Put a new replica in the place of one that broke; give the place up where none comes to work there."""
        reason, task = seat.replica.reason, seat.task
        seat.task = seat.shape = None
        if task is not None:
            self._failed(task, reason)
        else:
            seat.failures += 1
        self._restarts += 1
        if seat.failures < MOST_STARTS:
            seat.replica = self._replica(needs)
            return
        self._seats.remove(seat)
        self._given_up.append(f"replica {seat.replica.number}, since {reason}")
        told = f"{MOST_STARTS} in a row ended before they made anything, at last {'; '.join(self._given_up)}"
        if not self._seats:
            raise RunError(f"no replica is left: {told}; give the same command to go on where this ended")
        self._observe(Note(f"{len(self._seats)} replicas go on alone: {told}"))


def _phrase(seat: _Seat) -> str:
    """What a replica is at."""
    report = seat.replica.report
    if seat.task is None:
        return f"replica {seat.replica.number}: {report.phase or seat.replica.state}"
    line = f"replica {seat.replica.number}: line {seat.task.line.number}, {report.phase}"
    return f"{line} {report.step}/{report.num_steps}, {report.reused} reused" if report.num_steps else line
