"""``hvcompile compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hvcompile.app import extras, quiet, tables
from hvcompile.app.cli.console import leaving, out


def compare(
    reference: Annotated[Path, typer.Argument(help="The video as it should be.")],
    clip: Annotated[Path, typer.Argument(help="Another of the same size and length.")],
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet: both, and what differs (.png).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures (.json).")] = None,
) -> None:
    """Measure the video file CLIP against REFERENCE, each frame and its motion.

    A video file is compressed, and what that lost counts here. ``hvcompile generate --compare`` measures the pixels
    themselves, against the exact run of the same prompt and seed.
    """
    with leaving():
        extras.require("hvcompile compare", "cli")
        with quiet.importing():
            from hvcompile.app import compare

        result = compare.compare_files(reference, clip, sheet_file=sheet, json_file=json_file)
    out.print(tables.each_frame(result.quality))
    out.print(tables.comparison_summary(result, sheet))
