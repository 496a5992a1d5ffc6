"""A diffusion transformer of a few lines, quick to trace: one list of blocks, a text condition, a timestep."""

from __future__ import annotations

import torch
from torch import nn

WIDTH, TOKENS, TEXT = 16, 12, 5


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.attend, self.text, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.scale = scale

    def forward(self, hidden: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        joint = torch.cat([self.attend(hidden), self.text(text)], dim=1)
        mixed = nn.functional.scaled_dot_product_attention(hidden[:, None], joint[:, None], joint[:, None])[:, 0]
        return hidden + self.scale * self.out(mixed + time[:, None])


class Toy(nn.Module):
    """``(sample [B, N, C], timestep [B], text [B, L, C]) -> [B, N, C]``."""

    def __init__(self, blocks: int = 4, scale: float = 0.2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.time, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.blocks = nn.ModuleList(Block(scale) for _ in range(blocks))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(-torch.arange(WIDTH // 2, device=timestep.device) * 0.7)
        angles = timestep[:, None].float() / 1000 * frequencies[None]
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        hidden = self.embed(sample)
        for block in self.blocks:
            hidden = block(hidden, text, time)
        return self.head(hidden)


def toy_inputs(seed: int = 0, tokens: int = TOKENS, timestep: float = 900.0, batch: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, tokens, WIDTH, generator=generator),
        "timestep": torch.full((batch,), timestep),
        "text": torch.randn(batch, TEXT, WIDTH, generator=generator),
    }
