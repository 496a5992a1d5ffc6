"""The door to private ``torch.distributed``: groups by name, their stores, collectives that are not waited for at once.

All names were checked on torch 2.11.0 and 2.13.0.

- ``distributed_c10d._resolve_process_group`` and ``_get_process_group_store``: from a group's name to the group, and to
  the store through which its ranks met. Functional collectives do the first themselves; nothing public does either.
- ``torch.ops._c10d_functional.all_to_all_single``, ``broadcast`` and ``wait_tensor``: what functional collectives trace
  into. The functions around them wait at once while a graph is traced, so that nothing could be computed in the
  meantime.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_Function = TypeVar("_Function", bound=Callable[..., Any])


def left_running(function: _Function) -> _Function:
    """Mark graph code that starts a transfer and does not wait for it, so that something can be computed meanwhile."""
    function.is_left_running = True  # type: ignore[attr-defined]
    return function


def is_left_running(target: Any) -> bool:
    """Whether a node with this target starts a transfer and does not wait for it."""
    return bool(getattr(target, "is_left_running", False))


def is_exchange(target: Any) -> bool:
    """Whether a node with this target is a collective: one of ours, or one of torch's."""
    return str(getattr(target, "__module__", "")).endswith(".collectives") or "c10d" in str(target)


def process_group(name: str) -> dist.ProcessGroup:
    """The process group of this process that goes by a name."""
    # Private: nothing public goes from a name to a group (2.11.0, 2.13.0).
    resolve: Any = dist.distributed_c10d._resolve_process_group  # type: ignore[attr-defined]
    return resolve(name)  # type: ignore[no-any-return]


def store_of(group: dist.ProcessGroup) -> Any:
    """The key-value store through which a group's ranks met."""
    # Private: nothing public gives a group's own store (2.11.0, 2.13.0).
    return dist.distributed_c10d._get_process_group_store(group)


def all_to_all(
    tensor: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int], group: str
) -> torch.Tensor:
    """Send so many rows to each rank and take so many from each; still on its way when it returns (see ``wait``).

    Args:
        tensor: contiguous; its rows lie in the order of the ranks that they go to.
        output_splits: rows from each rank.
        input_splits: rows for each rank.
        group: name of the process group.

    """
    # Private: the public functional collective waits at once while a graph is traced (2.11.0, 2.13.0).
    return torch.ops._c10d_functional.all_to_all_single(tensor, list(output_splits), list(input_splits), group)  # type: ignore[no-any-return]


def broadcast(tensor: torch.Tensor, group: str) -> torch.Tensor:
    """The first rank's tensor; still on its way when it returns (see ``wait``).

    Args:
        tensor: contiguous, of the same shape and dtype on all ranks.
        group: name of the process group.

    """
    # Private: as in ``all_to_all``.
    return torch.ops._c10d_functional.broadcast(tensor, 0, group)  # type: ignore[no-any-return]


def wait(moving: torch.Tensor) -> torch.Tensor:
    """What ``all_to_all`` or ``broadcast`` gave, once it is there."""
    # Private: the other half of those two.
    return torch.ops._c10d_functional.wait_tensor(moving)  # type: ignore[no-any-return]


def has_absent_ranks() -> bool:
    """Whether this process is within ``absent_ranks``."""
    return dist.is_initialized() and dist.get_backend() == "fake"


@contextlib.contextmanager
def absent_ranks(count: int, rank: int) -> Iterator[None]:
    """Within, this process is one of ``count`` ranks of a process group whose other ranks are not there.

    Collectives return at once, and what they return means nothing. With one rank there is no group. Within another of
    its kind, that one's group stays.

    Raises:
        RuntimeError: this process has a process group of ranks that are there.

    """
    if count == 1 or has_absent_ranks():
        yield
        return
    # Private: nothing public makes a group without its ranks; torch's own tests do by this (2.11.0, 2.13.0).
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
