"""One generation from the command line: load, compile, run, measure, compare, write the video file."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hvcompile
from hvcompile import outputs
from hvcompile.app import metrics, pipelines, sheet, video
from hvcompile.app.compare import check_files
from hvcompile.errors import InputError, UncompiledModelError, UntraceableModelError
from hvcompile.explanation import report
from hvcompile.explanation.explain import explain
from hvcompile.options import MODES, parse
from hvcompile.passes import PASSES
from hvcompile.ranks import launch
from hvcompile.torch_private import dynamo

BACKEND = "hvfast"
PLAIN_BACKEND = "inductor"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate and how; None leaves a choice to the pipeline, the device or the backend.

    Attributes:
        output: the video file; overwritten if it is there.
        frames, height, width: the clip, in frames and pixels.
        guidance: scale of embedded or classifier-free guidance, as the pipeline reads ``guidance_scale``.
        true_cfg: above 1, with ``negative_prompt``, the transformer runs twice a step.
        threshold: of the first-block cache, a relative difference; at 0 only what is the same is reused.
        fp8: linear layers in float8: True asks for it, on a CPU too, False rules it out, None is where it pays.
        mode: "exact" for the rewrites that don't change numerics, "max" for those too that are off by themselves.
        dump: directory for the graphs before and after each pass.
        compare: also run the plain compiled model, and measure against it.
        sheet_file: the contact sheet of the comparison; None for one beside ``output``.
        json_file: where the figures of the comparison go; None for nowhere.
        html_file: where the report of the run goes; None for nowhere.
        fps: frames a second of the file.
        rank_timeout: seconds after which a rank that waits for another gives up, where torchrun started several.

    """

    prompt: str
    output: Path
    model: str | None = None
    steps: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    guidance: float | None = None
    true_cfg: float | None = None
    negative_prompt: str | None = None
    threshold: float | None = None
    fp8: bool | None = None
    mode: str | None = None
    dump: Path | None = None
    compare: bool = False
    sheet_file: Path | None = None
    json_file: Path | None = None
    html_file: Path | None = None
    device: str | None = None
    dtype: str | None = None
    fps: int = 24
    rank_timeout: float = launch.TIMEOUT_SECONDS

    def check(self) -> None:
        """Raise InputError, or OptionError, for all that is wrong whatever the model; loads nothing."""
        for name in ("steps", "frames", "height", "width", "fps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: give 1 or more")
        if not -(2**63) <= self.seed < 2**64:
            raise InputError(f"seed is {self.seed}: give a number that fits in 64 bits")
        if not 0 < self.rank_timeout < math.inf:
            raise InputError(f"rank_timeout is {self.rank_timeout}: give a finite number of seconds above 0")
        for name in ("guidance", "true_cfg", "threshold"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value}: give a finite number, 0 or more")
        for name in ("prompt", "negative_prompt"):
            try:
                (getattr(self, name) or "").encode()
            except UnicodeEncodeError as error:
                raise InputError(f"{name} is no valid text ({error.reason} at {error.start}): give UTF-8") from error
        if (self.true_cfg or 0) > 1 and self.negative_prompt is None:
            raise InputError(f"true_cfg is {self.true_cfg}, which does nothing without negative_prompt: give that too")
        if self.mode is not None and self.mode not in MODES:
            raise InputError(f"mode {self.mode!r} is unknown: give {' or '.join(MODES)}, or leave it out")
        # torch.compile takes a mode or options, never both.
        if self.mode is not None and self.threshold is not None:
            raise InputError(f"threshold can't be given with a mode (it is {self.mode!r}): leave one of them out")
        if self.mode is not None and self.fp8 is not None:
            raise InputError(f"fp8 can't be given with a mode (it is {self.mode!r}): leave one of them out")
        if self.mode is not None and self.dump is not None:
            raise InputError(
                f"dump can't be given with a mode: set HVCOMPILE_DUMP={self.dump} in the environment instead"
            )
        outputs.check(self.output, name="output", kind="video file", suffixes=video.CONTAINERS)
        if self.compare:
            check_files(self.sheet_path(), self.json_file)
        for name, path in (("sheet", self.sheet_file), ("json", self.json_file)):
            if path is not None and not self.compare:
                raise InputError(f"{name} {str(path)!r} is of a comparison: give compare too, or leave it out")
        if self.html_file is not None:
            report.check(self.html_file)
        if self.dump is not None and self.dump.exists() and not self.dump.is_dir():
            raise InputError(f"dump {str(self.dump)!r} is a file: give a directory")
        if self.model is not None:
            pipelines.check_model(self.model)
        pipelines.resolve_dtype(self.dtype, pipelines.resolve_device(self.device))
        parse(PASSES, self.compile_arguments().get("options"), self.mode)  # what the backend would say after loading

    def sheet_path(self) -> Path:
        """Tell where the contact sheet of a comparison goes."""
        return self.sheet_file or self.output.with_name(f"{self.output.stem}.sheet.png")

    def compile_arguments(self) -> dict[str, Any]:
        """Give the keyword arguments of ``transformer.compile`` besides the backend."""
        if self.mode is not None:
            return {"mode": self.mode}
        options: dict[str, Any] = {}
        if self.rank_timeout != launch.TIMEOUT_SECONDS and launch.num_ranks() > 1:
            options["context_parallel"] = {"timeout_seconds": self.rank_timeout}
        if self.threshold is not None:
            options["first_block_cache"] = {"threshold": self.threshold}
        if self.fp8 is not None:
            options["fp8"] = self.fp8
        if self.dump is not None:
            options["dump"] = str(self.dump)
        return {"options": options} if options else {}

    def call_arguments(self, loaded: pipelines.Loaded) -> dict[str, Any]:
        """Give the keyword arguments of the pipeline's call; raises InputError where it doesn't take one."""
        pipelines.Grid.of(loaded.pipe).check(height=self.height, width=self.width, frames=self.frames)
        named = {
            "num_inference_steps": ("steps", self.steps),
            "num_frames": ("frames", self.frames),
            "height": ("height", self.height),
            "width": ("width", self.width),
            "guidance_scale": ("guidance", self.guidance),
            "true_cfg_scale": ("true_cfg", self.true_cfg),
            "negative_prompt": ("negative_prompt", self.negative_prompt),
        }
        given = {argument: value for argument, (_, value) in named.items() if value is not None}
        for argument in given:
            if not loaded.accepts(argument):
                kind = type(loaded.pipe).__name__
                raise InputError(f"{named[argument][0]} can't be used: {kind} has no {argument}; leave it out")
        if self.negative_prompt is not None and loaded.accepts("true_cfg_scale") and (self.true_cfg or 0) <= 1:
            raise InputError("negative_prompt does nothing in this pipeline without true_cfg: give one above 1")
        return {**loaded.defaults, **given}


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished generation; ``comparison``, ``sheet``, its picture, and ``report`` are None unless asked for."""

    output: Path
    run: metrics.Run
    graphs: int
    recompiles: int
    comparison: metrics.Comparison | None = None
    sheet: Path | None = None
    report: Path | None = None


Observer = Callable[["str | metrics.Step"], None]
"""Told, as a generation goes on, what has begun (a few words) and each step when it is done."""


def generate(
    request: Request, observe: Observer = lambda event: None, loaded: pipelines.Loaded | None = None
) -> Result:
    """Run ``request`` and write its video file.

    Args:
        request: what to generate.
        observe: told of phases and steps as they come.
        loaded: a pipeline to use in place of ``request.model``, for which model, dtype and device are then ignored.

    Raises:
        InputError: the request can't be met; before any compile time is spent, except where the pixels aren't finite.

    """
    request.check()
    device = launch.device_of_this_rank(request.device)
    if loaded is None:
        observe("loading")
        loaded = pipelines.load(request.model, request.dtype, device)
    # Not before: in a process group, libraries leave it to the first rank to write files, the tiny pipeline's too.
    with launch.joined(loaded.device, request.rank_timeout):
        return _generate(request, observe, loaded)


def _generate(request: Request, observe: Observer, loaded: pipelines.Loaded) -> Result:
    request.call_arguments(loaded)
    # The plain model goes first: a rewrite may free the weights that it runs on (FP8 does).
    plain = _run(request, loaded, observe, PLAIN_BACKEND, {}) if request.compare else None
    if plain is not None:
        video.check_finite(plain.frames, "the plain compiled model")
    num_calls = _num_calls(loaded.pipe.transformer)
    calls: list[dynamo.Call] = []
    run = _run(request, loaded, observe, BACKEND, request.compile_arguments(), calls if request.html_file else None)
    stats = hvcompile.stats(loaded.pipe.transformer)
    result = Result(output=request.output, run=run, graphs=stats.graphs, recompiles=stats.recompiles)
    if launch.rank() > 0:
        return result  # all ranks have the same frames; the first one writes them
    observe("writing")
    video.write(run.frames, request.output, fps=request.fps)
    if plain is not None:
        observe("comparing")
        result = _compared(request, result, plain)
    if request.html_file is not None:
        observe("reporting")
        _report(request.html_file, request, loaded, result, _since(stats, num_calls), calls)
        result = dataclasses.replace(result, report=request.html_file)
    return result


def _report(
    path: Path,
    request: Request,
    loaded: pipelines.Loaded,
    result: Result,
    stats: hvcompile.Stats,
    calls: list[dynamo.Call],
) -> None:
    """Write the report of a run; the first call of its transformer is traced once more, and nothing is computed."""
    num_frames, height, width, _ = result.run.frames.shape
    arguments = request.call_arguments(loaded)
    facts = {
        "prompt": request.prompt,
        "clip": f"{width}x{height}, {num_frames} frames, seed {request.seed}, in {result.output}",
        "settings": ", ".join(f"{name} {held}" for name, held in arguments.items() if isinstance(held, (int, float))),
        "time": f"{result.run.seconds:.2f} s in all, {result.run.compile_seconds:.2f} s compiling",
    }
    if result.run.step_seconds is not None:
        facts["time"] += f", {result.run.step_seconds:.4f} s a step after"
    if result.comparison is not None and result.comparison.step_speedup is not None:
        facts["against inductor"] = f"{result.comparison.step_speedup:.2f} times as fast a step"
    explanation = None
    try:
        (args, kwargs), *_ = calls
        explanation = explain(loaded.pipe.transformer, *args, **kwargs, **request.compile_arguments())
    except UntraceableModelError as error:  # Dynamo broke the call into several graphs; the run itself is there
        facts["not shown"] = f"the trunk and the graphs: {error}"
    title = request.model or type(loaded.pipe).__name__
    report.write(path, explanation=explanation, stats=stats, title=title, facts=facts)


def _num_calls(transformer: torch.nn.Module) -> int:
    """How many decisions a transformer's cache has made so far."""
    try:
        stats = hvcompile.stats(transformer)
    except UncompiledModelError:
        return 0
    return stats.hits + stats.misses


