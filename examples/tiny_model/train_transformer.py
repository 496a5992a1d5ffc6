"""Trains the tiny transformer and both text encoders together, by rectified flow, on latents of the trained VAE.

Two runs make the model: the first learns captions and, one time in ten, no caption; the second starts from it and
learns what guidance does (``--teacher``), so that the guidance embedding stands for a real guidance scale.

``python examples/tiny_model/train_transformer.py --vae runs/vae/vae --run runs/plain``
``python examples/tiny_model/train_transformer.py --vae runs/vae/vae --run runs/guided --teacher runs/plain/pipeline``

Run again, either goes on where it was stopped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import architecture
import clips
import torch
import typer
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from rich.progress import track
from runs import Averaged, Run, device
from torch.nn.functional import mse_loss
from train_vae import batch_of

from hvcompile.app import tiny

TRAINED = ("transformer", "text_encoder", "text_encoder_2")
"""The parts of the pipeline that learn here."""

GUIDANCE = (1.0, 8.0)
"""Range of the guidance scales that the model is asked for in training."""

SLOW = 1e-2
"""Radians a timestep unit (of 1000): faster sinusoids of the timestep hardly count at the start."""

TRAINING_SHIFT = 3.0
"""Shift of the distribution that timesteps are drawn from: more of them noisy than not."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Captions as the pipeline tokenises them.

    Attributes:
        llama_ids: (captions, tokens), prompt template and all; the longest caption has no padding.
        llama_mask: 1 where there is a token, 0 where there is padding, as ``llama_ids``.
        clip_ids: (captions, tokens), padded to the longest.

    """

    llama_ids: torch.Tensor
    llama_mask: torch.Tensor
    clip_ids: torch.Tensor

    @classmethod
    def of(cls, pipe: Any, captions: Sequence[str]) -> Text:
        """Tokenise captions; padding that the pipeline adds behind the longest is left out, being masked anyway."""
        prompts = [DEFAULT_PROMPT_TEMPLATE["template"].format(caption) for caption in captions]
        llama = pipe.tokenizer(prompts, padding="longest", return_tensors="pt")
        clip = pipe.tokenizer_2(list(captions), padding="longest", return_tensors="pt")
        return cls(llama_ids=llama.input_ids, llama_mask=llama.attention_mask, clip_ids=clip.input_ids)

    def pick(self, which: torch.Tensor, place: torch.device) -> Text:
        """Take some captions, by number, to a device."""
        parts = (self.llama_ids, self.llama_mask, self.clip_ids)
        llama_ids, llama_mask, clip_ids = (part[which].to(place) for part in parts)
        return Text(llama_ids=llama_ids, llama_mask=llama_mask, clip_ids=clip_ids)

    def encode(self, text_encoder: Any, text_encoder_2: Any) -> dict[str, torch.Tensor]:
        """Encode as ``HunyuanVideoPipeline.encode_prompt`` does: the transformer's three inputs that tell of text."""
        states = text_encoder(self.llama_ids, attention_mask=self.llama_mask, output_hidden_states=True).hidden_states
        start = DEFAULT_PROMPT_TEMPLATE["crop_start"]
        return {
            "encoder_hidden_states": states[-3][:, start:],
            "encoder_attention_mask": self.llama_mask[:, start:],
            "pooled_projections": text_encoder_2(self.clip_ids).pooler_output,
        }


def main(
    vae: Annotated[Path, typer.Option(help="Directory of the trained VAE.")] = Path("runs/vae/vae"),
    run: Annotated[Path, typer.Option(help="Directory of the run; made if absent.")] = Path("runs/plain"),
    teacher: Annotated[Path | None, typer.Option(help="Pipeline whose guidance is to be learnt.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps in all.")] = 8000,
    minutes: Annotated[float, typer.Option(help="Wall-clock minutes in all, whichever ends first.")] = 1e9,
    batch: Annotated[int, typer.Option(help="Clips a step.")] = 32,
    num_clips: Annotated[int, typer.Option(help="Training clips; their latents are kept in the run.")] = 8192,
    peak: Annotated[float, typer.Option(help="Peak learning rate, of Muon (matched to AdamW's) and AdamW.")] = 2e-3,
    compiled: Annotated[bool, typer.Option(help="Compile the blocks; on a CPU that takes minutes first.")] = False,
) -> None:
    """Train, and leave ``run/pipeline``: the whole pipeline with the averaged weights."""
    torch.manual_seed(0)
    place = device()
    pipe = HunyuanVideoPipeline.from_pretrained(teacher) if teacher else new_pipeline(vae)
    pipe.vae.to(place)
    modules = {name: getattr(pipe, name).to(place).train() for name in TRAINED}
    frozen = {name: copy.deepcopy(module).eval() for name, module in modules.items()} if teacher else None
    average = Averaged(modules, decay=0.998)
    optimisers = optimisers_of(modules, peak)
    state = Run(
        directory=run,
        steps=steps,
        minutes=minutes,
        warmup=0.1 if teacher else 0.03,
        parts={**modules, **optimisers, "average": average},
    )
    state.resume()
    latents = latents_of(pipe.vae, num_clips, run / "latents.pt")
    # Numbers of captions: the clips' own, and one more for none. Every batch has the same shapes, whatever it draws.
    text = Text.of(pipe, [*(clips.make(seed).caption for seed in range(num_clips)), ""])
    for models in (modules, frozen or {}) if compiled else ():
        for block in repeated_blocks(models):
            block.compile()
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
        inputs = {"hidden_states": noisy, "timestep": 1000 * time, "guidance": (1000 * scales).to(place)}
        captioned = text.pick(which, place)
        blank = text.pick(torch.full((batch,), num_clips), place)
        with autocast:
            if frozen is None:
                target = noise - clean
                dropped = which.masked_fill(torch.rand(batch, generator=draw) < 0.1, num_clips)
                velocity = velocity_of(modules, inputs, text.pick(dropped, place))
            else:
                with torch.no_grad():
                    with_text = velocity_of(frozen, inputs, captioned)
                    without = velocity_of(frozen, inputs, blank)
                    target = without + scales.to(place)[:, None, None, None, None] * (with_text - without)
                velocity = velocity_of(modules, inputs, captioned)
            loss = mse_loss(velocity.float(), target.float())
        for optimiser in optimisers.values():
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = peak * state.learning_rate_share()
        torch.autograd.backward(loss)
        parameters = [value for module in modules.values() for value in module.parameters()]
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in optimisers.values():
            optimiser.step()
        average.update()
        state.log(squared_error=loss.item(), gradient=norm.item())
    export(pipe, average, run / "pipeline")


