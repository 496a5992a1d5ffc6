"""Adapters that come, go and change on a compiled model: what each call costs, and whether what follows is right.

``python benchmarks/lora.py`` takes each call of ``tests/lora_cases.py`` on a model of a few lines, four times: exact,
with the cache, with float8 linears, and on two ranks. ``--hunyuan-video`` takes a tiny HunyuanVideo. A step with
fresh noise follows each change, and an eager model with the same adapters gives what it must be. Rows go into a
JSON file, and a table stands beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tables_of_rows
import typer
from tables_of_rows import Row

ROOT = Path(__file__).resolve().parent.parent
JSON = ROOT / "docs" / "measurements" / "lora_cpu.json"
sys.path.insert(0, str(ROOT / "tests"))

import lora_cases  # noqa: E402
import ranks  # noqa: E402


def measure(names: Sequence[str], mode: str, lower: str, build: Callable[[], Any]) -> Iterator[Row]:
    """Rows of some calls; of two ranks the worse one's, which are there when all are."""
    if mode != "two ranks":
        rows = ([lora_cases.measure(name, mode, lower, build)] for name in names)
    else:
        how = (names, mode, lower, build)
        found = ranks.results(ranks.launch(lora_cases.measure_all, 2, *how, group_timeout=900, limit=3600))
        rows = (list(pair) for pair in zip(*found, strict=True))
    for pair in rows:
        row = max(pair, key=lambda one: float(one["error"]))
        yield {
            "name": f"{row['call']}, {mode}",
            "lower": lower,
            **row,
            "recompiles": max(one["recompiles"] for one in pair),
        }


def is_right(row: Row) -> bool:
    """Whether a row is what ``tests/lora_cases.py`` says, within the mode's bound, and no stale step was reused."""
    is_fresh = row["reused_after_a_change"] == 0
    is_close = row["error"] <= lora_cases.BOUNDS[row["mode"]]
    return is_fresh and is_close and bool(row["recompiles"] == lora_cases.CALLS[row["call"]].expected(row["mode"]))


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown, after the count."""
    head = ["call", "mode", "changes", "graphs", "recompiles", "error", "effect", "weights", "right"]
    lines = [
        f"{sum(map(is_right, rows))} of {len(rows)} rows are right: as many compilations as expected, every step is "
        "within 1e-4 (float8 1e-2) of eager with the same adapters, and none reused that was cached before a change. "
        "*Error* is the largest. *Effect* is how far the least of the changes moves what the model computes. *Weights* "
        "is the most memory that weights, adapters and float8 copies hold after a step or a change.",
        "",
        f"| {' | '.join(head)} |",
        f"| {' | '.join(['---'] * len(head))} |",
    ]
    for row in rows:
        cells = [row["call"], row["mode"], row["changes"], row["graphs"], row["recompiles"], f"{row['error']:.1e}"]
        cells += [f"{row['effect']:.2f}", f"{row['most_bytes'] / 2**10:.0f} KiB", "yes" if is_right(row) else "no"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "# Adapters\n\n" + "\n".join(lines) + "\n"


def main(
    only: Annotated[list[str] | None, typer.Option(help="Modes by name; all without it.")] = None,
    hunyuan_video: Annotated[
        bool, typer.Option("--hunyuan-video", help="Of diffusers, rather than a model of a few lines.")
    ] = False,
    lower: Annotated[str, typer.Option(help='"inductor", "aot" or "eager".')] = "eager",
    again: Annotated[bool, typer.Option("--again", help="Measure those anew that have a row already.")] = False,
    json_file: Annotated[Path, typer.Option("--json", help="Rows so far; the table lies beside it, as .md.")] = JSON,
) -> None:
    """Measure the rows that are not there yet, one after the other, and write rows and table after each."""
    if unknown := set(only or ()) - set(lora_cases.MODES):
        raise typer.BadParameter(f"none is called {', '.join(unknown)}; there are {', '.join(lora_cases.MODES)}")
    rows = tables_of_rows.read(json_file)
    build = lora_cases.model if hunyuan_video else lora_cases.small
    known = [f"{name}, {mode}" for name in lora_cases.CALLS for mode in lora_cases.MODES]
    for mode in only or lora_cases.MODES:
        wanted = [name for name in lora_cases.CALLS if again or f"{name}, {mode}" not in rows]
        for row in measure(wanted, mode, lower, build) if wanted else ():
            rows[row["name"]] = row
            tables_of_rows.write(json_file, [rows[key] for key in known if key in rows], 1e-4, table)
            print(row["name"], "right" if is_right(row) else f"WRONG {row}", flush=True)


if __name__ == "__main__":
    typer.run(main)
