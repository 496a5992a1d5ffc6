"""Clips and pictures inside a report: the file holds them, so that it can be sent as it is."""

from __future__ import annotations

import base64
import mimetypes
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hvcompile.explanation import figures

MOST_BYTES = 24 * 2**20
"""Of one file; a larger one is named in the report, not held."""


@dataclass(frozen=True, kw_only=True)
class Medium:
    """A clip or picture; ``source`` is a data address, or None where ``reason`` says why it is not shown."""

    label: str
    is_video: bool
    source: str | None
    reason: str = ""


def media(files: Mapping[str, Path]) -> Iterator[Medium]:
    """Read files for a report.

    Args:
        files: label -> a picture or video file, told by its ending.

    """
    for label, path in files.items():
        kind = mimetypes.guess_type(path.name)[0] or ""
        is_video = kind.startswith("video/")
        if not is_video and not kind.startswith("image/"):
            yield Medium(label=label, is_video=False, source=None, reason=f"{path} is no picture and no video")
            continue
        try:
            size = path.stat().st_size
            if size > MOST_BYTES:
                text = f"{path} is not held here, since it has {figures.with_prefix(size, 'B')}"
                yield Medium(label=label, is_video=is_video, source=None, reason=text)
                continue
            content = base64.b64encode(path.read_bytes()).decode("ascii")
        except OSError as error:
            text = f"{path} can't be read: {error.strerror or error}"
            yield Medium(label=label, is_video=is_video, source=None, reason=text)
            continue
        yield Medium(label=label, is_video=is_video, source=f"data:{kind};base64,{content}")
