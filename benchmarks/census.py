"""Which transformers of diffusers run under hvfast, and what becomes of each: graphs, trunk, cache, error.

``python benchmarks/census.py`` runs a tiny model of every transformer class with random weights, each in a process of
its own, so that a crash costs one row. Rows go into a JSON file as they come, and a table stands beside it. A second
start skips what is there; ``--again`` runs it anew.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tables_of_rows
import typer
from tables_of_rows import Row

ROOT = Path(__file__).resolve().parent.parent
JSON = ROOT / "docs" / "measurements" / "census_cpu.json"
BOUND = 1e-4
"""Of the largest difference, relative to the largest value, in float32."""

Call = Callable[..., Any]


# What runs in a process of its own. Heavy imports stay in here: the parent only waits, and prints.


def families() -> Mapping[str, Any]:
    """Every model at hand by name: the tests' zoo, and what ``census_models`` adds."""
    for folder in (ROOT / "tests", ROOT / "benchmarks"):
        sys.path.insert(0, str(folder))
    import census_models
    import zoo  # type: ignore[import-not-found, unused-ignore]  # no package: it lies beside the tests that use it

    return {**zoo.FAMILIES, **census_models.FAMILIES}


def tensors(output: Any) -> Iterator[Any]:
    """The tensors of a model's output, in order."""
    import torch

    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, list | tuple):
        for item in output:
            yield from tensors(item)


def relative_error(actual: Any, expected: Any) -> float:
    """The largest difference of any tensor of an output, relative to that tensor's largest value; NaN where one is."""
    found, wanted = list(tensors(actual)), list(tensors(expected))
    if [item.shape for item in found] != [item.shape for item in wanted]:
        return float("inf")
    errors = [
        float((one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-30))
        for one, other in zip(found, wanted, strict=True)
    ]
    return float("nan") if any(map(math.isnan, errors)) else max(errors, default=float("nan"))


def repeated(inputs: Any, times: int) -> Any:
    """Inputs of one sample as those of a batch of the same: what has one row gets several."""
    import torch

    if isinstance(inputs, torch.Tensor):
        is_row = inputs.ndim > 0 and inputs.shape[0] == 1
        return torch.cat([inputs] * times) if is_row else inputs
    if isinstance(inputs, list | tuple):
        return type(inputs)(repeated(item, times) for item in inputs)
    return {key: repeated(item, times) for key, item in inputs.items()} if isinstance(inputs, dict) else inputs


def reason(error: BaseException) -> str:
    """An error in one line: what was raised, and the first line that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.rstrip().endswith("raised:")]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def call(model: Call, inputs: Mapping[str, Any]) -> Any:
    """A call as pipelines make it."""
    import torch

    with torch.no_grad():
        return model(**inputs, return_dict=False)


def compiled(family: Any, lower: str, **how: Any) -> tuple[Any, Any]:
    """A fresh model, and the same compiled."""
    import torch

    torch.compiler.reset()
    model = family.build()
    options: dict[str, Any] = {"lower": lower}
    return model, torch.compile(model, backend="hvfast", options=options, **how)


def runs_whole(family: Any, lower: str, inputs: Mapping[str, Any], row: Row) -> tuple[Any, Any, Any]:
    """A model and its compiled self after a first call, and that call's output; in pieces where one graph fails.

    Some models make tables at their first call, in a way that Dynamo can't trace, so a call without it may come first.
    A model in pieces runs with the switch that docs/how_it_works.md names for such models.
    """
    import torch

    for is_warm in (False, True):
        model, fast = compiled(family, lower, fullgraph=True)
        try:
            if is_warm:
                call(model, inputs)
            output = call(fast, inputs)
        except Exception as error:
            row.setdefault("why_not_whole", reason(error))
        else:
            row["whole"], row["warm"] = True, is_warm
            return model, fast, output
    row["whole"] = row["warm"] = False
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    model, fast = compiled(family, lower)
    return model, fast, call(fast, inputs)


def journal(stats: Any, row: Row) -> None:
    """What was found and done, of all graphs: the trunks' lists, and the cache or why there is none."""
    outlined = [item for rows in stats.journal for item in rows if item.name == "outline"]
    caches = [item.report for rows in stats.journal for item in rows if item.name == "FirstBlockCache"]
    row["trunk"] = sorted({text for item in outlined for text in item.report.matched})
    if not row["trunk"]:
        row["why_no_trunk"] = sorted({why for item in outlined for _, why in item.report.declined})
    row["cache"] = any(report.matched for report in caches)
    if not row["cache"]:
        row["why_no_cache"] = sorted({why for report in caches for _, why in report.declined})
    row["graphs"], row["recompiles"], row["unfit"] = stats.graphs, stats.recompiles, stats.unfit


