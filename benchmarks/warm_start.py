"""How long a process takes until its first step is done: cold, warm, and from artifacts in a directory of its own.

``python benchmarks/warm_start.py`` starts processes one after the other, each new, on one thread of the CPU: the first
compiles, in an empty cache directory, and saves artifacts; the second has the first one's directory; the third has an
empty one, into which it loads the artifacts. The models are the transformer of the embedded tiny pipeline, at the size
that it was trained on, and a HunyuanVideo of 20+40 blocks of little width. Rows go into a JSON file, and a table stands
beside it. ``--only`` takes models by name, ``--dual 1 --single 2`` tries the second out in less.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tables_of_rows
import typer
from tables_of_rows import Row

ROOT = Path(__file__).resolve().parent.parent
JSON = ROOT / "docs" / "measurements" / "warm_start_cpu.json"
TINY, DEEP = "tiny pipeline", "20+40 blocks"
COLD, WARM, SHIPPED = "cold", "warm", "shipped"
PARTS = {
    "imports": "imports, and the model made",
    "dynamo": "Dynamo captures",
    "rewriting": "hvfast rewrites",
    "lowering": "AOTAutograd, Inductor and C++, or their caches",
    "guards": "Dynamo's guards",
    "rest": "the rest, and the step itself",
}


def model_and_inputs(name: str, dual: int, single: int) -> tuple[Any, dict[str, Any]]:
    """A model, and what a call of it is given, fresh from a seed."""
    import torch

    if name == TINY:
        from hvcompile.app import pipelines

        model = pipelines.load(device="cpu").pipe.transformer
        config, draw = model.config, torch.Generator().manual_seed(1)
        mask = torch.zeros(1, 256, dtype=torch.long)
        mask[:, :11] = 1
        return model, {
            "hidden_states": torch.randn(1, config.in_channels, 5, 4, 6, generator=draw),
            "timestep": torch.tensor([900.0]),
            "encoder_hidden_states": torch.randn(1, 256, config.text_embed_dim, generator=draw),
            "encoder_attention_mask": mask,
            "pooled_projections": torch.randn(1, config.pooled_projection_dim, generator=draw),
            "guidance": torch.tensor([6000.0]),
            "return_dict": False,
        }
    sys.path.insert(0, str(ROOT / "tests"))
    import zoo  # type: ignore[import-not-found, unused-ignore]  # no package: it lies beside the tests that use it

    return zoo.build_hunyuan_video(num_layers=dual, num_single_layers=single, width=32), zoo.inputs_hunyuan_video()


def timed(owner: Any, name: str, spent: dict[str, float], part: str) -> None:
    """Have the seconds of a function added to a part."""
    function: Callable[..., Any] = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] = spent.get(part, 0.0) + time.perf_counter() - start

    setattr(owner, name, run)


def work(name: str, kind: str, artifacts: str, dual: int, single: int) -> Row:
    """One process: its seconds, part by part, and what its steps computed, as the sum and the squares' sum."""
    start = time.perf_counter()
    import torch

    torch.set_num_threads(1)
    import hvcompile
    from hvcompile import backend
    from hvcompile.torch_private.caching import lookups

    model, given = model_and_inputs(name, dual, single)
    spent = {"imports": time.perf_counter() - start}
    for function, part in {"hvfast": "backend", "lower": "lowering"}.items():
        timed(backend, function, spent, part)
    timed(torch._dynamo.guards.CheckFunctionManager, "__init__", spent, "guards")
    step: Any = torch.compile(model, backend=backend.hvfast, fullgraph=True, dynamic=False)
    refused = ""
    begin = time.perf_counter()
    if kind == SHIPPED:
        refused = hvcompile.load_artifacts(artifacts).refused
    with torch.no_grad():
        first = step(**given)[0].double()
        total = time.perf_counter() - begin
        second = step(**given)[0].double()
        eager = model(**given)[0].double()
    traced = sum(torch._dynamo.utils.compilation_time_metrics["bytecode_tracing"])
    if kind == COLD:
        hvcompile.save_artifacts(artifacts)
    spent["rewriting"] = spent.pop("backend") - spent["lowering"]
    spent["dynamo"] = traced
    spent["rest"] = total - traced - spent["rewriting"] - spent["lowering"] - spent["guards"]
    return {
        "first_step": total,
        "parts": {part: spent[part] for part in PARTS},
        "results": [float(item) for made in (first, second) for item in (made.sum(), made.square().sum())],
        "error": float((first - eager).abs().max() / eager.abs().max()),
        "compiled_code": dataclasses.asdict(lookups()),
        "refused": refused,
    }


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown."""
    head = ["model", "process", "seconds until the first step is done", "of the cold one's", *PARTS.values()]
    head += ["graphs found", "results as the cold one's"]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join(['---', '---', *['---:'] * (len(head) - 3), '---'])} |"]
    for row in rows:
        cold = next(one for one in rows if one["model"] == row["model"] and one["kind"] == COLD)
        share = f"{row['first_step'] / cold['first_step']:.3f}"
        cells = [row["model"], row["kind"], f"{row['first_step']:.2f}", share]
        cells += [f"{row['parts'][part]:.2f}" for part in PARTS]
        cells += [str(row["compiled_code"]["found"]), "yes" if row["results"] == cold["results"] else "NO"]
        lines.append(f"| {' | '.join(cells)} |")
    return (
        "# Warm starts\n\nSeconds until the first step is done are from the call of the compiled model to its end, "
        "loading artifacts included; imports come before. One thread of the CPU, every process new.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def main(
    only: Annotated[list[str] | None, typer.Option(help="Models by name; all without it.")] = None,
    dual: Annotated[int, typer.Option(min=1, help="Dual-stream blocks of the second model.")] = 20,
    single: Annotated[int, typer.Option(min=0, help="Single-stream blocks of it.")] = 40,
    json_file: Annotated[Path, typer.Option("--json", help="Rows so far; the table lies beside it, as .md.")] = JSON,
    worker: Annotated[str | None, typer.Option(hidden=True, help="One process: model, kind, and artifacts.")] = None,
) -> None:
    """Measure, write rows and table, and print the table."""
    if worker is not None:
        name, kind, artifacts = worker.split("|")
        print(json.dumps(work(name, kind, artifacts, dual, single)))
        return
    rows = tables_of_rows.read(json_file)
    for name in only or (TINY, DEEP):
        with tempfile.TemporaryDirectory(prefix="hvcompile-") as directory:
            for kind, cache in ((COLD, "first"), (WARM, "first"), (SHIPPED, "second")):
                task = f"{name}|{kind}|{Path(directory, 'artifacts')}"
                command = [sys.executable, __file__, "--worker", task, "--dual", str(dual), "--single", str(single)]
                own = {"TORCHINDUCTOR_CACHE_DIR": str(Path(directory, cache)), "OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, env=os.environ | own, stdout=subprocess.PIPE, text=True, check=True)
                row = {
                    "name": f"{name}, {kind}",
                    "model": name,
                    "kind": kind,
                    **json.loads(done.stdout.splitlines()[-1]),
                }
                rows[row["name"]] = row
                tables_of_rows.write(json_file, list(rows.values()), 1e-4, table)
    print(table(list(rows.values())))


if __name__ == "__main__":
    typer.run(main)
