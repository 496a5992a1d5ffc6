"""Clips and pictures in a report: held in the file, or named where they can't be."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hvcompile.app import video
from hvcompile.explanation import media, report
from hvcompile.runtime.state import Stats

NOTHING = Stats(graphs=1, recompiles=0, hits=0, misses=0, slots=0, bytes=0, steps=[], journal=[])


def test_a_report_holds_the_clip_and_the_sheet(tmp_path: Path) -> None:
    clip, sheet, page = tmp_path / "a.mp4", tmp_path / "a.png", tmp_path / "a.html"
    video.write(np.zeros((3, 32, 48, 3), np.float32), clip, fps=8)
    Image.new("RGB", (8, 8)).save(sheet)
    report.write(page, stats=NOTHING, media={"the clip": clip, "the sheet": sheet})
    text = page.read_text("utf-8")
    for file, kind in ((clip, "video/mp4"), (sheet, "image/png")):
        assert f'src="data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"' in text
    assert "the clip" in text
    assert "media-src data:" in text


def test_what_can_t_be_held_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large, text = tmp_path / "a<b.mp4", tmp_path / "a.txt"
    large.write_bytes(b"x" * 100)
    monkeypatch.setattr(media, "MOST_BYTES", 50)
    shown = list(media.media({"clip": large, "none": tmp_path / "none.png", "text": text}))
    assert [item.source for item in shown] == [None] * 3
    assert [item.is_video for item in shown] == [True, False, False]
    assert "is not held here, since it has 100" in shown[0].reason
    assert "can't be read: No such file" in shown[1].reason
    assert "is no picture and no video" in shown[2].reason
    page = tmp_path / "a.html"
    report.write(page, stats=NOTHING, media={"clip": large})
    assert "a&lt;b.mp4" in page.read_text("utf-8")


def test_the_same_frames_are_the_same_file() -> None:
    """Whatever lies in memory beside them: with x264's macroblock tree, one in seven of these files differed."""
    rng = np.random.default_rng(0)
    frames = np.clip(np.cumsum(rng.normal(0, 0.05, (9, 32, 48, 3)), 0) + 0.5, 0, 1).astype(np.float32)
    files = set()
    for _ in range(40):
        _ = [rng.integers(0, 255, size, np.uint8) for size in rng.integers(1000, 9000, 200)]
        files.add(video.encoded(frames, ".mp4", fps=24))
    assert len(files) == 1
