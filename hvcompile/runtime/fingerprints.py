"""Hashes of tensors, which tell inputs apart."""

from __future__ import annotations

import collections
import weakref

import torch

from hvcompile.torch_private.storages import version_of


def fingerprint(tensor: torch.Tensor) -> int:
    """A 64-bit hash of a tensor's bits; waits for the device.

    It is a sum modulo 2**64 with odd weights that depend on the position, so order matters. It takes one reduction.
    """
    return int(hash_of(tensor).item())


def hash_of(tensor: torch.Tensor) -> torch.Tensor:
    """``fingerprint`` as an int64 scalar that stays on the device."""
    flat = tensor.detach()
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    flat = flat.contiguous().flatten()
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    flat = flat.view(bits).to(torch.int64)
    place = torch.arange(1, flat.numel() + 1, device=flat.device, dtype=torch.int64)
    weight = place * -7046029254386353131  # 2**64 divided by the golden ratio, as a signed number
    weight = (weight ^ (weight >> 29)) * -4658895280553007687
    return ((flat + 1) * (weight | 1)).sum()


def sketch(tensor: torch.Tensor) -> torch.Tensor:
    """``hash_of`` at most 512 elements, spread evenly over a tensor; cheap however large it is."""
    flat = tensor.detach().reshape(-1)
    return hash_of(flat[:: max(1, flat.numel() // 256)])


class Fingerprints:
    """Fingerprints of condition tensors; those of unmodified tensors are remembered, 64 at most."""

    def __init__(self) -> None:
        self._known: collections.deque[tuple[weakref.ref[torch.Tensor], int, int]] = collections.deque(maxlen=64)

    def fingerprint_of(self, tensor: torch.Tensor) -> int:
        """Look up a tensor's fingerprint; computed, which waits for the device, where it is not known."""
        if tensor.is_inference():  # carries no version counter, so it may change unseen
            return fingerprint(tensor)
        for reference, version, content in self._known:
            if reference() is tensor and version == version_of(tensor):
                return content
        content = fingerprint(tensor)
        self._known.append((weakref.ref(tensor), version_of(tensor), content))
        return content
