"""Ranks that take turns in telling each other something, through the store where they met: no collective, no device."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from hvcompile import inductor


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
    store, rank = inductor.store_of(process_group), process_group.rank()
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
    store = inductor.store_of(process_group)
    return [store.add(_counter(name, rank), 0) for rank in range(process_group.size())]


def _counter(name: str, rank: int) -> str:
    return f"{name}/turn/{rank}"