def static(family: Any, lower: str, row: Row) -> None:
    """The first call, the same again, and other inputs, each against the model itself."""
    import hvcompile

    first, other = family.inputs(seed=3), family.inputs(seed=4)
    model, fast, output = runs_whole(family, lower, first, row)
    expected = call(model, first)
    row["computed_error"] = relative_error(output, expected)
    row["again_error"] = relative_error(call(fast, first), expected)
    stats = hvcompile.stats(fast)
    row["reused"] = any(step.reused for step in stats.steps)
    row["other_error"] = relative_error(call(fast, other), call(model, other))
    journal(stats, row)


def dynamic(family: Any, lower: str, row: Row) -> None:
    """With ``dynamic=True``: batches of two and three where the model takes them, else the one shape."""
    import hvcompile

    inputs = family.inputs(seed=3)
    shapes = [repeated(inputs, times) for times in (2, 3)]
    model = family.build()
    expected = call(model, inputs)
    try:
        wanted = [call(model, item) for item in shapes]
        is_batched = (
            all(
                relative_error(one[:1], whole[:1]) < BOUND
                for batch in wanted
                for one, whole in zip(tensors(batch), tensors(expected), strict=True)
            )
            and next(tensors(wanted[0])).shape != next(tensors(expected)).shape
        )
    except Exception:
        is_batched = False
    if not is_batched:
        shapes, wanted = [inputs], [expected]
    row["dynamic_shapes"] = len(shapes)
    warmed, fast = compiled(family, lower, fullgraph=row["whole"], dynamic=True)
    if row.get("warm"):
        call(warmed, inputs)
    row["dynamic_error"] = max(
        relative_error(call(fast, item), want) for item, want in zip(shapes, wanted, strict=True)
    )
    row["dynamic_recompiles"] = hvcompile.stats(fast).recompiles


def measure(name: str, lower: str) -> Row:
    """A model's row; what fails stands in it as ``failed`` and ``dynamic_failed``."""
    began = time.monotonic()
    family = families()[name]
    row: Row = {"name": name, "class": type(family.build()).__name__, "lower": lower}
    try:
        call(family.build(), family.inputs(seed=3))
    except Exception as error:
        return {**row, "eager_failed": reason(error)}
    try:
        static(family, lower, row)
    except Exception as error:
        row["failed"] = reason(error)
    try:
        row.setdefault("whole", False)
        dynamic(family, lower, row)
    except Exception as error:
        row["dynamic_failed"] = reason(error)
    return {**row, "seconds": round(time.monotonic() - began, 1)}


# The parent.


