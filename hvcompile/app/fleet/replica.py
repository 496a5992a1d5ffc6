"""A replica: ranks on one machine that share one video at a time, each a Ray actor with a worker.

Whoever holds a replica calls ``advance`` again and again, which never waits. A replica that breaks stays so; another
takes its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hvcompile.app.fleet.cluster import Needs
from hvcompile.app.fleet.thread import BROKEN, BUSY, IDLE, LOADING, MADE, Outcome, Report, WorkerThread
from hvcompile.app.request.ask import Ask
from hvcompile.app.request.clips import Clips
from hvcompile.errors import one_line

log = logging.getLogger(__name__)

WAITING, CHECKING = "waiting", "checking"
"""It waits for room in the cluster; its pipeline looks at requests."""
SILENCE_SECONDS = 120.0
"""After which a rank that does not answer is taken for dead; importing and compiling may hold it up for a while."""
GRACE_SECONDS = 15.0
"""How long ranks may end a video, or load, apart from each other."""
TAKE_SECONDS = 0.05
"""For which a file is waited for at once; one that takes longer is there at one of the next looks."""


class Rank:
    """A worker in a process of its own, as an actor; every method answers at once."""

    def __init__(self) -> None:
        self._thread: WorkerThread | None = None

    def meet(self) -> tuple[str, int]:
        """Give an address and a free port of this machine, for the ranks to meet at."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), int(probe.getsockname()[1])

    def start(self, base: Clips, environment: dict[str, str], holds_all_sizes: bool) -> int:
        """Begin to load; returns the number of this process."""
        # Before torch is imported, which reads some of it.
        os.environ.update(environment)
        from hvcompile.app import store

        store.use_own()
        _be_quiet()
        self._thread = WorkerThread(base, holds_all_sizes=holds_all_sizes)
        return os.getpid()

    def begin(self, number: int, ask: Ask, seconds: float | None, contents: dict[str, bytes]) -> None:
        """As of the worker's thread."""
        self._worker.begin(number, ask, seconds, contents)

    def cancel(self, number: int) -> None:
        """As of the worker's thread."""
        self._worker.cancel(number)

    def report(self) -> Report:
        """As of the worker's thread."""
        return self._worker.report()

    def take(self) -> bytes:
        """As of the worker's thread."""
        return self._worker.take()

    def check(self, asks: list[Ask]) -> list[str | None]:
        """As of the worker's thread."""
        return self._worker.check(asks)

    @property
    def _worker(self) -> WorkerThread:
        if self._thread is None:
            raise RuntimeError("this rank was not started")
        return self._thread


def _be_quiet() -> None:
    from hvcompile.app import quiet

    with quiet.importing("diffusers", "transformers"):
        from hvcompile.app.fleet import worker  # noqa: F401
    quiet.hide_progress_bars()


def _hint(error: Exception) -> str:
    """What Ray does not say where its head can't ask who wants an actor: it ends the actor as nobody's."""
    if "all references to the actor were removed" not in str(error):
        return ""
    return ": RAY_AUTH_MODE here may differ from what it was where the cluster was started; set it alike"


