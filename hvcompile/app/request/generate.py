"""What ``hvcompile generate`` is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hvcompile import outputs
from hvcompile.app.grid import Grid
from hvcompile.app.request.parameters import Device, Dtype, Frames, Height, Mode, RankTimeout, Width
from hvcompile.errors import InputError
from hvcompile.explanation import report
from hvcompile.options import MODES, parse
from hvcompile.passes import PASSES
from hvcompile.ranks import launch

if TYPE_CHECKING:
    from hvcompile.app.pipelines import Loaded


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate and how; None leaves a choice to the pipeline, the device or the backend.

    The fields are the parameters of the command. ``guidance`` is embedded or classifier-free, as the pipeline reads
    ``guidance_scale``; ``threshold`` is a relative difference, and at 0 only what is the same is reused; ``fp8`` is
    True to ask for it, on a CPU too.
    """

    prompt: Annotated[str, typer.Argument(help="What the video shows.")]
    model: Annotated[
        str | None, typer.Option(help="Directory or hub id of a diffusers pipeline (default: an embedded tiny one).")
    ] = None
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None
    frames: Frames = None
    height: Height = None
    width: Width = None
    seed: Annotated[int, typer.Option(help="Of the first noise; the same on every device.")] = 0
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None
    true_cfg: Annotated[
        float | None, typer.Option(help="True guidance scale; above 1, with --negative-prompt, two calls a step.")
    ] = None
    negative_prompt: Annotated[str | None, typer.Option(help="What the video should not show.")] = None
    threshold: Annotated[
        float | None, typer.Option(help="Of the first-block cache: a larger one reuses more steps.")
    ] = None
    fp8: Annotated[
        bool | None,
        typer.Option("--fp8/--no-fp8", help="Linear layers in float8, or not (default: where GPUs gain from it)."),
    ] = None
    mode: Mode = None
    output: Annotated[Path, typer.Option("--output", "-o", help="The video file; replaced if there.")] = Path("out.mp4")
    fps: Annotated[int, typer.Option(help="Frames a second of the video file.")] = 24
    compare: Annotated[bool, typer.Option("--compare", help="Also run plain torch.compile, and measure both.")] = False
    sheet_file: Annotated[
        Path | None,
        typer.Option("--sheet", help="Contact sheet of --compare (default: beside the output, .sheet.png)."),
    ] = None
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the figures of --compare go.")] = None
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a report: each step, the trunk, the passes (.html).")
    ] = None
    device: Device = None
    dtype: Dtype = None
    dump: Annotated[Path | None, typer.Option(help="Directory for the graphs before and after each pass.")] = None
    rank_timeout: RankTimeout = launch.TIMEOUT_SECONDS

    def check(self) -> None:
        """Raise InputError, or OptionError, for all that is wrong whatever the model; loads nothing."""
        from hvcompile.app import pipelines

        self._check_numbers()
        self._check_texts()
        self._check_mode()
        self._check_files()
        if self.model is not None:
            pipelines.check_model(self.model)
        pipelines.resolve_dtype(self.dtype, pipelines.resolve_device(self.device))
        parse(PASSES, self.compile_arguments().get("options"), self.mode)  # what the backend would say after loading

    def _check_numbers(self) -> None:
        for name in ("steps", "frames", "height", "width", "fps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: give 1 or more")
        if not -(2**63) <= self.seed < 2**64:
            raise InputError(f"seed is {self.seed}: give a number that fits in 64 bits")
        if not 0 < self.rank_timeout < math.inf:
            raise InputError(f"rank_timeout is {self.rank_timeout}: give a finite number of seconds above 0")
        for name in ("guidance", "true_cfg", "threshold"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is {value}: give a finite number, 0 or more")

    def _check_texts(self) -> None:
        for name in ("prompt", "negative_prompt"):
            try:
                (getattr(self, name) or "").encode()
            except UnicodeEncodeError as error:
                raise InputError(f"{name} is no valid text ({error.reason} at {error.start}): give UTF-8") from error
        if (self.true_cfg or 0) > 1 and self.negative_prompt is None:
            raise InputError(f"true_cfg is {self.true_cfg}, which does nothing without negative_prompt: give that too")

    def _check_mode(self) -> None:
        if self.mode is None:
            return
        if self.mode not in MODES:
            raise InputError(f"mode {self.mode!r} is unknown: give {' or '.join(MODES)}, or leave it out")
        # torch.compile takes a mode or options, never both.
        if self.threshold is not None:
            raise InputError(f"threshold can't be given with a mode (it is {self.mode!r}): leave one of them out")
        if self.fp8 is not None:
            raise InputError(f"fp8 can't be given with a mode (it is {self.mode!r}): leave one of them out")
        if self.dump is not None:
            raise InputError(
                f"dump can't be given with a mode: set HVCOMPILE_DUMP={self.dump} in the environment instead"
            )

    def _check_files(self) -> None:
        from hvcompile.app import video
        from hvcompile.app.compare import check_files

        outputs.check(self.output, name="output", kind="video file", suffixes=video.CONTAINERS)
        if self.compare:
            check_files(self.sheet_path(), self.json_file)
        for name, path in (("sheet", self.sheet_file), ("json", self.json_file)):
            if path is not None and not self.compare:
                raise InputError(f"{name} {str(path)!r} is of a comparison: give compare too, or leave it out")
        if self.html_file is not None:
            report.check(self.html_file)
        if self.dump is not None and self.dump.exists() and not self.dump.is_dir():
            raise InputError(f"dump {str(self.dump)!r} is a file: give a directory")

    def sheet_path(self) -> Path:
        """Tell where the contact sheet of a comparison goes."""
        return self.sheet_file or self.output.with_name(f"{self.output.stem}.sheet.png")

    def compile_arguments(self) -> dict[str, Any]:
        """Give the keyword arguments of ``transformer.compile`` besides the backend."""
        if self.mode is not None:
            return {"mode": self.mode}
        options: dict[str, Any] = {}
        if self.rank_timeout != launch.TIMEOUT_SECONDS and launch.num_ranks() > 1:
            options["context_parallel"] = {"timeout_seconds": self.rank_timeout}
        if self.threshold is not None:
            options["first_block_cache"] = {"threshold": self.threshold}
        if self.fp8 is not None:
            options["fp8"] = self.fp8
        if self.dump is not None:
            options["dump"] = str(self.dump)
        return {"options": options} if options else {}

    def call_arguments(self, loaded: Loaded) -> dict[str, Any]:
        """Give the keyword arguments of the pipeline's call; raises InputError where it doesn't take one."""
        Grid.of(loaded.pipe).check(height=self.height, width=self.width, frames=self.frames)
        named = {
            "num_inference_steps": ("steps", self.steps),
            "num_frames": ("frames", self.frames),
            "height": ("height", self.height),
            "width": ("width", self.width),
            "guidance_scale": ("guidance", self.guidance),
            "true_cfg_scale": ("true_cfg", self.true_cfg),
            "negative_prompt": ("negative_prompt", self.negative_prompt),
        }
        arguments = {argument: value for argument, (_, value) in named.items() if value is not None}
        for argument in arguments:
            if not loaded.accepts(argument):
                kind = type(loaded.pipe).__name__
                raise InputError(f"{named[argument][0]} can't be used: {kind} has no {argument}; leave it out")
        if self.negative_prompt is not None and loaded.accepts("true_cfg_scale") and (self.true_cfg or 0) <= 1:
            raise InputError("negative_prompt does nothing in this pipeline without true_cfg: give one above 1")
        return {**loaded.defaults, **arguments}
