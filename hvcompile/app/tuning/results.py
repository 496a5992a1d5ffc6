"""What was measured of one setting: its clips against those of plain torch.compile."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvcompile.app.metrics import Quality, Run, as_json

UNLIKE = ("psnr", "worst_frame_psnr")
"""Figures that are infinite where a clip is identical, for which JSON has null."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One clip of a setting.

    Attributes:
        reused: the share of the steps that were reused, 0 to 1.
        seconds: of the denoising, without compiling.
        reference_seconds: the same of plain torch.compile.
        psnr: decibels, the mean over the frames that differ; infinite where none does.
        worst_frame_psnr: decibels, of the frame that differs most.
        ssim: structural similarity, the mean over the frames.
        temporal_psnr: decibels, of the change from frame to frame; None for a picture.

    """

    reused: float
    seconds: float
    reference_seconds: float
    psnr: float
    worst_frame_psnr: float
    ssim: float
    temporal_psnr: float | None

    @classmethod
    def of(cls, run: Run, quality: Quality, reference_seconds: float) -> Measured:
        """The figures of a run that was compared with its reference."""
        return cls(
            reused=run.num_reused / len(run.steps),
            seconds=denoising_seconds(run, reference_seconds / len(run.steps)),
            reference_seconds=reference_seconds,
            psnr=quality.mean_psnr,
            worst_frame_psnr=min(quality.psnr),
            ssim=quality.mean_ssim,
            temporal_psnr=as_json(quality.mean_temporal_psnr),
        )

    def record(self) -> dict[str, Any]:
        """The figures as JSON."""
        return {name: as_json(value) if name in UNLIKE else value for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Measured:
        """The figures from JSON; raises TypeError where it holds others."""
        return cls(**{name: math.inf if value is None and name in UNLIKE else value for name, value in record.items()})


@dataclass(frozen=True)
class Row:
    """All clips of a setting, one or more."""

    clips: Sequence[Measured]

    def check(self) -> None:
        """Raise ValueError or TypeError where a figure is none, as those of a damaged file may be."""
        figures = (self.reused, self.speedup, self.psnr, self.worst_psnr, self.ssim, self.temporal_psnr)
        if any(math.isnan(figure) for figure in figures if figure is not None):
            raise ValueError("a figure is not a number")

    @property
    def reused(self) -> float:
        """The mean share of the steps that were reused, 0 to 1."""
        return statistics.fmean(clip.reused for clip in self.clips)

    @property
    def speedup(self) -> float:
        """How many times as fast as plain torch.compile all clips together were denoised."""
        return sum(clip.reference_seconds for clip in self.clips) / sum(clip.seconds for clip in self.clips)

    @property
    def psnr(self) -> float:
        """Decibels, the mean over the clips that differ; infinite where none does."""
        different = [clip.psnr for clip in self.clips if math.isfinite(clip.psnr)]
        return statistics.fmean(different) if different else math.inf

    @property
    def worst_psnr(self) -> float:
        """Decibels, of the clip that differs most."""
        return min(clip.psnr for clip in self.clips)

    @property
    def ssim(self) -> float:
        """The mean over the clips."""
        return statistics.fmean(clip.ssim for clip in self.clips)

    @property
    def temporal_psnr(self) -> float | None:
        """Decibels, the mean over the clips that have one."""
        known = [clip.temporal_psnr for clip in self.clips if clip.temporal_psnr is not None]
        return statistics.fmean(known) if known else None


def denoising_seconds(run: Run, computed_seconds: float) -> float:
    """The wall time of all steps, those that compiled counted as what a computed step takes otherwise.

    Args:
        run: of one clip.
        computed_seconds: what a computed step takes, of a run that does not tell: it computed the first step alone.

    """
    usual, settled = run.computed_seconds or computed_seconds, set(run.settled)
    return sum(step.seconds if step in settled else min(step.seconds, usual) for step in run.steps)
