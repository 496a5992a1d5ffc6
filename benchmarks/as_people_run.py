"""Adapters, offloading and quantised checkpoints, each exact, with the cache, with float8 and on two ranks.

``python benchmarks/as_people_run.py`` runs tiny models afresh: every call of ``tests/lora_cases.py`` and
``tests/people_cases.py``. It writes the rows as JSON and a table beside them, and leaves with 1 where one is not right.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import lora
import tables_of_rows
import typer
from tables_of_rows import Row

ROOT = Path(__file__).resolve().parent.parent
JSON = ROOT / "docs" / "measurements" / "as_people_run_cpu.json"
sys.path.insert(0, str(ROOT / "tests"))

import lora_cases  # noqa: E402
import people_cases  # noqa: E402
import ranks  # noqa: E402

ADAPTERS = (
    "`load_lora_adapter` on a model compiled without",
    "`set_adapters`: other scales",
    "`disable_lora`, `enable_lora`",
    "`hotswap=True`, ten in a row",
    "`hvcompile.restore`, `fuse_lora`, `unfuse_lora`",
)


def adapters(mode: str, lower: str) -> Iterator[Row]:
    """Rows of the calls that change adapters; see ``lora.py`` for all of these."""
    for row in lora.measure(ADAPTERS, mode, lower, lora_cases.small):
        yield {**row, "refused": None, "peak_bytes": row["most_bytes"], "right": lora.is_right(row)}


def others(mode: str, lower: str) -> Iterator[Row]:
    """Rows of all other calls; of two ranks the one that is refused, or further from eager."""
    names = list(people_cases.CALLS)
    if mode == "two ranks":
        how = (names, mode, lower)
        found = ranks.results(ranks.launch(people_cases.measure_all, 2, *how, group_timeout=900, limit=3600))
    else:
        found = [people_cases.measure_all(names, mode, lower)]
    for rows in zip(*found, strict=True):
        row = max(rows, key=lambda one: (one["refused"] is not None, one.get("error", 0.0)))
        yield {**row, "right": all(map(people_cases.is_right, rows))}


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown, after the count."""
    import diffusers
    import torch

    head = ["call", "mode", "graphs", "recompiles", "error", "weights on the device", "right"]
    lines = [
        "# As people run it",
        "",
        f"`python benchmarks/as_people_run.py`, torch {torch.__version__}, diffusers {diffusers.__version__}, tiny "
        "models, graphs run eagerly unless the JSON file says otherwise.",
        "",
        f"{sum(row['right'] for row in rows)} of {len(rows)} rows are right: within 1e-4 (float8 1e-2) of eager with "
        "the same adapters, weights or hooks, compiled as often as expected, and the mode's pass applied; or refused "
        "where it can't be, with the error's first line here. *Recompiles* are those after the first call. *Weights on "
        "the device* are counted in bytes on the CPU: what parameters, buffers, adapters and float8 copies hold after "
        "a step, and the most that a graph brings beside them from the host. With hooks that move weights, the most "
        "that they hold there at once, in the eager model. Float8's own error grows with the depth of these untrained "
        "models: 5 blocks are within 1e-2, and 8 were at 1.1e-2 in all rows.",
        "",
        f"| {' | '.join(head)} |",
        f"| {' | '.join(['---'] * len(head))} |",
    ]
    for row in rows:
        cells: list[Any] = [row["call"], row["mode"]]
        if row["refused"] is None:
            cells += [row["graphs"], row["recompiles"], f"{row['error']:.1e}", f"{row['peak_bytes'] / 2**10:.0f} KiB"]
        else:
            cells += ["-", "-", "-", str(row["refused"]).replace("|", "\\|")]
        lines.append(f"| {' | '.join(map(str, [*cells, 'yes' if row['right'] else 'no']))} |")
    return "\n".join(lines) + "\n"


def main(
    lower: Annotated[str, typer.Option(help='"inductor", "aot" or "eager".')] = "eager",
    json_file: Annotated[Path, typer.Option("--json", help="The rows; the table lies beside it, as .md.")] = JSON,
) -> None:
    """Measure all rows, and write rows and table."""
    rows = [
        {"name": f"{row['call']}, {row['mode']}", "lower": lower, **row}
        for mode in lora_cases.MODES
        for part in (adapters, others)
        for row in part(mode, lower)
    ]
    order = [*ADAPTERS, *people_cases.CALLS]
    rows.sort(key=lambda row: order.index(row["call"]))
    tables_of_rows.write(json_file, rows, 1e-4, table)
    print(table(rows))
    if not all(row["right"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
