"""A video transformer of a few lines with a grid of tokens, and what sparse attention makes of it, computed densely."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

WIDTH, HEADS, TEXT, CHANNELS = 32, 2, 5, 3
Mask = torch.Tensor
"""Which tokens of the sample read which, in the model's order: bool ``[tokens, tokens]``, or one for each head."""


class GridBlock(nn.Module):
    """Attention of the sample's tokens and the text's, joined in one of two orders, or of the sample's alone."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.order = order

    def forward(
        self, hidden: torch.Tensor, text: torch.Tensor, time: torch.Tensor, table: torch.Tensor, mask: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        video = hidden.shape[1]
        parts = {"video": [hidden], "video|text": [hidden, text], "text|video": [text, hidden]}[self.order]
        joint = torch.cat(parts, dim=1) if len(parts) > 1 else hidden
        query, key, value = (
            layer(joint).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        cut = 0 if self.order != "text|video" else text.shape[1]
        turned = [held[:, :, cut : cut + video] * table for held in (query, key)]
        if len(parts) > 1:
            others = [held[:, :, :cut] if cut else held[:, :, video:] for held in (query, key)]
            pairs = zip(others, turned, strict=True) if cut else zip(turned, others, strict=True)
            turned = [torch.cat(pair, dim=2) for pair in pairs]
        mixed = nn.functional.scaled_dot_product_attention(turned[0], turned[1], value, attn_mask=mask)
        change = self.out(mixed.transpose(1, 2).flatten(2)) + time[:, None]
        hidden = hidden + 0.5 * change[:, cut : cut + video]
        if len(parts) > 1:
            text = text + 0.5 * (change[:, :cut] if cut else change[:, video:])
        return hidden, text


def in_tokens(patches: torch.Tensor) -> torch.Tensor:
    """``[B, C, F, H, W]`` as ``[B, tokens, C]``."""
    return patches.flatten(2).transpose(1, 2)


class GridToy(nn.Module):
    """``(sample [B, C, F, H, W], timestep [B], text [B, L, D]) -> [B, C, F, H, W]``; patches of 1 x 2 x 2."""

    def __init__(self, order: str = "video|text", blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Conv3d(CHANNELS, WIDTH, (1, 2, 2), (1, 2, 2))
        self.time, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CHANNELS * 4)
        self.blocks = nn.ModuleList(GridBlock(order) for _ in range(blocks))
        self.requires_grad_(False).eval()

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        frequencies = torch.exp(-torch.arange(WIDTH // 2, device=sample.device) * 0.3)
        angles = timestep[:, None].float() / 1000 * frequencies[None]
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        hidden = self.patch(sample)
        grid = hidden.shape[2:]
        hidden = in_tokens(hidden)
        table = 1 + 0.5 * torch.sin(torch.arange(hidden.shape[1], device=sample.device)[:, None] * frequencies[None])
        mask = None if keep is None else keep[:, None, None]
        for block in self.blocks:
            hidden, text = block(hidden, text, time, table, mask)
        velocity: torch.Tensor = self.head(hidden).unflatten(1, grid).unflatten(-1, (CHANNELS, 1, 2, 2))
        velocity = velocity.permute(0, 4, 1, 5, 2, 6, 3, 7)
        return velocity.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def grid_inputs(
    grid: Sequence[int], seed: int = 0, batch: int = 1, text: int = TEXT, timestep: float = 900.0
) -> dict[str, torch.Tensor]:
    """Inputs of ``GridToy`` for a grid of so many tokens along frames, height and width."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    return {
        "sample": torch.randn(batch, CHANNELS, frames, 2 * height, 2 * width, generator=generator) * 2,
        "timestep": torch.full((batch,), timestep),
        "text": torch.randn(batch, text, WIDTH, generator=generator) * 2,
    }