class Replica:
    """The ranks of one mesh, from the wish for them until they are gone.

    Args:
        number: of the replica, unique in its fleet.
        base: what all videos share.
        ranks: how many.
        needs: of each of them.
        holds_all_sizes: as for ``Worker``.

    Attributes:
        state: ``WAITING``, ``CHECKING``, or as the worker's.
        reason: why it is broken.
        report: of the first rank, the latest.
        pids: of the ranks' processes, once they are known.
        wrong: what ``check`` has found, once that is known.

    """

    def __init__(self, number: int, base: Clips, ranks: int, needs: Needs, *, holds_all_sizes: bool = False) -> None:
        from ray.util.placement_group import placement_group

        self.number, self._base, self._ranks, self._needs = number, base, ranks, needs
        self._holds_all_sizes = holds_all_sizes
        self.state, self.reason = WAITING, ""
        self.report = Report(state=LOADING, phase="waiting for room")
        self.reports: list[Report] = []
        self.pids: list[int] = []
        self.wrong: list[str | None] | None = None
        self._group = placement_group([needs.bundle] * ranks, strategy="STRICT_PACK")
        self._actors: list[Any] = []
        self._awaited: list[Any] = [self._group.ready()]
        self._since = time.monotonic()
        self._uneven_since: float | None = None
        self._number: int | None = None
        self._next = self._begin_actors

    def advance(self) -> Outcome | None:
        """Look how it is; gives what became of the video that was begun, once, when that is known."""
        import ray

        if self.state == BROKEN:
            return None
        try:
            ready, rest = ray.wait(self._awaited, num_returns=len(self._awaited), timeout=0)
            if not rest:
                answers = ray.get(ready and self._awaited)
                self._since = time.monotonic()
                return self._next(answers)
            if ready:
                ray.get(ready)  # raises what ended a rank
            if self.state != WAITING and time.monotonic() - self._since > SILENCE_SECONDS:
                self.fail(f"a rank has not answered for {SILENCE_SECONDS:.0f} s")
        except ray.exceptions.RayTaskError as error:
            self.fail(f"a rank failed ({type(error.cause).__name__}: {one_line(error.cause)[:300]})")
        except ray.exceptions.RayError as error:
            self.fail(f"a rank died ({type(error).__name__}){_hint(error)}")
        return None

    def begin(
        self, number: int, ask: Ask, seconds: float | None = None, contents: Mapping[str, bytes] | None = None
    ) -> None:
        """Have it make a video; it must be idle. Of pictures, it is given the contents, whatever the machine has."""
        self._number, self.state, self._uneven_since = number, BUSY, None
        self.report = Report(state=BUSY, phase="starting")
        for actor in self._actors:
            actor.begin.remote(number, ask, seconds, dict(contents or {}))

    def cancel(self) -> None:
        """Stop the video that it makes, after the step it is at."""
        if self._number is not None:
            for actor in self._actors:
                actor.cancel.remote(self._number)

    def check(self, asks: Sequence[Ask]) -> None:
        """Have its pipeline look at some requests; it must be idle, and is again once ``wrong`` is known."""
        self.state = CHECKING
        self._await([self._actors[0].check.remote(list(asks))], self._checked)

    def kill(self) -> None:
        """End its processes at once, and give its room back."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor)
        with contextlib.suppress(Exception):
            remove_placement_group(self._group)

    # What follows is done one after the other, each when the answers to the one before are there.

    def _begin_actors(self, _: list[Any]) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.state = LOADING
        self.report = Report(state=LOADING, phase="starting")
        for index in range(self._ranks):
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
            options = {"num_cpus": self._needs.cpus, "num_gpus": self._needs.gpus, "scheduling_strategy": place}
            self._actors.append(ray.remote(Rank).options(max_restarts=0, **options).remote())
        self._await([self._actors[0].meet.remote()], self._begin_workers)

    def _begin_workers(self, answers: list[Any]) -> None:
        ((address, port),) = answers
        starts = []
        for rank, actor in enumerate(self._actors):
            variables = {"RANK": rank, "WORLD_SIZE": self._ranks, "MASTER_ADDR": address, "MASTER_PORT": port}
            # Ray shows a rank its own GPU alone, so that it is the first one there.
            environment = self._needs.environment | {"LOCAL_RANK": "0"}
            if self._ranks > 1:
                environment |= {name: str(value) for name, value in variables.items()}
            starts.append(actor.start.remote(self._base, environment, self._holds_all_sizes))
        self._await(starts, self._started)

    def _started(self, answers: list[Any]) -> None:
        self.pids = list(answers)
        self._poll()

    def _checked(self, answers: list[Any]) -> None:
        (self.wrong,), self.state = answers, IDLE
        self._poll()

    def _poll(self) -> None:
        self._await([actor.report.remote() for actor in self._actors], self._reported)

    def _reported(self, answers: list[Any]) -> Outcome | None:
        reports: list[Report] = answers
        self.report, self.reports = reports[0], reports
        broken = next((report for report in reports if report.state == BROKEN), None)
        if broken is not None:
            self.fail(broken.reason)
            return None
        outcome = None
        if self.state == LOADING and all(report.state == IDLE for report in reports):
            self.state = IDLE
        elif self.state == BUSY:
            outcome = self._ended(reports)
            if outcome is not None and outcome.made is not None:
                return self._take(outcome)
            if outcome is not None:
                self.state, self._number = IDLE, None
        if self.state != BROKEN:
            self._poll()
        return outcome

    def _ended(self, reports: list[Report]) -> Outcome | None:
        """What became of the video, once all ranks are through with it and agree."""
        ends = [report.outcome for report in reports if report.outcome and report.outcome.number == self._number]
        if ends and len(ends) < len(reports):
            self._uneven_since = self._uneven_since or time.monotonic()
            if time.monotonic() - self._uneven_since > GRACE_SECONDS:
                self.fail(f"its ranks ended apart: {ends[0].reason or ends[0].kind}")
        if len(ends) < len(reports):
            return None
        # What the first rank alone does, writing the file, may fail there alone.
        odd = next((end for end in ends[1:] if end.kind not in (ends[0].kind, MADE)), None)
        if odd is not None:
            self.fail(f"its ranks disagree: {odd.reason}")
            return None
        return ends[0]

    def _take(self, outcome: Outcome) -> Outcome | None:
        """Have the first rank send the file."""
        import ray

        self._await([self._actors[0].take.remote()], functools.partial(self._taken, outcome))
        ray.wait(self._awaited, timeout=TAKE_SECONDS)
        return self.advance()

    def _taken(self, outcome: Outcome, answers: list[Any]) -> Outcome:
        self.state, self._number = IDLE, None
        self._poll()
        made = None if outcome.made is None else dataclasses.replace(outcome.made, content=answers[0])
        return dataclasses.replace(outcome, made=made)

    def _await(self, references: list[Any], then: Any) -> None:
        self._awaited, self._next, self._since = references, then, time.monotonic()

    def fail(self, reason: str) -> None:
        """End it for good, for this reason."""
        log.debug("replica %d: %s", self.number, reason)
        self.state, self.reason = BROKEN, reason
        self.report = Report(state=BROKEN, reason=reason)
        self.kill()
