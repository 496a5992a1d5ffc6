"""Small models of many families, compiled for GPUs that are not there, in every mode: what compiles, and what it does.

``python benchmarks/lowered_census.py`` takes one tiny configuration of each family, in bfloat16, through hvfast,
Inductor, Triton and ptxas. HunyuanVideo goes through every mode on every architecture, the others through two modes on
Hopper. Nothing is computed. Each case is a process of its own; rows are kept as they come, and a case that fails is a
row that says why. ``--case NAME`` runs one and prints its row.
"""

from __future__ import annotations

import dataclasses
import functools
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
sys.path.insert(0, str(ROOT / "tests"))
OUTPUT = ROOT / "docs" / "measurements" / "lowered_census.json"

err = Console(stderr=True, highlight=False)

HUNYUAN, GPUS = "hunyuan_video", ("h100", "b200", "l40s")
"""One GPU of each architecture with float8: sm_90, sm_100, sm_89."""
FAMILIES = (
    *("hunyuan_video_i2v_concat", "hunyuan_video_i2v_replace", "hunyuan_video_framepack"),
    *("cogvideox", "mochi", "wan_t2v", "ltx", "flux_guided", "qwen_image"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A family, a way to compile it, and for what."""

    family: str
    way: str
    gpu: str = "h100"
    ranks: int = 1
    mode: str | None = None
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """As it stands in the table."""
        ranks = f", {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{self.family}, {self.way}, {self.gpu}{ranks}"


OFF = ("first_block_cache", False)
WAYS: tuple[functools.partial[Case], ...] = (
    functools.partial(Case, way="exact", mode="exact"),
    functools.partial(Case, way="cache", options=(("fp8", False),)),
    functools.partial(Case, way="forecast", options=(("fp8", False), ("first_block_cache", {"forecast": 2}))),
    functools.partial(Case, way="float8 by row", options=(("fp8", {"keep_last_blocks": 0}), OFF)),
    functools.partial(
        Case, way="float8 by tensor", options=(("fp8", {"granularity": "tensor", "keep_last_blocks": 0}), OFF)
    ),
    functools.partial(Case, way="default"),
    functools.partial(Case, way="max", mode="max"),
)
SHARDED: tuple[functools.partial[Case], ...] = (
    functools.partial(Case, way="Ulysses", ranks=2),
    functools.partial(Case, way="ring", ranks=2, options=(("context_parallel", {"ring": 2}),)),
    functools.partial(Case, way="2 x 2", ranks=4, options=(("context_parallel", {"ulysses": 2, "ring": 2}),)),
)
CASES: tuple[Case, ...] = (
    *(way(family=HUNYUAN, gpu=gpu) for gpu in GPUS for way in WAYS),
    *(way(family=HUNYUAN) for way in SHARDED),
    *(way(family=family) for family in FAMILIES for way in WAYS if way.keywords["way"] in {"default", "max"}),
)


def model_and_inputs(family: str) -> tuple[Any, dict[str, Any]]:
    """A tiny model of a family on the meta device, in bfloat16, its heads as wide as a GPU's kernels take them."""
    import torch
    import zoo

    if family == HUNYUAN:
        from diffusers import HunyuanVideoTransformer3DModel

        config = zoo.hunyuan_video_config(2, 4, 256) | {"num_attention_heads": 4, "attention_head_dim": 64}
        config["rope_axes_dim"] = (16, 24, 24)
        with torch.device("meta"):
            model: Any = HunyuanVideoTransformer3DModel(**config)
        inputs = zoo.inputs_hunyuan_video()
        inputs["hidden_states"] = torch.empty(1, 4, 5, 24, 40)
    else:
        known = zoo.FAMILIES[family]
        model, inputs = known.build(), known.inputs()
    model = model.eval().to(torch.bfloat16)

    def moved(held: Any) -> Any:
        if isinstance(held, torch.Tensor):
            device = next(model.parameters()).device
            return held.to(device, torch.bfloat16 if held.is_floating_point() else held.dtype)
        return [moved(item) for item in held] if isinstance(held, list) else held

    return model, {name: moved(held) for name, held in inputs.items()}


def measured(case: Case) -> Row:
    """The row of one case."""
    import hvcompile
    from hvcompile.lowered import walk

    model, inputs = model_and_inputs(case.family)
    lowered = hvcompile.lower(
        model,
        **inputs,
        return_dict=False,
        mode=case.mode,
        options=dict(case.options),
        ranks=case.ranks,
        device=case.gpu,
    )
    kinds = (walk.TRITON, walk.LIBRARY, walk.COPY, walk.SYNC, walk.COLLECTIVE)
    return {
        "name": case.name,
        "passes": [row.name for row in lowered.journal if row.report.applied],
        "declined": {
            row.name: row.report.declined[0][1]
            for row in lowered.journal
            if not row.report.applied and row.report.declined
        },
        "kernels": len(lowered.kernels),
        "failures": [list(item) for item in lowered.failures],
        "spilling": [kernel.name for kernel in lowered.spilling],
        "computed": {kind: lowered.computed.count(kind) for kind in kinds},
        "reused": None if lowered.reused is None else {kind: lowered.reused.count(kind) for kind in kinds},
        "at once": sum(launches == 0 for _, launches in lowered.computed.overlaps()),
        "seconds": round(lowered.seconds, 1),
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as a page."""
    lines = [
        "# Small models, compiled for GPUs that were not there",
        "",
        "Tiny configurations in bfloat16. Written by `python benchmarks/lowered_census.py`. Nothing was computed. "
        "Launches are those of a computed step, and in brackets of one that reuses.",
        "",
        "| case | passes | Triton kernels | library calls | copies | synchronisations "
        "| collectives [waited for at once] | kernels compiled, failed, spilling | s compiling |",
        "|---|---|---:|---:|---:|---:|---:|---|---:|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['error']} | | | | | | | |")
            continue
        counts = [str(number) for number in row["computed"].values()]
        if row["reused"]:
            counts = [f"{one} ({other})" for one, other in zip(counts, row["reused"].values(), strict=True)]
        made = f"{row['kernels']}, {len(row['failures'])}, {len(row['spilling'])}"
        passes = ", ".join(name for name in row["passes"] if name != "outline")
        cells = [row["name"], passes or "none", *counts[:4], f"{counts[4]} [{row['at once']}]", made]
        lines.append(f"| {' | '.join(cells)} | {row['seconds']:.0f} |")
    return "\n".join([*lines, ""])


def main(
    case: Annotated[str | None, typer.Option(help="Run this case alone, and print its row as JSON.")] = None,
    only: Annotated[str, typer.Option(help="Cases whose names hold this.")] = "",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure all again.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a case.")] = 600.0,
    output: Annotated[Path, typer.Option(help="The rows (.json); a table (.md) goes beside it.")] = OUTPUT,
) -> None:
    """Compile every case, and write the table."""
    if case is not None:
        chosen = [item for item in CASES if item.name == case]
        if not chosen:
            raise typer.BadParameter(f"--case {case!r} is none of {'; '.join(item.name for item in CASES)}")
        sys.stdout.write(json.dumps(measured(chosen[0])) + "\n")
        return
    rows = {} if fresh else read(output)
    for item in CASES:
        if only not in item.name or (item.name in rows and "error" not in rows[item.name]):
            continue
        rows[item.name] = _row(item, timeout)
        err.print(f"{item.name}: {rows[item.name].get('error', 'compiled')}", soft_wrap=True, markup=False)
        write(output, [rows[known.name] for known in CASES if known.name in rows], 0.0, table)


def _row(case: Case, timeout: float) -> Row:
    command = [sys.executable, __file__, "--case", case.name]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"name": case.name, "error": f"not done after {timeout:.0f} s"}
    if ran.returncode:
        last = next((line for line in reversed(ran.stderr.splitlines()) if line.strip(" │╰─╯")), "no word")
        return {"name": case.name, "error": last.strip()[:300]}
    found: Row = json.loads(ran.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    typer.run(main)
