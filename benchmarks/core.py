"""Two figures of the core, on the CPU: what compiling costs as a model gets deeper, and what a reused step costs.

``python benchmarks/core.py`` prints both and writes them as JSON. A missed bound is printed and recorded, and is no
error of this command. Seconds are wall clock: run it on a machine that does nothing else. At its defaults it takes
about half an hour on two cores; ``--dual 3 --single 5 --width 64 --tokens 256 --json FILE`` tries it out in less.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
DEPTH_BOUND = 1.5
"""Compile time of the deep model, over that of the shallow one, with Dynamo's own tracing left out."""
STEP_BOUND = 1.10
"""Time of a reused step over that of a model cut to one block."""
TOKEN_FRAMES = 4
CHANNELS = 4

DYNAMO, REGIONAL, INDUCTOR = "Dynamo alone", "compile_repeated_blocks", "Inductor, whole model"
HVFAST, HVFAST_OFF = "hvfast", "hvfast, cache off"
COMPILERS = (HVFAST, HVFAST_OFF, INDUCTOR, REGIONAL, DYNAMO)

REUSED, CUT, CUT_INDUCTOR = "hvfast, reused step", "one block, hvfast, cache off", "one block, Inductor"
COMPUTED, WHOLE, EAGER = "hvfast, computed step", INDUCTOR, "eager"

T = TypeVar("T")

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depth:
    """How many dual-stream and single-stream blocks a model has."""

    dual: int
    single: int

    def __str__(self) -> str:
        return f"{self.dual}+{self.single}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compilation:
    """What one cold compilation took.

    ``first_s`` is the first call, which compiles; ``second_s`` a call with another sample and timestep of the same
    shapes, which may compile again; ``third_s`` one more such call, a plain step. ``cpu_s`` is the processor time of
    the first two in the process itself, all threads, without the compilers that it starts.
    """

    compiler: str
    depth: str
    first_s: float
    second_s: float
    third_s: float
    cpu_s: float

    @property
    def seconds(self) -> float:
        """All that compiling costs a user: the first call and the second."""
        return self.first_s + self.second_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """A measured ratio beside the most that it may be."""

    claim: str
    ratio: float
    at_most: float

    @property
    def verdict(self) -> Literal["PASS", "FAIL"]:
        """Whether the ratio is within the bound; one that is no number is not."""
        return "PASS" if self.ratio <= self.at_most else "FAIL"

    def record(self) -> dict[str, Any]:
        """The bound as JSON."""
        return {**dataclasses.asdict(self), "verdict": self.verdict}


# What runs in a process of its own. Heavy imports stay in here: the parent only waits, and prints.


def build(depth: Depth, width: int) -> Any:
    """A HunyuanVideo transformer with random weights, the same for equal arguments: fp32, on the CPU."""
    sys.path.insert(0, str(ROOT / "tests"))
    import zoo  # type: ignore[import-not-found, unused-ignore]  # no package: it lies beside the tests that use it

    return zoo.build_hunyuan_video(num_layers=depth.dual, num_single_layers=depth.single, width=width)


def token_grid(tokens: int) -> tuple[int, int, int]:
    """Frames, rows and columns of video tokens, about ``tokens`` of them in all."""
    side = max(1, round(math.sqrt(tokens / TOKEN_FRAMES)))
    return TOKEN_FRAMES, side, side


def inputs(tokens: int) -> dict[str, Any]:
    """A call's keyword arguments, as a pipeline gives them."""
    import torch

    frames, rows, columns = token_grid(tokens)
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, CHANNELS, frames, 2 * rows, 2 * columns, generator=draw),
        "timestep": torch.tensor([900.0]),
        "encoder_hidden_states": torch.randn(1, 7, 16, generator=draw),
        "encoder_attention_mask": (torch.arange(7) < 5).to(torch.int64)[None],
        "pooled_projections": torch.randn(1, 8, generator=draw),
        "guidance": torch.tensor([6000.0]),
    }


def hvfast(model: Any, **cache: Any) -> Any:
    """A model compiled by this project: with no option the cache is off, else it has these."""
    import torch

    options: dict[str, Any] = {"first_block_cache": cache or False}
    return torch.compile(model, backend="hvfast", fullgraph=True, options=options)


