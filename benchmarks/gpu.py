"""Everything that only a GPU can tell, in under ten minutes: first whether results are right, then how fast they come.

``python benchmarks/gpu.py`` runs its checks in the order of what they tell, each result kept as it comes, and leaves a
JSON and a table (.md). It needs a CUDA device, torch and diffusers; the float8 checks need torchao. When ``--minutes``
are over, what is left is a row that says so. A check that dies with its process, as after an illegal address, is a row
that says how; the next ones get a new process.

Right means: as close to the model in float32 as eager diffusers is in the same dtype, times a factor that stands in the
row; the cache's decisions equal diffusers' own; a model that moved or was offloaded equals the one that stayed, bit for
bit. Fast means the median of CUDA events around a step, beside plain Inductor in the same process.

``--device cpu --scale tiny --lower eager`` runs all of it where there is no GPU, to try the script out.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import functools
import json
import multiprocessing
import platform
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
SCALES = ("full", "tiny")
FLOAT8 = {"keep_last_blocks": 0}
"""All blocks, so that speed and memory are those of float8 alone."""
err = Console(stderr=True, highlight=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class How:
    """Where and how large: the same for all checks."""

    device: str
    scale: str
    lower: str

    @property
    def is_tiny(self) -> bool:
        """Whether the script is only tried out."""
        return self.scale == "tiny"


CHECKS: dict[str, Callable[[How], dict[str, Any]]] = {}
"""By name, in the order in which they run."""


def check(function: Callable[[How], dict[str, Any]]) -> Callable[[How], dict[str, Any]]:
    """Add a check, which returns its row: "good", and figures."""
    CHECKS[function.__name__] = function
    return function


# Models and inputs.


def transformer(how: How, dual: int, single: int, heads: int, dtype: Any) -> Any:
    """A HunyuanVideo of so many blocks and heads of 128, its weights random and of a size at which signals live on."""
    import torch
    from diffusers import HunyuanVideoTransformer3DModel

    head = 16 if how.is_tiny else 128
    torch.manual_seed(0)
    with torch.device(how.device):
        model = HunyuanVideoTransformer3DModel(
            num_layers=dual,
            num_single_layers=single,
            num_attention_heads=heads,
            attention_head_dim=head,
            rope_axes_dim=(4, 6, 6) if how.is_tiny else (16, 56, 56),
            text_embed_dim=64,
            pooled_projection_dim=32,
            num_refiner_layers=1,
        )
    return model.eval().to(dtype)


def inputs(
    how: How, dtype: Any, latents: tuple[int, int, int], valid: int = 20, step: int = 0, text: int = 64
) -> dict[str, Any]:
    """Of one step: latents ``[1, 16, frames, height, width]``, ``valid`` of the text's tokens valid."""
    import torch

    draw = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=draw).to(how.device, dtype)

    sample, way = normal(1, 16, *latents), normal(1, 16, *latents)
    return {
        "hidden_states": sample + 0.03 * step * way,
        "timestep": torch.full((1,), 900 - 20 * step, device=how.device),
        "encoder_hidden_states": normal(1, text, 64),
        "encoder_attention_mask": (torch.arange(text, device=how.device) < valid)[None].to(dtype),
        "pooled_projections": normal(1, 32),
        "guidance": torch.full((1,), 6000.0, device=how.device, dtype=dtype),
        "return_dict": False,
    }


def small(how: How) -> tuple[int, int, int]:
    """Latents of a model that is held against eager: odd sizes."""
    return (3, 6, 10) if how.is_tiny else (5, 46, 74)


def compiled(model: Any, how: How, mode: str = "default", **options: Any) -> Any:
    """The model under hvfast; ``torch.compile`` leaves the model itself alone."""
    import torch

    from hvcompile.backend import hvfast

    torch._dynamo.reset()
    return torch.compile(
        model, backend=functools.partial(hvfast, mode=mode, options={"lower": how.lower, **options}), fullgraph=True
    )


