"""HunyuanVideo at its full size, compiled for GPUs that are not there: launches, bytes and memory of a step.

``python benchmarks/lowered_full_size.py`` compiles 20+40 blocks (12.8 billion parameters) at 1280x720 and 129 frames
for an H100 of 80 GB, by plain Inductor and by hvfast in its modes, on one rank and on eight. Nothing is computed: every
figure but the seconds is read off the generated code. Each is a process of its own; rows are kept as they come.

Bytes are a model: each operand of a library call counts once, and a Triton kernel counts what Inductor estimates.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from tables_of_rows import Row, read, write

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "docs" / "measurements" / "lowered_full_size.json"
LATENTS = (1, 16, 33, 90, 160)
"""Of 129 frames of 1280x720: a VAE's cell is 4 frames (the first alone) of 8x8 pixels."""
TEXT_TOKENS = 256

err = Console(stderr=True, highlight=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One way to compile: plain Inductor, or hvfast in a mode, for one of so many ranks."""

    name: str
    mode: str | None = None
    ranks: int = 1
    is_plain: bool = False


CASES = (
    Case(name="plain Inductor", is_plain=True),
    Case(name="exact", mode="exact"),
    Case(name="default"),
    Case(name="max", mode="max"),
    Case(name="exact, 8 ranks", mode="exact", ranks=8),
    Case(name="default, 8 ranks", ranks=8),
)


def measured(case: Case, blocks: tuple[int, int]) -> Row:
    """The row of one case."""
    import torch
    from diffusers import HunyuanVideoTransformer3DModel

    import hvcompile
    from hvcompile.lowered import walk
    from hvcompile.lowered.gpus import peaks

    dual, single = blocks
    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(num_layers=dual, num_single_layers=single).eval().to(torch.bfloat16)
        inputs: dict[str, Any] = {
            "hidden_states": torch.empty(LATENTS, dtype=torch.bfloat16),
            "timestep": torch.empty(1, dtype=torch.int64),
            "encoder_hidden_states": torch.empty(1, TEXT_TOKENS, 4096, dtype=torch.bfloat16),
            "encoder_attention_mask": torch.empty(1, TEXT_TOKENS, dtype=torch.bfloat16),
            "pooled_projections": torch.empty(1, 768, dtype=torch.bfloat16),
            "guidance": torch.empty(1, dtype=torch.bfloat16),
        }
    lowered = hvcompile.lower(
        model, **inputs, return_dict=False, mode=case.mode, ranks=case.ranks, plain=case.is_plain, device="h100"
    )
    kinds = (walk.TRITON, walk.LIBRARY, walk.COPY, walk.SYNC, walk.COLLECTIVE)
    steps, device = {"computed": lowered.computed, "reused": lowered.reused}, peaks(lowered.gpu)
    return {
        "name": case.name,
        "ranks": case.ranks,
        "seconds": round(lowered.seconds, 1),
        "kernels": len(lowered.kernels),
        "failures": [name for name, _ in lowered.failures],
        "spilling": [kernel.name for kernel in lowered.spilling],
        "gpu_bytes": lowered.gpu.memory_bytes,
        "peak_bytes": lowered.peak_bytes,
        "steps": {
            name: {
                **{kind: step.count(kind) for kind in kinds},
                "bytes": step.num_bytes,
                "flops": step.flops,
                "model_seconds": None if device is None else step.seconds(device),
                "input_bytes": step.input_bytes,
                "buffer_bytes": step.peak_bytes,
                "exposed_collectives": sum(launches == 0 for _, launches in step.overlaps()),
            }
            for name, step in steps.items()
            if step is not None
        },
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as a page."""
    lines = [
        "# HunyuanVideo at full size, compiled for an H100 that was not there",
        "",
        "20+40 blocks, 1280x720, 129 frames, bfloat16. Written by `python benchmarks/lowered_full_size.py`. Nothing "
        "was computed. Launches are of one rank and one step; a library call may launch more than one kernel. Seconds "
        "at least are a model: a kernel takes what its bytes or its products take at the peaks that NVIDIA states for "
        "an H100 SXM, whichever is more, and collectives take none.",
        "",
        "| | step | Triton kernels | library calls | copies | synchronisations | collectives (waited for at once) "
        "| GB read and written | TFLOP | s at least | GiB of inputs | GiB of buffers | fits 80 GB "
        "| kernels compiled, failed, spilling | s compiling |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|---|---:|",
    ]
    for row in rows:
        for name, step in row["steps"].items():
            triton, library, copies, syncs, collectives = list(step.values())[:5]
            fits = "yes" if step["input_bytes"] + step["buffer_bytes"] < row["gpu_bytes"] else "no"
            made = f"{row['kernels']}, {len(row['failures'])}, {len(row['spilling'])}"
            lines.append(
                f"| {row['name']} | {name} | {triton} | {library} | {copies} | {syncs} "
                f"| {collectives} ({step['exposed_collectives']}) | {step['bytes'] / 1e9:.0f} "
                f"| {step['flops'] / 1e12:.0f} | {step['model_seconds']:.2f} "
                f"| {step['input_bytes'] / 2**30:.1f} | {step['buffer_bytes'] / 2**30:.1f} | {fits} | {made} "
                f"| {row['seconds']:.0f} |"
            )
    return "\n".join([*lines, ""])


def main(
    case: Annotated[str | None, typer.Option(help="Measure this case alone, and print its row as JSON.")] = None,
    blocks: Annotated[str, typer.Option(help="Dual-stream and single-stream blocks.")] = "20+40",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure all again.")] = False,
    output: Annotated[Path, typer.Option(help="The rows (.json); a table (.md) goes beside it.")] = OUTPUT,
) -> None:
    """Compile every case, and write the table."""
    dual, single = map(int, blocks.split("+"))
    if case is not None:
        (chosen,) = [item for item in CASES if item.name == case]
        sys.stdout.write(json.dumps(measured(chosen, (dual, single))) + "\n")
        return
    rows = {} if fresh else read(output)
    for item in CASES:
        if item.name in rows:
            continue
        err.print(item.name)
        command = [sys.executable, __file__, "--case", item.name, "--blocks", blocks]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows[item.name] = _row(ran.stdout)
        write(output, [rows[known.name] for known in CASES if known.name in rows], 0.0, table)


def _row(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    return found


if __name__ == "__main__":
    typer.run(main)
