"""What several commands are told alike: a pipeline, clips to make with it, and how it is compiled."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hvcompile.app.request.assignments import assignments
from hvcompile.app.request.compiling import Compiling
from hvcompile.app.request.jobs import read_prompts, read_seeds
from hvcompile.app.request.parameters import (
    Adapters,
    CallSettings,
    CompiledCode,
    CompileVae,
    Device,
    Dtype,
    Frames,
    Height,
    RankTimeout,
    VaeTiling,
    Width,
)
from hvcompile.errors import InputError
from hvcompile.ranks import launch


@dataclass(frozen=True, kw_only=True)
class Clips(Compiling):
    """The clips of a command, and what makes them; None leaves a choice to the pipeline, the device or the backend.

    The fields are parameters of the command. ``guidance`` is embedded or classifier-free, as the pipeline reads
    ``guidance_scale``.
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
    seeds: Annotated[str | None, typer.Option(help="Several, such as 0-7,42: every prompt with each.")] = None
    guidance: Annotated[float | None, typer.Option(help="Guidance scale.")] = None
    true_cfg: Annotated[
        float | None, typer.Option(help="True guidance scale; above 1, with --negative-prompt, two calls a step.")
    ] = None
    negative_prompt: Annotated[str | None, typer.Option(help="What should not be seen.")] = None
    call_settings: CallSettings = ()
    lora: Adapters = ()
    vae_tiling: VaeTiling = True
    compile_vae: CompileVae = False
    artifacts: CompiledCode = None
    offload: Annotated[
        str | None,
        typer.Option(help="Keep on the host what the GPU does not need now: 'model', 'blocks', 'group' or 'none'."),
    ] = None
    device: Device = None
    dtype: Dtype = None
    rank_timeout: RankTimeout = launch.TIMEOUT_SECONDS

    def check(self) -> None:
        """Raise InputError, or OptionError, for all that is wrong whatever the model; loads nothing."""
        from hvcompile.app import adapters, pipelines
        from hvcompile.options import MODES, parse
        from hvcompile.passes import PASSES

        self._check_numbers()
        self._check_texts()
        assignments(self.call_settings, "--set", "max_sequence_length=128")
        _ = self.pictures  # reads them
        for place in self.lora:
            adapters.parse(place)
        if self.model is not None:
            pipelines.check_model(self.model)
        device = pipelines.resolve_device(self.device)
        pipelines.resolve_dtype(self.dtype, device)
        if self.offload is not None and self.offload not in pipelines.OFFLOADS:
            raise InputError(f"offload {self.offload!r} is unknown: give {' or '.join(pipelines.OFFLOADS)}")
        if self.is_offloaded and device.type == "cpu":
            raise InputError(
                f"offload {self.offload!r} has nothing to offload from: the device is the CPU; leave it out"
            )
        if self.artifacts is not None and not self.artifacts.is_dir():
            raise InputError(f"artifacts {str(self.artifacts)!r} are not there: give a directory hvcompile warm made")
        if self.mode is not None and self.mode not in MODES:
            raise InputError(f"mode {self.mode!r} is unknown: give {' or '.join(MODES)}, or leave it out")
        parse(PASSES, self.backend_options(), self.mode)  # what the backend would say after loading

    def _check_numbers(self) -> None:
        for name in ("steps", "frames", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: give 1 or more")
        if self.seed is not None and self.seeds is not None:
            raise InputError("seed and seeds are both given: give one of them")
        for seed in self.all_seeds():
            if not -(2**63) <= seed < 2**64:
                raise InputError(f"seed is {seed}: give a number that fits in 64 bits")
        if not 0 < self.rank_timeout < math.inf:
            raise InputError(f"rank-timeout is {self.rank_timeout}: give a finite number of seconds above 0")
        check_not_negative(guidance=self.guidance, true_cfg=self.true_cfg)

    def _check_texts(self) -> None:
        if self.prompt is None and self.prompts_file is None:
            raise InputError("there is no prompt: give PROMPT, or --prompts FILE")
        if self.prompt is not None and self.prompts_file is not None:
            raise InputError("PROMPT and --prompts are both given: give one of them")
        for name in ("prompt", "negative_prompt"):
            try:
                (getattr(self, name) or "").encode()
            except UnicodeEncodeError as error:
                message = f"{spelled(name)} is no valid text ({error.reason} at {error.start}): give UTF-8"
                raise InputError(message) from error
        if (self.true_cfg or 0) > 1 and self.negative_prompt is None:
            raise InputError(f"true-cfg is {self.true_cfg}, which does nothing without negative-prompt: give that too")

    def files_read(self) -> dict[str, Path]:
        """The files that are read, by the names of their options."""
        fields = {"prompts": self.prompts_file, "options": self.options_file, "image": self.image}
        fields |= {"last-image": self.last_image}
        return {name: path for name, path in fields.items() if path is not None}

    def check_apart(self, written: Iterable[tuple[str, Path | None]]) -> None:
        """Raise InputError where a file would be written that another is, or that is read; see the function."""
        check_apart(self.files_read(), written)

    @property
    def is_offloaded(self) -> bool:
        """Whether the device holds no more of the pipeline than it needs."""
        return self.offload not in (None, "none")

    def all_seeds(self) -> tuple[int, ...]:
        """Every seed that is asked for."""
        return (self.seed or 0,) if self.seeds is None else read_seeds(self.seeds)

    # Files are read once: they may be pipes, or be gone when a long run ends.

    @functools.cached_property
    def prompts(self) -> tuple[str, ...]:
        """Every prompt that is asked for."""
        return (self.prompt or "",) if self.prompts_file is None else read_prompts(self.prompts_file)

    @functools.cached_property
    def pictures(self) -> Mapping[str, Any]:
        """Pictures to begin and to end with, by the names that pipelines have for them."""
        from hvcompile.app import pictures

        places = {"image": self.image, "last_image": self.last_image}
        return {name: pictures.read(path, spelled(name)) for name, path in places.items() if path is not None}

    def own_options(self) -> dict[str, Any]:
        """Options of the backend that parameters of their own give."""
        own = super().own_options()
        if self.rank_timeout != launch.TIMEOUT_SECONDS and launch.num_ranks() > 1:
            own["context_parallel"] = {"timeout_seconds": self.rank_timeout}
        return own


def check_not_negative(**numbers: float | None) -> None:
    """Raise InputError for a number that is given and is below 0, or not finite; names are those of fields."""
    for name, value in numbers.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise InputError(f"{spelled(name)} is {value}: give a finite number, 0 or more")


def spelled(name: str) -> str:
    """The name of a field as it is typed."""
    return name.replace("_", "-")


def check_apart(read: Mapping[str, Path], written: Iterable[tuple[str, Path | None]]) -> None:
    """Raise InputError where a file would be written that another is, or that is read.

    Args:
        read: the files that are read, by the names of their options.
        written: the name of the option and the file, for each that is written; None for one that is not.

    """
    taken = {os.path.realpath(path): name for name, path in read.items()}
    for name, path in written:
        if path is None:
            continue
        place = os.path.realpath(path)
        if place in taken:
            raise InputError(f"{name} {str(path)!r} is the file of {taken[place]} too: give another name")
        if os.path.isdir(place):
            raise InputError(f"{name} {str(path)!r} is a directory: give a file name")
        taken[place] = name