def error(actual: Any, expected: Any) -> float:
    """The Euclidean norm of the difference, relative to that of what is expected."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def against_eager(how: How, dtype: Any, factor: float, bound: float, mode: str, **options: Any) -> dict[str, Any]:
    """A row: the error of hvfast and of eager, both against the model in float32 with the same weights."""
    model = transformer(how, 2, 4, 4, dtype)
    given = [inputs(how, dtype, small(how), valid) for valid in (20, 64, 1)]
    eager = [model(**item)[0] for item in given]
    precise = copy.deepcopy(model).float()
    exact = [precise(**{name: _float(held) for name, held in item.items()})[0] for item in given]
    del precise
    fast = compiled(model, how, mode, **options)
    found = [fast(**item)[0] for item in given]
    ours, theirs = (max(map(error, outputs, exact)) for outputs in (found, eager))
    import hvcompile

    applied = [row.name for row in hvcompile.stats(fast).journal[0] if row.report.applied]
    is_good = ours <= max(factor * theirs, bound)
    return {"good": is_good, "error": ours, "eager error": theirs, "dtype": str(dtype), "passes": ", ".join(applied)}


def _float(held: Any) -> Any:
    import torch

    return held.float() if isinstance(held, torch.Tensor) and held.is_floating_point() else held


# Whether results are right.


@check
def exact_float32(how: How) -> dict[str, Any]:
    """Without TF32, and prompts of 20, 64 and 1 valid tokens in one graph."""
    import torch

    return against_eager(how, torch.float32, 4.0, 1e-5, "exact")


@check
def exact_bfloat16(how: How) -> dict[str, Any]:
    """As users run it."""
    import torch

    return against_eager(how, torch.bfloat16, 1.5, 0.0, "exact")


@check
def cache(how: How) -> dict[str, Any]:
    """The decisions of diffusers' own cache, and outputs to 1e-3, over 16 steps in float32."""
    import torch
    from diffusers.hooks import FirstBlockCacheConfig

    import hvcompile

    model = transformer(how, 2, 4, 4, torch.float32)
    steps = [inputs(how, torch.float32, small(how), step=step) for step in range(16)]
    fast = compiled(model, how, first_block_cache={"threshold": 0.0}, fp8=False)
    for item in steps:
        fast(**item)
    # Half of the steps change less than this from the one before.
    threshold = 1.2 * statistics.median(step.difference for step in hvcompile.stats(fast).steps)
    fast = compiled(model, how, first_block_cache={"threshold": threshold}, fp8=False)
    hvcompile.reset(fast)
    found = [fast(**item)[0] for item in steps]
    reused = [step.reused for step in hvcompile.stats(fast).steps]
    calls = [0]
    model.single_transformer_blocks[-1].attn.to_q.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    theirs, apart = [], 0.0
    for item, ours in zip(steps, found, strict=True):
        before = calls[0]
        with model.cache_context("cond"):
            apart = max(apart, error(ours, model(**item)[0]))
        theirs.append(calls[0] == before)
    is_good = reused == theirs and apart < 1e-3 and 0 < sum(reused) < len(reused)
    return {"good": is_good, "reused": sum(reused), "same decisions": reused == theirs, "error": apart}


@check
def float8_linears(how: How) -> dict[str, Any]:
    """By row, with the memory of the weights that it lets go."""
    import torch

    return against_eager(how, torch.bfloat16, 0.0, 0.1, "default", first_block_cache=False, fp8=FLOAT8)


@check
def everything(how: How) -> dict[str, Any]:
    """``mode="max"``: float8 attention too, by its Triton kernel on this card."""
    import torch

    return against_eager(how, torch.bfloat16, 0.0, 0.2, "max", first_block_cache=False)


