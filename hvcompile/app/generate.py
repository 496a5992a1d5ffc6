"""Generations from the command line: load, compile, run, measure, compare, write the files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from hvcompile import outputs
from hvcompile.app import adapters, metrics, overview, pictures, pipelines, quiet, sheet, tiny, video
from hvcompile.app.arguments import call_arguments
from hvcompile.app.denoisers import denoisers, stats_of_all
from hvcompile.app.records import record, write_report
from hvcompile.app.request.generate import PICTURES, VIDEOS, Request
from hvcompile.app.request.jobs import Job
from hvcompile.app.results import Batch, Clip, Result
from hvcompile.app.runner import Runner
from hvcompile.app.steps import Observer
from hvcompile.errors import InputError, OutputError, RunError
from hvcompile.ranks import launch
from hvcompile.runtime.state import Stats
from hvcompile.torch_private import dynamo
from hvcompile.torch_private.compilers import why_no_compiling

BACKEND = "hvfast"
PLAIN_BACKEND = "inductor"

__all__ = ["Batch", "Clip", "Observer", "Request", "Result", "generate", "generate_all"]


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
    with _ready(request, observe, loaded) as ready:
        (job,) = request.jobs(_output(request, ready))
        return _generate(request, job, observe, ready)


def generate_all(
    request: Request, observe: Observer = lambda event: None, loaded: pipelines.Loaded | None = None
) -> Batch:
    """Run every job of ``request`` with one compilation, write a file each, and a contact sheet of all.

    A job whose pixels, memory, pipeline or file fail is noted, and the others go on. Where the run is interrupted, the
    sheet and the JSON file are of what was made by then. Arguments and errors are those of ``generate``, errors of
    single jobs aside.
    """
    with _ready(request, observe, loaded) as ready:
        output = _output(request, ready)
        arguments, jobs = call_arguments(request, ready), request.jobs(output)
        runner = Runner(ready, BACKEND, request.compile_arguments(), observe)
        clips: list[Clip] = []
        shown: list[overview.Row] = []
        try:
            for job in jobs:
                observe(f"{len(clips) + 1} of {len(jobs)}: seed {job.seed}, {job.prompt}")
                try:
                    run = runner.run(job, arguments)
                    if launch.rank() == 0:
                        _write(run, job.output, request.fps)
                except (InputError, OutputError, RunError) as error:
                    clips.append(Clip(job=job, run=None, error=" ".join(str(error).split())))
                    continue
                shown.append(overview.Row.of(run.frames, f"seed {job.seed}: {job.prompt}"))
                clips.append(Clip(job=job, run=run.without_frames()))
        finally:
            batch = _finished(request, ready, output, clips, shown)
        return batch


def _finished(
    request: Request, loaded: pipelines.Loaded, output: Path, clips: list[Clip], shown: list[overview.Row]
) -> Batch:
    """Write the sheet and the JSON file of several clips, as far as they were made."""
    stats = stats_of_all(denoisers(loaded.pipe))
    batch = Batch(clips=tuple(clips), stats=stats, sheet=None, notes=_notes(request, loaded, stats))
    if launch.rank() > 0:
        return batch
    if shown:
        batch = dataclasses.replace(batch, sheet=request.sheet_path(output))
        sheet.write(overview.draw(shown), request.sheet_path(output))
    if request.json_file is not None:
        arguments = call_arguments(request, loaded)
        made = [record(request, loaded, clip.job, clip.run, stats, arguments) | {"error": clip.error} for clip in clips]
        outputs.write_json({"clips": made}, request.json_file)
    return batch


@contextlib.contextmanager
def _ready(request: Request, observe: Observer, loaded: pipelines.Loaded | None) -> Iterator[pipelines.Loaded]:
    """Check all that can be checked, load, and join the other ranks; within, the pipeline can run."""
    request.check()
    device = launch.device_of_this_rank(request.device)
    lacking = why_no_compiling(loaded.device if loaded is not None else pipelines.resolve_device(device))
    if lacking and os.environ.get("TORCHDYNAMO_DISABLE") != "1":
        raise InputError(lacking)
    if loaded is None:
        observe("loading")
        with quiet.loading():
            loaded = pipelines.load(request.model, request.dtype, device)
        adapters.fuse(loaded.pipe, request.lora)
    pipelines.tile(loaded, request.vae_tiling)
    # Not before: in a process group, libraries leave it to the first rank to write files, the tiny pipeline's too.
    with launch.joined(loaded.device, request.rank_timeout):
        call_arguments(request, loaded)
        yield loaded


def _output(request: Request, loaded: pipelines.Loaded) -> Path:
    """Where the result goes; raises InputError where the file is of another kind than what the pipeline makes."""
    endings, what = (VIDEOS, "videos") if loaded.makes_video else (PICTURES, "pictures")
    output = request.output or Path(f"out{endings[0]}")
    if output.suffix.lower() not in endings:
        raise InputError(
            f"output {str(output)!r} does not fit {loaded.kind}, which makes {what}: give a name that ends in "
            f"{', '.join(endings)}"
        )
    return output


def _generate(request: Request, job: Job, observe: Observer, loaded: pipelines.Loaded) -> Result:
    arguments = call_arguments(request, loaded)
    # The plain model goes first: a rewrite may free the weights that it runs on (FP8 does).
    plain = None
    if request.compare:
        plain = Runner(loaded, PLAIN_BACKEND, {"dynamic": request.dynamic or None}, observe).run(job, arguments)
        video.check_finite(plain.frames, "the plain compiled model")
    models = denoisers(loaded.pipe)
    before = stats_of_all(models)
    calls: list[dynamo.Call] = []
    runner = Runner(loaded, BACKEND, request.compile_arguments(), observe, calls if request.html_file else None)
    run = runner.run(job, arguments)
    # Where ranks disagree it raises, and no video is written: what they made is not one video.
    stats = stats_of_all(models)
    result = Result(output=job.output, run=run, stats=stats, notes=_notes(request, loaded, stats, run))
    if launch.rank() > 0:
        return result  # all ranks have the same frames; the first one writes them
    observe("writing")
    _write(run, job.output, request.fps)
    if plain is not None:
        observe("comparing")
        result = _compared(request, result, plain)
    if request.json_file is not None:
        figures = record(request, loaded, job, run, stats, arguments)
        compared = result.comparison.record() if result.comparison is not None else {}
        outputs.write_json(figures | compared, request.json_file)
    if request.html_file is not None:
        observe("reporting")
        since = _since(stats, 0 if before is None else before.hits + before.misses) if stats is not None else None
        write_report(request, loaded, job, dataclasses.replace(result, stats=since), arguments, calls)
        result = dataclasses.replace(result, report=request.html_file)
    return result


def _write(run: metrics.Run, output: Path, fps: int) -> None:
    if output.suffix.lower() in PICTURES:
        pictures.write(run.frames, output)
    else:
        video.write(run.frames, output, fps=fps)


def _notes(
    request: Request, loaded: pipelines.Loaded, stats: Stats | None, run: metrics.Run | None = None
) -> tuple[str, ...]:
    """What a user should know of a generation beside its figures, a line each."""
    notes = []
    if request.model is None and (unknown := tiny.unknown_words([job.prompt for job in request.jobs(Path("x"))])):
        notes.append(
            f"the tiny model was not trained on {', '.join(unknown)}, and draws something else; it knows shapes, "
            "colours and directions, such as: a red circle moves to the left over a blue background"
        )
    if run is not None:
        asked = (request.frames, request.height, request.width)
        if any(size not in (None, made) for size, made in zip(asked, run.size, strict=True)):
            frames, height, width = run.size
            length = f", {frames} frames" if loaded.makes_video else ""
            notes.append(f"{loaded.kind} made {width}x{height}{length}, which is not what was asked for")
    return tuple(notes)


def _since(stats: Stats, num_calls: int) -> Stats:
    """What was done after the first ``num_calls`` decisions."""
    if num_calls == 0:
        return stats
    num_new = stats.hits + stats.misses - num_calls
    steps = stats.steps[-num_new:] if num_new else []
    hits = sum(step.reused for step in steps)
    return dataclasses.replace(stats, steps=steps, hits=hits, misses=len(steps) - hits)


def _compared(request: Request, result: Result, plain: metrics.Run) -> Result:
    """Measure a run against the plain one, and write the contact sheet."""
    run = result.run
    quality = metrics.compare(run.frames, plain.frames)
    names = {"clip_name": f"hvfast ({run.num_reused} of {len(run.steps)} steps reused)", "reference_name": "inductor"}
    place = request.sheet_path(result.output)
    sheet.write(sheet.draw(run.frames, plain.frames, quality, **names), place)
    comparison = metrics.Comparison(run=run, plain=plain, quality=quality)
    return dataclasses.replace(result, comparison=comparison, sheet=place)
