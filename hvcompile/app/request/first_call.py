"""What every command is asked for that looks at the first call of a transformer: of a pipeline, or of a script."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated

import typer

from hvcompile import outputs
from hvcompile.app.request.parameters import Frames, Height, JsonFile, Mode, Width
from hvcompile.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FirstCallRequest:
    """Whose first call, and at what size; None leaves a choice to the pipeline. A command's request adds fields."""

    model: Annotated[
        str | None,
        typer.Argument(
            help="Directory or hub id of a diffusers pipeline, or a Python script (default: the embedded tiny one)."
        ),
    ] = None
    arguments: Annotated[tuple[str, ...], typer.Argument(help="Of the script, after --.")] = ()
    frames: Frames = None
    height: Height = None
    width: Width = None
    prompt: Annotated[str | None, typer.Option(help="Its length counts where the pipeline does not pad.")] = None
    mode: Mode = None
    dtype: Annotated[str | None, typer.Option(help="bfloat16 (default), float16 or float32.")] = None
    json_file: JsonFile = None

    def check_call(self, gpu: str, gpus: Collection[str], *more: str) -> None:
        """Raise InputError for what is wrong whatever the model; loads nothing.

        Args:
            gpu: that was asked for.
            gpus: those that there are.
            more: fields that a script chooses itself, beside those here.

        """
        from hvcompile.app import pipelines

        for name in ("frames", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: give 1 or more")
        if gpu not in gpus:
            raise InputError(f"gpu {gpu!r} is unknown: give one of {', '.join(gpus)}")
        if self.dtype is not None and self.dtype not in pipelines.DTYPES:
            raise InputError(f"dtype {self.dtype!r} is unknown: give one of {', '.join(pipelines.DTYPES)}")
        if self.json_file is not None:
            outputs.check(self.json_file, name="json", kind="JSON file", suffixes=(".json",))
        if self.is_script:
            for name in ("frames", "height", "width", "mode", "dtype", "prompt", *more):
                if getattr(self, name) is not None:
                    raise InputError(f"{name} can't be given with a script, which chooses it itself: leave it out")
            if not os.path.isfile(str(self.model)):
                raise InputError(f"model {self.model!r}: there is no such script: check its path")
        elif self.arguments:
            raise InputError(f"{' '.join(self.arguments)!r} is more than one model: only a script is given arguments")
        elif self.model is not None:
            pipelines.check_model(self.model)

    @property
    def is_script(self) -> bool:
        """Whether ``model`` names a Python script."""
        return self.model is not None and self.model.endswith(".py")

    @property
    def sizes(self) -> Mapping[str, int | None]:
        """The clip's, by the names that pipelines have for them."""
        return {"num_frames": self.frames, "height": self.height, "width": self.width}