@check
def moved(how: How) -> dict[str, Any]:
    """A float8 model that went to the host and came back gives the same bits, and left no memory on the device."""
    import torch

    model, given = transformer(how, 1, 2, 4, torch.bfloat16), inputs(how, torch.bfloat16, small(how))
    fast = compiled(model, how, first_block_cache=False, fp8=FLOAT8)
    before = fast(**given)[0]
    here = torch.device(how.device)
    held = _allocated(here)
    model.to("cpu")
    left = _allocated(here)
    model.to(here)
    after = fast(**given)[0]
    return {"good": bool(torch.equal(before, after)), "bytes held": held, "bytes left while away": left}


@check
def waits(how: How) -> dict[str, Any]:
    """How often a step waits for the device: once with the cache, never without."""
    import torch

    if how.device == "cpu":
        return {"good": True, "why": "a CPU is not waited for"}
    row: dict[str, Any] = {}
    cases: dict[str, dict[str, Any]] = {"with cache": {}, "without": {"first_block_cache": False}}
    for name, options in cases.items():
        model = transformer(how, 1, 2, 4, torch.bfloat16)
        fast = compiled(model, how, fp8=False, **options)
        given = [inputs(how, torch.bfloat16, small(how), step=step) for step in range(4)]
        for item in given[:3]:
            fast(**item)
        with _counted_waits() as count:
            fast(**given[3])
        row[name] = len(count)
    return {"good": row["with cache"] <= 1 and row["without"] == 0, **row}


@contextlib.contextmanager
def _counted_waits() -> Iterator[list[str]]:
    """What torch's own watch for synchronisations warns of."""
    import warnings

    import torch

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        found: list[str] = []
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found += [str(item.message) for item in told if "synchroniz" in str(item.message)]


@check
def embedded_pipeline(how: How) -> dict[str, Any]:
    """The embedded model's clip: exact within rounding of eager diffusers, and the default mode reuses steps."""
    import numpy as np
    import torch

    import hvcompile
    from hvcompile.app import metrics, pipelines
    from hvcompile.backend import hvfast

    clips, reused = {}, 0
    for mode in ("eager", "exact", "default"):
        loaded = pipelines.load(None, None, how.device)
        if mode != "eager":
            torch._dynamo.reset()
            backend = functools.partial(hvfast, mode=mode, options={"lower": how.lower})
            loaded.pipe.transformer.compile(backend=backend, fullgraph=True)
        draw = torch.Generator().manual_seed(0)
        arguments = {**loaded.defaults, **({"num_inference_steps": 6} if how.is_tiny else {})}
        prompt = "a red circle moves to the left over a blue background"
        clips[mode] = np.asarray(loaded.pipe(prompt, generator=draw, output_type="np", **arguments).frames[0])
        if mode == "default":
            reused = hvcompile.stats(loaded.pipe.transformer).hits
    exact = metrics.compare(clips["exact"], clips["eager"]).mean_psnr
    default = metrics.compare(clips["default"], clips["eager"]).mean_psnr
    return {"good": exact > 50, "PSNR exact": exact, "PSNR default": default, "steps reused": reused}


# How fast they come.


def _sizes(how: How, *, is_whole: bool) -> tuple[int, int, int, tuple[int, int, int]]:
    """Blocks of two kinds, heads, and latents: a fifth of HunyuanVideo at 33 frames of 720p, or all of it."""
    if how.is_tiny:
        return 1, 2, 4, (2, 6, 10)
    return (20, 40, 24, (9, 90, 160)) if is_whole else (4, 8, 24, (9, 90, 160))


