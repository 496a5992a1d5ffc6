"""Trains a tiny transformer and its text encoders together, by rectified flow, on latents of the trained VAE.

Two runs make the tiny HunyuanVideo: the first learns captions and, one time in ten, no caption; the second starts from
it and learns what guidance does (``--teacher``), so that the guidance embedding stands for a real guidance scale.

``python examples/tiny_model/train_transformer.py --vae runs/vae/vae --run runs/plain``
``python examples/tiny_model/train_transformer.py --vae runs/vae/vae --run runs/guided --teacher runs/plain/pipeline``

A finer one, of 480 tokens and then 1,920, begins with the weights that the package ships:

``cd examples/tiny_model``
``python train_transformer.py --start ../../hvcompile/app/tiny_hunyuan_video --fine --scale 2 --run ../../runs/fine2``
``python train_transformer.py --start ../../runs/fine2/pipeline --scale 4 --run ../../runs/fine4``

The tiny Wan, whose guidance takes two passes a step, needs the first run alone, with ``--family wan``. Run again, each
goes on where it was stopped.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import clips
import torch
import typer
from families import FAMILIES, Name
from family import Family
from muon import Muon
from rich.progress import track
from runs import Averaged, Run, device
from torch.nn.functional import mse_loss
from train_vae import batch_of

GUIDANCE = (1.0, 8.0)
"""Range of the guidance scales that the model is asked for in training."""

TRAINING_SHIFT = 3.0
"""Shift of the distribution that timesteps are drawn from: more of them noisy than not."""


def main(
    family: Annotated[Name, typer.Option(help="What is trained.")] = Name.HUNYUAN_VIDEO,
    vae: Annotated[Path, typer.Option(help="Directory of the trained VAE.")] = Path("runs/vae/vae"),
    run: Annotated[Path, typer.Option(help="Directory of the run; made if absent.")] = Path("runs/plain"),
    teacher: Annotated[Path | None, typer.Option(help="Pipeline whose guidance is to be learnt.")] = None,
    start: Annotated[Path | None, typer.Option(help="Pipeline whose weights training begins with.")] = None,
    fine: Annotated[bool, typer.Option(help="Give what --start names a token for each latent value.")] = False,
    scale: Annotated[int, typer.Option(min=1, help="How many times as large clips are drawn.")] = 1,
    steps: Annotated[int, typer.Option(help="Optimiser steps in all.")] = 8000,
    minutes: Annotated[float, typer.Option(help="Wall-clock minutes in all, whichever ends first.")] = 1e9,
    batch: Annotated[int, typer.Option(help="Clips a step.")] = 32,
    num_clips: Annotated[int, typer.Option(help="Training clips; their latents are kept in the run.")] = 8192,
    peak: Annotated[float, typer.Option(help="Peak learning rate, of Muon (matched to AdamW's) and AdamW.")] = 2e-3,
    compiled: Annotated[bool, typer.Option(help="Compile the blocks; on a CPU that takes minutes first.")] = False,
) -> None:
    """Train, and leave ``run/pipeline``: the whole pipeline with the averaged weights."""
    torch.manual_seed(0)
    place, kind = device(), FAMILIES[family]
    if teacher and not kind.embeds_guidance:
        raise typer.BadParameter(f"{family} has no guidance embedding to teach", param_hint="--teacher")
    pipe = pipeline_of(kind, vae, start or teacher, fine=fine)
    pipe.vae.to(place)
    modules = {name: getattr(pipe, name).to(place).train() for name in kind.trained}
    frozen = {name: copy.deepcopy(module).eval() for name, module in modules.items()} if teacher else None
    average = Averaged(modules, decay=0.998)
    optimisers = optimisers_of(kind, modules, peak)
    state = Run(
        directory=run,
        steps=steps,
        minutes=minutes,
        warmup=0.1 if teacher else 0.03,
        parts={**modules, **optimisers, "average": average},
    )
    state.resume()
    latents = latents_of(kind, pipe.vae, num_clips, run / "latents.pt", scale)
    # Numbers of captions: the clips' own, and one more for none. Every batch has the same shapes, whatever it draws.
    text = kind.tokenise(pipe, [*(clips.make(seed).caption for seed in range(num_clips)), ""])
    for models in [modules] if frozen is None else [modules, frozen]:
        kind.prepare(models["transformer"], text)
        for block in kind.blocks(models["transformer"]) if compiled else ():
            block.compile()  # one by one they share a compilation or two
    # At this width bfloat16 is slower than float32 on a CPU, with AMX too: the gradients' matrices are small.
    autocast = torch.autocast(place.type, torch.bfloat16, enabled=place.type == "cuda")
    for step in state.loop():
        if step % 500 == 499:
            export(pipe, average, run / "pipeline")
        draw = torch.Generator().manual_seed(step)
        which = torch.randint(num_clips, (batch,), generator=draw)
        clean = latents[which].to(place)
        noise = torch.randn(clean.shape, generator=draw).to(place)
        time = draw_times(batch, draw).to(place)
        scales = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * torch.rand(batch, generator=draw)
        noisy = torch.lerp(clean, noise, time[:, None, None, None, None])
        inputs = {"hidden_states": noisy, "timestep": 1000 * time}
        if kind.embeds_guidance:
            inputs["guidance"] = (1000 * scales).to(place)
        captioned = pick(text, which, place)
        with autocast:
            if frozen is None:
                target = noise - clean
                dropped = which.masked_fill(torch.rand(batch, generator=draw) < 0.1, num_clips)
                velocity = velocity_of(kind, modules, inputs, pick(text, dropped, place))
            else:
                blank = pick(text, torch.full((batch,), num_clips), place)
                target = guided_velocity(kind, frozen, inputs, captioned, blank, scales.to(place))
                velocity = velocity_of(kind, modules, inputs, captioned)
            loss = mse_loss(velocity.float(), target.float())
        for optimiser in optimisers.values():
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = peak * state.learning_rate_share()
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(average.parameters(), 1.0)
        for optimiser in optimisers.values():
            optimiser.step()
        average.update()
        state.log(squared_error=loss.item(), gradient=norm.item())
    export(pipe, average, run / "pipeline")


def pipeline_of(kind: Family, vae: Path, start: Path | None, *, fine: bool) -> Any:
    """Load what training begins with, or make it from the trained VAE."""
    if start is None:
        if fine:
            raise typer.BadParameter("needs a pipeline to begin with: --start", param_hint="--fine")
        return kind.new_pipeline(vae)
    pipe = kind.pipeline.from_pretrained(start, torch_dtype=torch.float32)
    if fine:
        pipe.register_modules(transformer=kind.finer(pipe.transformer))
    return pipe


def optimisers_of(kind: Family, modules: dict[str, torch.nn.Module], peak: float) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, AdamW for all else."""
    muon: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, value in modules["transformer"].named_parameters():
        is_in_block = "blocks." in name
        is_matrix = value.ndim == 2 and not kind.is_modulation(name.removesuffix(".weight"))
        (muon if is_in_block and is_matrix else others).append(value)
    others += [value for name in kind.trained[1:] for value in modules[name].parameters()]
    return {
        "muon": Muon(muon, lr=peak, weight_decay=0.01),
        "adamw": torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.01),
    }


