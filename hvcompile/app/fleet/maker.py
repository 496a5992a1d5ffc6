"""What makes a server's videos: a deployment of Ray Serve, each replica of which holds the ranks of one mesh."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

from hvcompile.app.fleet import alive
from hvcompile.app.fleet.alive import Presence
from hvcompile.app.fleet.cluster import Needs
from hvcompile.app.fleet.replica import Replica
from hvcompile.app.fleet.thread import BROKEN, BUSY, IDLE, Outcome
from hvcompile.app.request.ask import Ask
from hvcompile.app.request.clips import Clips
from hvcompile.app.request.serve import Size
from hvcompile.errors import RunError

PAUSE_SECONDS = 0.05
STOP_SECONDS = 60.0
"""How long a video that was stopped may take to do so, until its ranks are ended."""
WARM = "a red circle moves to the left over a blue background"
_NUMBERS = itertools.count(1)


class Maker:
    """Makes one video at a time. Where its ranks break, new ones take their place before the next.

    Args:
        base: what all videos share.
        ranks: how many share one.
        needs: of each of them.
        sizes: that are compiled before the first request is taken.

    """

    def __init__(self, base: Clips, ranks: int, needs: Needs, sizes: tuple[Size, ...]) -> None:
        self._base, self._ranks, self._needs, self._sizes = base, ranks, needs, sizes
        self._replica = self._begun()
        self._loaded = False

    def _begun(self) -> Replica:
        return Replica(next(_NUMBERS), self._base, self._ranks, self._needs, holds_all_sizes=True)

    async def warm(self) -> Presence:
        """Load and compile, if that is not done yet, and say who this is; raises RunError where it can't be."""
        await self._ready()
        return alive.own()

    async def make(self, ask: Ask, seconds: float, gate: Presence) -> AsyncIterator[dict[str, Any]]:
        """Make a video.

        Args:
            ask: for what.
            seconds: after which it is stopped.
            gate: who asks. Ray does not end what a process asked for that has died: the video is stopped here, so
                that it holds up nothing that the next gate asks for.

        Yields:
            How far it is, and last of all what has become of it: ``outcome``, the memory of each rank, and who this is.

        Raises:
            RunError: its ranks broke, or the gate is gone.

        """
        await self._ready()
        number, begin = next(_NUMBERS), time.monotonic()
        self._replica.begin(number, ask, seconds)
        orphaned = asyncio.create_task(alive.gone(gate))
        try:
            told = (-1, "")
            while (outcome := self._replica.advance()) is None:
                if orphaned.done():
                    orphaned.result()  # raises what went wrong with looking
                    raise RunError("the gate that asked for a video is gone")
                report = self._replica.report
                if self._replica.state == BROKEN:
                    raise RunError(self._replica.reason)
                if time.monotonic() - begin > seconds + STOP_SECONDS:
                    self._replica.fail("a video did not stop in time")
                if (report.step, report.phase) != told:
                    told = report.step, report.phase
                    yield {"step": report.step, "num_steps": report.num_steps}
                await asyncio.sleep(PAUSE_SECONDS)
            memory = [report.resident_bytes for report in self._replica.reports]
            yield {"outcome": outcome, "memory": memory, "maker": alive.own()}
        finally:
            orphaned.cancel()
            if self._replica.state == BUSY:
                self._replica.cancel()

    async def _ready(self) -> None:
        """Wait until the ranks are idle, new ones where they broke, and every size is compiled."""
        if self._replica.state == BROKEN:
            self._replica, self._loaded = self._begun(), False
        end = time.monotonic() + STOP_SECONDS
        while self._replica.state != IDLE:
            was_busy = self._replica.state == BUSY
            self._replica.advance()
            if self._replica.state == BROKEN:
                raise RunError(self._replica.reason)
            if was_busy and time.monotonic() > end:
                self._replica.fail("a video that was cancelled did not stop")
            await asyncio.sleep(PAUSE_SECONDS)
        if not self._loaded:
            for size in self._sizes:
                await self._warm(size)
            self._loaded = True

    async def _warm(self, size: Size) -> None:
        ask = Ask(prompt=WARM, steps=2, width=size.width, height=size.height, frames=size.frames)
        self._replica.begin(next(_NUMBERS), ask)
        outcome: Outcome | None = None
        while outcome is None:
            outcome = self._replica.advance()
            if self._replica.state == BROKEN:
                raise RunError(self._replica.reason)
            await asyncio.sleep(PAUSE_SECONDS)
        if outcome.made is None:
            self._replica.fail(outcome.reason)
            raise RunError(f"size {size}x{size.frames} can't be made: {outcome.reason}")

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._replica.kill()
