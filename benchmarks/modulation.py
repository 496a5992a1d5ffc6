"""Whether AdaLN modulation should be batched over blocks: its share of a step, and what one large product would gain.

Every block computes shifts, scales and gates from the timestep and pooled text: a matrix-vector product that reads its
weight once. ``python benchmarks/modulation.py`` counts those weights in HunyuanVideo, sets the time to read them beside
the least time of a step on a GPU, computed and reused, and measures on this machine what reading them as one stacked
matrix gains over one product a block: the ratio of processor time, both measured in turn.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import HunyuanVideoTransformer3DModel
from float8 import FULL, SHAPES, environment, flops
from rich.console import Console
from rich.table import Table
from torch import nn

from hvcompile.graph.costs import DEVICES

GPUS = ("h100", "h200")
UNBATCHED = 0.5
"""Share of the bandwidth that products of one row reach by themselves, assumed where it can't be measured."""


def main(
    blocks: Annotated[int, typer.Option(help="Products that are stacked.", min=2)] = 6,
    width: Annotated[int, typer.Option(help="Of the model; a product gives 6 times as much.", min=8)] = 3072,
    repeats: Annotated[int, typer.Option(help="Times that each side is measured.", min=1)] = 9,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write all figures.")] = None,
) -> None:
    """Print the shares and the ratio."""
    console = Console()
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(num_layers=20, num_single_layers=40, **FULL)
    bodies = [*model.transformer_blocks, *model.single_transformer_blocks]
    counts = [
        sum(weight.numel() for name, weight in block.named_parameters() if "norm" in name and "linear" in name)
        for block in bodies
    ]
    share = sum(counts) / sum(weight.numel() for weight in model.parameters())
    console.print(
        f"{sum(counts) / 1e9:.2f} billion parameters of modulation in {len(bodies)} blocks, {share:.0%} of all"
    )
    rows = [
        row for name in GPUS for shape, latent in SHAPES.items() for row in shares(model, counts, name, shape, latent)
    ]
    table = Table("GPU", "shape", "step", "least ms", "modulation ms", "share", "batched over blocks ms")
    for row in rows:
        table.add_row(*(f"{item:.4g}" if isinstance(item, float) else item for item in row.values()))
    console.print(table)
    measured = measure(blocks, width, repeats)
    console.print(
        f"{blocks} products {6 * width} x {width} in float32, one row, {torch.get_num_threads()} thread(s): "
        f"one stacked product takes {statistics.median(measured['ratio']):.3f} times the processor time of one each "
        f"({min(measured['ratio']):.3f} to {max(measured['ratio']):.3f}, {repeats} pairs); "
        f"{statistics.median(measured['gigabytes_a_second']):.1f} GB/s"
    )
    if json_file is not None:
        content = {**environment("cpu"), "parameters": sum(counts), "shares": rows, "blocks": blocks, "width": width}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({**content, **measured}, indent=1) + "\n", "utf-8")


def shares(
    model: Any, counts: list[int], name: str, shape: str, latent: tuple[int, int, int]
) -> list[dict[str, float | str]]:
    """Least time of a computed and of a reused step at bfloat16's peak, and of reading the modulation's weights in it.

    A reused step computes the first block alone, and with it its modulation; batched over blocks it would compute all.
    """
    device = DEVICES[name]
    step = flops(model, latent) / device.flops[torch.bfloat16]
    whole, first = (2 * number / device.bandwidth for number in (sum(counts), counts[0]))
    found = []
    for kind, least, read in (("computed", step, whole), ("reused", step / len(counts), first)):
        row: dict[str, float | str] = {"gpu": name, "shape": shape, "step": kind, "least_ms": least * 1e3}
        row |= {"modulation_ms": read / UNBATCHED * 1e3, "share": f"{read / UNBATCHED / least:.2%}"}
        found.append(row | {"batched_ms": whole * 1e3})
    return found


@torch.no_grad()
def measure(blocks: int, width: int, repeats: int) -> dict[str, list[float]]:
    """Processor time of one stacked product over that of a product each, on the same memory, measured in turn."""
    stacked = torch.randn(blocks * 6 * width, width) / width**0.5
    weights, given = stacked.split(6 * width), torch.randn(1, width)

    def spent(weights: tuple[torch.Tensor, ...]) -> float:
        began = time.process_time()
        for weight in weights:
            nn.functional.linear(given, weight)
        return time.process_time() - began

    ratio, rate = [], []
    for place in range(repeats + 1):
        each, one = spent(weights), spent((stacked,))
        if place:  # the first finds the memory cold
            ratio.append(one / each)
            rate.append(stacked.nbytes / each / 1e9)
    return {"ratio": ratio, "gigabytes_a_second": rate}


if __name__ == "__main__":
    typer.run(main)
