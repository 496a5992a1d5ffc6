"""The contact sheet: which frames, at what size, how much amplified, and that every cell shows what its row says."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hvcompile.app import metrics, sheet


def quality(*psnr: float) -> metrics.Quality:
    return metrics.Quality(psnr=psnr, ssim=(0.9,) * len(psnr), temporal_psnr=(20.0,) * (len(psnr) - 1))


@pytest.mark.parametrize(
    ("psnr", "chosen"),
    [
        ([math.inf], [0]),
        ([30.0, 20.0], [0, 1]),
        ([math.inf] * 17, [0, 3, 6, 10, 13, 16]),
        ([30.0] * 7 + [20.0] + [30.0] * 9, [0, 3, 7, 10, 13, 16]),
        ([30.0] + [20.0] + [30.0] * 15, [1, 3, 6, 10, 13, 16]),
    ],
)
def test_it_shows_frames_over_the_whole_clip_and_the_worst(psnr: list[float], chosen: list[int]) -> None:
    assert sheet.select(quality(*psnr)) == chosen


def test_small_pictures_grow_by_whole_factors_and_large_ones_shrink() -> None:
    assert sheet.fitted(96, 64) == (192, 128)
    assert sheet.fitted(200, 100) == (200, 100)
    assert sheet.fitted(1280, 720) == (320, 180)
    assert sheet.fitted(1, 1) == (176, 176)


@pytest.mark.parametrize(
    ("largest", "gain"), [(0.0, 1), (1.0, 1), (0.6, 1), (0.2, 5), (0.04, 20), (1e-3, 1000), (1e-9, 1000)]
)
def test_the_difference_is_amplified_as_far_as_it_fits(largest: float, gain: int) -> None:
    assert sheet.amplification(np.full((2, 8, 8, 3), largest)) == gain


def test_a_few_outliers_do_not_hide_the_rest() -> None:
    difference = np.full(100_000, 0.01)
    difference[:50] = 1.0
    assert sheet.amplification(difference) == 100


def test_every_cell_shows_what_its_row_says(tmp_path: Path) -> None:
    """Flat frames, so that a cell is one colour: found back by counting pixels of that colour."""
    reference = np.broadcast_to(np.linspace(0.2, 0.6, 3, dtype=np.float32)[:, None, None, None], (3, 64, 96, 3)).copy()
    clip = reference + np.float32(0.04)
    drawn = sheet.draw(
        clip, reference, metrics.compare(clip, reference), clip_name="fast.mp4", reference_name="exact.mp4"
    )
    sheet.write(drawn, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture)
    width, height = sheet.fitted(96, 64)
    for value in (0.2, 0.4, 0.6, 0.24, 0.44, 0.64):
        level = round(value * 255)
        assert (np.abs(pixels.astype(int) - level).max(-1) <= 1).sum() >= width * height
    # 0.04, amplified by 20, in each of three columns
    level = round(0.8 * 255)
    assert (np.abs(pixels.astype(int) - level).max(-1) <= 1).sum() >= 3 * width * height
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"], "nothing else is left behind"


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 720, 64), (30, 33, 47)])
def test_the_text_fits_beside_any_clip(shape: tuple[int, int, int]) -> None:
    """What is drawn beyond an edge is lost, so the margins of a sheet must be as white as they began."""
    draw = np.random.default_rng(0)
    reference = draw.random((*shape, 3), dtype=np.float32)
    clip = draw.random((*shape, 3), dtype=np.float32)
    drawn = sheet.draw(
        clip, reference, metrics.compare(clip, reference), clip_name="c" * 120, reference_name="the reference"
    )
    pixels = np.asarray(drawn)
    assert (pixels[:12] == 255).all()
    assert (pixels[-12:] == 255).all()
    assert (pixels[:, :12] == 255).all()
    assert (pixels[:, -12:] == 255).all()
