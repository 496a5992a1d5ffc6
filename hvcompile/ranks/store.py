"""What ranks tell each other through the store where they met: no collective, which may have failed, and no device."""

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


def take_turn(process_group: dist.ProcessGroup, name: str, held: Any, seconds: float) -> list[Any]:
    """Tell the other ranks something, and wait for what they have to tell in the same turn.

    Args:
        process_group: the ranks.
        name: of the series of turns; all ranks take the same ones.
        held: anything that JSON has.
        seconds: how long to wait.

    Returns:
        What each rank gives, by its rank in the group.

    Raises:
        RuntimeError: a rank did not come in time, or the store is gone. Not every store raises a ``DistError`` then.

    """
    store, rank = distributed.store_of(process_group), process_group.rank()
    turn = store.add(_counter(name, rank), 1)
    keys = [f"{name}/{turn}/{other}" for other in range(process_group.size())]
    store.set(keys[rank], json.dumps(held))
    store.wait(keys, datetime.timedelta(seconds=seconds))
    told = [json.loads(item) for item in store.multi_get(keys)]
    if turn > 1:  # all have come here, so none reads the turn before any more
        store.delete_key(f"{name}/{turn - 1}/{rank}")
    return told


def turns_taken(process_group: dist.ProcessGroup, name: str) -> Sequence[int]:
    """How often each rank of the group has come.

    Raises:
        RuntimeError: the store is gone.

    """
    store = distributed.store_of(process_group)
    return [store.add(_counter(name, rank), 0) for rank in range(process_group.size())]


def _counter(name: str, rank: int) -> str:
    return f"{name}/turn/{rank}"


class Exchange:
    """Tells all ranks of the default process group what each has to say, turn by turn; alone, a process hears itself.

    All ranks take the same turns. One waits for the others as long as its own turn took, and twice the timeout beyond:
    another may be held up by a collective that only ends by that timeout.

    Args:
        timeout_seconds: of the process group.

    """

    def __init__(self, timeout_seconds: float = launch.TIMEOUT_SECONDS) -> None:
        self.size, self.rank = launch.num_ranks(), launch.rank()
        self._timeout_seconds = timeout_seconds
        self._began = time.monotonic()

    def __call__(self, held: Any) -> list[tuple[int, Any]]:
        """What each rank gives, as JSON has it, with its rank, in the order in which they came; the same on all.

        Raises:
            InputError: a rank did not come in time.

        """
        if self.size == 1:
            return [(0, held)]
        assert dist.group.WORLD is not None
        store, name = distributed.store_of(dist.group.WORLD), "hvcompile/exchange"
        patience = 2 * self._timeout_seconds + time.monotonic() - self._began
        try:
            # Nobody comes to the next turn before all have come to this one.
            place = store.add(f"{name}/place", 1)
            told = take_turn(dist.group.WORLD, name, [place, self.rank, held], patience)
        except RuntimeError as error:
            raise InputError(
                f"rank {self.rank} of {self.size} waited {patience:.0f} s for another, which has ended or hangs: look "
                "at the output of the others"
            ) from error
        said = sorted(told, key=lambda item: item[0])
        self._began = time.monotonic()
        return [(rank, item) for _, rank, item in said]

    def finish(self) -> None:
        """Wait for all ranks to be done; the first leaves last, since the store may be in its process.

        Raises:
            InputError: a rank did not come in time.

        """
        self("done")
        if self.size == 1:
            return
        assert dist.group.WORLD is not None
        store, key = distributed.store_of(dist.group.WORLD), "hvcompile/exchange/left"
        turn = store.add(f"{key}/turn/{self.rank}", 1)
        if self.rank > 0:
            store.set(f"{key}/{turn}/{self.rank}", "")
            return
        with contextlib.suppress(dist.DistError):  # who has ended has left
            others = [f"{key}/{turn}/{rank}" for rank in range(1, self.size)]
            store.wait(others, datetime.timedelta(seconds=self._timeout_seconds))
