"""``hvcompile bench``: contenders on the same model, inputs, threshold and schedule, each in a process, in turn.

Each contender is a process of its own with an empty compile cache, and only one computes at a time. First each
compiles: it generates until a run captures no graph. Then come the rounds: in each, every contender generates once, in
an order that moves on by one from round to round, so that what slows the machine down slows all; ratios are taken
within a round.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvcompile import outputs
from hvcompile.app import metrics, pipelines, tiny
from hvcompile.app.bench import contenders, process
from hvcompile.app.bench.contenders import EAGER
from hvcompile.app.bench.process import Protocol, Shape
from hvcompile.app.bench.results import Result, Row, scaled
from hvcompile.app.pipelines import Grid
from hvcompile.errors import InputError
from hvcompile.torch_private.lowering import LOWERINGS

KEYS = {
    "eager": contenders.EAGER,
    "inductor": contenders.INDUCTOR,
    "diffusers": contenders.DIFFUSERS,
    "cache-dit": contenders.CACHE_DIT,
    "exact": contenders.EXACT,
    "hvfast": contenders.HVFAST,
}
"""Contenders as the command line names them, in the order of the table."""

GRID = Grid(spatial=16, temporal=4)
"""Of HunyuanVideo's VAE and patches: a token is 16x16 pixels of 4 frames."""
MOST_WARM_RUNS = 4
SMALL = {"frames": 9, "height": 96, "width": 96, "steps": 20, "dual": 2, "single": 4, "hidden": 128}
FULL = {"frames": 129, "height": 720, "width": 1280, "steps": 30}
HEAD_DIM = 16
"""Of the tiny transformer."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure; None leaves a choice to ``full`` and the device.

    Attributes:
        model: directory or hub id of a HunyuanVideo pipeline, whose weights are used; None for random weights.
        blocks: as "20+40", dual-stream and single-stream blocks of the random model.
        hidden: its width, a multiple of 16.
        frames, height, width: the clip, in frames and pixels.
        tokens: the same in video tokens, about, in place of the three.
        steps: of a run.
        threshold: of every cache.
        repeats: rounds.
        contenders: keys of ``KEYS``; eager always runs.
        full: the reference's protocol: the full model, 1280x720, 129 frames, 30 steps.
        shapes: count recompilations over other shapes and prompts, too (by default unless ``full``).
        restart: end each process after its turn, so that its memory is free for the next, and start it again over its
            own compile cache (by default where ``full``): one more run a turn, which warms it up.
        timeout: seconds that a contender may take to answer one request (a run, or all other shapes).

    """

    model: str | None = None
    blocks: str | None = None
    hidden: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    tokens: int | None = None
    steps: int | None = None
    threshold: float = 0.06
    repeats: int = 3
    contenders: tuple[str, ...] = tuple(KEYS)
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None
    lower: str = "inductor"
    full: bool = False
    shapes: bool | None = None
    restart: bool | None = None
    timeout: float | None = None
    json_file: Path | None = None
    plot_file: Path | None = None

    def check(self) -> None:
        """Raise InputError for all that is wrong, before anything is built."""
        for name, least in (("steps", 2), ("repeats", 1), ("threads", 1), ("tokens", 32)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}: give {least} or more")
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise InputError(f"threshold is {self.threshold}: give a finite number, 0 or more")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}: give a number from 0 that fits in 63 bits")
        if self.timeout is not None and not self.timeout > 0:
            raise InputError(f"timeout is {self.timeout}: give seconds, more than 0")
        unknown = [key for key in self.contenders if key not in KEYS]
        if unknown or not self.contenders:
            given = ", ".join(map(repr, unknown)) or "nothing"
            raise InputError(f"contenders has {given}: give some of {','.join(KEYS)}")
        if self.lower not in LOWERINGS:
            raise InputError(f"lower is {self.lower!r}: give one of {', '.join(LOWERINGS)}")
        self._check_model()
        if self.tokens is not None and any(size is not None for size in (self.frames, self.height, self.width)):
            raise InputError(
                f"tokens is {self.tokens}, and frames, height or width are given too: give one or the other"
            )
        GRID.check(height=self.height, width=self.width, frames=self.frames)
        for name, least in (("frames", 1), ("height", 32), ("width", 32)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}: give {least} or more")
        for name, path, kind in (("json", self.json_file, "JSON file"), ("plot", self.plot_file, "PNG picture")):
            if path is not None:
                outputs.check(path, name=name, kind=kind, suffixes=(".json",) if name == "json" else (".png",))

    def _check_model(self) -> None:
        device = pipelines.resolve_device(self.device)
        pipelines.resolve_dtype(self.dtype, device)
        if self.model is not None:
            for name in ("blocks", "hidden"):
                if (value := getattr(self, name)) is not None:
                    raise InputError(f"{name} is {value}, but a model with weights of its own is given: leave out one")
            pipelines.transformer_config(self.model)
        if self.blocks is not None:
            self._depth()
        if self.hidden is not None and (self.hidden < HEAD_DIM or self.hidden % HEAD_DIM):
            raise InputError(f"hidden is {self.hidden}: give a multiple of {HEAD_DIM}, the width of a head")
        if self.full and self.model is None and self.blocks is None and device.type == "cpu":
            raise InputError(
                "full, on the CPU, is a model of 12.8 billion parameters and days of computing: give device cuda, or "
                "blocks, frames, height and width to try the protocol out at a small size"
            )

    def _depth(self) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+)\+(\d+)", (self.blocks or "").strip())
        if found is None or not int(found[1]) or not int(found[2]):
            raise InputError(f"blocks is {self.blocks!r}: give dual-stream and single-stream blocks, such as 20+40")
        return int(found[1]), int(found[2])

    def protocol(self) -> Protocol:
        """What all contenders are given."""
        device = pipelines.resolve_device(self.device)
        dtype = pipelines.resolve_dtype(self.dtype, device)
        if self.full and self.dtype is None:
            dtype = pipelines.DTYPES["bfloat16"]
        sizes: dict[str, int] = {**SMALL, **(FULL if self.full else {})}
        if self.tokens is not None:
            side = 16 * max(2, round(math.sqrt(self.tokens / 8)))
            sizes |= {"frames": 29, "height": side, "width": side}
        given = {name: getattr(self, name) for name in ("frames", "height", "width", "steps")}
        sizes |= {name: value for name, value in given.items() if value is not None}
        is_full_model = self.full and self.blocks is None
        if self.model is not None or (is_full_model and self.hidden is None):
            config: dict[str, Any] = {}
        else:
            dual, single = self._depth() if self.blocks else (20, 40) if self.full else (SMALL["dual"], SMALL["single"])
            config = tiny.transformer_config(dual, single, (self.hidden or SMALL["hidden"]) // HEAD_DIM)
        text, prompt = (256, 40) if not config else (10, 7)
        return Protocol(
            model=self.model,
            config=config,
            shape=Shape(
                num_frames=sizes["frames"],
                height=sizes["height"],
                width=sizes["width"],
                text_tokens=text,
                prompt_tokens=prompt,
            ),
            steps=sizes["steps"],
            threshold=self.threshold,
            seed=self.seed,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            threads=self.threads,
            lower=self.lower,
        )

    def systems(self) -> list[str]:
        """The contenders to run, by their names in ``hvcompile.contenders``."""
        return [system for key, system in KEYS.items() if key in self.contenders or system == EAGER]

    @property
    def timeout_s(self) -> float:
        """The time limit of a request in seconds."""
        return self.timeout if self.timeout is not None else 6 * 3600.0 if self.full else 1800.0


def other_shapes(shape: Shape) -> list[tuple[str, Shape]]:
    """Shapes and prompts that follow the first in one process, each with its name."""
    more = dataclasses.replace
    larger = more(shape, num_frames=shape.num_frames + 4, height=shape.height + 16, width=shape.width + 32)
    return [
        ("shorter prompt, same padding", more(shape, prompt_tokens=shape.prompt_tokens - 2)),
        ("longer and larger clip", larger),
        (
            "another length and size",
            more(shape, num_frames=shape.num_frames + 8, height=shape.height + 48, width=shape.width + 16),
        ),
        ("longer text", more(shape, text_tokens=shape.text_tokens + 6, prompt_tokens=shape.prompt_tokens + 5)),
    ]


class FailedError(Exception):
    """A contender can't go on; the message says why."""


class Seat:
    """A contender's process, started when it is first asked for something, over compile caches of its own."""

    def __init__(self, system: str, protocol: Protocol, folder: Path, timeout: float) -> None:
        self.system, self._protocol, self._timeout = system, protocol, timeout
        self._folder = folder / re.sub(r"\W+", "_", system)
        self._folder.mkdir()
        self._log = self._folder / "log.txt"
        self._process: Any = None
        self._connection: Any = None

    def ask(self, request: str, *arguments: Any) -> Any:
        """Have the process call a method of ``bench_process.Contender``; gives what that returned.

        Raises:
            FailedError: it raised, died, or took longer than the timeout, after which it is ended.

        """
        if self._process is None:
            self._start()
        try:
            self._connection.send((request, arguments))
            ready = multiprocessing.connection.wait([self._connection, self._process.sentinel], self._timeout)
            if not ready:
                self.stop(patience=0)
                raise FailedError(f"no answer to {request!r} in {self._timeout:g} s (--timeout)")
            is_good, answer = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)
            code = self._process.exitcode
            self.stop()
            raise FailedError(f"its process died in {request!r} ({_ending(code)}){self._last_words()}") from error
        if not is_good:
            self.stop()
            raise FailedError(answer)
        return answer

    def stop(self, patience: float = 5) -> None:
        """End the process and the compilers that it started; its compile caches stay.

        Args:
            patience: seconds in which it may leave by itself.

        """
        if self._process is None:
            return
        self._connection.close()  # where it waits for a request, it leaves by itself
        self._process.join(patience)
        if self._process.is_alive():
            try:
                os.killpg(self._process.pid, signal.SIGKILL)  # its own group, which it made at its start
            except (AttributeError, OSError):
                self._process.kill()
            self._process.join()
        self._process.close()
        self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        arguments = (other, self.system, self._protocol, self._log)
        self._process = context.Process(target=process.serve, args=arguments, daemon=False)
        caches = {name: str(self._folder / "cache") for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        before = {name: os.environ.get(name) for name in caches}
        os.environ |= caches
        try:
            self._process.start()
        finally:
            for name, held in before.items():
                os.environ.pop(name)
                if held is not None:
                    os.environ[name] = held
            other.close()

    def _last_words(self) -> str:
        try:
            lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines()]
        except OSError:
            return ""
        said = [line for line in lines if line and not line.startswith("USDT:")]  # torch's profiler writes those
        return f": {said[-1][:120]}" if said else ""


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {-code}, {signal.Signals(-code).name}"
    return f"exit code {code}"


