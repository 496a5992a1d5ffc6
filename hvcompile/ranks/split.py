"""How a sequence is split over the ranks of a group, where it is in a tensor, and how to cut and join the parts."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from hvcompile.ranks import collectives

# Products are fastest where their sizes are multiples of 16 bytes, which 16 elements are in every dtype. Inductor would
# else measure, rank by rank, whether to copy operands into padded ones.
ALIGNMENT = 16
MOST_PADDING = 0.005
"""Tokens that may be added for it, as a share of those of a rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """How a sequence is split over the ranks of a group: each holds ``local`` tokens, the last ones perhaps padding.

    Attributes:
        group: name of the process group.
        rank: this process's rank in it.
        ranks: its size.
        length: tokens of the whole sequence.
        ring: into how many consecutive stretches the sequence is cut. Keys travel from stretch to stretch. The ranks
            of one stretch (``ulysses`` of them) share out its heads.

    """

    group: str
    rank: int
    ranks: int
    length: int
    ring: int = 1

    @property
    def local(self) -> int:
        """Tokens a rank, padding included; a multiple of ``ALIGNMENT`` where that costs next to nothing."""
        least = -(-self.length // self.ranks)
        aligned = -(-least // ALIGNMENT) * ALIGNMENT
        return aligned if aligned <= least * (1 + MOST_PADDING) else least

    @property
    def start(self) -> int:
        """Index of this rank's first token in the whole sequence."""
        return self.rank * self.local

    @property
    def ulysses(self) -> int:
        """Ranks that share out the heads of one stretch."""
        return self.ranks // self.ring

    @property
    def stretch(self) -> int:
        """Tokens of one stretch, padding included."""
        return self.local * self.ulysses

    @property
    def place(self) -> int:
        """Which stretch this rank has a part of."""
        return self.rank // self.ulysses

    def valid(self, stretch: int) -> int:
        """Tokens of a stretch without padding."""
        return min(max(self.length - stretch * self.stretch, 0), self.stretch)


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a dimension: tokens ``start`` to ``stop`` of the split sequence, or as many tokens on every rank.

    A rank holds *all* its tokens of the split sequence, even if a segment covers only some of them (a slice). Values of
    the others have no meaning.
    """

    start: int
    stop: int
    is_split: bool


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the sequence is in a tensor: its dimension, and what lies along it in order."""

    dim: int
    segments: tuple[Segment, ...]

    def at(self, dim: int) -> Layout:
        """The same layout along another dimension."""
        return dataclasses.replace(self, dim=dim)

    def size(self, split: Split) -> int:
        """Length of the dimension on one rank."""
        return sum(split.local if item.is_split else item.stop - item.start for item in self.segments)

    @property
    def total(self) -> int:
        """Length of the dimension in the whole tensor."""
        return sum(item.stop - item.start for item in self.segments)

    @property
    def num_split(self) -> int:
        """How many segments are split."""
        return sum(item.is_split for item in self.segments)

    def is_complete(self, split: Split) -> bool:
        """Whether every split segment covers the whole sequence."""
        return all(not item.is_split or (item.start, item.stop) == (0, split.length) for item in self.segments)

    def is_padded(self, split: Split) -> bool:
        """Whether a split segment lacks tokens of the ranks' parts, so that zeros stand for them."""
        return any(item.is_split and (item.start or item.stop < split.local * split.ranks) for item in self.segments)

    def offsets(self, split: Split) -> list[tuple[int, int, Segment]]:
        """Each segment, after the index where it begins on one rank and the index where it does in the whole tensor."""
        offsets, local, whole = [], 0, 0
        for item in self.segments:
            offsets.append((local, whole, item))
            local += split.local if item.is_split else item.stop - item.start
            whole += item.stop - item.start
        return offsets

    def __str__(self) -> str:
        parts = (f"{item.stop - item.start} {'split' if item.is_split else 'whole'}" for item in self.segments)
        return f"dimension {self.dim} [{' | '.join(parts)}]"


# Of what an operation returns: None for a value that is whole on every rank, a list for a tuple of values.
Layouts = Layout | None | list["Layout | None"]


def take_local(whole: Any, *, split: Split, dim: int, ndim: int, start: int, stop: int) -> Any:
    """Cut this rank's part out of a whole tensor; graph code.

    Args:
        whole: holds tokens ``start`` to ``stop`` of the split sequence along ``dim``.
        split: of the sequence.
        dim: the sequence's dimension.
        ndim: dimensions of the tensor.
        start: first token.
        stop: token after the last.

    Returns:
        ``split.local`` tokens along ``dim``; zeros for tokens that are not in ``whole``.

    """
    after = split.local * split.ranks - stop
    if start or after:
        whole = torch.nn.functional.pad(whole, (0, 0) * (ndim - 1 - dim) + (start, after))
    return whole.narrow(dim, split.start, split.local)


def localise(whole: Any, *, split: Split, layout: Layout, ndim: int) -> Any:
    """One rank's part of a whole tensor; graph code."""
    parts = []
    for _, offset, item in layout.offsets(split):
        part = whole if len(layout.segments) == 1 else whole.narrow(layout.dim, offset, item.stop - item.start)
        if item.is_split:
            part = take_local(part, split=split, dim=layout.dim, ndim=ndim, start=item.start, stop=item.stop)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=layout.dim)


def delocalise(local: Any, *, split: Split, layout: Layout) -> Any:
    """The whole tensor from one rank's part, with an all-gather for each split segment; graph code."""
    parts = []
    for offset, _, item in layout.offsets(split):
        if item.is_split:
            part = collectives.gather(local.narrow(layout.dim, offset, split.local), split.group, layout.dim)
            parts.append(part.narrow(layout.dim, 0, split.length))
        else:
            parts.append(local.narrow(layout.dim, offset, item.stop - item.start))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=layout.dim)
