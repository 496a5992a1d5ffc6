"""A grid of tokens in tiles, and which blocks of keys a block of queries reads by where they lie on it.

Tokens are put in the order of tiles: those of a tile follow each other, and so do tiles that touch. A block is as many
consecutive tokens as a whole tile has. Where tiles divide the grid, each block is a tile; elsewhere tiles at the end of
an axis are smaller, and a block may have tokens of several that touch.

Masks are bool ``[blocks, blocks]``: which blocks (the second) a block (the first) reads. A rule is stated for tiles; a
block reads another if a tile that it has tokens of reads one that the other has tokens of.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

Sizes = tuple[int, int, int]
"""Frames, height and width: of a grid in tokens, of a tile in tokens, or of a window in tiles."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of a stream's tokens: so many; on a grid of frames, height and width where they are the sample's."""

    size: int
    grid: Sizes | None


def grid_of(parts: Sequence[Part]) -> Sizes:
    """The grid of the one part that has one."""
    return next(part.grid for part in parts if part.grid is not None)


def tile_order(grid: Sizes, tile: Sizes, device: Any = None) -> torch.Tensor:
    """The tokens of a grid, numbered row by row, in the order of tiles: int64 ``[tokens]``."""
    return _tiled(grid, tile)[0].to(device)


def num_tiles(grid: Sizes, tile: Sizes) -> Sizes:
    """How many tiles there are along each axis."""
    frames, height, width = (-(-size // step) for size, step in zip(grid, tile, strict=True))
    return frames, height, width


def _tiled(grid: Sizes, tile: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """``tile_order``, and for each token in that order the tile that it is of, numbered row by row."""
    counts = num_tiles(grid, tile)
    places = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, 3)
    frame, row, column = (places // torch.tensor(tile)).unbind(1)
    # To and fro, so that a tile touches the one before it.
    turned_row = torch.where(frame % 2 == 0, row, counts[1] - 1 - row)
    line = frame * counts[1] + turned_row
    turned_column = torch.where(line % 2 == 0, column, counts[2] - 1 - column)
    order = (line * counts[2] + turned_column).argsort(stable=True)
    return order, ((frame * counts[1] + row) * counts[2] + column)[order]


def _of_blocks(grid: Sizes, tile: Sizes, reads: torch.Tensor) -> torch.Tensor:
    """A rule of tiles, bool ``[tiles, tiles]``, as one of blocks."""
    owners, block = _tiled(grid, tile)[1], math.prod(tile)
    parts = torch.arange(len(owners)) // block
    members = torch.zeros(-(-len(owners) // block), len(reads))
    members[parts, owners] = 1
    return members @ reads.float() @ members.T > 0


def _distances(counts: Sizes, axis: int) -> torch.Tensor:
    """How many tiles apart two tiles are along an axis, ``[tiles, tiles]``; rows are those of queries."""
    place = torch.cartesian_prod(*map(torch.arange, counts)).view(-1, 3)[:, axis]
    return (place[:, None] - place[None]).abs()


def _is_near(counts: Sizes, axis: int, window: int) -> torch.Tensor:
    """Whether a tile is within a window of so many tiles around another, moved to where all of it is on the grid."""
    place = torch.cartesian_prod(*map(torch.arange, counts)).view(-1, 3)[:, axis]
    half, last = window // 2, counts[axis] - 1
    middle = place.clamp(min(half, last), max(last - half, 0)) if window <= last else place * 0 + last // 2
    reach = half if window <= last else last + 1
    return (place[None] - middle[:, None]).abs() <= reach


def window_mask(grid: Sizes, tile: Sizes, window: Sizes) -> torch.Tensor:
    """A tile reads those in a window around it, as sliding tile attention does (arXiv:2502.04507)."""
    counts = num_tiles(grid, tile)
    near = [_is_near(counts, axis, window[axis]) for axis in range(3)]
    return _of_blocks(grid, tile, near[0] & near[1] & near[2])


def radial_mask(grid: Sizes, tile: Sizes, width: float) -> torch.Tensor:
    """A tile reads a band of each other frame of tiles, half as wide where that is twice as far (arXiv:2506.19852).

    The band is ``width`` of a frame for the frame itself and the next, and is taken along its tiles row by row. Where
    it would be narrower than a tile, it is one tile, in fewer and fewer of the frames. All read the first frame.
    """
    counts = num_tiles(grid, tile)
    apart, place = _distances(counts, 0), torch.arange(math.prod(counts)) % (counts[1] * counts[2])
    halvings = apart.clamp(min=1).float().log2().floor()
    band = width * counts[1] * counts[2] / 2**halvings
    is_in_band = (place[:, None] - place[None]).abs() < band.clamp(min=1)
    is_taken = apart % (1 / band).ceil().clamp(min=1) == 0
    is_first = (torch.arange(math.prod(counts)) < counts[1] * counts[2])[None]
    return _of_blocks(grid, tile, (is_in_band & is_taken) | is_first)


def profile_masks(grid: Sizes, tile: Sizes, window: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """What a spatial and a temporal head read, as in Sparse VideoGen (arXiv:2502.01776).

    A spatial one reads the frames within the window, whole; a temporal one what is within the window of its own place,
    in all frames. Both read the first frame.
    """
    counts = num_tiles(grid, tile)
    near = [_is_near(counts, axis, window[axis]) for axis in range(3)]
    is_first = (torch.arange(math.prod(counts)) < counts[1] * counts[2])[None]
    spatial, temporal = near[0] | is_first, (near[1] & near[2]) | is_first
    return _of_blocks(grid, tile, spatial), _of_blocks(grid, tile, temporal)


def num_reads(mask: torch.Tensor, block: int, tokens: int) -> int:
    """Pairs of a query and a key that a mask lets through; the last block may have fewer tokens than the others."""
    sizes = torch.full((len(mask),), block)
    sizes[-1] = tokens - block * (len(mask) - 1)
    return int((sizes[:, None] * sizes[None] * mask).sum())


def lists_of(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask as lists: for each block of queries the blocks that it reads before the others, and how many it reads.

    Args:
        mask: bool ``[..., blocks, blocks]``.

    Returns:
        int32 ``[..., blocks, blocks]`` and int32 ``[..., blocks]``.

    """
    order = mask.logical_not().to(torch.int32).argsort(dim=-1, stable=True)
    return order.to(torch.int32), mask.sum(-1).to(torch.int32)


def static_mask(rule: str, grid: Sizes, tile: Sizes, window: Sizes, width: float) -> torch.Tensor:
    """The mask of the rule "window" or "radial"."""
    return radial_mask(grid, tile, width) if rule == "radial" else window_mask(grid, tile, window)


def static_lists(
    rule: str, grid: Sizes, tile: Sizes, window: Sizes, width: float, device: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The lists of ``static_mask``, for all samples and heads: ``[1, 1, blocks, blocks]`` and ``[1, 1, blocks]``."""
    return lists_of(static_mask(rule, grid, tile, window, width)[None, None].to(device))
