"""A run on several ranks as torchrun starts it: joining the process group, and who speaks."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from hvcompile.errors import InputError

TIMEOUT_SECONDS = 120.0
"""How long a rank waits for another before it ends in an error."""


def num_ranks() -> int:
    """How many ranks torchrun started, or a script of its own initialised; 1 where none did."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """The rank of this process; 0 where it is alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if num_ranks() > 1 else 0


def of_this_rank(directory: Path | None) -> Path | None:
    """A directory of this rank's own inside one that several ranks are given."""
    return directory / f"rank_{rank()}" if directory is not None and num_ranks() > 1 else directory


def device_of_this_rank(device: str | None) -> str | None:
    """The GPU of this rank, where torchrun started several and the user did not ask for the CPU.

    Raises:
        InputError: one numbered GPU was asked for, which several ranks can't share.

    """
    if num_ranks() == 1 or device == "cpu" or not torch.cuda.is_available():
        return device
    if device is not None and torch.device(device).index is not None:
        raise InputError(f"device {device!r} can't be shared by {num_ranks()} ranks: give cuda, and each takes its own")
    place, count = int(os.environ.get("LOCAL_RANK", rank())), torch.cuda.device_count()
    if place >= count:
        raise InputError(f"rank {rank()} is number {place} on a machine of {count} GPUs: start as many ranks as GPUs")
    return f"cuda:{place}"


def own_device(device: torch.device) -> torch.device:
    """Where a rank computed before, which has to be where it computes now.

    Raises:
        InputError: it is not.

    """
    if num_ranks() == 1 or device.type == "cpu":
        return device
    now = torch.device(device_of_this_rank(device.type) or "cpu")
    if now != device:
        here = f"on {now}" if now.index is not None else "on a machine without GPUs"
        raise InputError(
            f"rank {rank()} was on {device} and is now {here}: start the ranks as they were started, each on a GPU "
            "of its own (LOCAL_RANK)"
        )
    return now


GRACE_SECONDS = 10.0
"""How long a rank leaves it to the first one to say what is wrong for all of them."""


@contextlib.contextmanager
def joined(device: torch.device, timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[None]:
    """Initialise the process group that torchrun prepared, and take it down at the end; nothing where it did not.

    Args:
        device: where this rank computes: NCCL joins GPUs, gloo CPUs.
        timeout_seconds: after which a rank that waits for another gives up.

    Raises:
        InputError: not all ranks came in time.

    """
    if num_ranks() == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=timeout_seconds)
        )
    except dist.DistError as error:
        raise InputError(
            f"rank {rank()} of {num_ranks()} waited {timeout_seconds:g} s for the others: start all of them, with the "
            "same MASTER_ADDR and MASTER_PORT"
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(RuntimeError):  # after an error the others may be gone
            dist.destroy_process_group()
