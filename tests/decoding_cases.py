"""Tiny VAEs, and what ranks do with them; apart from the tests, since processes find functions by their names."""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLWan
from torch import nn

import hvcompile
from hvcompile.app import generate, pipelines
from hvcompile.app.request.generate import Request
from hvcompile.app.results import Result


def hunyuan(dtype: torch.dtype = torch.float32) -> AutoencoderKLHunyuanVideo:
    """Tiles of 4 x 4 latents by 2 frames at a stride of 3 x 3 by 1."""
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )
    vae.enable_tiling(32, 32, 8, 24, 24, 4)
    return vae.eval().to(dtype)


def cogvideox() -> AutoencoderKLCogVideoX:
    """Hands a cache, a dict that it returns, from some frames of a tile to the next."""
    torch.manual_seed(0)
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=64,
        sample_width=64,
    )
    vae.enable_tiling(32, 32)
    return vae.eval()


def wan() -> AutoencoderKLWan:
    """Hands a cache, a list that it writes into, from a frame of a tile to the next."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    vae.enable_tiling(32, 32, 24, 24)
    return vae.eval()


VAES: dict[str, Callable[..., Any]] = {"hunyuan": hunyuan, "cogvideox": cogvideox, "wan": wan}


def latents(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _note(told: list[tuple[int, int]], done: int, total: int) -> None:
    told.append((done, total))


@torch.no_grad()
def decoded(name: str, shapes: list[tuple[int, ...]], dtype: str = "float32") -> list[dict[str, Any]]:
    """Each shape's decoding, shared and by this rank alone."""
    torch.set_num_threads(1)
    kind = getattr(torch, dtype)
    vae = VAES[name](kind) if name == "hunyuan" else VAES[name]()
    found = []
    for seed, shape in enumerate(shapes):
        z = latents(*shape, seed=seed, dtype=kind)
        own = vae.decode(z).sample
        told: list[tuple[int, int]] = []
        with hvcompile.share_decoding(vae, tell=functools.partial(_note, told)) as state:
            shared = vae.decode(z)
            (again,) = vae.decode(z, return_dict=False)
        found.append(
            {
                "equal": torch.equal(shared.sample, own) and torch.equal(again, own),
                "nan": bool(own.isnan().any()),
                "tiles": state.num_tiles,
                "own": state.num_own,
                "reason": state.reason,
                "told": told[: len(told) // 2],
                "left": "decode" in vars(vae),
            }
        )
    return found


class Failing(nn.Module):
    """A decoder that fails or ends its process at its first call, or is stopped while its calls are planned."""

    def __init__(self, decoder: nn.Module, how: str) -> None:
        super().__init__()
        self.decoder, self.how = decoder, how

    def forward(self, z: torch.Tensor) -> Any:
        if z.is_meta and self.how == "stop" and torch.distributed.get_rank() == 1:
            raise KeyboardInterrupt
        if not z.is_meta and self.how != "stop" and torch.distributed.get_rank() == 1:
            if self.how == "die":
                os._exit(9)
            raise MemoryError("no memory is left")
        return self.decoder(z)


@torch.no_grad()
def failing(how: str) -> str:
    """What a rank is told where rank 1 fails."""
    vae = hunyuan()
    vae.decoder = Failing(vae.decoder, how)
    with hvcompile.share_decoding(vae):
        try:
            vae.decode(latents(1, 4, 1, 7, 7))
        except BaseException as error:
            assert isinstance(vae.decoder, Failing)
            return f"{type(error).__name__}: {error}"
    return "nothing"


@torch.no_grad()
def differing(what: str) -> Any:
    """Rank 1 has latents of another size, or of the same one with other values."""
    rank = torch.distributed.get_rank()
    vae = hunyuan()
    first = latents(1, 4, 1, 7, 7)
    z = first if rank == 0 else latents(1, 4, 1, 7 + (what == "size"), 7, seed=1)
    if what == "tiles" and rank == 1:
        vae.enable_tiling(32, 32, 8, 16, 16, 4)
    if what == "weights" and rank == 1:
        vae.decoder.conv_out.conv.weight.mul_(1.5)
    with hvcompile.share_decoding(vae):
        try:
            return torch.equal(vae.decode(z).sample, type(vae).decode(vae, first).sample)
        except hvcompile.DisagreementError as error:
            return str(error)


def generated() -> dict[str, Any]:
    """A clip of the tiny pipeline whose decoding is shared, beside one decoded alone."""
    torch.set_num_threads(1)
    loaded = pipelines.load()
    vae = loaded.pipe.vae
    vae.enable_tiling(32, 32, 16, 24, 24, 12)
    request = Request(prompt="a red circle", steps=2, frames=5, height=32, width=48, backend_settings=OPTIONS)
    events: list[Any] = []
    shared = runs(request, loaded, events)
    vae.decode = functools.partial(type(vae).decode, vae)  # as replaced by somebody: left as it is
    alone = runs(request, loaded, [])
    return {
        "equal": bool((shared.run.frames == alone.run.frames).all()),
        "notes": shared.notes,
        "last": [event for event in events if isinstance(event, str)][-1 - (torch.distributed.get_rank() == 0)],
    }


OPTIONS = ("lower=eager", "context_parallel=false")


def runs(request: Request, loaded: pipelines.Loaded, events: list[Any]) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        there = dataclasses.replace(request, output=Path(folder) / "a.mp4")
        return generate.generate(there, events.append, loaded)
