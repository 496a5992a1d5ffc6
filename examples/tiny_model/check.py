"""Checks a tiny model from pixels alone: whether the object has the caption's colour and goes the caption's way.

No classifier, and of the training code the captions and the palette alone: a moving object is what differs from the
background, its colour the nearest of the palette's, its way the shift of its centre of mass.

``python examples/tiny_model/check.py``: 64 held-out captions, each run exactly and with the first-block cache, by the
model that the package ships; ``--model tests/tiny_wan_video`` for the other.
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import clips
import diffusers
import numpy as np
import numpy.typing as npt
import torch
import typer
from families import FAMILIES, Name
from family import SIZE
from rich.console import Console
from rich.progress import track
from rich.table import Table

import hvcompile

Pixels = npt.NDArray[np.floating[Any]]

_LEAST_DIFFERENCE = 0.15
"""Of a colour channel (0 to 1) from the background, for a pixel to count as of the object."""
_LEAST_SHIFT = 2.0
"""Pixels that the centre of mass must move by; the slowest captions ask for 6."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a clip shows.

    Attributes:
        colour: the object's, a key of ``clips.COLOURS``; "" where nothing differs from the background.
        background: the colour of the border, a key of ``clips.COLOURS``.
        direction: a key of ``clips.DIRECTIONS``; "" where the object hardly moves.

    """

    colour: str
    background: str
    direction: str


def look(frames: Pixels) -> Seen:
    """Tell what is seen in a clip: (frames, height, width, 3), 0 to 1."""
    border = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], axis=1)
    backdrop = np.median(border, axis=1)  # (frames, 3)
    difference = np.abs(frames - backdrop[:, None, None]).max(axis=-1)
    weight = np.where(difference > _LEAST_DIFFERENCE, difference, 0)
    background = _nearest(backdrop.mean(axis=0), list(clips.COLOURS))
    mass = weight.sum(axis=(1, 2))
    if (mass == 0).any():
        return Seen(colour="", background=background, direction="")
    inside = weight > 0.5 * weight.max(axis=(1, 2), keepdims=True)  # edges are mixed with the background
    colour = _nearest(np.median(frames[inside], axis=0), list(clips.OBJECT_COLOURS))
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]]
    centres = np.stack([(weight * axis).sum(axis=(1, 2)) / mass for axis in (x, y)], axis=1)
    shift = centres[-3:].mean(axis=0) - centres[:3].mean(axis=0)
    way = max(clips.DIRECTIONS, key=lambda name: float(shift @ np.array(clips.DIRECTIONS[name])))
    return Seen(colour=colour, background=background, direction=way if np.abs(shift).max() > _LEAST_SHIFT else "")


def _nearest(pixel: Pixels, names: list[str]) -> str:
    return min(names, key=lambda name: float(np.square(pixel - np.array(clips.COLOURS[name]) / 255).sum()))


@dataclass(kw_only=True)
class Score:
    """Counts over clips; rates are shares of ``num_clips``."""

    num_clips: int = 0
    colour: int = 0
    direction: int = 0
    background: int = 0
    steps: int = 0
    reused: int = 0
    seconds: float = 0.0

    def add(self, frames: Pixels, clip: clips.Clip) -> None:
        """Count one clip against what its caption says."""
        seen = look(frames)
        self.num_clips += 1
        self.colour += seen.colour == clip.things[0].colour
        self.direction += seen.direction == clip.direction
        self.background += seen.background == clip.background


def main(
    model: Annotated[Path, typer.Option(help="Directory of the pipeline.")] = FAMILIES[Name.HUNYUAN_VIDEO].directory,
    num_clips: Annotated[int, typer.Option(help="Held-out captions.")] = 64,
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 30,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, if not the default one.")] = None,
    shift: Annotated[float | None, typer.Option(help="Shift of the scheduler, if not the model's.")] = None,
    quick: Annotated[
        bool, typer.Option(help="Without compiling, in batches, exact only: for use in training.")
    ] = False,
    lower: Annotated[
        str, typer.Option(help="What the rewritten graph is lowered by: inductor, aot, eager.")
    ] = "inductor",
    frames: Annotated[Path | None, typer.Option(help="Where to write the frames as a picture.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write the figures as JSON.")] = None,
) -> None:
    """Generate the held-out captions and print how many are right."""
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    shift_name = "flow_shift" if "flow_shift" in pipe.scheduler.config else "shift"
    if shift is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **{shift_name: shift})
    arguments: dict[str, Any] = {**SIZE, "num_inference_steps": steps}
    if guidance is not None:
        arguments["guidance_scale"] = guidance
    asked = [clips.make(seed, held_out=True) for seed in range(num_clips)]
    scores, pictures = {"real clips": Score()}, []
    for clip in asked:
        scores["real clips"].add(clip.frames(), clip)
    scores["VAE"] = Score()
    noise: list[float] = []
    for clip in asked:
        back = _through_vae(pipe.vae, clip.frames())
        noise.append(-10 * float(np.log10(np.square(back - clip.frames()).mean())))
        scores["VAE"].add(back, clip)
    if quick:
        exact = _generate_in_batches(pipe, asked, arguments)
        runs = {"exact": exact}
    else:
        runs = {mode: _generate(pipe, mode, lower, asked, arguments) for mode in ("exact", "default")}
    for mode, (score, made) in runs.items():
        scores[mode] = score
        pictures.append(made)
    _print(scores, noise)
    if frames is not None:
        _write_picture(frames, pictures)
    if output is not None:
        figures = {name: asdict(score) for name, score in scores.items()}
        settings = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
            "machine": platform.machine(),
            "arguments": arguments,
            "shift": pipe.scheduler.config[shift_name],
        }
        psnr = {"mean": float(np.mean(noise)), "least": float(np.min(noise))}
        output.write_text(json.dumps({**settings, "scores": figures, "vae_psnr_db": psnr}, indent=1) + "\n")


@torch.no_grad()
def _through_vae(vae: Any, frames: Pixels) -> Pixels:
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] * 2 - 1
    back = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0].permute(1, 2, 3, 0)
    result: Pixels = (back / 2 + 0.5).clamp(0, 1).numpy()
    return result


def _generate(
    pipe: Any, mode: str, lower: str, asked: list[clips.Clip], arguments: dict[str, Any]
) -> tuple[Score, list[Pixels]]:
    """Generate one by one with hvfast; seconds include compiling."""
    score, made = Score(), []
    began = time.perf_counter()
    pipe.transformer.compile(backend="hvfast", options={"mode": mode, "lower": lower})
    for seed, clip in enumerate(track(asked, description=mode)):
        generator = torch.Generator().manual_seed(seed)
        frames = pipe(clip.caption, generator=generator, output_type="np", **arguments).frames[0]
        score.add(frames, clip)
        made.append(frames)
    stats = hvcompile.stats(pipe.transformer)
    score.seconds, score.reused, score.steps = time.perf_counter() - began, stats.hits, stats.hits + stats.misses
    return score, made


def _generate_in_batches(pipe: Any, asked: list[clips.Clip], arguments: dict[str, Any]) -> tuple[Score, list[Pixels]]:
    score, made = Score(), []
    began = time.perf_counter()
    for start in track(range(0, len(asked), 16), description="exact"):
        batch = asked[start : start + 16]
        generators = [torch.Generator().manual_seed(start + index) for index in range(len(batch))]
        captions = [clip.caption for clip in batch]
        videos = pipe(captions, generator=generators, output_type="np", **arguments).frames
        for clip, frames in zip(batch, videos, strict=True):
            score.add(frames, clip)
            made.append(frames)
    score.seconds = time.perf_counter() - began
    return score, made


def _print(scores: dict[str, Score], noise: list[float]) -> None:
    table = Table("", "clips", "colour", "direction", "background", "steps reused", "seconds")
    for name, score in scores.items():
        rates = [f"{count / score.num_clips:.1%}" for count in (score.colour, score.direction, score.background)]
        reused = f"{score.reused / score.steps:.1%}" if score.steps else ""
        table.add_row(name, str(score.num_clips), *rates, reused, f"{score.seconds:.0f}" if score.seconds else "")
    console = Console()
    console.print(table)
    console.print(f"VAE: {np.mean(noise):.2f} dB mean PSNR, {np.min(noise):.2f} dB at the least")


def _write_picture(path: Path, pictures: list[list[Pixels]], num_rows: int = 16) -> None:
    """Write clips as rows of five frames, 3 pixels a pixel; the second half of the rows stands on the right."""
    from PIL import Image

    rows = []
    for clip in range(min(num_rows, len(pictures[0]))):
        shown = [np.concatenate(made[clip][:: (clips.NUM_FRAMES - 1) // 4], axis=1) for made in pictures]
        rows.append(np.concatenate(shown, axis=1))
    picture = np.concatenate(rows, axis=0).repeat(2, axis=0).repeat(2, axis=1)
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(path)


if __name__ == "__main__":
    typer.run(main)
