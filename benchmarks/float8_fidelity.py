"""What float8 does to a video and to the cache's decisions: linear layers, attention, the cache, in every combination.

``python benchmarks/float8_fidelity.py`` generates every prompt exactly and with each, and gives PSNR against the exact
clips and the share of steps reused. It also measures what float8 adds to the difference that the cache decides by:
block 1's, in steps that are all computed, with float8 in all blocks but the first, as it is, and in every block, as it
is not. Seconds are not measured: on a CPU float8 is emulated.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import diffusers
import numpy as np
import torch
import torchao
import typer
from pareto import PROMPTS
from rich.console import Console
from rich.progress import track
from rich.table import Table

import hvcompile
from hvcompile.app import metrics, pipelines
from hvcompile.passes.first_block_cache import FirstBlockCache

NUMERICS: dict[str, dict[str, Any]] = {
    "exact": {"fp8": False},
    "float8 linears": {"fp8": True},
    "float8 attention": {"fp8": False, "attention": {"fp8": True}},
    "float8 linears and attention": {"fp8": True, "attention": {"fp8": True}},
}
ALWAYS = {"warmup_steps": 10**6}
"""A cache that computes every step and still measures the difference."""


def main(
    model: Annotated[str | None, typer.Option(help="Directory or hub id; the embedded pipeline without it.")] = None,
    num_prompts: Annotated[int, typer.Option(help="Of the Pareto benchmark's prompts.", min=1)] = len(PROMPTS),
    steps: Annotated[int, typer.Option(help="Denoising steps.", min=4)] = 30,
    threshold: Annotated[list[float] | None, typer.Option(help="Of the cache; give as many as wanted.")] = None,
    lower: Annotated[str, typer.Option(help="What runs the graph: inductor, aot or eager.")] = "aot",
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write all figures.")] = None,
) -> None:
    """Print both tables, and write the figures."""
    console = Console()
    prompts = PROMPTS[:num_prompts]
    thresholds = threshold or [0.06, 0.1, 0.15]
    settings: dict[str, dict[str, Any]] = {}
    for number in (None, *thresholds):
        cache = {"first_block_cache": False if number is None else {"threshold": number}}
        for name, options in NUMERICS.items():
            settings[name if number is None else f"{name}, cache {number:g}"] = {**options, **cache}
    exact: list[Any] = []
    rows: list[dict[str, Any]] = []
    found: dict[str, list[float]] = {}

    def write() -> None:
        if json_file is not None:
            versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "torchao": torchao.__version__}
            run = {"model": model or "embedded", "steps": steps, "lower": lower, "prompts": list(prompts)}
            content = {"date": time.strftime("%Y-%m-%d"), **versions, **run, "rows": rows, "differences": found}
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")

    for name, options in settings.items():
        frames, reused, _ = generate(model, prompts, steps, {**options, "lower": lower}, name)
        exact = exact or frames
        if frames is exact:
            continue
        quality = [metrics.compare(made, known) for made, known in zip(frames, exact, strict=True)]
        psnr = [item.mean_psnr for item in quality]
        rows.append(
            {
                "setting": name,
                "reused": reused,
                "psnr_db": [round(item, 3) if math.isfinite(item) else None for item in psnr],
                "ssim": [round(item.mean_ssim, 5) for item in quality],
            }
        )
        write()
    console.print(quality_table(rows))

    found["no float8"] = differences(model, prompts, steps, {**NUMERICS["exact"], "lower": lower})
    for name in ("float8 linears", "float8 attention"):
        float8 = {**NUMERICS[name], "lower": lower}
        found[f"{name}, all blocks but the first"] = differences(model, prompts, steps, float8)
        with mock.patch.object(FirstBlockCache, "compares_first_block", False):  # as if it did not decide by it
            found[f"{name}, every block"] = differences(model, prompts, steps, float8)
        write()
    console.print(noise_table(found))


def generate(
    model: str | None, prompts: tuple[str, ...], steps: int, options: dict[str, Any], what: str
) -> tuple[list[Any], float, list[float]]:
    """Generate every prompt with a fresh model: frames, the share of steps reused, and each step's difference."""
    torch._dynamo.reset()
    loaded = pipelines.load(model)
    pipe = loaded.pipe
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.compile(backend="hvfast", fullgraph=True, options=options)
    frames = []
    for seed, prompt in enumerate(track(prompts, description=what)):
        generator = torch.Generator().manual_seed(seed)
        made = pipe(
            prompt, generator=generator, output_type="np", **{**loaded.defaults, "num_inference_steps": steps}
        ).frames[0]
        frames.append(np.asarray(made, np.float32))
    stats = hvcompile.stats(pipe.transformer)
    total = stats.hits + stats.misses
    return frames, stats.hits / total if total else 0.0, [step.difference for step in stats.steps]


def differences(model: str | None, prompts: tuple[str, ...], steps: int, options: dict[str, Any]) -> list[float]:
    """Block 1's difference in every step of every prompt, each against the step before; none in a first step."""
    options = {**options, "first_block_cache": ALWAYS}
    _, _, found = generate(model, prompts, steps, options, "differences")
    return [round(item, 6) for item in found if math.isfinite(item)]


def quality_table(rows: list[dict[str, Any]]) -> Table:
    """PSNR and SSIM against the exact clips."""
    table = Table("", "steps reused", "PSNR mean", "least", "SSIM mean")
    for row in rows:
        psnr = [item for item in row["psnr_db"] if item is not None] or [math.inf]
        figures = (f"{statistics.fmean(psnr):.2f} dB", f"{min(psnr):.2f} dB", f"{statistics.fmean(row['ssim']):.4f}")
        table.add_row(row["setting"], f"{row['reused']:.1%}", *figures)
    return table


def noise_table(differences: dict[str, list[float]]) -> Table:
    """What float8 adds to the differences: their quantiles, and how the median moved; first those without."""
    table = Table("", "tenth", "median", "nine tenths", "median of the ratio to without")
    known, *_ = differences.values()
    for name, found in differences.items():
        tenths = statistics.quantiles(found, n=10)
        ratio = statistics.median(item / base for item, base in zip(found, known, strict=True) if base)
        table.add_row(name, f"{tenths[0]:.4f}", f"{tenths[4]:.4f}", f"{tenths[8]:.4f}", f"{ratio:.4f}")
    return table


if __name__ == "__main__":
    typer.run(main)