def in_line(grid: Sequence[int], tile: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
    """The tokens in the order of tiles, each with its tile.

    Tiles follow each other to and fro along height and width; their tokens row by row.
    """
    counts = [-(-size // step) for size, step in zip(grid, tile, strict=True)]
    line: list[tuple[int, tuple[int, ...]]] = []
    lines = 0
    for frame in range(counts[0]):
        heights = range(counts[1]) if frame % 2 == 0 else reversed(range(counts[1]))
        for height in heights:
            widths = range(counts[2]) if lines % 2 == 0 else reversed(range(counts[2]))
            lines += 1
            for width in widths:
                place: tuple[int, ...] = (frame, height, width)
                sizes = zip(place, tile, grid, strict=True)
                inside = [range(at * step, min((at + 1) * step, size)) for at, step, size in sizes]
                for f, h, w in itertools.product(*inside):
                    line.append(((f * grid[1] + h) * grid[2] + w, place))
    return line


def line_of(grid: Sequence[int], tile: Sequence[int]) -> list[int]:
    """For each token, in the model's order, its place in the order of tiles."""
    places = {token: place for place, (token, _) in enumerate(in_line(grid, tile))}
    return [places[token] for token in range(len(places))]


def blocks_of(grid: Sequence[int], tile: Sequence[int]) -> tuple[list[int], dict[int, set[tuple[int, ...]]]]:
    """For each token, in the model's order, the block that it is in; and each block's tiles."""
    tiles_of: dict[int, set[tuple[int, ...]]] = {}
    for at, (_, place) in enumerate(in_line(grid, tile)):
        tiles_of.setdefault(at // math.prod(tile), set()).add(place)
    return [at // math.prod(tile) for at in line_of(grid, tile)], tiles_of


def mask_by(
    grid: Sequence[int], tile: Sequence[int], reads: Callable[[tuple[int, ...], tuple[int, ...]], bool]
) -> Mask:
    """Which tokens read which, by a rule of tiles, written as loops."""
    block_of, tiles_of = blocks_of(grid, tile)
    allowed = [
        [any(reads(a, b) for a in tiles_of[first] for b in tiles_of[second]) for second in range(len(tiles_of))]
        for first in range(len(tiles_of))
    ]
    return torch.tensor([[allowed[first][second] for second in block_of] for first in block_of])


def is_in_window(
    grid: Sequence[int], tile: Sequence[int], window: Sequence[int]
) -> Callable[[tuple[int, ...], tuple[int, ...]], bool]:
    """The rule of sliding tiles: within the window around a tile, moved to where all of it is on the grid."""
    counts = [-(-size // step) for size, step in zip(grid, tile, strict=True)]

    def reads(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
        for at, other, count, size in zip(first, second, counts, window, strict=True):
            start = min(max(at - size // 2, 0), max(count - size, 0))
            if not start <= other < start + size:
                return False
        return True

    return reads


def dense_under(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    mask: Mask | Callable[[torch.Tensor, torch.Tensor], Mask],
    order: str,
    monkeypatch: pytest.MonkeyPatch,
) -> torch.Tensor:
    """The model run eagerly, its attention a plain softmax in float64 under a mask of the sample's tokens.

    The mask may be a function of their queries and keys, in the model's order.
    """
    sample = inputs["sample"]
    tokens = sample[0, 0].numel() // 4

    def attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor:
        allowed = torch.ones(*query.shape[:3], key.shape[2], dtype=torch.bool)
        start = query.shape[2] - tokens if order == "text|video" else 0
        ours = slice(start, start + tokens)
        allowed[..., ours, ours] = mask if isinstance(mask, torch.Tensor) else mask(query[:, :, ours], key[:, :, ours])
        if attn_mask is not None:
            allowed &= attn_mask
        scores = query.double() @ key.double().mT * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
        attended: torch.Tensor = (weights @ value.double()).to(query.dtype)
        return attended

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(nn.functional, "scaled_dot_product_attention", attention)
        result: torch.Tensor = model(**inputs)
    return result
