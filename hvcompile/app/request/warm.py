"""What ``hvcompile warm`` is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hvcompile.app.request import generate
from hvcompile.app.request.compiling import Compiling
from hvcompile.app.request.parameters import EACH, Device, Dtype, JsonFile
from hvcompile.errors import InputError

PROMPT = "a red circle moves to the left over a blue background"


@dataclass(frozen=True, kw_only=True)
class Request(Compiling):
    """What to compile ahead, and how; None leaves a choice to the pipeline. The fields are the command's parameters."""

    model: Annotated[
        str | None, typer.Argument(help="Directory or hub id of a diffusers pipeline (default: the embedded tiny one).")
    ] = None
    sizes: Annotated[
        tuple[str, ...],
        typer.Option(help="WIDTHxHEIGHTxFRAMES, with commas between several; WIDTHxHEIGHT of pictures."),
    ] = ()
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Compile anew, and write artifacts to this directory, to be shipped."),
    ] = None
    steps: Annotated[int, typer.Option(help="Denoising steps of each size: enough to reach every transformer.")] = 2
    prompt: Annotated[str, typer.Option(help="Its length counts where the pipeline does not pad.")] = PROMPT
    call_settings: Annotated[
        tuple[str, ...],
        typer.Option("--set", help="Any other argument of the pipeline: --set max_sequence_length=128. Repeats."),
        EACH,
    ] = ()
    device: Device = None
    dtype: Dtype = None
    json_file: JsonFile = None

    def check(self) -> None:
        """Raise InputError, or OptionError, for all that is wrong whatever the model; loads nothing."""
        from hvcompile.artifacts import check_place

        for request in self.generations():
            request.check()
        if self.output is not None:
            check_place(self.output)

    def generations(self) -> tuple[generate.Request, ...]:
        """A generation for each size, as ``hvcompile generate`` would be asked for it."""
        return tuple(
            generate.Request(
                prompt=self.prompt,
                model=self.model,
                steps=self.steps,
                width=width,
                height=height,
                frames=frames,
                call_settings=self.call_settings,
                mode=self.mode,
                backend_settings=self.backend_settings,
                options_file=self.options_file,
                fp8=self.fp8,
                dynamic=self.dynamic,
                device=self.device,
                dtype=self.dtype,
                json_file=self.json_file,
            )
            for width, height, frames in map(_read, self.sizes or ("",))
        )


def _read(size: str) -> tuple[int | None, int | None, int | None]:
    if not size:
        return None, None, None
    if not re.fullmatch(r"\d{1,6}x\d{1,6}(x\d{1,6})?", size):
        raise InputError(f"sizes has {size!r}: give WIDTHxHEIGHTxFRAMES, such as 1280x720x129, or WIDTHxHEIGHT")
    width, height, *frames = map(int, size.split("x"))
    return width, height, frames[0] if frames else None
