"""The measures of likeness against formulas written out in numpy, and the edges of what they take."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from hvcompile.app import metrics


def decibels(difference: NDArray[np.float64]) -> float:
    """PSNR of pixels from 0 to 1, by its definition."""
    return float(-10 * np.log10(np.mean(difference**2)))


def similarity(a: NDArray[np.float64], b: NDArray[np.float64], window: int) -> float:
    """SSIM by Wang et al. 2004: a mean filter, the unbiased covariance, over the pixels whose window is whole."""
    values = []
    for channel in range(a.shape[-1]):
        views = [np.lib.stride_tricks.sliding_window_view(one[..., channel], (window, window)) for one in (a, b)]
        x, y = (view.reshape(-1, window * window) for view in views)
        mean_x, mean_y = x.mean(1), y.mean(1)
        covariance = ((x - mean_x[:, None]) * (y - mean_y[:, None])).sum(1) / (window * window - 1)
        c1, c2 = 0.01**2, 0.03**2
        numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        values.append((numerator / ((mean_x**2 + mean_y**2 + c1) * (x.var(1, ddof=1) + y.var(1, ddof=1) + c2))).mean())
    return float(np.mean(values))


def clips(frames: int, height: int, width: int, noise: float = 0.05) -> tuple[metrics.Frames, metrics.Frames]:
    draw = np.random.default_rng(frames * height * width)
    reference = draw.random((frames, height, width, 3), dtype=np.float32)
    clip = (reference + noise * draw.standard_normal(reference.shape)).clip(0, 1).astype(np.float32)
    return clip, reference


@pytest.mark.parametrize("shape", [(4, 16, 24), (3, 33, 17), (2, 7, 9), (5, 5, 64), (2, 3, 3), (2, 4, 6)])
def test_every_measure_is_its_formula(shape: tuple[int, int, int]) -> None:
    clip, reference = clips(*shape)
    quality = metrics.compare(clip, reference)
    a, b = clip.astype(np.float64), reference.astype(np.float64)
    assert quality.psnr == pytest.approx([decibels(x - y) for x, y in zip(a, b, strict=True)])
    assert quality.temporal_psnr == pytest.approx(
        [decibels(x - y) for x, y in zip(np.diff(a, axis=0), np.diff(b, axis=0), strict=True)]
    )
    window = next(odd for odd in (7, 5, 3) if odd <= min(shape[1:]))
    assert quality.ssim == pytest.approx([similarity(x, y, window) for x, y in zip(a, b, strict=True)], abs=1e-6)
    assert quality.mean_psnr == pytest.approx(np.mean(quality.psnr))
    assert quality.mean_ssim == pytest.approx(np.mean(quality.ssim))
    assert quality.mean_temporal_psnr == pytest.approx(np.mean(quality.temporal_psnr))


def test_the_temporal_measure_sees_flicker_and_no_standing_error() -> None:
    reference = np.full((6, 16, 16, 3), 0.5, np.float32)
    standing = reference + np.float32(0.1)
    flicker = reference + np.float32(0.1) * (-1) ** np.arange(6, dtype=np.float32)[:, None, None, None]
    assert metrics.compare(standing, reference).mean_psnr == pytest.approx(20, abs=1e-4)
    assert metrics.compare(standing, reference).mean_temporal_psnr == math.inf
    assert metrics.compare(flicker, reference).mean_psnr == pytest.approx(20, abs=1e-4)
    assert metrics.compare(flicker, reference).mean_temporal_psnr == pytest.approx(20 - 20 * math.log10(2), abs=1e-4)
    noisy = reference + np.random.default_rng(0).normal(0, 0.05, (6, 16, 16, 3)).astype(np.float32)
    quality = metrics.compare(noisy, reference)
    assert quality.mean_temporal_psnr == pytest.approx(quality.mean_psnr - 10 * math.log10(2), abs=0.3)


def test_frames_that_are_identical_are_infinite_and_left_out_of_the_mean() -> None:
    clip, reference = clips(3, 16, 16)
    clip[:2] = reference[:2]
    quality = metrics.compare(clip, reference)
    assert quality.psnr[:2] == (math.inf, math.inf)
    assert quality.mean_psnr == quality.psnr[2]
    assert quality.temporal_psnr[0] == math.inf
    assert quality.temporal_psnr[1] == pytest.approx(quality.psnr[2])
    assert quality.mean_temporal_psnr == quality.temporal_psnr[1]
    same = metrics.compare(reference, reference)
    assert (same.mean_psnr, same.mean_temporal_psnr) == (math.inf, math.inf)
    assert same.mean_ssim == pytest.approx(1, abs=1e-9)


def test_one_frame_has_no_motion_to_measure() -> None:
    quality = metrics.compare(*clips(1, 16, 16))
    assert len(quality.psnr) == len(quality.ssim) == 1
    assert quality.temporal_psnr == ()
    assert quality.mean_temporal_psnr is None


def test_the_record_is_json_of_every_reader() -> None:
    clip, reference = clips(3, 16, 16)
    clip[0] = reference[0]
    quality = metrics.compare(clip, reference)
    record = json.loads(json.dumps(quality.record(), allow_nan=False))
    assert record["psnr_db"] == {
        "mean": quality.mean_psnr,
        "worst": min(quality.psnr),
        "each": [None, *quality.psnr[1:]],
    }
    assert record["ssim"]["each"] == list(quality.ssim)
    assert metrics.compare(clip[:1], clip[:1]).record()["temporal_psnr_db"] == {"mean": None, "worst": None, "each": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda clip: clip[:1], "must both be"),
        (lambda clip: clip[:, 1:], "must both be"),
        (lambda clip: np.where(clip == clip.max(), np.nan, clip), "must be finite"),
        (lambda clip: np.where(clip == clip.max(), np.inf, clip), "must be finite"),
    ],
)
def test_what_can_t_be_measured_is_refused(change: object, message: str) -> None:
    assert callable(change)
    _, reference = clips(2, 16, 16)
    with pytest.raises(ValueError, match=message):
        metrics.compare(change(reference), reference)
    with pytest.raises(ValueError, match=message):
        metrics.compare(reference, change(reference))


def test_frames_below_the_smallest_window_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 pixels"):
        metrics.compare(*clips(2, 2, 16))
    with pytest.raises(ValueError, match="must both be"):
        metrics.compare(*(clip[0] for clip in clips(2, 16, 16)))
    with pytest.raises(ValueError, match="must both be"):
        metrics.compare(*(clip[:0] for clip in clips(2, 16, 16)))


def test_compile_time_is_the_first_step_less_a_computed_one() -> None:
    def step(index: int, seconds: float, reused: bool = False) -> metrics.Step:
        return metrics.Step(backend="b", index=index, num_steps=4, seconds=seconds, reused=reused)

    frames = np.zeros((1, 8, 8, 3), np.float32)
    steps = (step(0, 10.0), step(1, 2.0), step(2, 0.5, True), step(3, 2.0))
    run = metrics.Run(frames=frames, seconds=16.0, steps=steps)
    assert run.compile_seconds == 8.0
    assert run.step_seconds == pytest.approx(1.5)
    assert run.num_reused == 1
    assert metrics.Run(frames=frames, seconds=10.0, steps=steps[:1]).step_seconds is None
