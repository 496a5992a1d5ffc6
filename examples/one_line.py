"""The one line in a script of your own: a diffusers pipeline whose transformer runs under hvfast.

``python examples/one_line.py MODEL "a prompt"``, MODEL being a directory or hub id of a text-to-video pipeline of
diffusers. Without a MODEL it takes the embedded tiny HunyuanVideo and makes a short clip.
"""

from __future__ import annotations

import sys
from typing import Any

import imageio.v3
import torch
from diffusers import DiffusionPipeline

import hvcompile
from hvcompile.app import tiny


def main(model: str, prompt: str, **size: Any) -> None:
    """Generate ``out.mp4``, and print what each step did."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)

    pipe.transformer.compile(backend="hvfast")  # this is all

    frames = pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="np", **size).frames[0]
    pixels = (frames * 255).round().astype("uint8")
    imageio.v3.imwrite("out.mp4", pixels, plugin="pyav", codec="libx264", fps=24, out_pixel_format="yuv420p")
    stats = hvcompile.stats(pipe.transformer)
    for number, step in enumerate(stats.steps):
        print(f"step {number}: {'reused' if step.reused else 'computed'}, difference {step.difference:.4f}")
    print(f"{stats.hits} of {stats.hits + stats.misses} steps reused, {stats.graphs} graph, out.mp4 written")


if __name__ == "__main__":
    given = sys.argv[1:]
    if len(given) == 2:
        main(*given)
    elif not given:
        main(str(tiny.DIRECTORY), "a red circle moves to the left over a blue background", **tiny.DEFAULTS)
    else:
        raise SystemExit("give both a model and a prompt, or neither")
