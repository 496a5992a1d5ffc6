"""Who writes what others read, in one step of the compiled code."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

import torch

from hvcompile.torch_private.storages import storage_id


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """What one event wrote, until it was written again.

    Attributes:
        writer: the place of that event among a step's.
        readers: the places of those that read it.
        dtype: of its elements.
        numel: how many elements it has.

    """

    writer: int
    readers: tuple[int, ...]
    dtype: torch.dtype
    numel: int


def kernel_operands(source: str, args: Sequence[object]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The tensors that a Triton kernel reads, and those that it writes, by the names that Inductor gives arguments.

    Where the names are others, as in kernels that a library brought, each tensor counts as both.
    """
    found = re.search(r"def triton_\w*\(([^)]*)\)", source)
    names = [name.strip() for name in found[1].split(",")] if found else []
    names += [""] * (len(args) - len(names))
    tensors = [(name, item) for name, item in zip(names, args, strict=False) if isinstance(item, torch.Tensor)]
    read = [item for name, item in tensors if not name.startswith("out_ptr")]
    return read, [item for name, item in tensors if not name.startswith("in_ptr")]


class Flows:
    """Keeps, as events come, what each one wrote and who read it.

    A part of a storage is a buffer of its own: what is joined is written in parts. A reader of a storage counts as one
    of all its parts.
    """

    def __init__(self) -> None:
        self._all: list[tuple[int, torch.dtype, int, list[int]]] = []
        self._latest: dict[int, list[tuple[int, int, int]]] = {}

    def new(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take the tensors' memory as not written yet."""
        for tensor in tensors:
            self._latest.pop(storage_id(tensor), None)

    def event(self, place: int, read: Sequence[torch.Tensor], written: Sequence[torch.Tensor]) -> None:
        """Take note of an event that reads and then writes."""
        for storage in dict.fromkeys(map(storage_id, read)):
            for *_, buffer in self._latest.get(storage, ()):
                self._all[buffer][-1].append(place)
        for tensor in written:
            begin, end = _span(tensor)
            parts = self._latest.setdefault(storage_id(tensor), [])
            parts[:] = [part for part in parts if not (begin <= part[0] and part[1] <= end)]
            parts.append((begin, end, len(self._all)))
            self._all.append((place, tensor.dtype, tensor.numel(), []))

    def buffers(self) -> Iterator[Buffer]:
        """All that were written, in order."""
        for writer, dtype, numel, readers in self._all:
            yield Buffer(writer=writer, readers=tuple(readers), dtype=dtype, numel=numel)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Where a tensor's elements begin and end in its storage, in bytes."""
    begin = int(tensor.storage_offset())
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin * tensor.element_size(), (begin + last + 1) * tensor.element_size()
