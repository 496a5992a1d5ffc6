"""A video that was made, apart from what makes it: whoever is handed one need not load torch to read it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Made:
    """A video that was made.

    Attributes:
        content: of its file; empty on other ranks than the first.
        suffix: of its file, such as ".mp4".
        frames: how many.
        height: pixels.
        width: pixels.
        steps: how many were done.
        reused: how many of them took the cached residual.
        captured: steps in which Dynamo captured a graph.
        seconds: of all: text, compiling, steps, decoding, encoding.
        compile_seconds: of them.
        peak_bytes: the most memory that this process held; None where it was not measured.
        maker: what the last bits of the pixels depend on besides the request: ``device`` with its threads, and the
            versions of ``torch`` and ``hvcompile``.

    """

    content: bytes
    suffix: str
    frames: int
    height: int
    width: int
    steps: int
    reused: int
    captured: int
    seconds: float
    compile_seconds: float
    peak_bytes: int | None
    maker: dict[str, str] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """All but the content, as JSON."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "content"}