def new_pipeline(vae: Path) -> HunyuanVideoPipeline:
    """Put the trained VAE and untrained other parts together."""
    tokenizer, tokenizer_2 = tiny.llama_tokenizer(), tiny.clip_tokenizer()
    pipe = HunyuanVideoPipeline(
        text_encoder=tiny.llama(tokenizer),
        tokenizer=tokenizer,
        transformer=architecture.transformer(),
        vae=AutoencoderKLHunyuanVideo.from_pretrained(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=tiny.clip(tokenizer_2),
        tokenizer_2=tokenizer_2,
    )
    initialise(pipe)
    return pipe


@torch.no_grad()
def initialise(pipe: Any) -> None:
    """Draw the starting weights: words far apart, blocks that do nothing yet (adaptive norms of zero), slow clocks.

    The embedding of the timestep has sinusoids of up to one radian a unit (of 1000), which tell nothing of how noisy
    the latents are but make every step unlike the one before; the columns that read them start damped.
    """
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        for module in encoder.modules():
            if isinstance(module, torch.nn.Embedding):
                module.weight.normal_()
            elif isinstance(module, torch.nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and (is_modulation(name) or name == "proj_out"):
            module.weight.zero_()
            module.bias.zero_()
    damp_clocks(pipe.transformer, SLOW)


@torch.no_grad()
def damp_clocks(transformer: Any, slow: float) -> None:
    """Damp the columns that read sinusoids of the timestep much faster than ``slow``, in radians a timestep unit."""
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith("timestep_embedder.linear_1"):
            half = module.in_features // 2
            frequency = torch.exp(-math.log(10_000) * torch.arange(half) / half).repeat(2)  # radians a timestep unit
            module.weight *= 1 / (1 + (frequency / slow) ** 2)


def is_modulation(name: str) -> bool:
    """Whether a linear layer of the transformer computes shifts, scales and gates from the timestep and the text."""
    return "norm" in name and name.endswith(".linear")


def optimisers_of(modules: dict[str, torch.nn.Module], peak: float) -> dict[str, torch.optim.Optimizer]:
    """Muon for the matrices inside the transformer's blocks, AdamW for all else."""
    muon: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, value in modules["transformer"].named_parameters():
        is_in_block = "blocks." in name
        is_matrix = value.ndim == 2 and not is_modulation(name.removesuffix(".weight"))
        (muon if is_in_block and is_matrix else others).append(value)
    others += [value for name in TRAINED[1:] for value in modules[name].parameters()]
    return {
        "muon": torch.optim.Muon(muon, lr=peak, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.01),
    }


def repeated_blocks(modules: dict[str, torch.nn.Module]) -> list[torch.nn.Module]:
    """List the transformer's blocks: compiled one by one they share two compilations."""
    if not modules:
        return []
    transformer: Any = modules["transformer"]
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def draw_times(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Draw times in (0, 1), 1 being noise: four in five logit-normal, the others uniform, then shifted."""
    normal = torch.randn(batch, generator=generator).sigmoid()
    uniform = torch.rand(batch, generator=generator)
    time = torch.where(torch.rand(batch, generator=generator) < 0.8, normal, uniform)
    return TRAINING_SHIFT * time / (1 + (TRAINING_SHIFT - 1) * time)


def velocity_of(modules: dict[str, Any], inputs: dict[str, torch.Tensor], text: Text) -> torch.Tensor:
    """Predict noise minus clean latents: (batch, channels, latent frames, height, width)."""
    encoded = text.encode(modules["text_encoder"], modules["text_encoder_2"])
    velocity: torch.Tensor = modules["transformer"](**inputs, **encoded, return_dict=False)[0]
    return velocity


@torch.no_grad()
def latents_of(vae: Any, num_clips: int, cache: Path) -> torch.Tensor:
    """Encode the training clips, scaled as the pipeline's decoding expects, once a run: (clips, 16, 5, 4, 6)."""
    if cache.is_file():
        latents: torch.Tensor = torch.load(cache, weights_only=True)
        if len(latents) == num_clips:
            return latents
    place, size = next(vae.parameters()).device, 16
    parts = []
    for start in track(range(0, num_clips, size), description="encoding clips"):
        pixels = batch_of(range(start, start + size)).to(place, memory_format=torch.channels_last_3d)
        parts.append((vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor).cpu())
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