def compile_with(compiler: str, model: Any) -> Any:
    """The model, to be compiled when it is called first."""
    import torch

    if compiler == REGIONAL:
        model.compile_repeated_blocks(fullgraph=True)
        return model
    if compiler == DYNAMO:
        return torch.compile(model, backend=lambda graph, _inputs: graph.forward, fullgraph=True)
    if compiler == INDUCTOR:
        return torch.compile(model, fullgraph=True)
    return hvfast(model, threshold=0.06) if compiler == HVFAST else hvfast(model)


def measure_compilation(compiler: str, depth: Depth, width: int, tokens: int) -> Compilation:
    """Compile one model with one compiler; the process must be fresh."""
    import torch

    import hvcompile.backend  # noqa: F401 - with it Dynamo and Inductor are imported, for all compilers alike

    model = build(depth, width)
    arguments = inputs(tokens)
    seconds, cpu_start, cpu_s = [], time.process_time(), 0.0
    with torch.no_grad():
        start = time.perf_counter()
        compiled = compile_with(compiler, model)
        for number in range(3):
            compiled(**arguments)
            seconds.append(time.perf_counter() - start)
            cpu_s = time.process_time() - cpu_start if number < 2 else cpu_s
            arguments |= {
                "hidden_states": arguments["hidden_states"] * 0.9,
                "timestep": arguments["timestep"] - 100.0,
            }
            start = time.perf_counter()
    first_s, second_s, third_s = seconds
    return Compilation(
        compiler=compiler, depth=str(depth), first_s=first_s, second_s=second_s, third_s=third_s, cpu_s=cpu_s
    )


