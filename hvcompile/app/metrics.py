"""What is measured of a generation: time and reuse a step, and how far one clip is from another, in space and time."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from hvcompile.torch_private.caching import NO_LOOKUPS, Lookups

Frames = NDArray[np.float32]
"""A clip: ``(frames, height, width, 3)``, values from 0 to 1."""


SMALLEST = 3
"""Pixels of a frame's side at least: the smallest window that structural similarity is defined in."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Likeness of a clip to a reference.

    Attributes:
        psnr: decibels, one value a frame; infinite where a frame is identical.
        ssim: structural similarity, one value a frame, at most 1.
        temporal_psnr: decibels, one value a pair of neighbouring frames (so none for a clip of one frame): the PSNR of
            the change from a frame to the next against the reference's change. An error that stands still does not
            count; one that is new in every frame counts twice, 3 dB below ``psnr``; so a value above that says that
            the clip moves as the reference does, and one below that it flickers.

    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    temporal_psnr: tuple[float, ...]

    @property
    def mean_psnr(self) -> float:
        """The mean over the frames that differ, in decibels; infinite where none does."""
        return _finite_mean(self.psnr)

    @property
    def mean_ssim(self) -> float:
        """The mean over all frames."""
        return sum(self.ssim) / len(self.ssim)

    @property
    def mean_temporal_psnr(self) -> float | None:
        """The mean over the changes that differ, in decibels; infinite where none does, None where there is none."""
        return _finite_mean(self.temporal_psnr) if self.temporal_psnr else None

    def record(self) -> dict[str, Any]:
        """The figures as JSON, which has no infinity: null stands for identical, and for what one frame lacks."""
        measures = {
            "psnr_db": (self.psnr, self.mean_psnr),
            "ssim": (self.ssim, self.mean_ssim),
            "temporal_psnr_db": (self.temporal_psnr, self.mean_temporal_psnr),
        }
        return {
            name: {
                "mean": as_json(mean),
                "worst": as_json(min(values, default=None)),
                "each": [as_json(value) for value in values],
            }
            for name, (values, mean) in measures.items()
        }


def _finite_mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.fmean(finite) if finite else math.inf


def as_json(value: float | None) -> float | None:
    """A figure as JSON takes it: null for one that is infinite, not a number or not there."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoising step that is done.

    Attributes:
        backend: what the transformer was compiled with.
        index: from 0 to ``num_steps`` - 1.
        seconds: wall time.
        reused: whether every call of the transformer took the cached residual.
        difference: the largest relative difference that was compared with the threshold; None where there is no cache.
        compiled: whether Dynamo captured a graph in it; the first step counts as such in any case.

    """

    backend: str
    index: int
    num_steps: int
    seconds: float
    reused: bool = False
    difference: float | None = None
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pass of the pipeline.

    Attributes:
        frames: of the clip; of a picture, one.
        seconds: of all of it: text, compiling, steps, decoding.
        steps: in order.
        peak_bytes: the most memory held at a time: on a GPU in this run, else by the process since it began; None where
            it was not measured.
        graphs: how many were found in torch's cache of compiled code, and how many compiled.

    """

    frames: Frames
    seconds: float
    steps: tuple[Step, ...]
    peak_bytes: int | None = None
    graphs: Lookups = NO_LOOKUPS

    @property
    def size(self) -> tuple[int, int, int]:
        """Number of frames, height and width."""
        num_frames, height, width, _ = self.frames.shape
        return num_frames, height, width

    def without_frames(self) -> Run:
        """The same, in which frames take no memory: all are black, in number and size as they were."""
        return dataclasses.replace(self, frames=np.broadcast_to(np.float32(0), self.frames.shape))

    @property
    def num_reused(self) -> int:
        """Steps that took the cached residual."""
        return sum(step.reused for step in self.steps)

    @property
    def compile_seconds(self) -> float:
        """The steps that compiled, less what a computed step takes otherwise."""
        usual, settled = self.computed_seconds or 0.0, set(self.settled)
        return sum(max(0.0, step.seconds - usual) for step in self.steps if step not in settled)

    @property
    def computed_seconds(self) -> float | None:
        """The median of the steps that computed all and compiled nothing; None where there is none after the first."""
        computed = [step.seconds for step in self.settled if not step.reused]
        return statistics.median(computed) if computed else None

    @property
    def step_seconds(self) -> float | None:
        """The mean of a step, computed or reused, that compiled nothing; None where all did."""
        return statistics.fmean(step.seconds for step in self.settled) if self.settled else None

    @property
    def settled(self) -> list[Step]:
        """The steps that compiled nothing: a second denoiser, or another length, compiles on the way."""
        return [step for step in self.steps[1:] if not step.compiled]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A run beside that of the plain compiled model, from the same seed, in the same process."""

    run: Run
    plain: Run
    quality: Quality

    @property
    def step_speedup(self) -> float | None:
        """Times faster a step, after the first, which compiles; None for runs of one step."""
        ours, plain = self.run.step_seconds, self.plain.step_seconds
        return plain / ours if ours and plain else None

    @property
    def total_speedup(self) -> float:
        """Times faster in all: text encoding, compiling, every step and decoding."""
        return self.plain.seconds / self.run.seconds

    def record(self) -> dict[str, Any]:
        """The comparison as JSON, beside what is recorded of the run itself."""
        plain = {"seconds": self.plain.seconds, "seconds_a_step": self.plain.step_seconds}
        return {"reference": {"backend": self.plain.steps[0].backend, **plain}, **self.quality.record()}


def compare(clip: Frames, reference: Frames) -> Quality:
    """Measure ``clip`` against ``reference``; holds two frames in float64 at a time.

    Raises:
        ValueError: the shapes differ, aren't (frames, height, width, channels) or have a side below ``SMALLEST``, or a
            value is not finite.

    """
    if clip.shape != reference.shape or clip.ndim != 4 or not clip.shape[0]:
        raise ValueError(f"clips must both be (frames, height, width, channels): got {clip.shape}, {reference.shape}")
    side = min(clip.shape[1:3])
    if side < SMALLEST:
        raise ValueError(f"frames must be at least {SMALLEST} pixels high and wide: got {clip.shape[1:3]}")
    if not (np.isfinite(clip).all() and np.isfinite(reference).all()):
        raise ValueError("clips must be finite: one of them holds NaN or infinity")
    window = min(7, side - 1 + side % 2)  # scikit-image's own window, or the largest odd one that fits
    changes = (
        (after.astype(np.float64) - before, after_reference.astype(np.float64) - before_reference)
        for (before, after), (before_reference, after_reference) in zip(
            pairwise(clip), pairwise(reference), strict=True
        )
    )
    return Quality(
        psnr=tuple(_psnr(frame, target) for frame, target in zip(clip, reference, strict=True)),
        ssim=tuple(
            float(
                structural_similarity(
                    target.astype(np.float64),
                    frame.astype(np.float64),
                    data_range=1.0,
                    channel_axis=-1,
                    win_size=window,
                )
            )
            for frame, target in zip(clip, reference, strict=True)
        ),
        temporal_psnr=tuple(_psnr(change, target) for change, target in changes),
    )


def _psnr(image: NDArray[Any], target: NDArray[Any]) -> float:
    """Decibels below the square of the range of pixels, 1; of changes too, so that both are on one scale."""
    if np.array_equal(image, target):
        return math.inf
    return float(peak_signal_noise_ratio(target.astype(np.float64), image.astype(np.float64), data_range=1.0))
