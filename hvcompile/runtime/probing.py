"""What compiled graphs keep from one call to the next, shown to whoever measures them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping

import torch

Probe = Callable[[int, int, Mapping[str, torch.Tensor]], None]
"""Told after a call: the compiled graph's number, that of the slot, and the slot's tensors by the state's name."""


class _Probes(threading.local):
    probe: Probe | None = None


_PROBES = _Probes()


@contextlib.contextmanager
def probing(probe: Probe) -> Iterator[None]:
    """Within, each call of a compiled graph in this thread that keeps state shows it to ``probe``.

    The tensors are the state itself: read them before the next call, and write nothing into them.
    """
    before, _PROBES.probe = _PROBES.probe, probe
    try:
        yield
    finally:
        _PROBES.probe = before


def current() -> Probe | None:
    """The probe of this thread, if there is one."""
    return _PROBES.probe
