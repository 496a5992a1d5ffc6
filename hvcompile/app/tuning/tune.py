"""Tries settings of the cache on the clips of a request, and chooses among them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hvcompile import outputs
from hvcompile.app import identity, metrics, pipelines, video
from hvcompile.app.generate import BACKEND, ready
from hvcompile.app.notes import EMBEDDED, sampler_of, written
from hvcompile.app.records import circumstances, plain
from hvcompile.app.reference import Reference
from hvcompile.app.request.tune import Request
from hvcompile.app.runner import Runner
from hvcompile.app.tuning.candidates import (
    FRONT_BLOCKS,
    LADDERS,
    Candidate,
    Goal,
    Ladders,
    ladder_of,
    missing,
    most_missing,
)
from hvcompile.app.tuning.results import Measured, Row, denoising_seconds
from hvcompile.app.tuning.schedule import COMPUTED, Recorder, Trajectory, schedules, why_none
from hvcompile.app.tuning.store import Store, rounded
from hvcompile.errors import InputError
from hvcompile.inputs import MADE_FOR
from hvcompile.ranks import launch
from hvcompile.ranks.store import Exchange
from hvcompile.runtime.probing import probing

OBSERVED = 4
"""Clips, at most, by which schedules are found."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a tuning is: clips of the reference and of candidates, of all that may have to be made."""

    what: str
    done: int
    most: int


