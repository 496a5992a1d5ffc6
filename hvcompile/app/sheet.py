"""The contact sheet of a comparison: frames of the reference, of the clip, and what differs, with the figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hvcompile import outputs
from hvcompile.app.metrics import Frames, Quality
from hvcompile.explanation import figures

MOST_FRAMES = 6
"""Columns at most."""
GAINS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""By what the difference may be amplified: the largest that leaves nearly all of it unclipped."""

_NARROWEST, _WIDEST = 176, 320  # pixels of a picture's width: room for its caption, and six to a screen
MARGIN, GAP, LINE = 16, 8, 20
"""Pixels around a sheet, between its pictures, and of a line of text."""
_INK, FAINT, PAPER = (24, 24, 27), (96, 96, 104), (255, 255, 255)


def draw(clip: Frames, reference: Frames, quality: Quality, *, clip_name: str, reference_name: str) -> Image.Image:
    """Draw a sheet: a title, a column for each frame of a selection, rows reference, clip, amplified difference.

    Args:
        clip: as measured; values outside 0 to 1 are shown at the end of the range.
        reference: of the same shape.
        quality: of ``clip`` against ``reference``.
        clip_name: how the title names the clip.
        reference_name: how the title names the reference.

    """
    chosen = select(quality)
    shown, target = clip[chosen], reference[chosen]
    gain = amplification(np.abs(shown - target))
    rows = (("reference", target), ("clip", shown), (f"difference x {gain}", np.abs(shown - target) * gain))

    title_font, font = ImageFont.load_default(size=17), ImageFont.load_default(size=13)
    width, height = fitted(clip.shape[2], clip.shape[1])
    titles = [f"{clip_name}  against  {reference_name}", _figures(quality)]
    captions = [_caption(quality, frame, chosen) for frame in chosen]

    label_width = math.ceil(max(font.getlength(label) for label, _ in rows)) + GAP
    columns_width = label_width + len(chosen) * (width + GAP) - GAP
    sheet_width = 2 * MARGIN + max(columns_width, *(math.ceil(title_font.getlength(line)) for line in titles))
    top = MARGIN + 2 * (LINE + 6) + 2 * LINE + GAP
    sheet = Image.new("RGB", (sheet_width, top + len(rows) * (height + GAP) - GAP + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, line in enumerate(titles):
        pen.text((MARGIN, MARGIN + place * (LINE + 6)), line, _INK if not place else FAINT, font=title_font)
    for column, (above, below) in enumerate(captions):
        left = MARGIN + label_width + column * (width + GAP)
        pen.text((left, top - 2 * LINE - GAP + 4), above, _INK, font=font)
        pen.text((left, top - LINE - GAP + 4), below, FAINT, font=font)
    for row, (label, pictures) in enumerate(rows):
        y = top + row * (height + GAP)
        pen.text((MARGIN, y + height // 2), label, _INK, font=font, anchor="lm")
        for column, picture in enumerate(pictures):
            sheet.paste(drawn(picture, (width, height)), (MARGIN + label_width + column * (width + GAP), y))
    return sheet


def write(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as PNG; a file that was there is replaced only when all went well."""
    with outputs.replacing(path) as part:
        sheet.save(part, format="PNG")


def select(quality: Quality) -> list[int]:
    """Choose frames to show: the first, the last, others evenly between, and of the neighbours of the worst itself."""
    count = len(quality.psnr)
    chosen = np.unique(np.linspace(0, count - 1, min(count, MOST_FRAMES)).round().astype(int))
    worst = int(np.argmin(quality.psnr))
    if math.isfinite(quality.psnr[worst]):
        chosen[np.abs(chosen - worst).argmin()] = worst
    return [int(frame) for frame in chosen]


def amplification(difference: NDArray[Any]) -> int:
    """Choose a gain of ``GAINS`` at which all but one in a thousand of the values still fit below 1."""
    most = float(np.quantile(difference, 0.999)) or float(difference.max())
    return max(gain for gain in GAINS if gain == 1 or (most and gain * most <= 1))


def fitted(width: int, height: int) -> tuple[int, int]:
    """Choose the size of a picture on the sheet: small ones grow by whole factors, large ones shrink."""
    if width > _WIDEST:
        return _WIDEST, max(1, round(height * _WIDEST / width))
    factor = math.ceil(_NARROWEST / width)
    return width * factor, height * factor


def drawn(pixels: Frames, size: tuple[int, int]) -> Image.Image:
    """Draw a frame, ``[height, width, 3]``, in a size."""
    picture = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    grows = size[0] >= picture.width
    return picture.resize(size, Image.Resampling.NEAREST if grows else Image.Resampling.LANCZOS)


def _figures(quality: Quality) -> str:
    temporal = quality.mean_temporal_psnr
    parts = [
        f"PSNR {decibels(quality.mean_psnr)}, worst frame {decibels(min(quality.psnr))}",
        f"SSIM {quality.mean_ssim:.4f}, worst frame {min(quality.ssim):.4f}",
        f"temporal PSNR {decibels(temporal)}" if temporal is not None else "one frame",
    ]
    return "   |   ".join(parts)


def _caption(quality: Quality, frame: int, chosen: Sequence[int]) -> tuple[str, str]:
    worst = min(quality.psnr)
    is_worst = len(chosen) > 1 and math.isfinite(worst) and quality.psnr[frame] == worst
    measured = f"{decibels(quality.psnr[frame])}, SSIM {quality.ssim[frame]:.3f}"
    return f"frame {frame}, the worst" if is_worst else f"frame {frame}", measured


def decibels(value: float) -> str:
    """Write a PSNR, which is infinite where nothing differs."""
    return figures.number(value, ".2f", " dB")
