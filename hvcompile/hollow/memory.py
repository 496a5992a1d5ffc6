"""Memory of the host that a device reads by itself, while the host goes on."""

from __future__ import annotations

import math

import torch

CHUNK_BYTES = 2**28
"""Of pinned memory that is asked for at once: torch rounds up to powers of two, and a matrix of 1.1 of these gets 2."""
ALIGNMENT = 256
"""Bytes, at which every tensor begins."""


class HostMemory:
    """Gives tensors in pinned memory, cut from chunks, so that at most a part of the last chunk is left over.

    A chunk lives as long as a tensor that was cut from it. Without a GPU, each tensor has ordinary memory of its own.

    Args:
        is_pinned: None for whether there is a GPU.
        is_cut: whether tensors are cut from chunks; None for whether memory is pinned.
        chunk_bytes: of a chunk, a power of two; what is larger gets memory of its own.

    """

    def __init__(
        self, *, is_pinned: bool | None = None, is_cut: bool | None = None, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.is_pinned = torch.cuda.is_available() if is_pinned is None else is_pinned
        self._is_cut = self.is_pinned if is_cut is None else is_cut
        self._chunk_bytes = chunk_bytes
        self._chunk = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._used = 0

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor's values on the host, with its shape, dtype and strides; itself where nothing is gained by a copy.

        Args:
            tensor: dense, on any device.

        """
        tensor = tensor.detach()
        if not self.is_pinned and not self._is_cut and tensor.device.type == "cpu":
            return tensor
        return self._empty_like(tensor).copy_(tensor)

    def _empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self._is_cut:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        num_bytes = extent * tensor.element_size()
        begin = math.ceil(self._used / ALIGNMENT) * ALIGNMENT
        if num_bytes > self._chunk_bytes:
            memory = self._allocate(num_bytes)
        else:
            if begin + num_bytes > self._chunk.numel():
                self._chunk, begin = self._allocate(self._chunk_bytes), 0
            self._used = begin + num_bytes
            memory = self._chunk[begin : self._used]
        return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=self.is_pinned)