Observer = Callable[[str], None]


def bench(request: Request, observe: Observer = lambda text: None) -> Result:
    """Measure all contenders; a peer that is missing or fails is a row that says so.

    Args:
        request: what to measure.
        observe: told in a few words what goes on.

    Returns:
        All rows; after a KeyboardInterrupt, what had been measured by then, and ``conditions["interrupted"]``.

    Raises:
        InputError: the request can't be met.

    """
    request.check()
    protocol, systems = request.protocol(), request.systems()
    restart = request.full if request.restart is None else request.restart
    shapes = not request.full if request.shapes is None else request.shapes
    rows = {system: Row(system=system) for system in systems}
    start, load, interrupted = time.perf_counter(), _load(), False
    with tempfile.TemporaryDirectory(prefix="hvcompile-bench-", ignore_cleanup_errors=True) as folder:
        seats = {system: Seat(system, protocol, Path(folder), request.timeout_s) for system in systems}
        latents = {system: Path(folder, f"latents_{place}.npy") for place, system in enumerate(systems)}

        def turn(
            system: str, doing: str, work: Callable[[Seat, Row], None], fail: Callable[[Row, str], None] = _fail
        ) -> None:
            row = rows[system]
            if row.error:
                return
            observe(f"{system}: {doing}")
            try:
                if restart and row.how:  # the first turn warms up anyway
                    seats[system].ask("run")
                work(seats[system], row)
            except FailedError as error:
                fail(row, str(error))
            if restart:
                seats[system].stop()

        def measure(number: int) -> Callable[[Seat, Row], None]:
            return lambda seat, row: _round(seat, row, number, latents[row.system])

        try:
            for system in systems:
                turn(system, "compiling", _compile_and_observe if restart else _compile)
            for number in range(request.repeats):
                shift = number % len(systems)
                for system in systems[shift:] + systems[:shift]:
                    turn(system, f"round {number + 1} of {request.repeats}", measure(number))
            for system in systems if not restart else ():  # a profiler takes memory, so not before the rounds
                turn(system, "steps", _observe)
            cases = other_shapes(protocol.shape)
            for system in systems if shapes else ():
                turn(system, "other shapes and prompts", lambda seat, row: _recompile(seat, row, cases), _fail_cases)
        except KeyboardInterrupt:
            # Hours may lie behind it: what is measured is given back, and a second interrupt ends it all.
            interrupted = True
        finally:
            for seat in seats.values():
                seat.stop()
        for row in rows.values() if interrupted else ():
            if not row.error and not row.rounds:
                row.error = "interrupted before its first round"
        _compare(rows, latents)
    return Result(
        conditions={
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": _versions(),
            "machine": {**_machine(protocol), "load_average": {"before": load, "after": _load()}},
            "seconds_in_all": time.perf_counter() - start,
            "interrupted": interrupted,
            "protocol": _record(request, protocol, restart),
        },
        rows=tuple(rows.values()),
    )


