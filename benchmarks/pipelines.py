"""Every tiny pipeline by Inductor: what the command line makes of it, beside what diffusers alone makes.

``python benchmarks/pipelines.py`` writes each pipeline of ``tests/tiny_pipelines.py`` to a directory with random
weights, and runs it in a process of its own: by diffusers without a compiler, with ``mode="exact"``, and as ``hvcompile
generate`` would by default, with two seeds. Rows go into a JSON file as they come, and a table stands beside it. A
second start skips what is there; ``--again`` runs it anew.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tables_of_rows
import typer
from tables_of_rows import Row

ROOT = Path(__file__).resolve().parent.parent
JSON = ROOT / "docs" / "measurements" / "pipelines_cpu.json"
BOUND = 1e-4
"""Of the largest difference of a pixel, whose values are from 0 to 1."""


def measure(name: str, folder: Path) -> Row:
    """A pipeline's row, and its files in ``folder``."""
    sys.path.insert(0, str(ROOT / "tests"))
    import numpy as np
    import tiny_pipelines

    from hvcompile.app import pipelines
    from hvcompile.app.batch import generate_all
    from hvcompile.app.denoisers import denoisers
    from hvcompile.app.generate import generate

    tiny = tiny_pipelines.PIPELINES[name]
    model = tiny_pipelines.write(name, folder)
    exact = tiny.request(model, folder, mode="exact", backend_settings=())
    loaded = pipelines.load(str(model))
    expected = tiny_pipelines.eager(loaded, exact)
    began = time.monotonic()
    result = generate(exact, loaded=loaded)
    seconds = time.monotonic() - began
    assert result.stats is not None
    loaded = pipelines.load(str(model))
    batch = generate_all(tiny.request(model, folder, seeds="0-1", backend_settings=()), loaded=loaded)
    assert batch.stats is not None
    runs = [clip.run for clip in batch.clips if clip.run is not None]
    return {
        "name": name,
        "pipeline": loaded.kind,
        "denoisers": [type(item).__name__ for item in denoisers(loaded.pipe).values()],
        "size": list(result.run.size),
        "steps": len(result.run.steps),
        "error": float(np.abs(result.run.frames - expected).max()),
        "graphs": result.stats.graphs,
        "recompiles": result.stats.recompiles,
        "pieces": [note for note in result.notes if "in pieces" in note],
        "errors_by_default": [clip.error for clip in batch.clips if clip.error is not None],
        "reused_by_default": [run.num_reused for run in runs],
        "cached": sum(
            bool(row.report.matched) for rows in batch.stats.journal for row in rows if row.name == "FirstBlockCache"
        ),
        "seconds_exact": round(seconds, 1),
    }


def in_a_process(name: str, folder: Path, limit_s: float) -> Row:
    """A pipeline's row from a process of its own, or what became of that."""
    file = folder / "row.json"
    command = [sys.executable, __file__, "--only", name, "--row-file", str(file), "--keep", str(folder)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "failed": f"ran past {limit_s:.0f} s"}
    if file.exists():
        row: Row = json.loads(file.read_text("utf-8"))
        file.unlink()
        return row
    last = (ended.stderr.strip().splitlines() or [""])[-1]
    return {"name": name, "failed": f"the process ended with {ended.returncode}: {last[:300]}"}


def is_right(row: Row) -> bool:
    """Whether the exact run was within the bound, and both default ones were made."""
    return "failed" not in row and row["error"] <= BOUND and not row["errors_by_default"]


def cells(row: Row) -> list[str]:
    """A row of the table."""
    if "failed" in row:
        return [row["name"], *["-"] * 7, row["failed"].replace("|", "\\|")]
    frames, height, width = row["size"]
    notes = [*row["pieces"], *row["errors_by_default"]]
    return [
        row["pipeline"] + (f" ({row['name']})" if row["name"] not in row["pipeline"].lower() else ""),
        " and ".join(dict.fromkeys(row["denoisers"])) + (" x 2" if len(row["denoisers"]) == 2 else ""),
        f"{frames} of {width}x{height}",
        "yes" if is_right(row) else "no",
        f"{row['error']:.1e}",
        f"{row['graphs']}, {row['recompiles']} more",
        ", ".join(f"{reused} of {row['steps']}" for reused in row["reused_by_default"]),
        f"{row['seconds_exact']:.0f}",
        "; ".join(note.replace("|", "\\|") for note in notes),
    ]


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown, after the count."""
    head = ["pipeline", "denoisers", "frames", "right", "error", "graphs", "reused by default", "seconds", "notes"]
    lines = [f"{sum(map(is_right, rows))} of {len(rows)} pipelines are right to {BOUND:g} of a pixel.", ""]
    lines += [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *map(cells, rows))]
    return "# Pipelines from the command line\n\n" + "\n".join(lines) + "\n"


def main(
    only: Annotated[list[str] | None, typer.Option(help="Pipelines by name; all without it.")] = None,
    limit_s: Annotated[float, typer.Option("--limit", help="Seconds that one may take.", min=1)] = 1200,
    again: Annotated[bool, typer.Option("--again", help="Run those anew that have a row already.")] = False,
    json_file: Annotated[Path, typer.Option("--json", help="Rows so far; the table lies beside it, as .md.")] = JSON,
    keep: Annotated[Path | None, typer.Option(help="Directory for the models, clips and sheets.")] = None,
    row_file: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the pipelines that have no row yet, one after the other, and write rows and table after each."""
    if row_file is not None:
        assert only is not None
        assert keep is not None
        row_file.write_text(json.dumps(measure(only[0], keep)), "utf-8")
        return
    sys.path.insert(0, str(ROOT / "tests"))
    import tiny_pipelines

    known = list(tiny_pipelines.PIPELINES)
    if unknown := set(only or ()) - set(known):
        raise typer.BadParameter(f"none is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    rows = tables_of_rows.read(json_file)
    with tempfile.TemporaryDirectory() as scratch:
        folder = keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in only or known:
            if name in rows and not again:
                continue
            rows[name] = in_a_process(name, folder, limit_s)
            tables_of_rows.write(json_file, [rows[key] for key in known if key in rows], BOUND, table)
            print(" | ".join(cells(rows[name])), flush=True)


if __name__ == "__main__":
    typer.run(main)
