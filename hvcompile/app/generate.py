"""One generation from the command line: load, compile, run, measure, compare, write the video file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hvcompile
from hvcompile import outputs
from hvcompile.app import metrics, pipelines, sheet, video
from hvcompile.app.request.generate import Request
from hvcompile.errors import InputError, UncompiledModelError, UntraceableModelError
from hvcompile.explanation import report
from hvcompile.explanation.explain import explain
from hvcompile.ranks import launch
from hvcompile.torch_private import dynamo
from hvcompile.torch_private.compilers import why_no_compiling

__all__ = ["Observer", "Request", "Result", "generate"]

BACKEND = "hvfast"
PLAIN_BACKEND = "inductor"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished generation; ``comparison``, ``sheet``, its picture, and ``report`` are None unless asked for.

    ``graphs`` and ``recompiles`` are None where nothing was compiled, as with ``TORCHDYNAMO_DISABLE=1``.
    """

    output: Path
    run: metrics.Run
    graphs: int | None
    recompiles: int | None
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
    lacking = why_no_compiling(loaded.device if loaded is not None else pipelines.resolve_device(device))
    if lacking and os.environ.get("TORCHDYNAMO_DISABLE") != "1":
        raise InputError(lacking)
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
    stats = _stats(loaded.pipe.transformer)  # where ranks disagree it raises, and no video is written
    result = Result(
        output=request.output,
        run=run,
        graphs=stats.graphs if stats is not None else None,
        recompiles=stats.recompiles if stats is not None else None,
    )
    if launch.rank() > 0:
        return result  # all ranks have the same frames; the first one writes them
    observe("writing")
    video.write(run.frames, request.output, fps=request.fps)
    if plain is not None:
        observe("comparing")
        result = _compared(request, result, plain)
    if request.html_file is not None:
        observe("reporting")
        done = _since(stats, num_calls) if stats is not None else None
        _report(request.html_file, request, loaded, result, done, calls)
        result = dataclasses.replace(result, report=request.html_file)
    return result


def _report(
    path: Path,
    request: Request,
    loaded: pipelines.Loaded,
    result: Result,
    stats: hvcompile.Stats | None,
    calls: list[dynamo.Call],
) -> None:
    """Write the report of a run; the first call of its transformer is traced once more, and nothing is computed."""
    num_frames, height, width, _ = result.run.frames.shape
    arguments = request.call_arguments(loaded)
    facts = {
        "prompt": request.prompt,
        "clip": f"{width}x{height}, {num_frames} frames, seed {request.seed}, in {result.output}",
        "settings": ", ".join(
            f"{name} {value}" for name, value in arguments.items() if isinstance(value, (int, float))
        ),
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
    stats = _stats(transformer)
    return 0 if stats is None else stats.hits + stats.misses


def _stats(transformer: torch.nn.Module) -> hvcompile.Stats | None:
    """What was done with a transformer; None where it has not been compiled, or Dynamo is switched off."""
    try:
        return hvcompile.stats(transformer)
    except UncompiledModelError:
        return None


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
    watch = _Watch(backend, num_steps, loaded.device, decisions, observe)
    observe(f"{backend}: compiling")
    with watch.beginning_after(_others(pipe)):
        start = time.perf_counter()
        frames = pipe(
            request.prompt,
            generator=torch.Generator().manual_seed(request.seed),  # on the CPU: the same noise on every device
            output_type="np",
            callback_on_step_end=watch.end_step,
            callback_on_step_end_tensor_inputs=[],
            **arguments,
        ).frames[0]
    seconds = time.perf_counter() - start
    return metrics.Run(frames=np.asarray(frames, dtype=np.float32), seconds=seconds, steps=tuple(watch.steps))


def _others(pipe: Any) -> list[torch.nn.Module]:
    """The models of a pipeline besides its transformer."""
    parts = pipe.components.items()
    return [part for name, part in parts if name != "transformer" and isinstance(part, torch.nn.Module)]


class _Watch:
    """Times the steps of a run, and tells of each when it is done."""

    def __init__(
        self,
        backend: str,
        num_steps: int,
        device: torch.device,
        decisions: Callable[[], list[tuple[bool, float]]],
        observe: Observer,
    ) -> None:
        self._backend, self._num_steps, self._device = backend, num_steps, device
        self._decisions, self._observe = decisions, observe
        self._decisions()  # those of an earlier generation on the same model
        self.steps: list[metrics.Step] = []
        self._mark = time.perf_counter()

    @contextlib.contextmanager
    def beginning_after(self, encoders: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Within, the first step begins when the last of these has run: the text is encoded."""
        hooks = [encoder.register_forward_hook(self._restart) for encoder in encoders]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _restart(self, *_: Any) -> None:
        if not self.steps:  # afterwards, too, models run: the decoder
            self._mark = time.perf_counter()

    def end_step(self, *_: Any) -> dict[str, Any]:
        """Take the time of a step, as the callback of a pipeline."""
        _synchronise(self._device)
        now, calls = time.perf_counter(), self._decisions()  # several calls where guidance runs the transformer twice
        self.steps.append(
            metrics.Step(
                backend=self._backend,
                index=len(self.steps),
                num_steps=self._num_steps,
                seconds=now - self._mark,
                reused=bool(calls) and all(reused for reused, _ in calls),
                difference=max((difference for _, difference in calls), default=None),
            )
        )
        self._observe(self.steps[-1])
        if len(self.steps) == self._num_steps:
            self._observe("decoding")
        self._mark = time.perf_counter()
        return {}


def _decisions(transformer: torch.nn.Module) -> Callable[[], list[tuple[bool, float]]]:
    """Make a function that returns (reused, difference) of the transformer calls since it was last called."""
    seen = 0

    def new() -> list[tuple[bool, float]]:
        nonlocal seen
        stats = _stats(transformer)
        if stats is None:  # its first call is still to come
            return []
        num_new, seen = stats.hits + stats.misses - seen, stats.hits + stats.misses
        return [(bool(call.reused), float(call.difference)) for call in stats.steps[-num_new:]] if num_new else []

    return new


def _no_decisions() -> list[tuple[bool, float]]:
    return []


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
