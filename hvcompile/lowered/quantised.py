"""What the quantisation of float8 products is fused into, and what is not, in one step of the compiled code."""

from __future__ import annotations

import collections
from collections.abc import Mapping

import torch

from hvcompile.float8.format import DTYPE
from hvcompile.lowered.flows import Buffer
from hvcompile.lowered.walk import TRITON, Walk

_LARGE = 16
"""How many times as large a buffer is than its scales, at least."""


def quantisations(step: Walk) -> Mapping[tuple[str, str], tuple[str, ...]]:
    """The Triton kernels that write float8, and the other kernels that quantisation takes.

    Returns:
        By the function of the code that it stands in and the kernel's name, the names of the Triton kernels that could
        have been one with it: they write what quantisation alone reads, or the scales. None where quantisation is
        fused: what it reads comes from the library, or is read by others too. With one scale a tensor there is always
        one, for the scale is known at the end alone.

    """
    written, read = _by_event(step)
    result: dict[tuple[str, str], dict[str, None]] = {}
    for buffer in step.buffers:
        writer = step.events[buffer.writer]
        if buffer.dtype != DTYPE or writer.kind != TRITON:
            continue
        apart = [
            item
            for item in read[buffer.writer]
            if item.dtype != DTYPE
            and item.numel * _LARGE > buffer.numel
            and all(_only_quantises(written[reader], item.numel) for reader in item.readers)
        ]
        products = (place for place in buffer.readers if step.events[place].name.startswith("aten._scaled_mm."))
        apart += [item for place in products for item in read[place] if item.dtype == torch.float32]
        names = result.setdefault((writer.where[-1] if writer.where else "", writer.name), {})
        for item in apart:
            if item.writer != buffer.writer and step.events[item.writer].kind == TRITON:
                names[step.events[item.writer].name] = None
    return {kernel: tuple(names) for kernel, names in result.items()}


def _by_event(step: Walk) -> tuple[Mapping[int, list[Buffer]], Mapping[int, list[Buffer]]]:
    """What each event writes, and what it reads of what others wrote."""
    written: dict[int, list[Buffer]] = collections.defaultdict(list)
    read: dict[int, list[Buffer]] = collections.defaultdict(list)
    for buffer in step.buffers:
        written[buffer.writer].append(buffer)
        for reader in buffer.readers:
            read[reader].append(buffer)
    return written, read


def _only_quantises(written: list[Buffer], numel: int) -> bool:
    """Whether an event that reads so many elements writes nothing but float8 and scales."""
    return all(item.dtype == DTYPE or item.numel * _LARGE <= numel for item in written)
