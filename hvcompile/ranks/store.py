"""What ranks tell each other through the key-value store where they met.

That takes no collective, which may have failed, and no device. Ranks go in turns: each leaves an item in the store and
waits until all have left theirs.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from hvcompile.errors import InputError
from hvcompile.ranks import launch
from hvcompile.torch_private import distributed


def take_turn(process_group: dist.ProcessGroup, name: str, item: Any, seconds: float) -> list[Any]:
    """Tell the other ranks something, and wait for what they tell in the same turn.

    Args:
        process_group: the ranks.
        name: of the series of turns; all ranks take the same ones.
        item: anything that JSON has.
        seconds: how long to wait.

    Returns:
        Each rank's item, by its rank in the group.

    Raises:
        RuntimeError: a rank did not come in time, or the store is gone. Not every store raises a ``DistError`` then.

    """
    store, rank = distributed.store_of(process_group), process_group.rank()
    turn, keys = _leave(process_group, name, item)
    store.wait(keys, datetime.timedelta(seconds=seconds))
    items = [json.loads(text) for text in store.multi_get(keys)]
    if turn > 1:  # all have come here, so none reads the turn before any more
        store.delete_key(f"{name}/{turn - 1}/{rank}")
    return items


def turns_taken(process_group: dist.ProcessGroup, name: str) -> Sequence[int]:
    """How often each rank of the group has come.

    Raises:
        RuntimeError: the store is gone.

    """
    store = distributed.store_of(process_group)
    return [store.add(_counter(name, rank), 0) for rank in range(process_group.size())]


def _leave(process_group: dist.ProcessGroup, name: str, item: Any) -> tuple[int, list[str]]:
    """Leave this rank's item of its next turn; returns the turn's number, from 1, and the keys of all ranks' items."""
    store, rank = distributed.store_of(process_group), process_group.rank()
    turn = store.add(_counter(name, rank), 1)
    keys = [f"{name}/{turn}/{other}" for other in range(process_group.size())]
    store.set(keys[rank], json.dumps(item))
    return turn, keys


def _counter(name: str, rank: int) -> str:
    return f"{name}/turn/{rank}"


class Exchange:
    """Turns of all ranks of the default process group, told in the order in which the ranks came.

    All ranks take the same turns. A process alone hears itself. A rank waits for the others as long as its own turn
    took, and twice the timeout beyond: another may be stuck in a collective that ends only by that timeout.

    Args:
        timeout_seconds: of the process group.

    """

    NAME = "hvcompile/exchange"

    def __init__(self, timeout_seconds: float = launch.TIMEOUT_SECONDS) -> None:
        self.size, self.rank = launch.num_ranks(), launch.rank()
        self._timeout_seconds = timeout_seconds
        self._began = time.monotonic()

    def __call__(self, item: Any) -> list[tuple[int, Any]]:
        """Take a turn.

        Args:
            item: anything that JSON has.

        Returns:
            Each rank with its item, in the order in which the ranks came; the same list on all ranks.

        Raises:
            InputError: a rank did not come in time.

        """
        if self.size == 1:
            return [(0, item)]
        assert dist.group.WORLD is not None
        seconds = 2 * self._timeout_seconds + time.monotonic() - self._began
        try:
            # A count over all turns orders them: no rank comes to the next turn before all have come to this one.
            place = distributed.store_of(dist.group.WORLD).add(f"{self.NAME}/place", 1)
            turn = take_turn(dist.group.WORLD, self.NAME, [place, self.rank, item], seconds)
        except RuntimeError as error:
            raise InputError(
                f"rank {self.rank} of {self.size} waited {seconds:.0f} s for another, which has ended or hangs: look "
                "at the output of the others"
            ) from error
        self._began = time.monotonic()
        return [(rank, theirs) for _, rank, theirs in sorted(turn, key=lambda entry: entry[0])]

    def finish(self) -> None:
        """Wait for all ranks to be done; rank 0 leaves last, since the store may be in its process.

        Raises:
            InputError: a rank did not come in time.

        """
        self("done")
        if self.size == 1:
            return
        assert dist.group.WORLD is not None
        _, keys = _leave(dist.group.WORLD, f"{self.NAME}/left", None)
        if self.rank == 0:
            with contextlib.suppress(dist.DistError):  # a rank that has ended has left
                distributed.store_of(dist.group.WORLD).wait(keys, datetime.timedelta(seconds=self._timeout_seconds))
