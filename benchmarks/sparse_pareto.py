"""What attention that skips tiles costs in quality, and saves in operations: each rule, alone and on top of the cache.

``python benchmarks/sparse_pareto.py --model DIR`` makes every clip with all tiles and all steps computed, and then with
each setting, and compares pixels. DIR is a pipeline of 1,500 tokens or more, as ``examples/tiny_model`` trains one:
with few tokens there is nothing to skip. Finished rows are kept as the run goes on; started again, it goes on where it
was broken off. Nothing is timed, so other work may run beside it. ``--prompts 2 --seeds 1`` tries it out in less.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pareto
import tables_of_rows
import torch
import typer
from rich.progress import track
from tables_of_rows import Row
from torch.utils.flop_counter import FlopCounterMode

import hvcompile
from hvcompile.app import metrics
from hvcompile.graph import block_sparse

ROOT = Path(__file__).resolve().parent.parent
JSON = ROOT / "docs" / "measurements" / "sparse_pareto_cpu.json"
DENSE = "all tiles"
TILE = (1, 4, 4)
RULES: dict[str, dict[str, Any]] = {
    **{f"window {'x'.join(map(str, size))}": {"window": size} for size in ((1, 3, 3), (3, 3, 3), (5, 3, 3), (3, 3, 5))},
    **{f"radial {width:g}": {"rule": "radial", "width": width} for width in (0.25, 0.5, 1.0)},
    **{
        f"mass {share:g}": {"rule": "mass", "share": share, "floor": 0.0, "window": (1, 1, 1)}
        for share in (0.3, 0.5, 0.7)
    },
    **{f"profile {'x'.join(map(str, size))}": {"rule": "profile", "window": size} for size in ((1, 1, 1), (1, 3, 3))},
}
"""What each setting gives beside the tile; a rule is "window" where none is named."""
THRESHOLDS = (None, 0.06)
"""Of the cache; None for every step computed."""


class Pairs:
    """Counts the pairs of blocks that sparse attention has computed, and that there were."""

    def __init__(self) -> None:
        self.read = self.of = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Look at the lists of every attention; the compiled graph calls the operator, and that this function."""
        rows = block_sparse._rows

        def look(indices: torch.Tensor, counts: torch.Tensor, last: int) -> Any:
            self.read += int(counts.sum())
            self.of += indices.numel()
            return rows(indices, counts, last)

        block_sparse._rows = look
        try:
            yield
        finally:
            block_sparse._rows = rows


