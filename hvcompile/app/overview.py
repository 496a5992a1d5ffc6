"""The contact sheet of several clips: a row each, frames from the first to the last."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from hvcompile.app.metrics import Frames
from hvcompile.app.sheet import FAINT, GAP, LINE, MARGIN, MOST_FRAMES, PAPER, drawn, fitted

MOST_ROWS = 100
"""Clips that a sheet shows, the first; a taller picture opens in few programs."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a sheet shows of a clip: frames ``[count, height, width, 3]`` in uint8, and what stands above them."""

    frames: NDArray[np.uint8]
    caption: str

    @classmethod
    def of(cls, frames: Frames, caption: str) -> Self:
        """Choose frames evenly from a clip, so that the rest need not be kept."""
        chosen = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), MOST_FRAMES)).round().astype(int))
        return cls(frames=(frames[chosen].clip(0, 1) * 255).round().astype(np.uint8), caption=caption)


def draw(rows: Sequence[Row], count: int) -> Image.Image:
    """Draw a sheet of one row or more; ``count`` is how many clips there are, of which it shows the first."""
    shown = rows[:MOST_ROWS]
    font = ImageFont.load_default(size=13)
    sizes = [fitted(row.frames.shape[2], row.frames.shape[1]) for row in shown]
    width = max(len(row.frames) * (size[0] + GAP) - GAP for row, size in zip(shown, sizes, strict=True))
    heights = [LINE + size[1] + GAP for size in sizes]
    rest = count - len(shown)
    height = sum(heights) + (LINE if rest else 0)
    page = Image.new("RGB", (width + 2 * MARGIN, height + 2 * MARGIN), PAPER)
    pen = ImageDraw.Draw(page)
    y = MARGIN
    for row, size, step in zip(shown, sizes, heights, strict=True):
        pen.text((MARGIN, y), _shortened(row.caption, font, width), FAINT, font=font)
        for column, frame in enumerate(row.frames):
            page.paste(drawn(frame / np.float32(255), size), (MARGIN + column * (size[0] + GAP), y + LINE))
        y += step
    if rest:
        pen.text((MARGIN, y), f"and {rest} more", FAINT, font=font)
    return page


def _shortened(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """Cut a caption that is wider than its row."""
    text = " ".join(text.split())
    longest = font.getlength(text)
    if longest <= width:
        return text
    return text[: max(1, math.floor(len(text) * width / longest) - 4)] + " ..."
