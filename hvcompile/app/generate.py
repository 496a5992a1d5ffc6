"""One generation from the command line: load, compile, run, measure, compare, write the files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hvcompile import outputs
from hvcompile.app import adapters, metrics, pictures, pipelines, quiet, saved, sheet, video
from hvcompile.app.arguments import call_arguments
from hvcompile.app.denoisers import denoisers, stats_of_all
from hvcompile.app.notes import notes, written
from hvcompile.app.records import record, write_report
from hvcompile.app.reference import Reference
from hvcompile.app.request.clips import Clips
from hvcompile.app.request.generate import PICTURES, VIDEOS, Request
from hvcompile.app.request.jobs import Job
from hvcompile.app.results import Result
from hvcompile.app.runner import Runner
from hvcompile.app.steps import Observer
from hvcompile.artifacts import load_artifacts
from hvcompile.errors import InputError, OutputError, one_line
from hvcompile.ranks import launch
from hvcompile.runtime.state import Stats
from hvcompile.torch_private import dynamo
from hvcompile.torch_private.compilers import why_no_compiling

BACKEND = "hvfast"

__all__ = ["Observer", "Request", "Result", "generate", "opened", "output_of", "ready", "write_frames"]


def generate(
    request: Request, observe: Observer = lambda event: None, loaded: pipelines.Loaded | None = None
) -> Result:
    """Run ``request``, which asks for one clip or picture, and write its files.

    Args:
        request: what to generate.
        observe: told of phases and steps as they come.
        loaded: a pipeline to use in place of ``request.model``; model, adapters, dtype and device are then ignored.

    Raises:
        InputError: the request can't be met; before any compile time is spent, except where the pixels aren't finite.
        RunError: the pipeline failed for a reason outside this package.
        OutputError: a file can't be written; what was made is kept elsewhere, and the message says where.

    """
    with ready(request, observe, loaded, request.load_fp8) as (pipeline, arguments):
        (job,) = request.jobs(output_of(request, pipeline))
        return _generate(request, job, observe, pipeline, arguments)


@contextlib.contextmanager
def ready(
    request: Clips, observe: Observer, loaded: pipelines.Loaded | None, float8: Path | None = None
) -> Iterator[tuple[pipelines.Loaded, dict[str, Any]]]:
    """Check all that can be checked, load, and join the other ranks; gives the pipeline and its call's arguments."""
    with opened(request, observe, loaded, float8) as pipeline:
        yield pipeline, call_arguments(request, pipeline)


@contextlib.contextmanager
def opened(
    request: Clips, observe: Observer, loaded: pipelines.Loaded | None = None, float8: Path | None = None
) -> Iterator[pipelines.Loaded]:
    """As ``ready``, of a pipeline whose call's arguments are known later."""
    request.check()
    device = launch.device_of_this_rank(request.device)
    lacking = why_no_compiling(loaded.device if loaded is not None else pipelines.resolve_device(device))
    if lacking and os.environ.get("TORCHDYNAMO_DISABLE") != "1":
        raise InputError(lacking)
    if request.artifacts is not None:
        load_artifacts(request.artifacts, options=request.backend_options(), mode=request.mode)
    if loaded is None:
        observe("loading")
        with quiet.loading():
            loaded = pipelines.load(
                request.model, request.dtype, device, is_offloaded=request.is_offloaded, float8=float8
            )
            adapters.fuse(loaded.pipe, request.lora)
            pipelines.offload(loaded, request.offload)
    pipelines.tile(loaded, request.vae_tiling)
    if request.compile_vae:
        pipelines.compile_decoder(loaded)
    # Not before: in a process group, libraries leave it to the first rank to write files, the tiny pipeline's too.
    with launch.joined(loaded.device, request.rank_timeout):
        yield loaded


def output_of(request: Request, loaded: pipelines.Loaded) -> Path:
    """Where the result goes; raises InputError where the file is of another kind than what the pipeline makes."""
    endings, what = (VIDEOS, "videos") if loaded.makes_video else (PICTURES, "pictures")
    output = request.output or Path(f"out{endings[0]}")
    if output.suffix.lower() not in endings:
        raise InputError(
            f"output {str(output)!r} does not fit {loaded.kind}, which makes {what}: give a name that ends in "
            f"{', '.join(endings)}"
        )
    return output


