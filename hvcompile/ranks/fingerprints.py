"""Hashes of tensors, which tell inputs apart."""

from __future__ import annotations

import collections
import weakref
from typing import Any

import torch

from hvcompile.torch_private.storages import mark_of
from hvcompile.torch_private.subclasses import without_class


def fingerprint(tensor: torch.Tensor) -> int:
    """A 64-bit hash of a tensor's bits; waits for the device.

    It is a sum modulo 2**64 with odd weights that depend on the position, so order matters. It takes one reduction.
    """
    return int(hash_of(without_class(tensor)).item())


def hash_of(tensor: Any, like: torch.Tensor | None = None) -> Any:
    """``fingerprint`` as an int64 scalar that stays on the device.

    Args:
        tensor: of any shape and dtype; a proxy too.
        like: what tells the tensor's dtype; None for the tensor itself.

    """
    like = tensor if like is None else like
    flat, device = tensor.detach(), like.device
    if like.is_complex():
        flat, like = torch.view_as_real(flat), torch.empty(0, dtype=like.dtype.to_real())
    flat = flat.reshape(-1)
    if like.is_floating_point():
        # Small floats as float32, which is exact: Inductor's C++ gets their bits wrong (torch 2.11 and 2.13).
        flat = flat.view(torch.int64) if like.element_size() == 8 else flat.to(torch.float32).view(torch.int32)
    flat = flat.to(torch.int64)
    place = torch.arange(1, flat.numel() + 1, device=device, dtype=torch.int64)  # of a proxy's number: a node
    # Bits first: Inductor makes a product with ``arange`` an index of the C++ loop, of which a compiler may assume that
    # it does not overflow, and then the loop has no end that it needs to heed (torch 2.11 and 2.13).
    weight = (place ^ 0x2545F4914F6CDD1D) * -7046029254386353131  # 2**64 over the golden ratio, as a signed number
    weight = (weight ^ (weight >> 29)) * -4658895280553007687
    return ((flat + 1) * (weight | 1)).sum()


def sketch(tensor: torch.Tensor) -> torch.Tensor:
    """``hash_of`` at most 512 elements, spread evenly over a tensor; cheap however large it is."""
    # As it lies in memory: to lay out a large tensor anew would cost a copy.
    flat = without_class(tensor).detach()
    if flat.layout is torch.strided:
        flat = flat.permute(sorted(range(flat.ndim), key=lambda dim: flat.stride()[dim], reverse=True))
    flat = flat.reshape(-1)
    content: torch.Tensor = hash_of(flat[:: max(1, flat.numel() // 256)])
    return content


class Fingerprints:
    """Fingerprints of condition tensors; those of unmodified tensors are remembered, 64 at most."""

    def __init__(self) -> None:
        self._known: collections.deque[tuple[weakref.ref[torch.Tensor], tuple[int, int], int]] = collections.deque(
            maxlen=64
        )

    def fingerprint_of(self, tensor: torch.Tensor) -> int:
        """Look up a tensor's fingerprint; computed, which waits for the device, where it is not known.

        A write that moves neither version nor address is not seen here. So nothing rests on a fingerprint alone: where
        one has led to a slot or to an agreement of ranks, the graph looks at the content in every step.
        """
        if tensor.is_inference():  # carries no version counter, so it may change unseen
            return fingerprint(tensor)
        mark = mark_of(tensor)
        for reference, known, content in self._known:
            if reference() is tensor and known == mark:
                return content
        content = fingerprint(tensor)
        self._known.append((weakref.ref(tensor), mark, content))
        return content
