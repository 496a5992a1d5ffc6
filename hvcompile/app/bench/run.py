"""``hvcompile bench``: contenders on the same model, inputs, threshold and schedule, each in a process, in turn.

Each contender is a process of its own with an empty compile cache, and only one computes at a time. First each
compiles: it generates until a run captures no graph. Then come the rounds: in each, every contender generates once, in
an order that moves on by one from round to round, so that what slows the machine down slows all; ratios are taken
within a round.
"""

from __future__ import annotations

import dataclasses
import datetime
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hvcompile.app import metrics
from hvcompile.app.bench import conditions
from hvcompile.app.bench.contenders import EAGER
from hvcompile.app.bench.process import Protocol, Shape
from hvcompile.app.bench.results import Result, Row, scaled
from hvcompile.app.bench.seat import FailedError, Seat
from hvcompile.app.request.bench import Request

MOST_WARM_RUNS = 4

Observer = Callable[[str], None]


def bench(request: Request, observe: Observer = lambda text: None) -> Result:
    """Measure all contenders; a peer that is missing or fails is a row that says so.

    Args:
        request: what to measure.
        observe: told in a few words what goes on.

    Returns:
        All rows; after a KeyboardInterrupt, what had been measured by then, and ``conditions["interrupted"]``.

    Raises:
        InputError: the request can't be met.

    """
    request.check()
    protocol = request.protocol()
    start, load, interrupted = time.perf_counter(), conditions.load(), False
    with tempfile.TemporaryDirectory(prefix="hvcompile-bench-", ignore_cleanup_errors=True) as folder:
        contest = _Contest(request, protocol, Path(folder), observe)
        try:
            contest.measure()
        except KeyboardInterrupt:
            # Hours may lie behind it: what is measured is given back, and a second interrupt ends it all.
            interrupted = True
        finally:
            contest.stop()
        contest.close(interrupted)
    machine = conditions.machine(protocol)
    return Result(
        conditions={
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": conditions.versions(),
            "machine": {**machine, "load_average": {"before": load, "after": conditions.load()}},
            "seconds_in_all": time.perf_counter() - start,
            "interrupted": interrupted,
            "protocol": conditions.record(request, protocol, contest.restart),
        },
        rows=tuple(contest.rows.values()),
    )


def _fail(row: Row, reason: str) -> None:
    row.error = reason


def _fail_cases(row: Row, reason: str) -> None:
    row.cases_error = reason  # what the first shape gave stands


class _Contest:
    """The contenders' seats and rows, and whose turn it is.

    ``restart`` says whether a process ends after its turn, ``shapes`` whether other shapes follow.
    """

    def __init__(self, request: Request, protocol: Protocol, folder: Path, observe: Observer) -> None:
        self._request, self._protocol, self._observe = request, protocol, observe
        self.restart = request.full if request.restart is None else request.restart
        self._shapes = not request.full if request.shapes is None else request.shapes
        systems = request.systems()
        self.rows = {system: Row(system=system) for system in systems}
        self._seats = {system: Seat(system, protocol, folder, request.timeout_s) for system in systems}
        self._latents = {system: folder / f"latents_{place}.npy" for place, system in enumerate(systems)}

    def measure(self) -> None:
        """Have all take their turns: compiling, the rounds, and what else is seen of each."""
        systems = list(self.rows)
        for system in systems:
            self._turn(system, "compiling", _compile_and_observe if self.restart else _compile)
        for number in range(self._request.repeats):
            shift = number % len(systems)
            for system in systems[shift:] + systems[:shift]:
                self._round(system, number)
        for system in systems if not self.restart else ():  # a profiler takes memory, so not before the rounds
            self._turn(system, "steps", _observe)
        cases = other_shapes(self._protocol.shape)
        for system in systems if self._shapes else ():
            self._turn(system, "other shapes and prompts", lambda seat, row: _recompile(seat, row, cases), _fail_cases)

    def stop(self) -> None:
        """End all processes."""
        for seat in self._seats.values():
            seat.stop()

    def close(self, interrupted: bool) -> None:
        """Say whom an interrupt kept from the rounds, and measure each contender's latents against eager's."""
        for row in self.rows.values() if interrupted else ():
            if not row.error and not row.rounds:
                row.error, row.is_interrupted = "interrupted before its first round", True
        _compare(self.rows, self._latents)

    def _round(self, system: str, number: int) -> None:
        doing = f"round {number + 1} of {self._request.repeats}"
        self._turn(system, doing, lambda seat, row: _round(seat, row, number, self._latents[system]))

    def _turn(
        self, system: str, doing: str, work: Callable[[Seat, Row], None], fail: Callable[[Row, str], None] = _fail
    ) -> None:
        row, seat = self.rows[system], self._seats[system]
        if row.error:
            return
        self._observe(f"{system}: {doing}")
        try:
            if self.restart and row.how:  # the first turn warms up anyway
                seat.ask("run")
            work(seat, row)
        except FailedError as error:
            fail(row, str(error))
        if self.restart:
            seat.stop()