def in_a_process(name: str, lower: str, limit_s: float) -> Row:
    """A model's row from a process of its own, or what became of that."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, __file__, "--lower", lower, "--only", name, "--row-file", str(file)]
        try:
            ended = subprocess.run(
                command,
                env={**os.environ, "PYTHONPATH": paths},
                capture_output=True,
                text=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"name": name, "lower": lower, "failed": f"ran past {limit_s:.0f} s"}
        if file.exists():
            return dict(json.loads(file.read_text("utf-8")))
        last = (ended.stderr.strip().splitlines() or [""])[-1]
        return {"name": name, "lower": lower, "failed": f"the process ended with {ended.returncode}: {last[:300]}"}


def is_right(row: Row) -> bool:
    """Whether every output was within the bound."""
    return all(row.get(f"{which}_error", float("inf")) <= BOUND for which in ("computed", "again", "other"))


def cells(row: Row) -> list[str]:
    """A row of the table."""
    if why := row.get("eager_failed") or (row.get("failed") if "trunk" not in row else None):
        return [row["name"], row["lower"], *["-"] * 6, why.replace("|", "\\|")]
    errors = [row[f"{which}_error"] for which in ("computed", "again", "other") if f"{which}_error" in row]
    notes = [row.get("failed"), row.get("dynamic_failed"), *row.get("why_no_trunk", ()), *row.get("why_no_cache", ())]
    notes += [row.get("why_not_whole"), f"{row['unfit']} calls in a graph of their own" if row["unfit"] else None]
    grew = row.get("dynamic_recompiles", 0)
    moved = f"yes, {row['dynamic_shapes']} shapes" if row.get("dynamic_error", float("inf")) <= BOUND else "no"
    return [
        row["name"],
        row["lower"],
        ("yes, after a call without" if row.get("warm") else "yes") if row["whole"] else f"no: {row['graphs']} graphs",
        "; ".join(text.split(":")[0] for text in row["trunk"]) or "none",
        ("reused" if row["reused"] else "there, not reused") if row["cache"] else "no",
        "yes" if is_right(row) else "no",
        f"{max(errors, default=float('nan')):.1e}",
        moved + (f", {grew} more graphs" if grew else ""),
        "; ".join(note.replace("|", "\\|") for note in notes if note),
    ]


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown, after the counts."""
    ran = [row for row in rows if "eager_failed" not in row]
    counts = {
        "run without a compiler": len(ran),
        "are one graph": sum(row.get("whole", False) for row in ran),
        "have a trunk": sum(bool(row.get("trunk")) for row in ran),
        "are cached": sum(row.get("cache", False) for row in ran),
        f"are right to {BOUND:g}": sum(map(is_right, ran)),
        "are right with dynamic=True": sum(row.get("dynamic_error", float("inf")) <= BOUND for row in ran),
    }
    head = ["model", "lowered by", "one graph", "trunk", "cache", "right", "error", "dynamic", "notes"]
    lowered = ", ".join(sorted({row["lower"] for row in rows}))
    lines = [
        f"{len(rows)} models, float32 on a CPU, run by {lowered}. Of these:",
        "",
        *(f"- {count} {what}" for what, count in counts.items()),
        "",
    ]
    lines += [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *map(cells, rows))]
    return "# Census of diffusers' transformers\n\n" + "\n".join(lines) + "\n"


def main(
    only: Annotated[list[str] | None, typer.Option(help="Models by name; all without it.")] = None,
    lower: Annotated[str, typer.Option(help="What runs the graph: inductor, aot or eager.")] = "inductor",
    limit_s: Annotated[float, typer.Option("--limit", help="Seconds that one model may take.", min=1)] = 1200,
    again: Annotated[bool, typer.Option("--again", help="Run models anew that have a row already.")] = False,
    json_file: Annotated[Path, typer.Option("--json", help="Rows so far; the table lies beside it, as .md.")] = JSON,
    row_file: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run the models that have no row yet, one after the other, and write rows and table after each."""
    if row_file is not None:
        assert only is not None
        row_file.write_text(json.dumps(measure(only[0], lower)), "utf-8")
        return
    known = families()
    if unknown := set(only or ()) - set(known):
        raise typer.BadParameter(f"no model is called {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    rows = tables_of_rows.read(json_file)
    for name in only or known:
        if name in rows and rows[name]["lower"] == lower and not again:
            continue
        rows[name] = in_a_process(name, lower, limit_s)
        tables_of_rows.write(json_file, [rows[key] for key in known if key in rows], BOUND, table)
        print(" | ".join(cells(rows[name])), flush=True)


if __name__ == "__main__":
    typer.run(main)