def _speed(how: How, *, is_whole: bool) -> dict[str, Any]:
    """Milliseconds of a computed and a reused step, plain Inductor first; ratios are to it."""
    import torch

    dual, single, heads, latents = _sizes(how, is_whole=is_whole)
    row: dict[str, Any] = {"blocks": f"{dual}+{single}", "latents": list(latents)}
    given = inputs(how, torch.bfloat16, latents, text=256)
    cases: dict[str, Callable[[Any], Any]] = {
        "Inductor": lambda model: torch.compile(model, backend="eager" if how.lower == "eager" else "inductor"),
        "exact": lambda model: compiled(model, how, "exact"),
        "computed": lambda model: compiled(model, how, first_block_cache={"threshold": 0.0}, fp8=False),
        "reused": lambda model: compiled(model, how, first_block_cache={"threshold": 1e9}, fp8=False),
        "float8": lambda model: compiled(model, how, first_block_cache=False, fp8=FLOAT8),
        "max": lambda model: compiled(model, how, "max", first_block_cache=False),
    }
    if is_whole:
        cases = {name: cases[name] for name in ("Inductor", "exact", "reused", "float8")}
    for name, make in cases.items():
        torch._dynamo.reset()
        try:
            row |= {f"{name} {key}": figure for key, figure in _timed(how, make, dual, single, heads, given).items()}
        except torch.OutOfMemoryError:
            row[f"{name} ms"] = "out of memory"
        _let_go()
    base = row.get("Inductor ms")
    ratios = {
        f"{name} times as fast": base / row[f"{name} ms"]
        for name in cases
        if isinstance(base, float) and isinstance(row.get(f"{name} ms"), float)
    }
    return {"good": isinstance(row.get("exact ms"), float), **row, **ratios}


def _timed(
    how: How, make: Callable[[Any], Any], dual: int, single: int, heads: int, given: dict[str, Any]
) -> dict[str, Any]:
    import torch

    model = transformer(how, dual, single, heads, torch.bfloat16)
    fast = make(model)
    start = time.perf_counter()
    for step in range(3):
        fast(**{**given, "timestep": given["timestep"] - step})
    compile_s = time.perf_counter() - start
    _reset_peak(how)
    times = []
    for step in range(3, 8):
        times.append(_milliseconds(how, functools.partial(fast, **{**given, "timestep": given["timestep"] - step})))
    return {"ms": statistics.median(times), "seconds to compile": compile_s, "peak bytes": _peak(how)}


def _milliseconds(how: How, function: Callable[[], Any]) -> float:
    import torch

    if how.device == "cpu":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def _allocated(device: Any) -> int:
    import torch

    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak(how: How) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if how.device != "cpu" else 0


def _reset_peak(how: How) -> None:
    import torch

    if how.device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def _let_go() -> None:
    import gc

    import torch

    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@check
def speed_of_a_fifth(how: How) -> dict[str, Any]:
    """4+8 of HunyuanVideo's blocks, 33 frames of 1280x720 (32,400 tokens), all modes."""
    return _speed(how, is_whole=False)


@check
def speed_of_the_whole(how: How) -> dict[str, Any]:
    """20+40 blocks, 12.8 billion random parameters, the same size."""
    return _speed(how, is_whole=True)


# Running them.


