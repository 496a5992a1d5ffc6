"""Which blocks of keys a block of queries reads, chosen by what queries and keys are in this step; graph code."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from hvcompile.graph.tiles import Sizes, lists_of, profile_masks, window_mask


def neighbours(grid: Sizes, tile: Sizes, window: Sizes, device: Any) -> tuple[torch.Tensor]:
    """What each block reads in any case, bool ``[blocks, blocks]``."""
    return (window_mask(grid, tile, window).to(device),)


def profiles(grid: Sizes, tile: Sizes, window: Sizes, device: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``profile_masks`` on a device."""
    spatial, temporal = profile_masks(grid, tile, window)
    return spatial.to(device), temporal.to(device)


def _in_blocks(tensor: torch.Tensor, block: int) -> torch.Tensor:
    """``[B, H, N, E]`` as ``[B, H, blocks, block, E]`` in fp32, with zeros after the last token."""
    padded = torch.nn.functional.pad(tensor.float(), (0, 0, 0, -tensor.shape[2] % block))
    return padded.reshape(*tensor.shape[:2], -1, block, tensor.shape[3])


def mass_lists(
    query: Any, key: Any, always: Any, block: int, scale: float, share: float, floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks that hold most of the softmax of pooled queries and keys, as lists (see ``tiles.lists_of``).

    A block stands for its tokens by their mean, and counts by how many they are. Blocks are taken from the heaviest on
    until they hold the share. Where a weight is not a number everything is read, so that it goes where it would.

    Args:
        query: ``[B, H, N, E]``.
        key: as ``query``.
        always: what is read in any case, bool ``[blocks, blocks]``.
        block: tokens a block.
        scale: of the products.
        share: of the weights that is held at least, above 0; 1 reads everything.
        floor: of the blocks that are read at least.

    """
    if isinstance(query, fx.Proxy):
        return query.tracer.create_proxy(  # type: ignore[return-value]
            "call_function", mass_lists, (query, key, always, block, scale, share, floor), {}
        )
    count = always.shape[0]
    sizes = (query.shape[2] - block * torch.arange(count, device=query.device)).clamp(max=block).float()
    pooled, pooled_keys = (_in_blocks(item, block).sum(3) / sizes[:, None] for item in (query, key))
    weights = (pooled @ pooled_keys.mT * scale + sizes.log()).softmax(-1)
    heaviest, order = weights.sort(dim=-1, descending=True)
    least = torch.arange(count, device=query.device) < math.ceil(floor * count)
    is_taken = (heaviest.cumsum(-1) - heaviest < share) | least
    mask = torch.zeros_like(is_taken).scatter(-1, order, is_taken) | always
    mask = mask | weights.isfinite().logical_not() if share < 1 else torch.ones_like(mask)
    return lists_of(mask)


def profile_lists(
    query: Any, key: Any, spatial: Any, temporal: Any, block: int, scale: float, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each head the one of two masks that keeps more of the weights of sampled queries, as lists.

    Args:
        query: ``[B, H, N, E]``.
        key: as ``query``.
        spatial: bool ``[blocks, blocks]``.
        temporal: as ``spatial``; taken where both keep as much.
        block: tokens a block.
        scale: of the products.
        rows: how many queries are sampled, evenly.

    """
    if isinstance(query, fx.Proxy):
        return query.tracer.create_proxy(  # type: ignore[return-value]
            "call_function", profile_lists, (query, key, spatial, temporal, block, scale, rows), {}
        )
    rows = min(rows, query.shape[2])
    places = torch.arange(rows, device=query.device) * query.shape[2] // rows
    weights = (query[:, :, places].float() @ key.float().mT * scale).softmax(-1)
    held = _in_blocks(weights.mT, block).sum(3).mT  # [B, H, rows, blocks]
    of_spatial, of_temporal = ((held * mask[places // block]).sum((2, 3)) for mask in (spatial, temporal))
    return lists_of(torch.where((of_spatial > of_temporal)[..., None, None], spatial, temporal))
