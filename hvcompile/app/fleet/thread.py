"""A worker in a thread of its own, which does all of its work: what hands it work only asks how it is."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hvcompile.app.fleet import pictures
from hvcompile.app.fleet.made import Made
from hvcompile.app.request.ask import Ask
from hvcompile.app.request.clips import Clips
from hvcompile.errors import DisagreementError, HvcompileError, InputError, OptionError, one_line, ours_below

if TYPE_CHECKING:
    from hvcompile.app.pipelines import Loaded

log = logging.getLogger(__name__)

LOADING, IDLE, BUSY, BROKEN = "loading", "idle", "busy", "broken"
"""What a worker is at. One that is broken makes no more videos."""
MADE, FAILED, STOPPED = "made", "failed", "stopped"
"""What became of a video."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a video: the video, or why there is none, in one line."""

    number: int
    kind: str
    made: Made | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a worker is.

    Attributes:
        state: one of ``LOADING``, ``IDLE``, ``BUSY``, ``BROKEN``.
        phase: in words, what it is at.
        step: of the video that it makes, how many steps are done.
        num_steps: of how many.
        reused: how many of them were.
        outcome: of the latest video that has ended; its content is had from ``take``.
        reason: why it is broken.
        resident_bytes: memory that the process holds on the host.

    """

    state: str
    phase: str = ""
    step: int = 0
    num_steps: int = 0
    reused: int = 0
    outcome: Outcome | None = None
    reason: str = ""
    resident_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class _Task:
    number: int
    ask: Ask
    deadline: float | None
    contents: Mapping[str, bytes]


class WorkerThread:
    """Starts a worker in a thread, and answers at once whatever it is doing.

    Args:
        base: of the worker.
        loaded: a pipeline to use in place of ``base.model``.
        holds_all_sizes: as for ``Worker``.

    """

    def __init__(self, base: Clips, loaded: Loaded | None = None, *, holds_all_sizes: bool = False) -> None:
        self._base, self._loaded, self._holds_all_sizes = base, loaded, holds_all_sizes
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._report = Report(state=LOADING)
        self._content = b""
        self._cancelled: set[int] = set()
        self._worker: Any = None
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()

    def begin(
        self, number: int, ask: Ask, seconds: float | None = None, contents: Mapping[str, bytes] | None = None
    ) -> None:
        """Have it make a video; returns at once.

        Args:
            number: that tells it from other videos.
            ask: for what.
            seconds: after which it is stopped; None for no limit.
            contents: of pictures, by name, where the files that ``ask`` names may be another machine's.

        """
        deadline = None if seconds is None else time.monotonic() + seconds
        self._tasks.put(_Task(number=number, ask=ask, deadline=deadline, contents=contents or {}))

    def cancel(self, number: int) -> None:
        """Stop a video after the step it is at; one that has not begun is not begun."""
        self._cancelled.add(number)

    def report(self) -> Report:
        """Tell how it is."""
        report = self._report
        return dataclasses.replace(report, resident_bytes=_resident_bytes())

    def take(self) -> bytes:
        """Give the file of the latest video, and let go of it."""
        content, self._content = self._content, b""
        return content

    def check(self, asks: list[Ask]) -> list[str | None]:
        """What is wrong with each of some requests for this pipeline; it must be idle. No picture is looked at."""
        reasons: list[str | None] = []
        for ask in asks:
            try:
                with pictures.unpacked(ask, pictures.stand_ins(ask)) as here:
                    self._worker.check(here)
                reasons.append(None)
            except (InputError, OptionError) as error:
                reasons.append(one_line(error))
        return reasons

    def close(self, seconds: float = 30.0) -> None:
        """End the thread once it is idle, and wait for that."""
        self._tasks.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        try:
            from hvcompile.app.fleet.worker import at_work

            with at_work(self._base, self._told, self._loaded, holds_all_sizes=self._holds_all_sizes) as self._worker:
                self._report = Report(state=IDLE)
                while (task := self._tasks.get()) is not None:
                    outcome = self._outcome(task)
                    is_broken = outcome.kind == BROKEN
                    self._report = Report(
                        state=BROKEN if is_broken else IDLE, outcome=outcome, reason=outcome.reason if is_broken else ""
                    )
                    if is_broken:
                        return
        except BaseException as error:  # whatever it is, the one who asks must hear of it
            log.debug("a worker ended", exc_info=error)
            self._report = Report(state=BROKEN, reason=_reason(error), outcome=self._report.outcome)

    def _outcome(self, task: _Task) -> Outcome:
        """Make a video; what is the video's own fault leaves the worker whole."""
        from hvcompile.app.fleet.worker import CANCELLED, LATE, StoppedError

        def should_stop() -> str | None:
            if task.number in self._cancelled:
                return CANCELLED
            return LATE if task.deadline is not None and time.monotonic() > task.deadline else None

        self._report = Report(state=BUSY, phase="starting")
        try:
            with pictures.unpacked(task.ask, task.contents) as ask:
                made = self._worker.make(ask, self._told, should_stop)
        except Exception as error:
            log.debug("a video failed", exc_info=error)
            fault = ours_below(error)
            if isinstance(fault, StoppedError):
                return Outcome(number=task.number, kind=STOPPED, reason=fault.reason)
            # An error of ours tells of the request, and all ranks have it alike. Of any other, nobody knows.
            is_its_own = isinstance(fault, HvcompileError) and not isinstance(fault, DisagreementError)
            return Outcome(number=task.number, kind=FAILED if is_its_own else BROKEN, reason=_reason(error))
        finally:
            self._cancelled.discard(task.number)
        self._content = made.content
        return Outcome(number=task.number, kind=MADE, made=dataclasses.replace(made, content=b""))

    def _told(self, event: Any) -> None:
        """A phase in words, or a step."""
        before = self._report
        if isinstance(event, str):
            self._report = dataclasses.replace(before, phase=event)
            return
        self._report = Report(
            state=BUSY,
            phase="denoising",
            step=event.index + 1,
            num_steps=event.num_steps,
            reused=(before.reused if event.index else 0) + event.reused,
        )


def _reason(error: BaseException) -> str:
    fault = ours_below(error)
    return one_line(fault) if fault is not None else f"{type(error).__name__}: {one_line(error)[:300]}"


def _resident_bytes() -> int:
    """Memory that this process holds now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0
