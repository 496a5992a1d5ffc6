"""Adapters that come, go and change on a compiled model: what each call costs, and whether what follows is right.

``python benchmarks/lora.py`` takes each call of ``tests/lora_cases.py`` on a tiny HunyuanVideo, four times: exact, with
the cache, with float8 linears, and on two ranks. A step with fresh noise follows each change, and an eager model with
the same adapters gives what it must be. Rows go into a JSON file, and a table stands beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tables_of_rows
import typer
from tables_of_rows import Row

ROOT = Path(__file__).resolve().parent.parent
JSON = ROOT / "docs" / "measurements" / "lora_cpu.json"
sys.path.insert(0, str(ROOT / "tests"))

import lora_cases  # noqa: E402
import ranks  # noqa: E402


def measure(name: str, mode: str, lower: str) -> Row:
    """A row; of two ranks the worse one's."""
    if mode != "two ranks":
        row = lora_cases.measure(name, mode, lower)
    else:
        launched = ranks.launch(lora_cases.measure_all, 2, [name], mode, lower, group_timeout=900, limit=1800)
        rows = [found[0] for found in ranks.results(launched)]
        row = max(rows, key=lambda found: float(found["error"]))
        row["recompiles"] = max(found["recompiles"] for found in rows)
    return {"name": f"{name}, {mode}", "lower": lower, **row}


def is_right(row: Row) -> bool:
    """Whether a row is what ``tests/lora_cases.py`` says, within the mode's bound, and no stale step was reused."""
    is_fresh = row["reused_after_a_change"] == 0
    is_close = row["error"] <= lora_cases.BOUNDS[row["mode"]]
    return is_fresh and is_close and bool(row["recompiles"] == lora_cases.CALLS[row["call"]].recompiles)


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown, after the count."""
    head = ["call", "mode", "changes", "graphs", "recompiles", "error", "effect", "weights", "right"]
    lines = [
        f"{sum(map(is_right, rows))} of {len(rows)} rows are right: as many compilations as expected, every step is "
        "within 1e-4 (float8 1e-2) of eager with the same adapters, and none reused that was cached before a change. "
        "*Error* is the largest. *Effect* is how far the least of the changes moves what the model computes. *Weights* "
        "is the most memory that weights, adapters and float8 copies hold before, after and between the steps.",
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
    lower: Annotated[str, typer.Option(help='"inductor", "aot" or "eager".')] = "eager",
    again: Annotated[bool, typer.Option("--again", help="Measure those anew that have a row already.")] = False,
    json_file: Annotated[Path, typer.Option("--json", help="Rows so far; the table lies beside it, as .md.")] = JSON,
) -> None:
    """Measure the rows that are not there yet, one after the other, and write rows and table after each."""
    if unknown := set(only or ()) - set(lora_cases.MODES):
        raise typer.BadParameter(f"none is called {', '.join(unknown)}; there are {', '.join(lora_cases.MODES)}")
    rows = tables_of_rows.read(json_file)
    known = [(name, mode) for name in lora_cases.CALLS for mode in lora_cases.MODES]
    for name, mode in known:
        key = f"{name}, {mode}"
        if (only and mode not in only) or (key in rows and not again):
            continue
        rows[key] = measure(name, mode, lower)
        ordered = [rows[key] for key in (f"{name}, {mode}" for name, mode in known) if key in rows]
        tables_of_rows.write(json_file, ordered, 1e-4, table)
        print(key, "right" if is_right(rows[key]) else f"WRONG {rows[key]}", flush=True)


if __name__ == "__main__":
    typer.run(main)
