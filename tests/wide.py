"""A diffusion transformer of a few lines whose linear layers are wide enough for float8: attention, MLP, modulation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

WIDTH, TOKENS, TEXT = 64, 24, 17


class Block(nn.Module):
    """Video and text joined; the projections read the joint tensor cut in two and put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.modulate = nn.Linear(WIDTH, 2 * WIDTH)
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        shift, scale = self.modulate(time).chunk(2, dim=-1)
        joint = torch.cat([hidden, text], dim=1)
        normed = nn.functional.layer_norm(joint, (WIDTH,)) * (1 + scale[:, None]) + shift[:, None]
        mlp = nn.functional.gelu(self.up(normed))
        cut = text.shape[1]
        again = torch.cat([normed[:, :-cut], normed[:, -cut:]], dim=1)
        query, key, value = (layer(again).unflatten(2, (2, -1)).transpose(1, 2) for layer in self.projections())
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        change: torch.Tensor = self.down(torch.cat([mixed, mlp], dim=2))
        return hidden + 0.2 * change[:, :-cut]

    def projections(self) -> tuple[nn.Linear, ...]:
        return self.to_q, self.to_k, self.to_v


class Wide(nn.Module):
    """``(sample [B, N, C], timestep [B], text [B, L, C]) -> [B, N, C]``."""

    blocks: Any  # to mypy every member of a module list is a module without attributes

    def __init__(self, blocks: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.time, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.requires_grad_(False).eval()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(-torch.arange(WIDTH // 2, device=timestep.device) * 0.2)
        angles = timestep[:, None].float() / 1000 * frequencies[None]
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1).to(sample.dtype))
        hidden = self.embed(sample)
        for block in self.blocks:
            hidden = block(hidden, text, time)
        velocity: torch.Tensor = self.head(hidden)
        return velocity


def wide_inputs(
    seed: int = 0, tokens: int = TOKENS, text: int = TEXT, batch: int = 1, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, tokens, WIDTH, generator=generator).to(dtype),
        "timestep": torch.full((batch,), 900.0),
        "text": torch.randn(batch, text, WIDTH, generator=generator).to(dtype),
    }
