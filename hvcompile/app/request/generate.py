"""What ``hvcompile generate`` is asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hvcompile import outputs
from hvcompile.app.request.clips import Clips, check_not_negative
from hvcompile.app.request.jobs import Job, jobs
from hvcompile.app.request.parameters import COMPILING
from hvcompile.errors import InputError

VIDEOS = (".mp4", ".mkv", ".mov")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of the files that are written; the first of each is that of the default."""
MOST_FPS = 1000
"""Frames a second; players know of no more, and an encoder counts in whole numbers of some size."""


@dataclass(frozen=True, kw_only=True)
class Request(Clips):
    """What to generate and how; None leaves a choice to the pipeline, the device or the backend.

    The fields are the parameters of the command. ``threshold`` is a relative difference, and at 0 only what is the same
    is reused.
    """

    threshold: Annotated[
        float | None,
        typer.Option(help="Of the first-block cache: a larger one reuses more steps.", rich_help_panel=COMPILING),
    ] = None
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The file; replaced if there (default: out.mp4, or out.png for a picture)."
        ),
    ] = None
    fps: Annotated[int, typer.Option(help="Frames a second of the video file.")] = 24
    compare: Annotated[bool, typer.Option("--compare", help="Also run plain torch.compile, and measure both.")] = False
    sheet_file: Annotated[
        Path | None,
        typer.Option("--sheet", help="Contact sheet of --compare or of several clips (default: beside the output)."),
    ] = None
    json_file: Annotated[Path | None, typer.Option("--json", help="Write settings and figures (.json).")] = None
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a report: the clip, each step, the trunk, the passes (.html).")
    ] = None
    save_fp8: Annotated[
        Path | None,
        typer.Option("--save-fp8", help="Write the transformers with float8 weights here.", rich_help_panel=COMPILING),
    ] = None
    load_fp8: Annotated[
        Path | None,
        typer.Option("--load-fp8", help="Take the transformers that --save-fp8 wrote here.", rich_help_panel=COMPILING),
    ] = None
    dump: Annotated[Path | None, typer.Option(help="Directory for the graphs before and after each pass.")] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but notes and errors.")] = False

    def check(self) -> None:
        """Raise InputError, or OptionError, for all that is wrong whatever the model; loads nothing."""
        if self.fps < 1:
            raise InputError(f"fps is {self.fps}: give 1 or more")
        if self.fps > MOST_FPS:
            raise InputError(f"fps is {self.fps}: give {MOST_FPS} or less")
        check_not_negative(threshold=self.threshold)
        if self.compare and os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            raise InputError("compare has nothing to compare where TORCHDYNAMO_DISABLE=1 switches compiling off")
        if self.dump is not None and self.dump.exists() and not self.dump.is_dir():
            raise InputError(f"dump {str(self.dump)!r} is a file: give a directory")
        self._check_float8()
        super().check()
        self._check_files()

    def _check_float8(self) -> None:
        from hvcompile.app import saved

        for name, place in (("save-fp8", self.save_fp8), ("load-fp8", self.load_fp8)):
            if place is not None and (self.fp8 is False or self.mode == "exact"):
                other = "no-fp8" if self.fp8 is False else "mode exact"
                raise InputError(f"{name} needs float8 weights, and {other} rules them out: leave one of the two out")
        if self.save_fp8 is not None:
            saved.check_place(self.save_fp8)
        if self.load_fp8 is not None:
            saved.check(self.load_fp8)
            if self.lora:
                raise InputError("lora can't be fused into weights that load-fp8 gives: fuse it when you save them")
            if self.save_fp8 is not None:
                raise InputError("save-fp8 and load-fp8 are both given: give one of them")
            if self.compare:
                raise InputError("compare needs the weights that load-fp8 does without: leave one of the two out")

    def _check_files(self) -> None:
        from hvcompile.app.compare import check_files
        from hvcompile.explanation import report

        output = self.output or Path(f"out{VIDEOS[0]}")
        outputs.check(output, name="output", kind="video or picture file", suffixes=(*VIDEOS, *PICTURES))
        places = [job.output for job in self.jobs(output)]
        is_one = len(places) == 1
        singles = {"compare": self.compare, "html": self.html_file is not None, "save-fp8": self.save_fp8 is not None}
        for name, is_given in singles.items():
            if is_given and not is_one:
                raise InputError(f"{name} can't be given with several prompts or seeds: give one of each")
        if self.sheet_file is not None and is_one and not self.compare:
            raise InputError(
                f"sheet {str(self.sheet_file)!r} is of a comparison or of several clips: give compare too, or leave it "
                "out"
            )
        sheet = self.sheet_path(output) if self.compare or not is_one else None
        check_files(sheet, self.json_file)
        others = {"sheet": sheet, "json": self.json_file, "html": self.html_file}
        self.check_apart([*(("output", path) for path in places), *others.items()])
        if self.html_file is not None:
            report.check(self.html_file)

    def jobs(self, output: Path) -> tuple[Job, ...]:
        """Every prompt with every seed; raises InputError where one of the two can't be read.

        Args:
            output: of a single job.

        """
        return jobs(self.prompts, self.all_seeds(), output)

    def sheet_path(self, output: Path) -> Path:
        """Tell where a contact sheet goes."""
        return self.sheet_file or output.with_name(f"{output.stem}.sheet.png")

    def own_options(self) -> dict[str, Any]:
        """Options of the backend that parameters of their own give."""
        own = super().own_options()
        if self.save_fp8 is not None or self.load_fp8 is not None:
            own["fp8"] = True
        if self.threshold is not None:
            own["first_block_cache"] = {"threshold": self.threshold}
        if self.dump is not None:
            own["dump"] = str(self.dump)
        return own