def _fail(row: Row, reason: str) -> None:
    row.error = reason


def _fail_cases(row: Row, reason: str) -> None:
    row.cases_error = reason  # what the first shape gave stands


def _compile(seat: Seat, row: Row) -> None:
    """Generate until a run captures no graph."""
    row.how = seat.ask("about")["how"]
    row.graphs = 0
    for _ in range(MOST_WARM_RUNS):
        answer = seat.ask("run")
        if not answer["graphs"]:
            break
        row.warm_seconds.append(sum(answer["step_seconds"]))
        row.graphs += answer["graphs"]
        row.compiling_bytes = _larger(row.compiling_bytes, answer["peak_bytes"])


def _compile_and_observe(seat: Seat, row: Row) -> None:
    _compile(seat, row)
    _observe(seat, row)


def _observe(seat: Seat, row: Row) -> None:
    """Look at what each step does."""
    seen = seat.ask("observe")
    row.steps, row.regions = seen["steps"], seen["regions"]


def _round(seat: Seat, row: Row, number: int, latents: Path) -> None:
    answer = _steady(seat, latents)
    if not answer["finite"]:
        raise FailedError("its latents are not all finite: give another dtype")
    row.rounds[number], row.cpu_rounds[number] = answer["step_seconds"], answer["step_cpu_seconds"]
    row.digests.append(answer["digest"])
    row.running_bytes = _larger(row.running_bytes, answer["peak_bytes"])


