"""What ``hvcompile lower`` is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hvcompile import outputs
from hvcompile.app.request.parameters import Frames, Height, JsonFile, Mode, Width
from hvcompile.errors import InputError
from hvcompile.lowered.gpus import GPUS
from hvcompile.options import parse
from hvcompile.passes import PASSES


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to compile, and for what; None leaves a choice to the pipeline. The fields are the command's parameters."""

    model: Annotated[
        str | None,
        typer.Argument(
            help="Directory or hub id of a diffusers pipeline, or a Python script (default: the embedded tiny one)."
        ),
    ] = None
    arguments: Annotated[tuple[str, ...], typer.Argument(help="Of the script, after --.")] = ()
    gpu: Annotated[str, typer.Option(help="To compile for: h100, h200, b200, l20, l40s, rtx4090 or rtx5090.")] = "h100"
    ranks: Annotated[int, typer.Option(help="How many such GPUs share a call.")] = 1
    frames: Frames = None
    height: Height = None
    width: Width = None
    prompt: Annotated[str | None, typer.Option(help="Its length counts where the pipeline does not pad.")] = None
    mode: Mode = None
    options: Annotated[
        str | None, typer.Option(help='Options of the backend, as JSON: \'{"fp8": {"granularity": "tensor"}}\'.')
    ] = None
    dtype: Annotated[str | None, typer.Option(help="bfloat16 (default), float16 or float32.")] = None
    plain: Annotated[bool, typer.Option(help="Compile it by plain Inductor as well, and show both.")] = False
    output: Annotated[Path | None, typer.Option(help="A directory for the generated code; made where it is not.")] = (
        None
    )
    json_file: JsonFile = None

    def check(self) -> None:
        """Raise InputError, or OptionError, for all that is wrong whatever the model; loads nothing."""
        from hvcompile.app import pipelines

        for name in ("frames", "height", "width", "ranks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: give 1 or more")
        if self.gpu not in GPUS:
            raise InputError(f"gpu {self.gpu!r} is unknown: give one of {', '.join(GPUS)}")
        if self.dtype is not None and self.dtype not in pipelines.DTYPES:
            raise InputError(f"dtype {self.dtype!r} is unknown: give one of {', '.join(pipelines.DTYPES)}")
        parse(PASSES, self.backend_options(), self.mode)
        if self.json_file is not None:
            outputs.check(self.json_file, name="json", kind="JSON file", suffixes=(".json",))
        if self.output is not None and self.output.exists() and not self.output.is_dir():
            raise InputError(f"output {str(self.output)!r} is a file: give a directory")
        if self.is_script:
            for name in ("frames", "height", "width", "mode", "options", "dtype", "prompt"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name} can't be given with a script, which chooses it itself: leave it out")
            if not Path(str(self.model)).is_file():
                raise InputError(f"model {self.model!r}: there is no such script: check its path")
        elif self.arguments:
            raise InputError(f"{' '.join(self.arguments)!r} is more than one model: only a script is given arguments")
        elif self.model is not None:
            pipelines.check_model(self.model)

    def backend_options(self) -> Mapping[str, Any] | None:
        """The backend's options; None where none are given.

        Raises:
            InputError: they are no JSON object.

        """
        if self.options is None:
            return None
        try:
            found = json.loads(self.options)
        except json.JSONDecodeError as error:
            raise InputError(f"options {self.options!r} are no JSON ({error}): give an object of sections") from error
        if not isinstance(found, dict):
            raise InputError(f"options {self.options!r} are no JSON object: give one of sections, such as {{}}")
        return found

    @property
    def is_script(self) -> bool:
        """Whether ``model`` names a Python script."""
        return self.model is not None and self.model.endswith(".py")
