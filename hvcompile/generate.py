"""One generation from the command line: load, compile, run, measure, compare, write the video file."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import imageio.v3
import numpy as np
import torch

import hvcompile
from hvcompile import metrics, pipelines
from hvcompile.errors import UncompiledModelError
from hvcompile.pipelines import InputError

BACKEND = "hvfast"
PLAIN_BACKEND = "inductor"
MODES = ("exact",)
CONTAINERS = (".mp4", ".mkv", ".mov")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate and how; None leaves a choice to the pipeline, the device or the backend.

    Attributes:
        output: the video file; overwritten if it is there.
        frames, height, width: the clip, in frames and pixels.
        guidance: scale of embedded or classifier-free guidance, as the pipeline reads ``guidance_scale``.
        true_cfg: above 1, with ``negative_prompt``, the transformer runs twice a step.
        threshold: of the first-block cache; 0 reuses nothing.
        mode: "exact" for the rewrites that don't change numerics.
        dump: directory for the graphs before and after each pass.
        compare: also run the plain compiled model, and measure against it.
        fps: frames a second of the file.
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
    mode: str | None = None
    dump: Path | None = None
    compare: bool = False
    device: str | None = None
    dtype: str | None = None
    fps: int = 24

    def check(self) -> None:
        """Raise InputError for all that is wrong whatever the model; loads nothing."""
        for name in ("steps", "frames", "height", "width", "fps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: give 1 or more")
        if not -(2**63) <= self.seed < 2**64:
            raise InputError(f"seed is {self.seed}: give a number that fits in 64 bits")
        for name in ("guidance", "true_cfg", "threshold"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value}: give a finite number, 0 or more")
        if self.mode is not None and self.mode not in MODES:
            raise InputError(f"mode {self.mode!r} is unknown: give {' or '.join(MODES)}, or leave it out")
        # torch.compile takes a mode or options, never both.
        if self.mode is not None and self.threshold is not None:
            raise InputError(f"threshold can't be given with mode {self.mode!r}, which has no cache: leave one of them out")
        if self.mode is not None and self.dump is not None:
            raise InputError(f"dump can't be given with mode {self.mode!r}: set HVCOMPILE_DUMP={self.dump} instead")
        _check_output(self.output)
        if self.dump is not None and self.dump.exists() and not self.dump.is_dir():
            raise InputError(f"dump {str(self.dump)!r} is a file: give a directory")
        if self.model is not None:
            pipelines.check_model(self.model)
        pipelines.resolve_dtype(self.dtype, pipelines.resolve_device(self.device))

    def compile_arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``transformer.compile`` besides the backend."""
        if self.mode is not None:
            return {"mode": self.mode}
        options: dict[str, Any] = {}
        if self.threshold is not None:
            options["first_block_cache"] = {"threshold": self.threshold}
        if self.dump is not None:
            options["dump"] = str(self.dump)
        return {"options": options} if options else {}

    def call_arguments(self, loaded: pipelines.Loaded) -> dict[str, Any]:
        """The keyword arguments of the pipeline's call; raises InputError where this pipeline doesn't take them."""
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
        return {**loaded.defaults, **given}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoising step: ``seconds`` of wall time, whether all its transformer calls were reused, and the largest
    relative difference that was compared with the threshold (None where there is no cache)."""

    seconds: float
    reused: bool = False
    difference: float | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pass of the pipeline: ``frames`` as ``metrics.Frames``, ``seconds`` of all of it, and its steps in order."""

    frames: metrics.Frames
    seconds: float
    steps: tuple[Step, ...]

    @property
    def num_reused(self) -> int:
        """Steps that took the cached residual."""
        return sum(step.reused for step in self.steps)

    @property
    def compile_seconds(self) -> float:
        """The first step, which compiles, less what a computed step takes afterwards."""
        computed = [step.seconds for step in self.steps[1:] if not step.reused]
        return max(0.0, self.steps[0].seconds - (statistics.median(computed) if computed else 0.0))

    @property
    def step_seconds(self) -> float | None:
        """The mean of a step, computed or reused, after the first; None for a run of one step."""
        return statistics.fmean(step.seconds for step in self.steps[1:]) if len(self.steps) > 1 else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A run beside that of the plain compiled model, from the same seed, in the same process."""

    run: Run
    plain: Run
    quality: metrics.Quality

    @property
    def step_speedup(self) -> float | None:
        """Times faster a step, after the first, which compiles; None for runs of one step."""
        ours, plain = self.run.step_seconds, self.plain.step_seconds
        return plain / ours if ours and plain else None

    @property
    def total_speedup(self) -> float:
        """Times faster in all: text encoding, compiling, every step and decoding."""
        return self.plain.seconds / self.run.seconds


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished generation; ``comparison`` is None unless it was asked for."""

    output: Path
    run: Run
    graphs: int
    recompiles: int
    comparison: Comparison | None = None


class Observer(Protocol):
    """What is told as a generation goes on."""

    def phase(self, text: str) -> None:
        """Something other than a step has begun."""

    def begin(self, name: str, num_steps: int) -> None:
        """A run of ``num_steps`` has begun; its first step compiles."""

    def step(self, step: Step) -> None:
        """A step of the run is done."""


class Silence:
    """An observer that looks away."""

    def phase(self, text: str) -> None:
        """Ignore it."""

    def begin(self, name: str, num_steps: int) -> None:
        """Ignore it."""

    def step(self, step: Step) -> None:
        """Ignore it."""