def _steady(seat: Seat, latents: Path | None = None) -> dict[str, Any]:
    """Generate until a run captures no graph; gives the answer to the last."""
    for _ in range(MOST_WARM_RUNS):
        answer: dict[str, Any] = seat.ask("run", latents)
        if not answer["graphs"]:
            return answer
    raise FailedError(f"it captured graphs in each of {MOST_WARM_RUNS} runs alike: there is no steady run")


def _recompile(seat: Seat, row: Row, cases: Sequence[tuple[str, Shape]]) -> None:
    _steady(seat)
    row.cases = seat.ask("recompile", cases)


def _larger(one: int | None, other: int | None) -> int | None:
    return max((value for value in (one, other) if value is not None), default=None)


def _compare(rows: dict[str, Row], latents: dict[str, Path]) -> None:
    """Measure each contender's latents against eager's."""
    if rows[EAGER].error:
        return
    reference = np.load(latents[EAGER])
    for system, row in rows.items():
        if system != EAGER and not row.error:
            row.quality = metrics.compare(*scaled(np.load(latents[system]), reference))


def _record(request: Request, protocol: Protocol, restart: bool) -> dict[str, Any]:
    """The protocol as JSON."""
    config = pipelines.transformer_config(protocol.model) if protocol.model else protocol.config
    shape = protocol.shape
    heads, head_dim = config.get("num_attention_heads", 24), config.get("attention_head_dim", 128)
    rows, columns = shape.height // GRID.spatial, shape.width // GRID.spatial
    return {
        "model": protocol.model or "random weights",
        "blocks": f"{config.get('num_layers', 20)}+{config.get('num_single_layers', 40)}",
        "hidden": heads * head_dim,
        "frames": shape.num_frames,
        "height": shape.height,
        "width": shape.width,
        "tokens": ((shape.num_frames - 1) // GRID.temporal + 1) * rows * columns,
        "text_tokens": shape.text_tokens,
        "prompt_tokens": shape.prompt_tokens,
        "steps": protocol.steps,
        "threshold": protocol.threshold,
        "seed": protocol.seed,
        "repeats": request.repeats,
        "device": protocol.device,
        "dtype": protocol.dtype,
        "lower": protocol.lower,
        "restart": restart,
        "timeout_s": request.timeout_s,
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("torch", "diffusers", "cache-dit", "hvcompile"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _machine(protocol: Protocol) -> dict[str, Any]:
    import torch

    device = torch.device(protocol.device)
    return {
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "architecture": platform.machine(),
        "threads": protocol.threads or torch.get_num_threads(),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
