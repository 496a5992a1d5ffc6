"""The tables of compiling ahead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from hvcompile.app import store
from hvcompile.app.tables.generation import compiled_code
from hvcompile.explanation import figures

if TYPE_CHECKING:
    from hvcompile.app.warm import Warmed


def warm_tables(result: Warmed) -> list[Table]:
    """Lay out what was compiled, a row each size, and where it is kept."""
    sizes = Table()
    for heading in ("size", "frames", "seconds of the first step", "seconds in all", "compiled code"):
        sizes.add_column(heading, justify="left" if heading in ("size", "compiled code") else "right")
    for size in result.sizes:
        sizes.add_row(
            f"{size.width}x{size.height}",
            str(size.num_frames),
            f"{size.first_seconds:.2f}",
            f"{size.seconds:.2f}",
            compiled_code(size.graphs),
        )
    kept = Table(show_header=False)
    artifacts = result.artifacts
    if artifacts is None:
        kept.add_row("kept in", Text(store.current(), overflow="fold"))
    else:
        kept.add_row("artifacts", Text(str(artifacts.path), overflow="fold"))
        kept.add_row("files", str(artifacts.num_files))
        kept.add_row("size", figures.with_prefix(artifacts.num_bytes, "B"))
    return [sizes, kept]