def serve(connection: Any, how: How) -> None:
    """Run the checks that the parent asks for, in this process."""
    import torch

    if how.device != "cpu":
        torch.cuda.set_device(how.device)  # events, streams and counts of memory are those of the current device
        torch.backends.cuda.matmul.allow_tf32 = False
    with torch.no_grad():
        while True:
            try:
                name = connection.recv()
            except EOFError:
                return
            try:
                row = CHECKS[name](how)
            except Exception as found:
                last = traceback.extract_tb(found.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                row = {"good": False, "failed": f"{type(found).__name__} at {where}: {str(found)[:300]}"}
            _let_go()
            connection.send(row)


class Child:
    """A process that runs checks; one that dies is followed by another."""

    def __init__(self, how: How) -> None:
        self._how = how
        self._process: Any = None
        self._connection: Any = None

    def run(self, name: str, seconds: float) -> dict[str, Any]:
        """The row of a check, or one that says how it ended."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._connection, other = context.Pipe()
            self._process = context.Process(target=serve, args=(other, self._how), daemon=False)
            self._process.start()
            other.close()
        try:
            self._connection.send(name)
            if self._connection.poll(seconds):
                row: dict[str, Any] = self._connection.recv()
                return row
            self.stop()
            return {"good": False, "failed": f"not done after {seconds:.0f} s"}
        except (EOFError, OSError):
            self._process.join(10)
            code = self._process.exitcode
            self.stop()
            return {"good": False, "failed": f"its process ended with {code}"}

    def stop(self) -> None:
        """End the process."""
        if self._process is not None:
            self._connection.close()
            self._process.join(3)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()
            self._process = None


def table(header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [f"{name}: {held}" for name, held in header.items() if name not in {"rows"}]
    body = ["| check | good | figures |", "|---|---|---|"]
    for row in rows:
        figures = "; ".join(f"{name} {_short(held)}" for name, held in row.items() if name not in {"name", "good"})
        body.append(f"| {row['name'].replace('_', ' ')} | {'yes' if row['good'] else 'no'} | {figures} |")
    return "\n".join(["# On a GPU", "", *(f"- {line}" for line in lines), "", *body, ""])


def _short(held: Any) -> str:
    return f"{held:.4g}" if isinstance(held, float) else str(held)


def about(how: How) -> dict[str, Any]:
    """The machine and the versions, asked for in a process of its own so that this one never touches the device.

    Raises:
        typer.BadParameter: the device is not there.

    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(_about, (how,))
    if isinstance(found, str):
        raise typer.BadParameter(found)
    return {**found, "scale": how.scale, "lowered by": how.lower}


def _about(how: How) -> dict[str, Any] | str:
    """The machine and the versions; a text where the device is not there."""
    import diffusers
    import torch

    name = platform.machine()
    if how.device != "cpu":
        known = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if how.device not in ("cuda", *known) or not known:
            allowed = ", ".join(known) or f"none: torch {torch.__version__} finds no CUDA device"
            return (
                f"--device is {how.device!r}; GPUs are {allowed}. --device cpu --scale tiny --lower eager tries the "
                "script out without one"
            )
        name = f"{torch.cuda.get_device_name(how.device)}, CUDA {torch.version.cuda}"
    return {
        "device": name,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def main(
    device: Annotated[str, typer.Option(help="cuda, cuda:N, or cpu to try the script out.")] = "cuda",
    scale: Annotated[str, typer.Option(help="full, or tiny to try the script out.")] = "full",
    lower: Annotated[str, typer.Option(help="inductor; eager tries the script out without compiling.")] = "inductor",
    minutes: Annotated[float, typer.Option(min=0.1, help="After which no check begins; one that runs is ended.")] = 9.0,
    only: Annotated[list[str] | None, typer.Option(help="Names of checks; give several.")] = None,
    output: Annotated[Path, typer.Option(help="The results, less their endings .json and .md.")] = (
        ROOT / "docs" / "measurements" / "gpu"
    ),
) -> None:
    """Check, measure and tabulate."""
    if scale not in SCALES:
        raise typer.BadParameter(f"--scale is {scale!r}; allowed is {' or '.join(SCALES)}")
    unknown = [name for name in only or [] if name not in CHECKS]
    if unknown:
        raise typer.BadParameter(f"--only names {unknown[0]!r}; allowed are {', '.join(CHECKS)}")
    start, how = time.monotonic(), How(device=device, scale=scale, lower=lower)
    header = {"command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]), **about(how)}
    rows: list[dict[str, Any]] = []
    child = Child(how)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        for name in CHECKS:
            if only and name not in only:
                continue
            left, begin = 60 * minutes - (time.monotonic() - start), time.monotonic()
            row = child.run(name, left) if left > 0 else {"good": False, "failed": "no time was left for it"}
            rows.append({"name": name, **row, "seconds": round(time.monotonic() - begin, 1)})
            err.print(f"{'right' if row['good'] else 'WRONG'}  {name}: {rows[-1]}", soft_wrap=True, markup=False)
            for ending, text in (
                (".json", json.dumps({**header, "rows": rows}, indent=1) + "\n"),
                (".md", table(header, rows)),
            ):
                output.with_name(output.name + ending).write_text(text, "utf-8")
    finally:
        child.stop()
    if not all(row["good"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