def _since(stats: hvcompile.Stats, num_calls: int) -> hvcompile.Stats:
    """What was done after the first ``num_calls`` decisions."""
    if num_calls == 0:
        return stats
    num_new = stats.hits + stats.misses - num_calls
    steps = stats.steps[-num_new:] if num_new else []
    hits = sum(step.reused for step in steps)
    return dataclasses.replace(stats, steps=steps, hits=hits, misses=len(steps) - hits)


def _compared(request: Request, result: Result, plain: metrics.Run) -> Result:
    """Measure a run against the plain one, and write the contact sheet and the figures."""
    run = result.run
    quality = metrics.compare(run.frames, plain.frames)
    comparison = metrics.Comparison(run=run, plain=plain, quality=quality)
    names = {"clip_name": f"hvfast ({run.num_reused} of {len(run.steps)} steps reused)", "reference_name": "inductor"}
    sheet.write(sheet.draw(run.frames, plain.frames, quality, **names), request.sheet_path())
    if request.json_file is not None:
        outputs.write_json(_record(request, result, comparison), request.json_file)
    return dataclasses.replace(result, comparison=comparison, sheet=request.sheet_path())


def _record(request: Request, result: Result, comparison: metrics.Comparison) -> dict[str, Any]:
    num_frames, height, width, _ = result.run.frames.shape
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "reference": "inductor",
        "clip": str(result.output),
        "frames": num_frames,
        "height": height,
        "width": width,
        "steps": len(result.run.steps),
        "steps_reused": result.run.num_reused,
        "seconds": {"clip": result.run.seconds, "reference": comparison.plain.seconds},
        "seconds_a_step": {"clip": result.run.step_seconds, "reference": comparison.plain.step_seconds},
        **comparison.quality.record(),
    }


