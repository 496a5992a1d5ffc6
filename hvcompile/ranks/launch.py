"""A run on several ranks as torchrun starts it: this rank's number, folder and device, and joining the others."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hvcompile.errors import InputError

if TYPE_CHECKING:
    import torch

TIMEOUT_SECONDS = 120.0
"""How long a rank waits for another before it ends in an error."""


def _is_joined() -> bool:
    """Whether there is a process group; nothing is imported to find out, since without torch there is none."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def num_ranks() -> int:
    """How many ranks run: those of the process group, else those that torchrun started, else 1."""
    if _is_joined():
        import torch.distributed as dist

        return dist.get_world_size()
    return _number("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def rank() -> int:
    """The rank of this process; 0 where it is alone."""
    if _is_joined():
        import torch.distributed as dist

        return dist.get_rank()
    return _number("RANK", 0) if num_ranks() > 1 else 0


def _number(variable: str, default: int) -> int:
    """A whole number that torchrun gives; raises InputError where something else stands there."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise InputError(f"the environment variable {variable} is {text!r}: torchrun sets it to a number, or unset it")
    return int(text)


def of_this_rank(directory: Path | None) -> Path | None:
    """The folder of this rank in a directory that several ranks share; the directory itself for a process alone."""
    return directory / f"rank_{rank()}" if directory is not None and num_ranks() > 1 else directory


def device_of_this_rank(device: str | None) -> str | None:
    """The device of this rank: a GPU of its own if there are several ranks and the user did not ask for the CPU.

    Args:
        device: that the user asked for; None for no choice.

    Returns:
        ``device`` itself, where the process is alone or computes on the CPU.

    Raises:
        InputError: the user asked for one numbered GPU, which several ranks can't share; or there are too few GPUs.

    """
    import torch

    if num_ranks() == 1 or device == "cpu" or not torch.cuda.is_available():
        return device
    if device is not None and torch.device(device).index is not None:
        raise InputError(f"device {device!r} can't be shared by {num_ranks()} ranks: give cuda, and each takes its own")
    index, count = _number("LOCAL_RANK", rank()), torch.cuda.device_count()
    if index >= count:
        raise InputError(f"rank {rank()} is number {index} on a machine of {count} GPUs: start as many ranks as GPUs")
    return f"cuda:{index}"


def own_device(device: torch.device) -> torch.device:
    """Check that this rank computes where it did before.

    Args:
        device: where it computed before.

    Returns:
        The device.

    Raises:
        InputError: it computes elsewhere now.

    """
    import torch

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


GRACE_SECONDS = 20.0
"""How long the other ranks leave it to rank 0 to report an error that all have."""


@contextlib.contextmanager
def joined(device: torch.device, timeout_seconds: float = TIMEOUT_SECONDS) -> Iterator[None]:
    """Initialise the process group that torchrun prepared, and destroy it at the end.

    Does nothing where a process is alone, or the group is initialised already.

    Args:
        device: where this rank computes: NCCL joins GPUs, gloo CPUs.
        timeout_seconds: after which a rank that waits for another gives up.

    Raises:
        InputError: not all ranks came in time.

    """
    if num_ranks() == 1 or _is_joined():
        yield
        return
    import torch
    import torch.distributed as dist

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