def other_shapes(shape: Shape) -> list[tuple[str, Shape]]:
    """Shapes and prompts that follow the first in one process, each with its name."""
    more = dataclasses.replace
    larger = more(shape, num_frames=shape.num_frames + 4, height=shape.height + 16, width=shape.width + 32)
    return [
        ("shorter prompt, same padding", more(shape, prompt_tokens=shape.prompt_tokens - 2)),
        ("longer and larger clip", larger),
        (
            "another length and size",
            more(shape, num_frames=shape.num_frames + 8, height=shape.height + 48, width=shape.width + 16),
        ),
        ("longer text", more(shape, text_tokens=shape.text_tokens + 6, prompt_tokens=shape.prompt_tokens + 5)),
    ]


def _compile(seat: Seat, row: Row) -> None:
    """Generate until a run captures no graph."""
    row.how = seat.ask("about")["how"]
    row.graphs = 0
    for _ in range(MOST_WARM_RUNS):
        answer = seat.ask("run")
        if not answer["graphs"]:
            break
        row.warm_seconds.append(sum(answer["step_seconds"]))
        row.graphs += answer["graphs"]
        row.compiling_bytes = _larger(row.compiling_bytes, answer["peak_bytes"])


def _compile_and_observe(seat: Seat, row: Row) -> None:
    _compile(seat, row)
    _observe(seat, row)


def _observe(seat: Seat, row: Row) -> None:
    """Look at what each step does."""
    seen = seat.ask("observe")
    row.steps, row.regions = seen["steps"], seen["regions"]


def _round(seat: Seat, row: Row, number: int, latents: Path) -> None:
    answer = _steady(seat, latents)
    if not answer["finite"]:
        raise FailedError("its latents are not all finite: give another dtype")
    row.rounds[number], row.cpu_rounds[number] = answer["step_seconds"], answer["step_cpu_seconds"]
    row.digests.append(answer["digest"])
    row.running_bytes = _larger(row.running_bytes, answer["peak_bytes"])


def _steady(seat: Seat, latents: Path | None = None) -> dict[str, Any]:
    """Generate until a run captures no graph; gives the answer to the last."""
    for _ in range(MOST_WARM_RUNS):
        answer: dict[str, Any] = seat.ask("run", latents)
        if not answer["graphs"]:
            return answer
    raise FailedError(f"it captured graphs in each of {MOST_WARM_RUNS} runs alike: there is no steady run")


def _recompile(seat: Seat, row: Row, cases: Sequence[tuple[str, Shape]]) -> None:
    _steady(seat)
    row.cases = seat.ask("recompile", cases)


def _larger(one: int | None, other: int | None) -> int | None:
    return max((value for value in (one, other) if value is not None), default=None)


def _compare(rows: dict[str, Row], latents: dict[str, Path]) -> None:
    """Measure each contender's latents against eager's."""
    if rows[EAGER].error:
        return
    reference = np.load(latents[EAGER])
    for system, row in rows.items():
        if system != EAGER and not row.error:
            row.quality = metrics.compare(*scaled(np.load(latents[system]), reference))