def draw_times(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Draw times in (0, 1), 1 being noise: four in five logit-normal, the others uniform, then shifted."""
    normal = torch.randn(batch, generator=generator).sigmoid()
    uniform = torch.rand(batch, generator=generator)
    time = torch.where(torch.rand(batch, generator=generator) < 0.8, normal, uniform)
    return TRAINING_SHIFT * time / (1 + (TRAINING_SHIFT - 1) * time)


def pick(text: dict[str, torch.Tensor], which: torch.Tensor, place: torch.device) -> dict[str, torch.Tensor]:
    """Take some captions, by number, to a device."""
    return {name: tokens[which].to(place) for name, tokens in text.items()}


def velocity_of(
    kind: Family, modules: dict[str, Any], inputs: dict[str, torch.Tensor], text: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Predict noise minus clean latents: (batch, channels, latent frames, height, width)."""
    encoded = kind.encode_text(modules, text)
    velocity: torch.Tensor = modules["transformer"](**inputs, **encoded, return_dict=False)[0]
    return velocity


@torch.no_grad()
def guided_velocity(
    kind: Family,
    frozen: dict[str, Any],
    inputs: dict[str, torch.Tensor],
    captioned: dict[str, torch.Tensor],
    blank: dict[str, torch.Tensor],
    scales: torch.Tensor,
) -> torch.Tensor:
    """Predict by two passes, as classifier-free guidance does, with a guidance scale a clip."""
    with_text = velocity_of(kind, frozen, inputs, captioned)
    without = velocity_of(kind, frozen, inputs, blank)
    return without + scales[:, None, None, None, None] * (with_text - without)


@torch.no_grad()
def latents_of(kind: Family, vae: Any, num_clips: int, cache: Path, scale: int = 1) -> torch.Tensor:
    """Encode the training clips, scaled as the pipeline's decoding expects, once a run.

    Returns:
        (clips, 16, 5, 4 scale, 6 scale).

    """
    if cache.is_file():
        latents: torch.Tensor = torch.load(cache, weights_only=True)
        if len(latents) == num_clips:
            return latents
    place, size = next(vae.parameters()).device, max(1, 16 // scale**2)
    parts = []
    for start in track(range(0, num_clips, size), description="encoding clips"):
        pixels = batch_of(range(start, start + size), scale=scale).to(place, memory_format=torch.channels_last_3d)
        mean, _ = kind.moments(vae, pixels).chunk(2, dim=1)
        parts.append(kind.normalised(vae, mean).cpu())
    latents = torch.cat(parts)[:num_clips].contiguous()
    cache.parent.mkdir(parents=True, exist_ok=True)
    torch.save(latents, cache)
    return latents


def export(pipe: Any, average: Averaged, directory: Path) -> None:
    """Write the pipeline with the averaged weights, in the layout of diffusers."""
    average.swap()
    pipe.save_pretrained(directory)
    average.swap()


if __name__ == "__main__":
    typer.run(main)