Observer = Callable[["str | metrics.Step | Progress"], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a tuning found.

    Attributes:
        rows: what was measured, a row a candidate.
        goal: what was asked for.
        chosen: the candidate that meets it best; None where none does, or nothing is asked.
        options: those of the backend with that candidate; None without one.
        problems: files that could not be written, a line each.

    """

    rows: Mapping[Candidate, Row]
    goal: Goal
    chosen: Candidate | None
    options: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def tune(request: Request, observe: Observer = lambda event: None, loaded: pipelines.Loaded | None = None) -> Outcome:
    """Measure what is missing, and choose.

    Every clip is made by plain torch.compile first. Some are made with every step computed by the cache, which tells
    the schedules that may be worth it. Each candidate then makes all clips again, and is compared with the first.
    What is measured is kept at once; a run that was broken off goes on there.

    Args:
        request: what to tune.
        observe: told of phases, steps and progress as they come.
        loaded: a pipeline to use in place of ``request.model``.

    Raises:
        InputError: the request can't be met.
        RunError: the pipeline failed for a reason outside this package.
        OutputError: what was measured can't be kept.

    """
    with ready(request, observe, loaded) as (pipeline, arguments):
        tuning = _Tuning(request, observe, pipeline, arguments)
        tuning.measure()
        return tuning.outcome()


class _Tuning:
    """One run of ``tune``; the first rank holds the store, and says to the others what comes next."""

    def __init__(
        self, request: Request, observe: Observer, loaded: pipelines.Loaded, arguments: Mapping[str, Any]
    ) -> None:
        self._request, self._observe, self._loaded, self._arguments = request, observe, loaded, arguments
        self._jobs = request.jobs()
        self._goal = Goal(psnr=request.psnr, worst_psnr=request.worst_psnr, speedup=request.speedup)
        self._store = Store(request.directory, self._conditions(), len(self._jobs)) if launch.rank() == 0 else None
        self._exchange = Exchange(request.rank_timeout)
        self._notes: list[str] = []
        self._num_done = 0

    def _conditions(self) -> dict[str, Any]:
        """What figures must have in common to stand in one table."""
        request, loaded = self._request, self._loaded
        return {
            **circumstances(request, loaded, self._arguments),
            "weights": identity.of_weights(loaded.pipe),
            "prompts": list(request.prompts),
            "seeds": list(request.all_seeds()),
            "pictures": {name: identity.of_picture(picture) for name, picture in request.pictures.items()},
            "vae_tiling": request.vae_tiling,
            "compile_vae": request.compile_vae,
            "offload": request.offload,
        }

    def measure(self) -> None:
        """Make the clips that are missing, the reference's first: a rewrite may free the weights that it runs on."""
        store = self._store
        if self._agreed(bool(self._missing()) and store is not None and not store.has_references()):
            self._make_reference()
        if self._agreed(store is not None and store.schedules is None):
            self._find_schedules()
        while (candidate := self._next()) is not None:
            row = self._measured(candidate)
            if store is not None and row is not None:
                store.rows[candidate] = row
                store.keep()
        if store is not None:
            store.drop_references()
        self._exchange.finish()

    def _next(self) -> Candidate | None:
        """The candidate that all ranks make now; None where nothing is missing."""
        candidates = self._missing()
        section = self._agreed(candidates[0].section() if candidates else None)
        return Candidate(**section) if section is not None else None

    def _missing(self) -> list[Candidate]:
        """What is still to be measured; nothing on other ranks than the first."""
        return missing(self._store.rows, self._goal, self._ladders()) if self._store is not None else []

    def _ladders(self) -> Ladders:
        """The candidates of every rule."""
        assert self._store is not None
        return [*LADDERS, *(ladder_of(found, front) for front, found in (self._store.schedules or {}).items())]

    def _agreed(self, item: Any) -> Any:
        """The first rank's item, on all of them."""
        return self._told(item)[0]

    def _told(self, item: Any) -> list[Any]:
        """What each rank has, on all of them; anything that JSON has."""
        return [theirs for _, theirs in sorted(self._exchange(item), key=operator.itemgetter(0))]

    def _find_schedules(self) -> None:
        """Keep the schedules that follow from some clips with every step computed; none where nothing follows."""
        given = self._request.backend_options().get("first_block_cache", {})
        taken = sorted({"computed_steps", "max_consecutive_hits"}.intersection(given))
        parts = [] if taken else self._told([item.record() for item in self._observed(given)])
        if self._store is None:
            return
        trajectories: list[Trajectory] = []
        if len(set(map(len, parts))) == 1:  # of all ranks the same generations
            read = [list(map(Trajectory.read, part)) for part in parts]
            trajectories = [first.joined(others) for first, *others in zip(*read, strict=True)]
        self._store.schedules = {front: schedules(trajectories, front) for front in FRONT_BLOCKS}
        self._store.keep()
        if not any(map(ladder_of, self._store.schedules.values())):
            reason = f"{' and '.join(taken)} is given" if taken else why_none(trajectories)
            self._notes.append(f"no schedule was tried: {reason}")

    def _observed(self, given: Mapping[str, Any]) -> list[Trajectory]:
        """Make some clips with every step computed; what this rank's blocks made in each step."""
        torch.compiler.reset()
        fields = {name: setting for name, setting in COMPUTED.items() if name not in given}
        runner = Runner(self._loaded, BACKEND, self._request.compile_arguments_with(fields), self._observe)
        recorder, jobs = Recorder(), self._jobs[:OBSERVED]
        with probing(recorder):
            for place, job in enumerate(jobs):
                self._tell("every step computed", place)
                runner.run(job, self._arguments)
                recorder.end()
        self._num_done += len(jobs)
        return recorder.trajectories()

    def _make_reference(self) -> None:
        if self._store is not None:
            self._store.keep()  # whose the directory is, before there is a clip in it
        reference = Reference(self._loaded, is_dynamic=self._request.dynamic, observe=self._observe)
        seconds = []
        for place, job in enumerate(self._jobs):
            self._tell(reference.name, place, is_reference=True)
            run = reference.run(job, self._arguments)
            video.check_finite(run.frames, "the plain compiled model")
            if min(run.frames.shape[1:3]) < metrics.SMALLEST:
                raise InputError(f"the clips are smaller than {metrics.SMALLEST} pixels, which SSIM needs: give more")
            if run.computed_seconds is None:
                told = "the first, and those that compile, tell nothing"
                raise InputError(f"of the steps ({len(run.steps)}) none can be timed, since {told}: give more")
            seconds.append(denoising_seconds(run, run.computed_seconds))
            if self._store is not None:
                self._store.num_steps = len(run.steps)
                self._store.write_reference(place, run.frames)
            self._agreed(None)
        self._num_done += len(self._jobs)
        self._notes += reference.notes
        if self._store is not None:
            self._store.reference_seconds = seconds
            self._store.keep()

    def _measured(self, candidate: Candidate) -> Row | None:
        """Make all clips with a candidate; its row on the first rank, None on the others."""
        torch.compiler.reset()  # of the one before it, its state too
        runner = Runner(self._loaded, BACKEND, self._request.compile_arguments_with(candidate.section()), self._observe)
        clips = []
        for place, job in enumerate(self._jobs):
            self._tell(str(candidate), place)
            run = runner.run(job, self._arguments)
            if self._store is not None:
                video.check_finite(run.frames, str(candidate))
                quality = metrics.compare(rounded(run.frames), self._store.reference(place))
                clips.append(Measured.of(run, quality, self._store.reference_seconds[place]))
            self._agreed(None)  # the others wait here while clips are compared, and in no collective, which times out
        self._num_done += len(self._jobs)
        self._notes += [note for note in runner.notes if note not in self._notes]
        return Row(clips) if clips else None

    def _tell(self, what: str, place: int, *, is_reference: bool = False) -> None:
        """Say what is made now, and how many clips are still to come at most."""
        if self._store is not None:
            finds = self._store.schedules is None
            ahead = most_missing(self._store.rows, self._goal, self._ladders(), finds_schedules=finds) + is_reference
            most = self._num_done + ahead * len(self._jobs) + finds * len(self._jobs[:OBSERVED])
            self._observe(Progress(what=what, done=self._num_done + place, most=most))

    def outcome(self) -> Outcome:
        """Choose, and write what is asked for."""
        if self._store is None:
            return Outcome(rows={}, goal=self._goal, chosen=None, options=None)
        rows = self._store.rows
        chosen = None if self._goal.is_open else self._goal.choose(rows)
        options = None
        if chosen is not None:
            options = self._request.options_with(chosen.section())
        request, store = self._request, self._store
        made_for = {
            "num_steps": store.num_steps,
            "sampler": sampler_of(self._loaded),
            "model": request.model or EMBEDDED,
        }
        kept = {**plain(options), MADE_FOR: made_for} if options is not None else None
        problems = written(
            (request.output if kept is not None else None, lambda path: outputs.write_json(kept or {}, path)),
            (request.json_file, lambda path: outputs.write_json(store.record(), path)),
        )
        return Outcome(
            rows=rows,
            goal=self._goal,
            chosen=chosen,
            options=options,
            notes=tuple(self._notes),
            problems=problems,
        )