def operations(model: pareto.Model) -> tuple[int, int]:
    """Of a step with all tiles: all, and those of attention between the sample's tokens in the blocks."""
    seen: list[int] = []
    hidden: list[int] = []

    def look(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        sample: Any = named.get("hidden_states", given[0] if given else None)
        config = model.transformer.config
        frames, height, width = sample.shape[2:]
        tokens = frames // config.patch_size_t * (height // config.patch_size) * (width // config.patch_size)
        inner = config.num_attention_heads * config.attention_head_dim
        hidden.append(4 * tokens**2 * inner * len(model.blocks))

    handle = model.transformer.register_forward_pre_hook(look, with_kwargs=True)
    forward = model.transformer.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = forward(*args, **kwargs)
        seen.append(counter.get_total_flops())
        return result

    model.transformer.forward = counted
    model.generate(*model.job.clips[0], output_type="latent", num_inference_steps=1)
    model.transformer.forward = forward
    handle.remove()
    return seen[0], hidden[0]


def measure(job: pareto.Job, encoded: dict[str, Any], options: dict[str, Any], references: Path) -> Row:
    """All clips with one setting: pairs and operations, and how far each clip is from the dense one's."""
    torch._dynamo.reset()
    model, pairs = pareto.Model(job, encoded), Pairs()
    whole, attention = operations(model)
    model.transformer.compile(backend="hvfast", fullgraph=True, options={"lower": "eager", **options})
    found: dict[str, list[float]] = {name: [] for name in ("psnr", "least_psnr", "ssim", "temporal")}
    with pairs.counting():
        for number, clip in enumerate(track(job.clips, description=str(options), disable=not sys.stderr.isatty())):
            pixels = np.asarray(model.generate(*clip).frames, dtype=np.float32)
            if not references.joinpath(f"{number}.npy").exists():
                np.save(references / f"{number}.npy", pixels)
            quality = metrics.compare(pixels, np.load(references / f"{number}.npy"))
            held = (quality.mean_psnr, min(quality.psnr), quality.mean_ssim, quality.mean_temporal_psnr)
            for name, figure in zip(found, held, strict=True):
                found[name].append(float(figure if figure is not None else "nan"))
    stats = hvcompile.stats(model.transformer)
    density = pairs.read / pairs.of if pairs.of else 1.0
    blocks = len(model.blocks)
    computed = 1 - stats.hits / (stats.hits + stats.misses) * (blocks - 1) / blocks if stats.hits else 1.0
    return {
        "pairs": density,
        "steps_reused": stats.hits / max(1, stats.hits + stats.misses),
        "operations": computed * (whole - (1 - density) * attention) / whole,
        "attention": attention / whole,
        **found,
    }


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown, those of equal cache together, the fewest operations last."""
    head = ["setting", "cache", "pairs computed", "operations", "PSNR", "worst clip", "SSIM", "temporal PSNR"]
    lines = [f"| {' | '.join(head)} |", "| --- | ---: |" + " ---: |" * (len(head) - 2)]
    for row in sorted(rows, key=lambda row: (row["threshold"] or 0, -row["operations"])):
        if row["rule"] == DENSE and row["threshold"] is None:
            continue
        mean = {name: statistics.fmean(row[name]) for name in ("psnr", "ssim", "temporal")}
        cells = [row["rule"], "none" if row["threshold"] is None else f"{row['threshold']:g}", f"{row['pairs']:.1%}"]
        cells += [f"{row['operations']:.1%}", f"{mean['psnr']:.1f}", f"{min(row['psnr']):.1f}"]
        cells += [f"{mean['ssim']:.3f}", f"{mean['temporal']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    clips = len(rows[0]["psnr"]) if rows else 0
    said = f"{clips} clips, tiles of {'x'.join(map(str, TILE))} tokens (frames x height x width), dB against the same "
    said += (
        "pipeline with all tiles and steps computed. Operations are those of all blocks and steps, of 100 % without."
    )
    return f"# Sparse attention: quality against operations\n\n{said}\n\n" + "\n".join(lines) + "\n"


def main(
    model: Annotated[str, typer.Option(help="A pipeline's directory.")],
    prompts: Annotated[int, typer.Option(min=1, max=len(pareto.PROMPTS), help="How many of the 16 prompts.")] = 16,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each prompt.")] = 2,
    frames: Annotated[int, typer.Option(min=1, help="Of a clip.")] = 17,
    height: Annotated[int, typer.Option(min=16, help="Pixels.")] = 128,
    width: Annotated[int, typer.Option(min=16, help="Pixels.")] = 192,
    steps: Annotated[int, typer.Option(min=2, help="Denoising steps.")] = 30,
    only: Annotated[list[str] | None, typer.Option(help="Settings by name; all without it.")] = None,
    json_file: Annotated[Path, typer.Option("--json", help="Rows so far; the table lies beside it, as .md.")] = JSON,
) -> None:
    """Measure what is missing, write rows and table, and print the table."""
    size = {"num_frames": frames, "height": height, "width": width, "num_inference_steps": steps}
    job = pareto.Job(
        model=model,
        dtype="float32",
        device="cpu",
        prompts=pareto.PROMPTS[:prompts],
        seeds=seeds,
        size=size,
        lower="eager",
    )
    rows, encoded = tables_of_rows.read(json_file), dict[str, Any]()
    with tempfile.TemporaryDirectory(prefix="hvcompile-sparse-") as folder:
        for threshold in THRESHOLDS:
            for rule in (DENSE, *(only or RULES)):
                name = rule if threshold is None else f"{rule}, cache {threshold:g}"
                is_reference = rule == DENSE and threshold is None
                if name in rows and not is_reference:  # the pixels of the reference are not kept
                    continue
                options: dict[str, Any] = {"first_block_cache": {"threshold": threshold} if threshold else False}
                if rule != DENSE:
                    options["sparse_attention"] = {"tile": TILE, "rule": "window", **RULES[rule]}
                row = measure(job, encoded, options, Path(folder))
                rows[name] = {"name": name, "rule": rule, "threshold": threshold, **row}
                tables_of_rows.write(json_file, list(rows.values()), 0.0, table)
    print(table(list(rows.values())))


if __name__ == "__main__":
    typer.run(main)
