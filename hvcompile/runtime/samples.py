"""Some elements of each of many weights, read on the device in one operation and made into one number.

A merged or hot-swapped LoRA, an EMA's swap and every other write through ``.data`` change a weight and leave no trace
that the host could see. To read all weights in every step would take as long as a part of the step. So 32 elements of
each are read, spread so that no row or column holds many of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import torch

PER_WEIGHT = 32
"""Elements of a weight that are read; of a smaller one all are."""
_GOLDEN = 0.6180339887498949
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
_SEED = 20240229


class WeightSamples:
    """Elements of weights, which lie at the addresses that they have when this is made.

    To read elements of a thousand tensors takes a thousand operations. So a tensor is laid over the addresses from the
    first weight's to the last one's, and one operation reads from it, at the places of these elements and nowhere else.
    It owns no memory and keeps none alive: freed, moved and replaced weights go as they would. Whoever holds this sees
    to it that the weights of a call are the same objects, at the same addresses, before he asks for their content;
    a call's weights live as long as the call.

    Weights on devices that no such tensor can be laid over (neither the CPU nor CUDA) are read one by one.

    Args:
        weights: as a call gives them.

    """

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        groups: dict[tuple[torch.device, int], list[torch.Tensor]] = {}
        self._apart: list[int] = []
        for place, weight in enumerate(weights):
            size = weight.element_size()
            if _is_addressable(weight):
                groups.setdefault((weight.device, min(size, 8)), []).append(weight)
            else:
                self._apart.append(place)
        self._groups = [_Group(device, size, members) for (device, size), members in groups.items()]

    @torch.no_grad()
    def content(self, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """A number that is another where one of the elements is, save for one case in 2**64; int64 scalar.

        Args:
            weights: those that this was made of, unmoved.

        """
        total: Any = None
        for part in self._parts(weights):
            total = part if total is None else total * 31 + part.to(total.device, non_blocking=True)
        return torch.zeros((), dtype=torch.int64, device="cpu") if total is None else total

    def _parts(self, weights: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        for group in self._groups:
            yield group.content()
        for place in self._apart:
            yield from (_content_of_one(part) for part in _plain(weights[place]))


class _Group:
    """The elements of weights on one device whose elements are of one size in bytes."""

    def __init__(self, device: torch.device, size: int, weights: Sequence[torch.Tensor]) -> None:
        # On the CPU whatever torch.set_default_device says.
        addresses = torch.tensor([weight.data_ptr() for weight in weights], device="cpu")
        base = int(addresses.min())
        known: dict[int, torch.Tensor] = {}  # a model's weights are of a few sizes
        offsets = torch.stack([_offsets(weight, known) for weight in weights])
        places = ((addresses[:, None] - base) // size + offsets).flatten()
        # Odd numbers, so that one changed element always tells; random, so that several do.
        generator = torch.Generator("cpu").manual_seed(_SEED)
        factors = torch.randint(-(2**62), 2**62, places.shape, generator=generator, device="cpu") * 2 + 1
        self._places, self._factors = places.to(device), factors.to(device)
        self._memory = _laid_over(base, int(places.max()) + 1, size, device)

    def content(self) -> torch.Tensor:
        elements = torch.index_select(self._memory, 0, self._places)
        return (elements * self._factors).sum()


def is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight has memory of its own, which a tensor subclass around others has not."""
    return weight.layout is torch.strided and not hasattr(type(weight), "__tensor_flatten__")


def _is_addressable(weight: torch.Tensor) -> bool:
    """Whether a weight's elements can be read by their addresses."""
    is_there = is_plain(weight) and weight.device.type in {"cpu", "cuda"} and weight.numel() > 0
    return is_there and weight.data_ptr() != 0 and weight.data_ptr() % min(weight.element_size(), 8) == 0


def _positions(count: int) -> torch.Tensor:
    """Positions of the elements that are read of so many, int64 ``[PER_WEIGHT]``; all of a few, some twice."""
    ordinal = torch.arange(PER_WEIGHT, device="cpu")
    if count <= PER_WEIGHT:
        return ordinal % count
    return ((ordinal * _GOLDEN).double() % 1 * count).to(torch.int64)


def _offsets(weight: torch.Tensor, known: dict[int, torch.Tensor]) -> torch.Tensor:
    """How far from its address these elements of a weight lie, in units of their size, 8 bytes at most."""
    if weight.numel() not in known:
        known[weight.numel()] = _positions(weight.numel())
    positions = known[weight.numel()]
    if weight.is_contiguous():
        offsets = positions
    else:
        offsets = torch.zeros_like(positions)
        for size, stride in zip(reversed(weight.shape), reversed(weight.stride()), strict=True):
            offsets += positions % size * stride
            positions = positions // size
    if weight.element_size() == 16:  # complex numbers of two parts: one of them, in turn
        offsets = offsets * 2 + torch.arange(PER_WEIGHT, device="cpu") % 2
    return offsets


def _laid_over(address: int, count: int, size: int, device: torch.device) -> torch.Tensor:
    """A tensor of ``count`` integers of ``size`` bytes over the memory at an address, which it does not own."""
    if device.type == "cpu":
        memory = (ctypes.c_char * (count * size)).from_address(address)
        return torch.frombuffer(memory, dtype=_BITS[size])
    with torch.cuda.device(device):
        return torch.as_tensor(_CudaMemory(address, count, size), device=device)


class _CudaMemory:
    """Memory of a GPU, as libraries hand it to each other."""

    def __init__(self, address: int, count: int, size: int) -> None:
        kind = f"<i{size}" if size > 1 else "|u1"
        self.__cuda_array_interface__ = {"shape": (count,), "typestr": kind, "data": (address, False), "version": 3}


def _plain(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a weight is made of: itself, or those within a tensor subclass."""
    if not hasattr(type(weight), "__tensor_flatten__"):
        yield weight
        return
    names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    for name in names:
        yield from _plain(getattr(weight, name))


def _content_of_one(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.detach()
    if weight.is_complex():
        weight = torch.view_as_real(weight)
    if weight.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=weight.device)
    elements = torch.take(weight.view(_BITS[weight.element_size()]), _positions(weight.numel()).to(weight.device))
    factors = torch.arange(1, 2 * PER_WEIGHT, 2, device=weight.device) * -7046029254386353131
    return (elements * factors).sum()
