"""What is measured of a generation: time and reuse a step, and how far one clip is from another (PSNR and SSIM)."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

Frames = NDArray[np.float32]
"""A clip: ``(frames, height, width, 3)``, values from 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Likeness of a clip to a reference.

    Attributes:
        psnr: decibels, one value a frame; infinite where a frame is identical.
        ssim: structural similarity, one value a frame, at most 1.

    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]

    @property
    def mean_psnr(self) -> float:
        """The mean over the frames that differ, in decibels; infinite where none does."""
        finite = [value for value in self.psnr if math.isfinite(value)]
        return sum(finite) / len(finite) if finite else math.inf

    @property
    def mean_ssim(self) -> float:
        """The mean over all frames."""
        return sum(self.ssim) / len(self.ssim)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoising step that is done.

    Attributes:
        backend: what the transformer was compiled with.
        index: from 0 to ``num_steps`` - 1.
        seconds: wall time.
        reused: whether every call of the transformer took the cached residual.
        difference: the largest relative difference that was compared with the threshold; None where there is no cache.

    """

    backend: str
    index: int
    num_steps: int
    seconds: float
    reused: bool = False
    difference: float | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One pass of the pipeline: ``frames`` as ``Frames``, ``seconds`` of all of it, and its steps in order."""

    frames: Frames
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


def compare(clip: Frames, reference: Frames) -> Quality:
    """Measure ``clip`` against ``reference``.

    Raises:
        ValueError: the shapes differ or aren't (frames, height, width, channels), or a value is not finite.

    """
    if clip.shape != reference.shape or clip.ndim != 4 or not clip.shape[0]:
        raise ValueError(f"clips must both be (frames, height, width, channels): got {clip.shape}, {reference.shape}")
    if not (np.isfinite(clip).all() and np.isfinite(reference).all()):
        raise ValueError("clips must be finite: one of them holds NaN or infinity")
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(clip, reference, strict=True)]
    side = min(clip.shape[1:3])
    window = min(7, side - 1 + side % 2)  # scikit-image's own window, or the largest odd one that fits
    return Quality(
        psnr=tuple(
            math.inf if np.array_equal(a, b) else float(peak_signal_noise_ratio(b, a, data_range=1.0)) for a, b in pairs
        ),
        ssim=tuple(
            float(structural_similarity(b, a, data_range=1.0, channel_axis=-1, win_size=window)) for a, b in pairs
        ),
    )
