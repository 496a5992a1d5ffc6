"""How long Dynamo's guards take before a step, with and without the look that hvfast puts before them, on the CPU.

``python benchmarks/guards.py`` prints milliseconds. Between two checks a reused step of the model runs, so that the
guards find the processor's caches as a step leaves them; checks of both kinds take turns. ``--dual 10 --single 20``
tries it out in less. Below 500 weights, and on torch 2.11, hvfast leaves Dynamo's guards as they are.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
DYNAMO, QUICK = "dynamo", "quick"

out = Console(highlight=False)


def check_of(model: torch.nn.Module, guards: str, given: dict[str, Any]) -> Callable[[], bool]:
    """What Dynamo does before a call of the compiled model: all its guards, with the inputs given."""
    from torch._dynamo import guards as dynamo_guards

    made: list[Callable[[], bool]] = []

    def keep(manager: Any, scope: dict[str, Any], _: Any) -> None:
        variables = dict(scope)
        made.append(lambda: bool(manager.root.check(variables)))

    dynamo_guards.guard_manager_testing_hook_fn = keep
    try:
        options: Any = {"lower": "eager", "mode": "exact", "guards": guards}
        torch.compile(model, backend="hvfast", fullgraph=True, options=options)(**given)
    finally:
        dynamo_guards.guard_manager_testing_hook_fn = None
    return made[-1]


def milliseconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def main(
    dual: Annotated[int, typer.Option(min=1, help="dual-stream blocks")] = 20,
    single: Annotated[int, typer.Option(min=0, help="single-stream blocks")] = 40,
    width: Annotated[int, typer.Option(min=16, help="channels, a multiple of 16")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="checks of each kind")] = 200,
) -> None:
    """Measure and print."""
    sys.path.insert(0, str(ROOT / "tests"))
    import zoo  # type: ignore[import-not-found, unused-ignore]  # no package: it lies beside the tests that use it

    torch.set_num_threads(1)
    model = zoo.build_hunyuan_video(num_layers=dual, num_single_layers=single, width=width)
    given = zoo.inputs_hunyuan_video()
    options: Any = {
        "first_block_cache": {"threshold": 1e6},
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
    }
    step = torch.compile(model, backend="hvfast", fullgraph=True, options=options)
    with torch.no_grad():
        checks = {guards: check_of(model, guards, given) for guards in (DYNAMO, QUICK)}
        for _ in range(3):
            step(**given)
        taken: dict[str, list[float]] = {"a step without guards on the model": []}
        for _ in range(repeats):
            for guards, check in checks.items():
                step(**given)
                taken.setdefault(f"guards, {guards}", []).append(milliseconds(check))
                if not check():
                    raise RuntimeError("guards failed, so what was measured is not a check of all of them")
            taken["a step without guards on the model"].append(milliseconds(lambda: step(**given)))
    weights = sum(1 for _ in model.parameters())
    table = Table(title=f"{dual}+{single} blocks, {weights} weights, width {width}, torch {torch.__version__}: ms")
    for heading in ("", "min", "median", "median / dynamo"):
        table.add_column(heading, justify="right" if heading else "left")
    base = statistics.median(taken[f"guards, {DYNAMO}"])
    for name, times in taken.items():
        median = statistics.median(times)
        table.add_row(name, f"{min(times):.2f}", f"{median:.2f}", f"{median / base:.2f}")
    out.print(table)


if __name__ == "__main__":
    typer.run(main)
