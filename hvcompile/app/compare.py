"""Two clips against each other: figures, contact sheet and JSON; of two video files, or within a generation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvcompile import outputs
from hvcompile.app import metrics, sheet, video
from hvcompile.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FileComparison:
    """A compared pair of files; ``frames``, ``height`` and ``width`` are what both have."""

    reference: Path
    clip: Path
    frames: int
    height: int
    width: int
    quality: metrics.Quality

    def record(self) -> dict[str, Any]:
        """The comparison as JSON."""
        return {
            "reference": str(self.reference),
            "clip": str(self.clip),
            "frames": self.frames,
            "height": self.height,
            "width": self.width,
            **self.quality.record(),
        }


def check_files(sheet_file: Path | None, json_file: Path | None) -> None:
    """Raise InputError where a contact sheet or the figures can't be written; None is no such file."""
    if sheet_file is not None:
        outputs.check(sheet_file, name="sheet", kind="PNG picture", suffixes=(".png",))
    if json_file is not None:
        outputs.check(json_file, name="json", kind="JSON file", suffixes=(".json",))


def compare_files(
    reference: Path, clip: Path, *, sheet_file: Path | None = None, json_file: Path | None = None
) -> FileComparison:
    """Measure one video file against another, frame by frame.

    Args:
        reference: the video as it should be.
        clip: of the same size and length.
        sheet_file: where a contact sheet goes (.png); None for none.
        json_file: where the figures go (.json); None for nowhere.

    Raises:
        InputError: a file is missing or no video, the two differ in size or length, a frame is too small to measure,
            or an output can't be written.

    """
    check_files(sheet_file, json_file)
    target, frames = video.read(reference, "reference"), video.read(clip, "clip")
    if target.shape[1:3] != frames.shape[1:3]:
        (h, w), (height, width) = target.shape[1:3], frames.shape[1:3]
        raise InputError(
            f"clip {str(clip)!r} is {width}x{height}, but reference {str(reference)!r} is {w}x{h}: "
            "give two videos of one size"
        )
    if len(target) != len(frames):
        raise InputError(
            f"clip {str(clip)!r} has a length of {len(frames)} frames, but reference {str(reference)!r} of "
            f"{len(target)}: give two videos of one length"
        )
    if min(frames.shape[1:3]) < metrics.SMALLEST:
        raise InputError(
            f"clip {str(clip)!r} is {frames.shape[2]}x{frames.shape[1]}: give videos of {metrics.SMALLEST} pixels or "
            "more each way, which SSIM needs"
        )
    quality = metrics.compare(frames, target)
    if sheet_file is not None:
        names = {"clip_name": clip.name, "reference_name": reference.name}
        sheet.write(sheet.draw(frames, target, quality, **names), sheet_file)
    num_frames, height, width, _ = frames.shape
    result = FileComparison(
        reference=reference, clip=clip, frames=num_frames, height=height, width=width, quality=quality
    )
    if json_file is not None:
        outputs.write_json(result.record(), json_file)
    return result