def _generate(
    request: Request, job: Job, observe: Observer, loaded: pipelines.Loaded, arguments: dict[str, Any]
) -> Result:
    # The plain model goes first: a rewrite may free the weights that it runs on (FP8 does).
    plain, plain_notes = None, []
    if request.compare:
        reference = Reference(loaded, is_dynamic=request.dynamic, observe=observe)
        plain, plain_notes = reference.run(job, arguments), reference.notes
        with _failure_told(request, record(request, loaded, job, None, None, arguments)):
            video.check_finite(plain.frames, "the plain compiled model")
    models = denoisers(loaded.pipe)
    before = stats_of_all(models)
    calls: list[dynamo.Call] = []
    runner = Runner(loaded, BACKEND, request.compile_arguments(), observe, calls if request.html_file else None)
    run = runner.run(job, arguments)
    # Where ranks disagree it raises, and no video is written: what they made is not one video.
    stats = stats_of_all(models)
    told = notes(request, loaded, run, [*plain_notes, *runner.notes])
    result = Result(output=job.output, run=run, stats=stats, notes=told)
    if launch.rank() > 0:
        return result  # all ranks have the same frames; the first one writes them
    figures = record(request, loaded, job, run, stats, arguments)
    observe("writing")
    with _failure_told(request, figures):
        write_frames(run, job.output, request.fps)
    problems: tuple[str, ...] = ()
    if plain is not None:
        observe("comparing")
        quality = metrics.compare(run.frames, plain.frames)
        comparison = metrics.Comparison(run=run, plain=plain, quality=quality)
        result = dataclasses.replace(result, comparison=comparison, sheet=request.sheet_path(job.output))
        problems += written((result.sheet, lambda path: _draw(comparison, path)))
    if request.save_fp8 is not None:
        saved.save(loaded.pipe, request.save_fp8)
    figures |= result.comparison.record() if result.comparison is not None else {}
    problems += written((request.json_file, lambda path: outputs.write_json(figures | {"error": None}, path)))
    if request.html_file is not None:
        observe("reporting")
        since = _since(stats, 0 if before is None else before.hits + before.misses) if stats is not None else None
        shown = dataclasses.replace(result, stats=since)
        problems += written(
            (request.html_file, lambda path: write_report(path, request, loaded, job, shown, arguments, calls))
        )
        result = dataclasses.replace(result, report=request.html_file)
    return dataclasses.replace(result, problems=problems)


@contextlib.contextmanager
def _failure_told(request: Request, figures: dict[str, Any]) -> Iterator[None]:
    """Where what runs within fails, the JSON file is written all the same, and says so."""
    try:
        yield
    except (InputError, OutputError) as error:
        failed = figures | {"error": one_line(error)}
        if launch.rank() == 0:
            written((request.json_file, lambda path: outputs.write_json(failed, path)))
        raise


def write_frames(run: metrics.Run, output: Path, fps: int) -> None:
    """Write what a run made as a picture or a video, as the file's name asks for."""
    if output.suffix.lower() in PICTURES:
        pictures.write(run.frames, output)
    else:
        video.write(run.frames, output, fps=fps)


def _since(stats: Stats, num_calls: int) -> Stats:
    """What was done after the first ``num_calls`` decisions."""
    if num_calls == 0:
        return stats
    num_new = stats.hits + stats.misses - num_calls
    steps = stats.steps[-num_new:] if num_new else []
    hits = sum(step.reused for step in steps)
    return dataclasses.replace(stats, steps=steps, hits=hits, misses=len(steps) - hits)


def _draw(comparison: metrics.Comparison, place: Path) -> None:
    """Write the contact sheet of a comparison."""
    run, plain = comparison.run, comparison.plain
    name = f"hvfast ({run.num_reused} of {len(run.steps)} steps reused)"
    names = {"clip_name": name, "reference_name": plain.steps[0].backend}
    sheet.write(sheet.draw(run.frames, plain.frames, comparison.quality, **names), place)
