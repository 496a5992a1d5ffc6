"""What ``hvcompile generate`` is asked for."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hvcompile import outputs
from hvcompile.app.request.assignments import assignments, merged, nested, options_file
from hvcompile.app.request.jobs import Job, jobs, read_prompts, read_seeds
from hvcompile.app.request.parameters import EACH, Device, Dtype, Frames, Height, Mode, RankTimeout, Width
from hvcompile.errors import InputError
from hvcompile.ranks import launch

VIDEOS = (".mp4", ".mkv", ".mov")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of the files that are written; the first of each is that of the default."""
MOST_FPS = 1000
"""Frames a second; players know of no more, and an encoder counts in whole numbers of some size."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate and how; None leaves a choice to the pipeline, the device or the backend.

    The fields are the parameters of the command. ``guidance`` is embedded or classifier-free, as the pipeline reads
    ``guidance_scale``; ``threshold`` is a relative difference, and at 0 only what is the same is reused; ``fp8`` is
    True to ask for it, on a CPU too.
    """

    prompt: Annotated[str | None, typer.Argument(help="What the video, or the picture, shows.", show_default=False)] = (
        None
    )
    prompts_file: Annotated[
        Path | None, typer.Option("--prompts", help="A file of prompts, one a line, in place of PROMPT.")
    ] = None
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id of a diffusers pipeline (default: an embedded tiny one).")
    ] = None
    image: Annotated[Path | None, typer.Option(help="A picture to begin with, where the pipeline takes one.")] = None
    last_image: Annotated[Path | None, typer.Option(help="A picture to end with, where it takes one.")] = None
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None
    frames: Frames = None
    height: Height = None
    width: Width = None
    seed: Annotated[int | None, typer.Option(help="Of the first noise; the same on every device (default: 0).")] = None
    seeds: Annotated[str | None, typer.Option(help="Several, such as 0-7,42: a file each, and one sheet of all.")] = (
        None
    )
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None
    true_cfg: Annotated[
        float | None, typer.Option(help="True guidance scale; above 1, with --negative-prompt, two calls a step.")
    ] = None
    negative_prompt: Annotated[str | None, typer.Option(help="What should not be seen.")] = None
    call_settings: Annotated[
        tuple[str, ...],
        typer.Option("--set", help="Any other argument of the pipeline: --set max_sequence_length=128. Repeats."),
        EACH,
    ] = ()
    lora: Annotated[
        tuple[str, ...],
        typer.Option(help="An adapter to fuse: a file, directory or hub id, and :scale if not 1. Repeats."),
        EACH,
    ] = ()
    vae_tiling: Annotated[
        bool, typer.Option("--vae-tiling/--no-vae-tiling", help="Decode large sizes in tiles, or whole.")
    ] = True
    threshold: Annotated[
        float | None, typer.Option(help="Of the first-block cache: a larger one reuses more steps.")
    ] = None
    fp8: Annotated[
        bool | None,
        typer.Option("--fp8/--no-fp8", help="Linear layers in float8, or not (default: where GPUs gain from it)."),
    ] = None
    mode: Mode = None
    backend_settings: Annotated[
        tuple[str, ...],
        typer.Option("--option", help="Any option of hvfast: --option first_block_cache.threshold=0.1. Repeats."),
        EACH,
    ] = ()
    options_file: Annotated[
        Path | None, typer.Option("--options", help="A JSON file of options, as torch.compile takes them.")
    ] = None
    dynamic: Annotated[
        bool, typer.Option("--dynamic", help="One graph for all sizes, rather than a compilation for each.")
    ] = False
    artifacts: Annotated[
        Path | None,
        typer.Option(help="A directory of compiled code that hvcompile warm made. It is code: give only your own."),
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
    device: Device = None
    dtype: Dtype = None
    dump: Annotated[Path | None, typer.Option(help="Directory for the graphs before and after each pass.")] = None
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but notes and errors.")] = False
    rank_timeout: RankTimeout = launch.TIMEOUT_SECONDS

    def check(self) -> None:
        """Raise InputError, or OptionError, for all that is wrong whatever the model; loads nothing."""
        from hvcompile.app import adapters, pipelines
        from hvcompile.options import MODES, parse
        from hvcompile.passes import PASSES

        self._check_numbers()
        self._check_texts()
        self._check_files()
        assignments(self.call_settings, "--set", "max_sequence_length=128")
        _ = self.pictures  # reads them
        if self.compare and os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            raise InputError("compare has nothing to compare where TORCHDYNAMO_DISABLE=1 switches compiling off")
        for place in self.lora:
            adapters.parse(place)
        if self.model is not None:
            pipelines.check_model(self.model)
        pipelines.resolve_dtype(self.dtype, pipelines.resolve_device(self.device))
        if self.mode is not None and self.mode not in MODES:
            raise InputError(f"mode {self.mode!r} is unknown: give {' or '.join(MODES)}, or leave it out")
        parse(PASSES, self.backend_options(), self.mode)  # what the backend would say after loading

    def _check_numbers(self) -> None:
        for name in ("steps", "frames", "height", "width", "fps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: give 1 or more")
        if self.fps > MOST_FPS:
            raise InputError(f"fps is {self.fps}: give {MOST_FPS} or less")
        if self.seed is not None and self.seeds is not None:
            raise InputError("seed and seeds are both given: give one of them")
        for seed in self.all_seeds():
            if not -(2**63) <= seed < 2**64:
                raise InputError(f"seed is {seed}: give a number that fits in 64 bits")
        if not 0 < self.rank_timeout < math.inf:
            raise InputError(f"rank-timeout is {self.rank_timeout}: give a finite number of seconds above 0")
        for name in ("guidance", "true_cfg", "threshold"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{_option(name)} is {value}: give a finite number, 0 or more")

    def _check_texts(self) -> None:
        if self.prompt is None and self.prompts_file is None:
            raise InputError("there is no prompt: give PROMPT, or --prompts FILE")
        if self.prompt is not None and self.prompts_file is not None:
            raise InputError("PROMPT and --prompts are both given: give one of them")
        for name in ("prompt", "negative_prompt"):
            try:
                (getattr(self, name) or "").encode()
            except UnicodeEncodeError as error:
                message = f"{_option(name)} is no valid text ({error.reason} at {error.start}): give UTF-8"
                raise InputError(message) from error
        if (self.true_cfg or 0) > 1 and self.negative_prompt is None:
            raise InputError(f"true-cfg is {self.true_cfg}, which does nothing without negative-prompt: give that too")

    def _check_files(self) -> None:
        from hvcompile.app.compare import check_files
        from hvcompile.explanation import report

        output = self.output or Path(f"out{VIDEOS[0]}")
        outputs.check(output, name="output", kind="video or picture file", suffixes=(*VIDEOS, *PICTURES))
        places = [job.output for job in self.jobs(output)]
        is_one = len(places) == 1
        for name, is_given in (("compare", self.compare), ("html", self.html_file is not None)):
            if is_given and not is_one:
                raise InputError(f"{name} can't be given with several prompts or seeds: give one of each")
        if self.sheet_file is not None and is_one and not self.compare:
            raise InputError(
                f"sheet {str(self.sheet_file)!r} is of a comparison or of several clips: give compare too, or leave it "
                "out"
            )
        sheet = self.sheet_path(output) if self.compare or not is_one else None
        check_files(sheet, self.json_file)
        self._check_apart(places, sheet)
        if self.html_file is not None:
            report.check(self.html_file)
        if self.artifacts is not None and not self.artifacts.is_dir():
            raise InputError(f"artifacts {str(self.artifacts)!r} are not there: give a directory hvcompile warm made")
        if self.dump is not None and self.dump.exists() and not self.dump.is_dir():
            raise InputError(f"dump {str(self.dump)!r} is a file: give a directory")

    def _check_apart(self, places: Sequence[Path], sheet: Path | None) -> None:
        """Raise InputError where a file would be written that another is, or that is read."""
        fields = {"prompts": self.prompts_file, "options": self.options_file, "image": self.image}
        fields |= {"last-image": self.last_image}
        taken = {os.path.realpath(path): name for name, path in fields.items() if path is not None}
        written = [("output", path) for path in places]
        written += [("sheet", sheet)] if sheet is not None else []
        written += [("json", self.json_file)] if self.json_file is not None else []
        written += [("html", self.html_file)] if self.html_file is not None else []
        for name, path in written:
            place = os.path.realpath(path)
            if place in taken:
                raise InputError(f"{name} {str(path)!r} is the file of {taken[place]} too: give another name")
            if os.path.isdir(place):
                raise InputError(f"{name} {str(path)!r} is a directory: give a file name")
            taken[place] = name

    def all_seeds(self) -> tuple[int, ...]:
        """Every seed that is asked for."""
        return (self.seed or 0,) if self.seeds is None else read_seeds(self.seeds)

    def jobs(self, output: Path) -> tuple[Job, ...]:
        """Every prompt with every seed; raises InputError where one of the two can't be read.

        Args:
            output: of a single job.

        """
        return jobs(self.prompts, self.all_seeds(), output)

    # Files are read once: they may be pipes, or be gone when a long run ends.

    @functools.cached_property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt that is asked for."""
        return (self.prompt or "",) if self.prompts_file is None else read_prompts(self.prompts_file)

    @functools.cached_property
    def options_in_file(self) -> dict[str, Any]:
        """Options of the backend that a file gives."""
        return options_file(self.options_file) if self.options_file is not None else {}

    @functools.cached_property
    def pictures(self) -> Mapping[str, Any]:
        """Pictures to begin and to end with, by the names that pipelines have for them."""
        from hvcompile.app import pictures

        places = {"image": self.image, "last_image": self.last_image}
        return {name: pictures.read(path, _option(name)) for name, path in places.items() if path is not None}

    def sheet_path(self, output: Path) -> Path:
        """Tell where a contact sheet goes."""
        return self.sheet_file or output.with_name(f"{output.stem}.sheet.png")

    def backend_options(self) -> dict[str, Any]:
        """Options of the backend; raises InputError where two parameters set the same."""
        own: dict[str, Any] = {}
        if self.rank_timeout != launch.TIMEOUT_SECONDS and launch.num_ranks() > 1:
            own["context_parallel"] = {"timeout_seconds": self.rank_timeout}
        if self.threshold is not None:
            own["first_block_cache"] = {"threshold": self.threshold}
        if self.fp8 is not None:
            own["fp8"] = self.fp8
        if self.dump is not None:
            own["dump"] = str(self.dump)
        given = nested(assignments(self.backend_settings, "--option", "first_block_cache.threshold=0.1"), "--option")
        return merged("--option", self.options_in_file, own, given)

    def compile_arguments(self) -> dict[str, Any]:
        """Give the keyword arguments of ``Module.compile`` besides the backend."""
        options = self.backend_options()
        arguments: dict[str, Any] = {"dynamic": True} if self.dynamic else {}
        if options:  # torch.compile takes a mode or options, never both
            return arguments | {"options": options | ({"mode": self.mode} if self.mode is not None else {})}
        return arguments | ({"mode": self.mode} if self.mode is not None else {})


def _option(name: str) -> str:
    """The name of a field as it is typed."""
    return name.replace("_", "-")
