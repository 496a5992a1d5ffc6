"""State that a step leaves as it is: it gives an unwritten tensor back in its place, and the runtime keeps its own.

A branch must give back what the other one does, and may not give back what it was given. So the branch that reuses
would have to copy all that is cached, in every step. Instead it says that it leaves it, by an operator that only
allocates. What that gives back is never read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import torch


@dataclasses.dataclass
class Left:
    """What the graph that runs has left: how many tensors; a branch leaves all that it can, or none."""

    count: int = 0


class _Step(threading.local):
    left: Left | None = None


_STEP = _Step()


@torch.library.custom_op("hvcompile::leave", mutates_args=())
def _leave(state: torch.Tensor) -> torch.Tensor:
    if _STEP.left is not None:
        _STEP.left.count += 1
    return torch.empty_like(state, memory_format=torch.contiguous_format)


@_leave.register_fake
def _(state: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(state, memory_format=torch.contiguous_format)


LEAVE = torch.ops.hvcompile.leave.default
"""Says, in a compiled graph, that this step leaves a state as it is; gives a contiguous, unwritten tensor like it."""


@contextlib.contextmanager
def watching() -> Iterator[Left]:
    """Gives what the graph that runs inside, in this thread, says it leaves."""
    before, _STEP.left = _STEP.left, Left()
    try:
        yield _STEP.left
    finally:
        _STEP.left = before
