"""A world in which tuning costs nothing, and tunings by several ranks; apart from the tests, for processes find it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ranks
import torch
import torch.distributed as dist

from hvcompile.app import metrics, pipelines
from hvcompile.app.request.jobs import Job
from hvcompile.app.request.tune import Request
from hvcompile.app.runner import Runner
from hvcompile.app.tuning import candidates, tune
from hvcompile.app.tuning.candidates import Candidate
from hvcompile.app.tuning.results import Measured, Row
from hvcompile.errors import InputError
from hvcompile.runtime import probing


def row_of(*, reused: float = 0.5, seconds: float = 1.0, psnr: float = 40.0, worst: float | None = None) -> Row:
    """A setting's row of two clips, of which the second is the worse one."""
    common = {"seconds": seconds, "reference_seconds": 2.0, "worst_frame_psnr": 20.0, "ssim": 0.9}
    worst = psnr if worst is None else worst
    return Row(
        [
            Measured(reused=reused, psnr=2 * psnr - worst, temporal_psnr=30.0, **common),
            Measured(reused=reused, psnr=worst, temporal_psnr=None, **common),
        ]
    )


def law(candidate: Candidate) -> Row:
    """A world in which a larger threshold reuses more, and loses decibels that a forecast wins back in part."""
    reused = min(0.9, 2 * candidate.threshold)
    if candidate.computed_steps:
        reused = 1 - len(candidate.computed_steps) / 30
    return row_of(reused=reused, seconds=2 * (1 - reused), psnr=60 - 50 * reused + 4 * candidate.forecast)


def run_of(frames: Any, *, seconds: float = 1.0, num_reused: int = 1, num_steps: int = 4) -> metrics.Run:
    steps = [
        metrics.Step(
            backend="hvfast",
            index=place,
            num_steps=num_steps,
            seconds=seconds,
            reused=place > num_steps - 1 - num_reused,
        )
        for place in range(num_steps)
    ]
    return metrics.Run(frames=np.asarray(frames, dtype=np.float32), seconds=9.0, steps=tuple(steps))


def show_steps(num_steps: int, part: slice) -> None:
    """Show a probe a generation as the cache's state has it, in a part of its streams."""
    probe, streams = probing.current(), np.random.default_rng(0).standard_normal((num_steps, 2, 9)).cumsum(0)
    for place, (first, rest) in enumerate(torch.from_numpy(streams)):
        clock = torch.tensor([1000.0 - 100 * place], dtype=torch.float64)
        state = {"counters": torch.tensor([place + 1, 0]), "last_clock": clock}
        assert probe is not None
        probe(0, 0, {**state, "first_residual": first[part], "residual_0": rest[part]})


def begin_world(made: list[str], replace: Callable[..., None], part: slice = slice(None)) -> None:
    """From now on runs cost nothing: their clips are noise that grows with the threshold.

    Args:
        made: gains the settings in their order.
        replace: puts something in the place of an attribute.
        part: of the streams that this rank has.

    """

    def begin(self: Any, _: Any, backend: str, arguments: Any, *__: Any) -> None:
        section = arguments.get("options", {}).get("first_block_cache")
        self.cache = (
            Candidate(**{name: value for name, value in section.items() if name != "warmup_steps"}) if section else None
        )
        self.notes = []
        made.append(backend if self.cache is None else str(self.cache))

    def run(self: Any, job: Any, _: Any) -> metrics.Run:
        clip = np.random.default_rng(job.seed).random((3, 8, 8, 3), np.float32)
        if self.cache is None:
            return run_of(clip, num_reused=0)
        if self.cache.threshold == 0:
            show_steps(4, part)
            return run_of(clip, num_reused=0)
        noise = 10 ** (-law(self.cache).psnr / 20) * (-1) ** np.indices(clip.shape).sum(0)
        return run_of(0.1 + 0.8 * clip + noise - (0.1 - 0.2 * clip), num_reused=round(4 * law(self.cache).reused))

    replace(Runner, "__init__", begin)
    replace(Runner, "run", run)


def request_in(folder: Path) -> Request:
    """What tunings in that world are asked for."""
    return Request(
        prompt="a red circle",
        seeds="0-1",
        psnr=45.0,
        output=folder / "tuned.json",
        json_file=folder / "all.json",
        rank_timeout=2.0,
    )


def of_all_ranks(folder: str, dying: int) -> tuple[int, int, str]:
    """Tune in that world, and once more in another folder, where the rank ``dying`` makes no seventh clip.

    Leaves the settings of the first in their order in a file of each rank. Returns how many rows that found, how many
    settings the second began, and its error.
    """
    whole, broken = Path(folder, "whole"), Path(folder, "broken")
    if dist.get_rank() == 0:
        whole.mkdir()
        broken.mkdir()
    dist.barrier()
    made: list[str] = []
    begin_world(made, setattr, slice(0, 4) if dist.get_rank() else slice(4, 9))
    loaded = pipelines.load()
    outcome = tune.tune(request_in(whole), loaded=loaded)
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(made))

    made.clear()
    make, numbers = Runner.run, itertools.count()

    def until(self: Runner, job: Job, arguments: Mapping[str, Any]) -> metrics.Run:
        if next(numbers) == 6 and dist.get_rank() == dying:
            ranks.die()
        return make(self, job, arguments)

    Runner.run = until  # type: ignore[method-assign]
    try:
        tune.tune(request_in(broken), loaded=loaded)
    except InputError as error:
        return len(outcome.rows), len(made), str(error)
    return len(outcome.rows), len(made), ""


def of_the_tiny_pipeline(folder: str) -> list[Any]:
    """Tune the tiny pipeline by some candidates, compiled; what was measured, of all clips, on the first rank."""
    ladders = [ladder[4:8:3] for ladder in candidates.LADDERS[1:2]]
    tune.__dict__["LADDERS"] = tuple(ladders)  # in a process of its own
    prompt = "a red circle moves to the left over a blue background"
    request = Request(
        prompt=prompt, steps=6, backend_settings=("lower=eager",), output=Path(folder) / f"{dist.get_world_size()}.json"
    )
    outcome = tune.tune(request, loaded=pipelines.load())
    return [
        (str(candidate), candidate.computed_steps, clip.reused, clip.psnr)
        for candidate, row in outcome.rows.items()
        for clip in row.clips
    ]
