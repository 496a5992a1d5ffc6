"""Draw one clip of the embedded tiny pipeline: exact, fast, and what differs.

Run ``python docs/pictures/clip.py`` in the repository; it takes a minute or two on two CPU cores, and writes
``docs/pictures/clip.png``. The same run, with the whole contact sheet, is ``hvcompile generate PROMPT --compare``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hvcompile.app import generate, metrics, sheet

PROMPT = "a red circle moves to the left over a blue background"
TARGET = Path(__file__).with_name("clip.png")
COLUMNS = 5
SCALE = 4
"""Pixels of the picture a pixel of the clip, by nearest neighbour."""

_MARGIN, _GAP, _LINE, _LABEL = 12, 6, 20, 116
_INK, _FAINT, _PAPER = (24, 24, 27), (96, 96, 104), (255, 255, 255)


def draw(comparison: metrics.Comparison) -> Image.Image:
    """Draw a row each for the exact clip, the fast one and their amplified difference; time runs to the right."""
    exact, fast = comparison.plain.frames, comparison.run.frames
    difference = np.abs(fast - exact)
    gain = sheet.amplification(difference)
    reused = f"{comparison.run.num_reused} of {len(comparison.run.steps)} steps reused"
    rows = (
        (("exact", "torch.compile"), exact),
        (("fast", "hvfast"), fast),
        ((f"difference x {gain}", f"PSNR {comparison.quality.mean_psnr:.1f} dB"), difference * gain),
    )
    chosen = np.linspace(0, len(exact) - 1, COLUMNS).round().astype(int)
    height, width = exact.shape[1] * SCALE, exact.shape[2] * SCALE
    size = (
        2 * _MARGIN + _LABEL + COLUMNS * (width + _GAP) - _GAP,
        2 * _MARGIN + 2 * _LINE + len(rows) * (height + _GAP) - _GAP,
    )
    picture = Image.new("RGB", size, _PAPER)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)
    pen.text((_MARGIN, _MARGIN), f'"{PROMPT}"   |   hvfast: {reused}', _INK, font=font)
    top = _MARGIN + 2 * _LINE
    for column, frame in enumerate(chosen):
        left = _MARGIN + _LABEL + column * (width + _GAP)
        pen.text((left, top - _LINE), f"frame {frame}", _FAINT, font=font)
        for row, (_, frames) in enumerate(rows):
            pixels = (frames[frame].clip(0, 1) * 255).round().astype(np.uint8)
            cell = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(cell, (left, top + row * (height + _GAP)))
    for row, ((label, below), _) in enumerate(rows):
        middle = top + row * (height + _GAP) + height // 2
        pen.text((_MARGIN, middle), label, _INK, font=font, anchor="lb")
        pen.text((_MARGIN, middle + 2), below, _FAINT, font=font, anchor="lt")
    return picture


def main() -> None:
    """Generate both clips from one seed, and write the picture."""
    with tempfile.TemporaryDirectory() as folder:
        request = generate.Request(prompt=PROMPT, output=Path(folder) / "clip.mp4", compare=True)
        comparison = generate.generate(request).comparison
    if comparison is None:
        raise RuntimeError("the generation gave no comparison")
    sheet.write(draw(comparison), TARGET)


if __name__ == "__main__":
    main()
