"""Files of a benchmark that measures one thing after the other: its rows as JSON, and a table beside them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(file: Path) -> dict[str, Row]:
    """The rows so far, by name; none where there is no file yet."""
    return {row["name"]: row for row in json.loads(file.read_text("utf-8"))["rows"]} if file.exists() else {}


def write(file: Path, rows: Sequence[Row], bound: float, table: Callable[[Sequence[Row]], str]) -> None:
    """Write the rows and their table, as .md; a reader never sees half of a file.

    Args:
        file: of the rows.
        rows: measured so far.
        bound: below which an error counts as none.
        table: lays them out as Markdown.

    """
    import diffusers
    import torch

    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    content = {"date": time.strftime("%Y-%m-%d"), **versions, "bound": bound, "rows": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((file, json.dumps(content, indent=1) + "\n"), (file.with_suffix(".md"), table(rows))):
        new = path.with_name(path.name + ".new")
        new.write_text(text, "utf-8")
        new.replace(path)