def take_turns(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, which take turns, so that what slows the machine down slows all of them."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            taken[name].append(time.perf_counter() - start)
    return taken


def measure_reused(depth: Depth, width: int, tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of a reused step, and of the model cut to its first block."""
    import torch

    import hvcompile

    whole, one = build(depth, width), build(Depth(dual=1, single=0), width)
    kept = one.state_dict().keys()  # copies: a model is told by its parameters, which no other may have
    one.load_state_dict({name: tensor for name, tensor in whole.state_dict().items() if name in kept})
    arguments = inputs(tokens)
    models = {REUSED: hvfast(whole, threshold=1.0), CUT: hvfast(one), CUT_INDUCTOR: torch.compile(one, fullgraph=True)}
    calls = {name: lambda model=model: model(**arguments) for name, model in models.items()}
    with torch.no_grad():
        take_turns(calls, 3)  # compiles; from the second call on the same inputs are a step to reuse
        before = hvcompile.stats(whole)
        taken = take_turns(calls, repeats)
    after = hvcompile.stats(whole)
    if after.misses != before.misses or after.hits != before.hits + repeats:
        raise RuntimeError(f"of {repeats} steps only {after.hits - before.hits} were reused: nothing to measure")
    return taken


def measure_computed(depth: Depth, width: int, tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of a step that computes all blocks."""
    import torch

    import hvcompile

    model = build(depth, width)
    samples = [inputs(tokens), inputs(tokens)]
    samples[1]["hidden_states"] = -samples[0]["hidden_states"]
    turn = iter(range(sys.maxsize))
    compiled = hvfast(model, threshold=0.0)
    plain: Any = torch.compile(model, fullgraph=True)
    calls: dict[str, Callable[[], Any]] = {
        # With the clock standing still, another sample is another generation, whose first step is always computed.
        COMPUTED: lambda: compiled(**samples[next(turn) % 2]),
        WHOLE: lambda: plain(**samples[0]),
        EAGER: lambda: model.forward(**samples[0]),
    }
    with torch.no_grad():
        take_turns(calls, 3)
        before = hvcompile.stats(model)
        taken = take_turns(calls, repeats)
    after = hvcompile.stats(model)
    if after.hits != before.hits or after.misses != before.misses + repeats:
        raise RuntimeError(f"of {repeats} steps only {after.misses - before.misses} were computed: nothing to measure")
    return taken


def environment() -> dict[str, Any]:
    """The machine as torch sees it."""
    import torch

    return {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "default_dtype": str(torch.get_default_dtype()),
    }


# The parent.


def cold(measurement: Callable[..., T], *args: Any) -> T:
    """Run a measurement in a process of its own, over caches of its own that begin empty."""
    with tempfile.TemporaryDirectory(prefix="hvcompile-benchmark-") as folder:
        caches = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder}
        before = {name: os.environ.get(name) for name in caches}
        os.environ |= caches
        try:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                return process.submit(measurement, *args).result()
        finally:
            for name, held in before.items():
                os.environ.pop(name)
                if held is not None:
                    os.environ[name] = held


def compile_times(shallow: Depth, deep: Depth, width: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Measure all compilers at both depths, print the figures, and return them."""
    measured: list[Compilation] = []
    for _ in range(repeats):
        for compiler in COMPILERS:
            for depth in (shallow, deep):
                measured.append(cold(measure_compilation, compiler, depth, width, tokens))
                err.print(f"  {compiler}, {depth} blocks: {measured[-1].seconds:.1f} s")
    seconds = {
        (compiler, str(depth)): statistics.median(
            item.seconds for item in measured if (item.compiler, item.depth) == (compiler, str(depth))
        )
        for compiler in COMPILERS
        for depth in (shallow, deep)
    }
    tracing = {depth: seconds[DYNAMO, str(depth)] for depth in (shallow, deep)}

    table = Table(title=f"Cold compile time in seconds, width {width}, first and second call")
    for heading in ("", f"{shallow} blocks", f"{deep} blocks", "ratio", "ratio without tracing", f"of {HVFAST}"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    rows: list[dict[str, Any]] = []
    for compiler in COMPILERS:
        low, high = seconds[compiler, str(shallow)], seconds[compiler, str(deep)]
        without = (high - tracing[deep]) / (low - tracing[shallow]) if compiler != DYNAMO else math.nan
        relative = high / seconds[HVFAST, str(deep)]
        table.add_row(compiler, *map(number, (low, high, high / low, without, relative)))
        rows.append(
            {
                "compiler": compiler,
                "shallow_s": low,
                "deep_s": high,
                "ratio": high / low,
                "ratio_without_tracing": None if compiler == DYNAMO else without,
                "deep_over_hvfast": relative,
            }
        )
    bounds = []
    for compiler in (HVFAST, HVFAST_OFF):
        low, high = seconds[compiler, str(shallow)], seconds[compiler, str(deep)]
        allowed = DEPTH_BOUND * low + tracing[deep]
        bounds += [
            Bound(
                claim=f"{compiler}: T({deep}) / ({DEPTH_BOUND} T({shallow}) + Dynamo({deep}))",
                ratio=high / allowed,
                at_most=1.0,
            ),
            Bound(
                claim=f"{compiler}: (T({deep}) - Dynamo({deep})) / (T({shallow}) - Dynamo({shallow}))",
                ratio=(high - tracing[deep]) / (low - tracing[shallow]),
                at_most=DEPTH_BOUND,
            ),
        ]
    out.print(table)
    print_bounds(bounds)
    return {
        "width": width,
        "video_tokens": math.prod(token_grid(tokens)),
        "depths": {"shallow": str(shallow), "deep": str(deep)},
        "summary": rows,
        "bounds": [bound.record() for bound in bounds],
        "measurements": [dataclasses.asdict(item) | {"seconds": item.seconds} for item in measured],
    }


def step_times(depth: Depth, width: int, tokens: int, repeats: int, computed_repeats: int) -> dict[str, Any]:
    """Measure the steps of one size, print the figures, and return them."""
    reused = cold(measure_reused, depth, width, tokens, repeats)
    computed = cold(measure_computed, depth, width, tokens, computed_repeats)
    count = math.prod(token_grid(tokens))

    median = {name: statistics.median(taken) for name, taken in (reused | computed).items()}
    table = Table(title=f"Steps at {depth} blocks, width {width}, {count} video tokens, in milliseconds")
    for heading in ("", "steps", "min", "median", "max", "ratio of medians"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for base, group in ((CUT, reused), (WHOLE, computed)):
        for name, taken in group.items():
            times = [1e3 * item for item in (min(taken), median[name], max(taken))]
            table.add_row(name, str(len(taken)), *map(number, times), f"{median[name] / median[base]:.3f}")
        table.add_section()
    out.print(table)

    bounds = [
        Bound(claim=f"{REUSED} / {base}", ratio=median[REUSED] / median[base], at_most=STEP_BOUND)
        for base in (CUT, CUT_INDUCTOR)
    ]
    overhead = median[REUSED] - median[CUT]
    out.print(f"a reused step takes {1e3 * overhead:.2f} ms more than the model cut to one block")
    print_bounds(bounds)
    paired = statistics.median(one / other for one, other in zip(reused[REUSED], reused[CUT], strict=True))
    return {
        "depth": str(depth),
        "width": width,
        "video_tokens": count,
        "bounds": [bound.record() for bound in bounds],
        "reused_over_cut_median_of_pairs": paired,
        "reused_minus_cut_s": overhead,
        "computed_over_inductor": median[COMPUTED] / median[WHOLE],
        "computed_over_eager": median[COMPUTED] / median[EAGER],
        "computed_over_reused": median[COMPUTED] / median[REUSED],
        "steps": [summary(name, taken) for name, taken in (reused | computed).items()],
    }


def summary(name: str, taken: Sequence[float]) -> dict[str, Any]:
    """Seconds of one kind of step, as JSON."""
    return {
        "step": name,
        "repeats": len(taken),
        "min_s": min(taken),
        "median_s": statistics.median(taken),
        "max_s": max(taken),
        "all_s": [round(item, 7) for item in taken],
    }


def number(item: float) -> str:
    """A figure for a table."""
    return "" if math.isnan(item) else f"{item:.2f}"


def print_bounds(bounds: Iterable[Bound]) -> None:
    """Print each bound on a line: the verdict, the ratio and what was claimed."""
    for bound in bounds:
        colour = "green" if bound.verdict == "PASS" else "red"
        out.print(
            f"[{colour}]{bound.verdict}[/] {bound.ratio:.3f} (at most {bound.at_most:g}): {bound.claim}", soft_wrap=True
        )
    out.print()


def main(
    dual: Annotated[int, typer.Option(min=1, help="Dual-stream blocks of the deep model.")] = 20,
    single: Annotated[int, typer.Option(min=1, help="Single-stream blocks of the deep model.")] = 40,
    width: Annotated[
        list[int] | None, typer.Option(help="Width of the model whose steps are timed; give several for several sizes.")
    ] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(min=4, help="Its video tokens, about: one for each --width, or one for all.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Reused steps at each size.")] = 60,
    computed_repeats: Annotated[int, typer.Option(min=1, help="Computed steps at each size.")] = 5,
    compile_width: Annotated[int, typer.Option(help="Width of the model whose compilation is timed.")] = 32,
    compile_tokens: Annotated[int, typer.Option(min=4, help="Its video tokens, about.")] = 64,
    compile_repeats: Annotated[int, typer.Option(min=1, help="Cold compilations of each kind; medians count.")] = 1,
    compilation: Annotated[bool, typer.Option(help="Measure compilation.")] = True,
    steps: Annotated[bool, typer.Option(help="Measure steps.")] = True,
    to: Annotated[Path, typer.Option("--json", help="Where the figures go; replaced if there.")] = (
        ROOT / "docs" / "measurements" / "core_cpu.json"
    ),
) -> None:
    """Measure, print and record what compiling costs and what a reused step costs, on the CPU."""
    widths, lengths = width or [128, 256], tokens or [1024, 2048]
    if len(lengths) == 1:
        lengths *= len(widths)
    if len(lengths) != len(widths):
        raise typer.BadParameter(f"{len(widths)} widths but {len(lengths)} of --tokens: give one for each, or one")
    shallow, deep = Depth(dual=2, single=4), Depth(dual=dual, single=single)
    packages = ("torch", "diffusers", "hvcompile")
    record: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        "machine": {
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "architecture": platform.machine(),
            **cold(environment),
        },
        "load_average_before": os.getloadavg(),
    }
    if compilation:
        record["compilation"] = compile_times(shallow, deep, compile_width, compile_tokens, compile_repeats)
    if steps:
        sizes = zip(widths, lengths, strict=True)
        record["steps"] = [step_times(deep, *size, repeats, computed_repeats) for size in sizes]
    record["load_average_after"] = os.getloadavg()
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(json.dumps(record, indent=2) + "\n")
    out.print(f"written to {to}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
