"""How far one clip is from another: PSNR and SSIM, a frame at a time."""

from __future__ import annotations

import math
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
