"""Puts a trained pipeline where it is kept in the repository, in half precision, with the pictures of its model card.

``python examples/tiny_model/publish.py --pipeline runs/guided/pipeline --log runs/plain/log.jsonl``
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import clips
import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline
from families import family_of
from family import SIZE
from PIL import Image

PROMPTS = (
    "a red circle moves to the left over a blue background",
    "a big yellow square rises over a black background",
    "a green triangle falls quickly over a white background",
    "a white diamond moves to the right over a grey background",
    "a purple circle bounces up and down over a black background",
    "an orange square moves left and a blue circle moves right over a white background",
)
"""Those of the sample picture; the last is no sentence of the grammar."""


def main(
    pipeline: Annotated[Path, typer.Option(help="Trained pipeline.")] = Path("runs/guided/pipeline"),
    vae: Annotated[Path | None, typer.Option(help="VAE to use in place of the pipeline's.")] = None,
    log: Annotated[list[Path] | None, typer.Option(help="A log.jsonl to draw; give as many as there are.")] = None,
    target: Annotated[Path | None, typer.Option(help="Where to write, if not where the family's is kept.")] = None,
) -> None:
    """Write the directory; a README.md that is there stays."""
    pipe = DiffusionPipeline.from_pretrained(pipeline)
    kind = family_of(pipe)
    target = target or kind.directory
    if vae is not None:
        pipe.register_modules(vae=type(pipe.vae).from_pretrained(vae))
    kind.finish(pipe.transformer)
    for part in (*kind.trained, "vae"):
        getattr(pipe, part).to(torch.float16)
    for part in pipe.components:
        shutil.rmtree(target / part, ignore_errors=True)
    pipe.save_pretrained(target)
    for path in target.rglob("*.json"):
        if path.name in {"model_index.json", "config.json"}:  # where it was trained is nobody's business
            content = json.loads(path.read_text())
            content.pop("_name_or_path", None)
            path.write_text(json.dumps(content, indent=2) + "\n")
    for path in target.rglob("*.safetensors"):
        path.chmod(0o644)
    # Stored in half precision, but to be computed in single wherever nobody asks for another.
    for part in kind.trained[1:]:
        path = target / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}, indent=2) + "\n")
    draw_samples(target, target / "samples.png")
    draw_losses(log or [], target / "loss.png")


def draw_samples(model: Path, path: Path) -> None:
    """Draw five frames of a clip for each of ``PROMPTS``, a row each, three pixels a pixel."""
    pipe: Any = DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for seed, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(seed)
        frames = pipe(prompt, generator=generator, output_type="np", **SIZE, num_inference_steps=30).frames[0]
        shown = frames[:: (clips.NUM_FRAMES - 1) // 4]
        rows.append(np.concatenate(np.pad(shown, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1), axis=1))
    picture = np.concatenate(rows).repeat(3, axis=0).repeat(3, axis=1)
    image = Image.fromarray((picture * 255).round().astype(np.uint8))
    image.quantize(256).save(path, optimize=True)


def draw_losses(logs: list[Path], path: Path) -> None:
    """Draw the squared error against the step, a panel a run, named by the directory of its log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * max(1, len(logs)), 2.6), layout="constrained")
    panels = figure.subplots(1, max(1, len(logs)), squeeze=False)[0]
    for panel, log in zip(panels, logs, strict=False):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        lines = [line for line in lines if "squared_error" in line]
        panel.semilogy([line["step"] for line in lines], [line["squared_error"] for line in lines], linewidth=0.8)
        panel.set(title=log.parent.name, xlabel="step", ylabel="mean squared error")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    typer.run(main)
