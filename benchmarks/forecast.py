"""What a forecast costs: a reused step and its state, beside a step that repeats and one that computes all blocks.

``python benchmarks/forecast.py`` compiles one model of 20 dual and 40 single blocks for each setting of the cache, and
takes the time of reused and computed steps of all of them in turn, in one process and one thread. Only the ratios mean
anything. They are the medians over the rounds. It prints a table and writes all figures as JSON.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from core import COMPUTED, REUSED, Depth, build, hvfast, inputs, token_grid
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, dict[str, Any]] = {
    "repeats": {},
    "forecast 1": {"forecast": 1},
    "forecast 2": {"forecast": 2},
    "forecast 2, decided by error": {"forecast": 2, "decide_by": "error"},
}
"""Fields of the cache, by what the table calls them."""

WARM_UP = 4
"""Steps that are taken before any is timed: they compile, and compute all that a forecast goes on along."""

out = Console(highlight=False)


def prepared(depth: Depth, width: int, given: dict[str, Any], **cache: Any) -> dict[str, Any]:
    """Compiled models of one setting, warm: one that reuses whatever can be, and one that reuses nothing."""
    thresholds = {REUSED: 1e9, COMPUTED: 0.0}
    steps = {kind: hvfast(build(depth, width), threshold=most, **cache) for kind, most in thresholds.items()}
    for call in steps.values():
        for step in range(WARM_UP):
            timed(call, given, step)
    return steps


def timed(call: Any, given: dict[str, Any], step: int) -> float:
    """Seconds of one call at a step of a generation, whose timestep falls and whose sample moves."""
    import torch

    moved = given["hidden_states"] + 0.01 * step
    clock = given["timestep"] - step
    start = time.perf_counter()
    with torch.no_grad():
        call(**{**given, "timestep": clock, "hidden_states": moved})
    return time.perf_counter() - start


def main(
    dual: Annotated[int, typer.Option(min=1, help="Dual-stream blocks.")] = 20,
    single: Annotated[int, typer.Option(min=1, help="Single-stream blocks.")] = 40,
    width: Annotated[int, typer.Option(min=16, help="Of the model.")] = 128,
    tokens: Annotated[int, typer.Option(min=4, help="Of the video, about.")] = 978,
    rounds: Annotated[int, typer.Option(min=1, help="Each takes a step of every setting.")] = 20,
    to: Annotated[Path, typer.Option("--json", help="Where the figures go.")] = (
        ROOT / "docs" / "measurements" / "forecast_cost_cpu.json"
    ),
) -> None:
    """Measure what forecasting costs."""
    import torch

    import hvcompile

    torch.set_num_threads(1)
    given, calls = inputs(tokens), {}
    for name, cache in SETTINGS.items():
        calls[name] = prepared(Depth(dual=dual, single=single), width, given, **cache)
    seconds: dict[str, dict[str, list[float]]] = {name: {REUSED: [], COMPUTED: []} for name in SETTINGS}
    for step in range(WARM_UP, WARM_UP + rounds):
        for name, kinds in calls.items():
            for kind, call in kinds.items():
                seconds[name][kind].append(timed(call, given, step))
    rows = []
    table = Table(
        "setting", "state, kB", "reused step as repeating", "computed step as repeating", "reused as computed"
    )
    for name, kinds in calls.items():
        stats = {kind: hvcompile.stats(call) for kind, call in kinds.items()}
        hits, misses = stats[REUSED].hits, stats[COMPUTED].misses
        expected = (rounds + WARM_UP - 1, rounds + WARM_UP)
        if (hits, misses) != expected:
            raise RuntimeError(f"{name}: {hits} steps were reused and {misses} computed, of which {expected} were due")
        ratios = _ratios(seconds, name)
        table.add_row(name, f"{stats[REUSED].bytes / 1e3:.0f}", *(f"{ratio:.3f}" for ratio in ratios.values()))
        rows.append({"setting": name, "state_bytes": stats[REUSED].bytes, **ratios})
    record = {
        "command": shlex.join(["python", "benchmarks/forecast.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": f"{dual}+{single} blocks, width {width}, {math.prod(token_grid(tokens))} tokens, float32",
        "versions": {"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
        "load_average": os.getloadavg()[0],
        "rounds": rounds,
        "settings": rows,
        "seconds": seconds,
    }
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(record, indent=2) + "\n")
    out.print(table)
    out.print(f"written to {to}", soft_wrap=True)


def _ratios(seconds: dict[str, dict[str, list[float]]], name: str) -> dict[str, float]:
    """Of one setting's steps, each divided by what it is compared with in the same round; the medians."""

    def median(of: list[float], by: list[float]) -> float:
        return round(statistics.median(one / other for one, other in zip(of, by, strict=True)), 4)

    own, repeats = seconds[name], seconds["repeats"]
    return {
        "reused_as_repeats": median(own[REUSED], repeats[REUSED]),
        "computed_as_repeats": median(own[COMPUTED], repeats[COMPUTED]),
        "reused_as_computed": median(own[REUSED], own[COMPUTED]),
    }


if __name__ == "__main__":
    typer.run(main)
