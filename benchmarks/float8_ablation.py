"""Which float8 layers change a video: PSNR against the exact clips, with some layers left alone.

``python benchmarks/float8_ablation.py`` generates every prompt exactly, then with float8 in all layers but those that a
setting names, on the embedded pipeline or another. Seconds are not measured: on a CPU float8 is emulated.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import torchao
import typer
from pareto import PROMPTS
from rich.console import Console
from rich.table import Table

from hvcompile.app import metrics, pipelines

BATCH = 8
"""Clips of one call."""
WANTED_DB = 30.0

ALL: dict[str, Any] = {"keep_last_blocks": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "none": ALL,
    "last 2 blocks, the default": {},
    "keep_blocks 1": {**ALL, "keep_blocks": 1},
    "keep_blocks 2": {**ALL, "keep_blocks": 2},
    "last block": {"keep_last_blocks": 1},
    "last 3 blocks": {"keep_last_blocks": 3},
    "first 2 blocks": {**ALL, "skip": ["transformer_blocks.0.*", "transformer_blocks.1.*"]},
    "proj_out": {**ALL, "skip": ["proj_out"]},
    "to_out": {**ALL, "skip": ["to_out.0", "to_add_out"]},
    "q, k, v": {**ALL, "skip": ["to_[qkv]", "add_[qkv]_proj"]},
    "MLP, first layer": {**ALL, "skip": ["net.0.proj", "proj_mlp"]},
    "MLP, second layer": {**ALL, "skip": ["net.2"]},
    "text stream": {**ALL, "skip": ["ff_context.*", "add_[qkv]_proj", "to_add_out"]},
}
"""What is left alone -> options of the pass."""


def main(
    model: Annotated[str | None, typer.Option(help="Directory or hub id; the embedded pipeline without it.")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=1)] = 30,
    first_seed: Annotated[list[int] | None, typer.Option(help="Seed of the first prompt; each is another run.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Settings by name; all without it.")] = None,
    lower: Annotated[str, typer.Option(help="What runs the graph: inductor, aot or eager.")] = "eager",
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write all figures.")] = None,
) -> None:
    """Print a row a setting, and write the figures."""
    console, seeds = Console(), first_seed or [0]
    exact = generate(model, steps, seeds, {"fp8": False}, lower)
    rows: list[dict[str, Any]] = []
    for name in only or SETTINGS:
        clips = generate(model, steps, seeds, {"fp8": SETTINGS[name] or True}, lower)
        psnr = [metrics.compare(made, known).mean_psnr for made, known in zip(clips, exact, strict=True)]
        rows.append({"left_alone": name, "options": SETTINGS[name], "psnr_db": [round(item, 3) for item in psnr]})
        console.print(f"{name}: mean {statistics.fmean(psnr):.2f} dB, least {min(psnr):.2f} dB")
        if json_file is not None:
            versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "torchao": torchao.__version__}
            content = {
                "date": time.strftime("%Y-%m-%d"),
                **versions,
                "model": model or "embedded",
                "steps": steps,
                "first_seeds": seeds,
                "lower": lower,
                "prompts": list(PROMPTS),
                "rows": rows,
            }
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    console.print(table(rows))


def generate(model: str | None, steps: int, seeds: list[int], options: dict[str, Any], lower: str) -> list[Any]:
    """Every prompt's clip for every first seed, with a fresh model."""
    torch._dynamo.reset()
    loaded = pipelines.load(model)
    pipe, arguments = loaded.pipe, {**loaded.defaults, "num_inference_steps": steps}
    pipe.transformer.compile(
        backend="hvfast", fullgraph=True, options={**options, "first_block_cache": False, "lower": lower}
    )
    clips: list[Any] = []
    for seed in seeds:
        for first in range(0, len(PROMPTS), BATCH):
            prompts = list(PROMPTS[first : first + BATCH])
            generators = [torch.Generator().manual_seed(seed + first + place) for place in range(len(prompts))]
            made = pipe(prompts, generator=generators, output_type="np", **arguments).frames
            clips += [np.asarray(clip, np.float32) for clip in made]
    return clips


def table(rows: list[dict[str, Any]]) -> Table:
    """A row a setting: PSNR over the clips, and how many lie lower than wanted."""
    made = Table("left alone", "PSNR mean", "least", f"under {WANTED_DB:g} dB")
    for row in rows:
        psnr = row["psnr_db"]
        under = f"{sum(item < WANTED_DB for item in psnr)} of {len(psnr)}"
        made.add_row(row["left_alone"], f"{statistics.fmean(psnr):.2f} dB", f"{min(psnr):.2f} dB", under)
    return made


if __name__ == "__main__":
    typer.run(main)