def _run(
    request: Request,
    loaded: pipelines.Loaded,
    observe: Observer,
    backend: str,
    compile_arguments: dict[str, Any],
    calls: list[dynamo.Call] | None = None,
) -> metrics.Run:
    """Compile the transformer with ``backend`` and run the pipeline once, step by step under ``observe``.

    ``calls`` gains the transformer's first call.
    """
    pipe, arguments = loaded.pipe, request.call_arguments(loaded)
    num_steps = int(arguments.get("num_inference_steps") or loaded.default("num_inference_steps"))
    pipe.transformer.compile(backend=backend, **compile_arguments)
    if calls is not None:
        dynamo.keep_first_call(pipe.transformer, calls)
    decisions = _decisions(pipe.transformer) if backend == BACKEND else _no_decisions
    decisions()  # those of an earlier generation on the same model
    steps: list[metrics.Step] = []
    mark = time.perf_counter()

    def on_step_end(*_: Any) -> dict[str, Any]:
        nonlocal mark
        _synchronise(loaded.device)
        now, calls = time.perf_counter(), decisions()  # several calls where guidance runs the transformer twice
        steps.append(
            metrics.Step(
                backend=backend,
                index=len(steps),
                num_steps=num_steps,
                seconds=now - mark,
                reused=bool(calls) and all(reused for reused, _ in calls),
                difference=max((difference for _, difference in calls), default=None),
            )
        )
        observe(steps[-1])
        if len(steps) == num_steps:
            observe("decoding")
        mark = time.perf_counter()
        return {}

    def on_encoded(*_: Any) -> None:
        nonlocal mark
        if not steps:
            mark = time.perf_counter()

    observe(f"{backend}: compiling")
    others = [
        part for name, part in pipe.components.items() if name != "transformer" and isinstance(part, torch.nn.Module)
    ]
    hooks = [
        part.register_forward_hook(on_encoded) for part in others
    ]  # the first step begins when the text is encoded
    start = time.perf_counter()
    try:
        frames = pipe(
            request.prompt,
            generator=torch.Generator().manual_seed(request.seed),  # on the CPU: the same noise on every device
            output_type="np",
            callback_on_step_end=on_step_end,
            callback_on_step_end_tensor_inputs=[],
            **arguments,
        ).frames[0]
    finally:
        for hook in hooks:
            hook.remove()
    return metrics.Run(
        frames=np.asarray(frames, dtype=np.float32), seconds=time.perf_counter() - start, steps=tuple(steps)
    )


def _decisions(transformer: torch.nn.Module) -> Callable[[], list[tuple[bool, float]]]:
    """Make a function that returns (reused, difference) of the transformer calls since it was last called."""
    seen = 0

    def new() -> list[tuple[bool, float]]:
        nonlocal seen
        try:
            stats = hvcompile.stats(transformer)
        except UncompiledModelError:  # its first call is still to come
            return []
        num_new, seen = stats.hits + stats.misses - seen, stats.hits + stats.misses
        return [(bool(call.reused), float(call.difference)) for call in stats.steps[-num_new:]] if num_new else []

    return new


def _no_decisions() -> list[tuple[bool, float]]:
    return []


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
