"""Several generations by one compiled pipeline: every prompt with every seed, a file each, and a sheet of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvcompile import outputs
from hvcompile.app import overview, pipelines, sheet
from hvcompile.app.denoisers import denoisers, stats_of_all
from hvcompile.app.generate import BACKEND, Observer, output_of, ready, write_frames
from hvcompile.app.notes import notes, written
from hvcompile.app.records import record
from hvcompile.app.request.generate import Request
from hvcompile.app.results import Batch, Clip
from hvcompile.app.runner import Runner
from hvcompile.errors import InputError, OutputError, RunError, one_line
from hvcompile.ranks import launch


def generate_all(
    request: Request, observe: Observer = lambda event: None, loaded: pipelines.Loaded | None = None
) -> Batch:
    """Run every job of ``request`` with one compilation, write a file each, and a contact sheet of all.

    A job whose pixels, memory, pipeline or file fail is noted, and the others go on. Where the run is interrupted, the
    sheet and the JSON file are of what was made by then. Arguments and errors are those of ``generate.generate``,
    errors of single jobs aside.
    """
    with ready(request, observe, loaded, request.load_fp8) as (pipeline, arguments):
        output = output_of(request, pipeline)
        jobs = request.jobs(output)
        runner = Runner(pipeline, BACKEND, request.compile_arguments(), observe)
        clips: list[Clip] = []
        shown: list[overview.Row] = []
        try:
            for job in jobs:
                observe(f"{len(clips) + 1} of {len(jobs)}: seed {job.seed}, {job.prompt}")
                try:
                    run = runner.run(job, arguments)
                    if launch.rank() == 0:
                        write_frames(run, job.output, request.fps)
                except (InputError, OutputError, RunError) as error:
                    clips.append(Clip(job=job, run=None, error=one_line(error)))
                    continue
                if len(shown) < overview.MOST_ROWS:
                    shown.append(overview.Row.of(run.frames, f"seed {job.seed}: {job.prompt}"))
                clips.append(Clip(job=job, run=run.without_frames()))
        finally:
            batch = _finished(request, pipeline, output, runner, arguments, clips, shown)
        return batch


def _finished(
    request: Request,
    loaded: pipelines.Loaded,
    output: Path,
    runner: Runner,
    arguments: Mapping[str, Any],
    clips: list[Clip],
    shown: list[overview.Row],
) -> Batch:
    """Write the sheet and the JSON file of several clips, as far as they were made."""
    stats = stats_of_all(denoisers(loaded.pipe))
    runs = [clip.run for clip in clips if clip.run is not None]
    told = notes(request, loaded, runs[0] if runs else None, runner.notes)
    batch = Batch(clips=tuple(clips), stats=stats, sheet=request.sheet_path(output) if shown else None, notes=told)
    if launch.rank() > 0:
        return batch

    def write_json(path: Path) -> None:
        made = [record(request, loaded, clip.job, clip.run, stats, arguments) | {"error": clip.error} for clip in clips]
        outputs.write_json({"clips": made}, path)

    problems = written(
        (batch.sheet, lambda path: sheet.write(overview.draw(shown, len(runs)), path)), (request.json_file, write_json)
    )
    return dataclasses.replace(batch, problems=problems)
