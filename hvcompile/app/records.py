"""What is written of a generation besides its frames: the JSON record, and the report's facts."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hvcompile.app import metrics
from hvcompile.app.denoisers import denoisers, first_denoiser
from hvcompile.app.pipelines import Loaded
from hvcompile.app.request.clips import Clips
from hvcompile.app.request.generate import Request
from hvcompile.app.request.jobs import Job
from hvcompile.app.results import Result
from hvcompile.errors import UntraceableModelError
from hvcompile.explanation import figures, report
from hvcompile.explanation.explain import explain
from hvcompile.ranks import launch
from hvcompile.runtime.state import Stats
from hvcompile.torch_private import dynamo
from hvcompile.version import __version__


def versions() -> dict[str, str]:
    """What ran: this package, Python, and the libraries below."""
    found = {"hvcompile": __version__, "python": platform.python_version()}
    for name in ("torch", "diffusers", "transformers", "triton", "torchao"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device}, {torch.get_num_threads()} threads"


def plain(value: Any) -> Any:
    """A setting as JSON takes it; a picture by its size."""
    size = getattr(value, "size", None)
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    return f"a picture of {size[0]}x{size[1]}" if isinstance(size, tuple) else str(value)


def circumstances(request: Clips, loaded: Loaded, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What clips are made with, as JSON: the pipeline and its settings, the backend's, and what runs them.

    Args:
        request: what was asked for.
        loaded: the pipeline.
        arguments: of the pipeline's call.

    """
    return {
        "model": request.model,
        "pipeline": loaded.kind,
        "denoisers": {name: type(model).__name__ for name, model in denoisers(loaded.pipe).items()},
        "settings": plain(arguments),
        "adapters": list(request.lora),
        "backend": plain(request.compile_arguments()),
        "device": device_name(loaded.device),
        "dtype": str(first_denoiser(loaded.pipe).dtype).removeprefix("torch."),
        "ranks": launch.num_ranks(),
        "versions": versions(),
    }


def record(
    request: Request,
    loaded: Loaded,
    job: Job,
    run: metrics.Run | None,
    stats: Stats | None,
    arguments: Mapping[str, Any],
) -> dict[str, Any]:
    """A generation as JSON: what was asked, what ran it, and what it took.

    Args:
        request: what was asked for.
        loaded: the pipeline.
        job: which of the request's.
        run: None where it failed.
        stats: of all denoisers; None where nothing was compiled.
        arguments: of the pipeline's call.

    """
    asked = {
        "prompt": job.prompt,
        "seed": job.seed,
        "output": str(job.output),
        **circumstances(request, loaded, arguments),
    }
    if run is None:
        return asked
    num_frames, height, width = run.size
    return asked | {
        "frames": num_frames,
        "height": height,
        "width": width,
        "steps": len(run.steps),
        "steps_reused": run.num_reused,
        "each_step": [
            {
                "seconds": step.seconds,
                "reused": step.reused,
                "difference": metrics.as_json(step.difference),
            }
            for step in run.steps
        ],
        "seconds": run.seconds,
        "seconds_compiling": run.compile_seconds,
        "seconds_a_step": run.step_seconds,
        "peak_bytes": run.peak_bytes,
        "compiled_code": dataclasses.asdict(run.graphs),
        "graphs": None if stats is None else stats.graphs,
        "recompiles": None if stats is None else stats.recompiles,
    }


def write_report(
    path: Path,
    request: Request,
    loaded: Loaded,
    job: Job,
    result: Result,
    arguments: Mapping[str, Any],
    calls: Sequence[dynamo.Call],
) -> None:
    """Write the report of a run; the first call of its denoiser is traced once more, and nothing is computed.

    Args:
        path: where the report goes.
        request: what was asked for.
        loaded: the pipeline.
        job: what was asked for.
        result: how it ran, with the statistics of this run alone.
        arguments: of the pipeline's call.
        calls: of the first denoiser.

    """
    facts = _facts(request, loaded, job, result, arguments)
    explanation = None
    try:
        (args, kwargs), *_ = calls
        explanation = explain(first_denoiser(loaded.pipe), *args, **kwargs, **_explained(request.compile_arguments()))
    except UntraceableModelError as error:  # Dynamo broke the call into several graphs; the run itself is there
        facts["not shown"] = f"the trunk and the graphs: {error}"
    shown = {"clip": job.output} | ({"contact sheet": result.sheet} if result.sheet is not None else {})
    report.write(
        path,
        explanation=explanation,
        stats=result.stats,
        title=request.model or loaded.kind,
        facts=facts,
        media=shown,
    )


def _explained(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``compile`` that ``explain`` takes."""
    return {name: value for name, value in arguments.items() if name in ("mode", "options")}


def _facts(request: Request, loaded: Loaded, job: Job, result: Result, arguments: Mapping[str, Any]) -> dict[str, str]:
    """What stands at the head of a report."""
    run = result.run
    num_frames, height, width = run.size
    length = f", {num_frames} frames" if loaded.makes_video else ""
    time = f"{run.seconds:.2f} s in all, {run.compile_seconds:.2f} s compiling"
    if run.step_seconds is not None:
        time += f", {run.step_seconds:.4f} s a step after"
    compiled = plain(request.compile_arguments())
    facts = {
        "prompt": job.prompt,
        "clip": f"{width}x{height}{length}, seed {job.seed}, in {job.output}",
        "settings": _words({name: value for name, value in plain(arguments).items() if value is not None}),
        "hvfast": _words(compiled) if compiled else "its defaults",
        "adapters": ", ".join(request.lora),
        "time": time,
        "memory": "" if run.peak_bytes is None else figures.with_prefix(run.peak_bytes, "B") + " at most",
        "device": device_name(loaded.device),
        "versions": _words(versions()),
        "denoisers": ", ".join(f"{name} ({type(model).__name__})" for name, model in denoisers(loaded.pipe).items()),
    }
    if len(denoisers(loaded.pipe)) > 1:
        facts["trunk and costs"] = f"those of {next(iter(denoisers(loaded.pipe)))} alone"
    if result.comparison is not None and result.comparison.step_speedup is not None:
        facts["against inductor"] = f"{result.comparison.step_speedup:.2f} times as fast a step"
    return {label: text for label, text in facts.items() if text}


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
