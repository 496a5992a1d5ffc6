"""Trains the VAE of a tiny model to reconstruct the clips: the first of the two training steps.

``python examples/tiny_model/train_vae.py --run runs/vae``; run again, it goes on where it was stopped. With ``--start
DIR --decoder-only`` it trains the decoder of a finished VAE further; the latents stay as they are, so the transformer
can learn meanwhile. ``--family wan`` trains that of the tiny Wan.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import clips
import numpy as np
import torch
import typer
from families import FAMILIES, Name
from family import LATENT_CHANNELS, Family
from runs import Averaged, Run, device
from torch.nn.functional import mse_loss

KL_WEIGHT = 1e-4
"""Of the KL divergence (mean a latent value) against the mean squared error of pixels in [-1, 1]."""


def main(
    family: Annotated[Name, typer.Option(help="What is trained.")] = Name.HUNYUAN_VIDEO,
    run: Annotated[Path, typer.Option(help="Directory of the run; made if absent.")] = Path("runs/vae"),
    steps: Annotated[int, typer.Option(help="Optimiser steps in all.")] = 4000,
    minutes: Annotated[float, typer.Option(help="Wall-clock minutes in all, whichever ends first.")] = 1e9,
    batch: Annotated[int, typer.Option(help="Clips a step.")] = 8,
    num_frames: Annotated[int, typer.Option(help="Frames of a clip that a step uses, from a place at random.")] = 9,
    start: Annotated[Path | None, typer.Option(help="A trained VAE to go on from.")] = None,
    decoder_only: Annotated[bool, typer.Option(help="Leave the encoder, and so the latents, as they are.")] = False,
    peak: Annotated[float, typer.Option(help="Peak learning rate of Adam.")] = 2e-3,
) -> None:
    """Train, and leave ``run/vae`` (the averaged weights) for the transformer's training."""
    torch.manual_seed(0)
    place, kind = device(), FAMILIES[family]
    vae = kind.autoencoder()
    vae = channels_last(type(vae).from_pretrained(start) if start else vae).train().to(place)
    # The encoder stays out of the optimisers; gradients are found for it all the same, by the graph compiled already.
    parts = (vae.decoder, vae.post_quant_conv) if decoder_only else (vae,)
    trained = [value for part in parts for value in part.parameters()]
    matrices = kernels_as_matrices(vae.decoder if decoder_only else vae)
    optimisers = {
        "muon": torch.optim.Muon(list(matrices.values()), lr=peak, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
        "adam": torch.optim.Adam([value for value in trained if value not in matrices], lr=peak, betas=(0.9, 0.99)),
    }
    average = Averaged({"vae": vae}, decay=0.995)
    state = Run(
        directory=run,
        steps=steps,
        minutes=minutes,
        parts={"vae": vae, **optimisers, "average": average},
    )
    state.resume()
    loss_of = torch.compile(losses) if kind.compiles_vae else losses
    for step in state.loop():
        pixels = mixed_batch(range(step * batch, (step + 1) * batch))
        first = step % (clips.NUM_FRAMES - num_frames + 1)  # the clips are random already
        pixels = pixels[:, :, first : first + num_frames].to(place, memory_format=torch.channels_last_3d)
        for optimiser in optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = peak * state.learning_rate_share()
        noise = torch.randn(latent_shape(batch, num_frames), device=place)
        error, divergence = loss_of(kind, vae, pixels, noise)
        vae.zero_grad(set_to_none=True)
        torch.autograd.backward(error + KL_WEIGHT * divergence)
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for kernel, matrix in matrices.items():
            matrix.grad = None if kernel.grad is None else as_matrix(kernel.grad)
        for optimiser in optimisers.values():
            optimiser.step()
        average.update()
        state.log(squared_error=error.item(), divergence=divergence.item(), gradient=norm.item())
        if (step + 1) % 500 == 0:
            state.note(psnr_held_out_db=export(kind, vae, average, run / "vae", rescale=not decoder_only, num_clips=16))
    state.note(psnr_held_out_db=export(kind, vae, average, run / "vae", rescale=not decoder_only, num_clips=64))


def export(kind: Family, vae: Any, average: Averaged, directory: Path, *, rescale: bool, num_clips: int) -> float:
    """Write the VAE with the averaged weights; gives its mean PSNR in dB on held-out clips."""
    average.swap()
    written = copy.deepcopy(vae).eval()
    for value in written.parameters():
        value.data = value.data.contiguous()
    average.swap()
    if rescale:
        scale_latents(kind, written)
    written.save_pretrained(directory)
    return round(psnr(written, range(num_clips)), 2)


def channels_last(vae: Any) -> Any:
    """Lay out the kernels of all convolutions with the channels last, as ``kernels_as_matrices`` needs them."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for value in vae.parameters():
        if value.ndim in formats:
            value.data = value.data.contiguous(memory_format=formats[value.ndim])
    return vae


def kernels_as_matrices(module: torch.nn.Module) -> dict[torch.Tensor, torch.nn.Parameter]:
    """Give the inner convolutions' kernels as the matrices that Muon takes, in the same memory."""
    matrices: dict[torch.Tensor, torch.nn.Parameter] = {}
    for name, value in module.named_parameters():
        is_inner = "block" in name and value.ndim in {4, 5} and value[0].numel() > 1
        if is_inner:
            matrices[value] = torch.nn.Parameter(as_matrix(value.detach()))
            if matrices[value].data_ptr() != value.data_ptr():
                raise RuntimeError(f"{name} is not in channels-last order")
    return matrices


def as_matrix(kernel: torch.Tensor) -> torch.Tensor:
    """Lay out a kernel (out, in, [frames,] height, width) in channels-last order as (out, all else), without a copy."""
    return kernel.movedim(1, -1).flatten(1)


def losses(kind: Family, vae: Any, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error of the reconstruction from a sampled latent, and KL divergence to the unit normal."""
    mean, log_variance = kind.moments(vae, pixels).chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    latents = mean + torch.exp(0.5 * log_variance) * noise
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return mse_loss(kind.pixels(vae, latents), pixels), divergence


def batch_of(seeds: range, *, held_out: bool = False, scale: int = 1) -> torch.Tensor:
    """Draw clips, ``scale`` times as large, as the VAE takes them: (clips, 3, frames, height, width), -1 to 1."""
    frames = np.stack([clips.make(seed, held_out=held_out).frames(scale) for seed in seeds])
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3) * 2 - 1


def mixed_batch(seeds: range) -> torch.Tensor:
    """Draw clips as ``batch_of`` does, every other one a crowd: a single small object alone teaches slowly."""
    made = [clips.crowd(seed) if seed % 2 else clips.make(seed) for seed in seeds]
    return torch.from_numpy(np.stack([clip.frames() for clip in made])).permute(0, 4, 1, 2, 3) * 2 - 1


def latent_shape(batch: int, num_frames: int) -> tuple[int, ...]:
    """Shape of the latents of ``batch`` clips: (batch, channels, latent frames, height, width)."""
    return (batch, LATENT_CHANNELS, (num_frames - 1) // 4 + 1, clips.HEIGHT // 8, clips.WIDTH // 8)


@torch.no_grad()
def psnr(vae: Any, seeds: range) -> float:
    """Mean over held-out clips of the PSNR in dB of what comes back through the VAE, pixels clamped to 0..1."""
    place = next(vae.parameters()).device
    figures = []
    for seed in seeds:
        pixels = batch_of(range(seed, seed + 1), held_out=True).to(place)
        back = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        figures.append(-10 * torch.log10(mse_loss(back / 2, pixels / 2)).item())
    return sum(figures) / len(figures)


@torch.no_grad()
def scale_latents(kind: Family, vae: Any) -> None:
    """Measure the latents of 128 training clips, so that the pipeline brings them to mean zero and variance one."""
    place = next(vae.parameters()).device
    batches = [vae.encode(batch_of(range(start, start + 8)).to(place)).latent_dist.mode() for start in range(0, 128, 8)]
    kind.note_statistics(vae, torch.cat(batches))


if __name__ == "__main__":
    typer.run(main)
