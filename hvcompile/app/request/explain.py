"""What ``hvcompile explain`` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hvcompile import outputs
from hvcompile.app.request.parameters import Frames, Height, JsonFile, Mode, Width
from hvcompile.errors import InputError
from hvcompile.explanation import report
from hvcompile.graph.costs import DEVICES
from hvcompile.options import MODES


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to explain; None leaves a choice to the pipeline. The fields are the parameters of the command."""

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
    gpu: Annotated[
        str, typer.Option(help="Whose peaks bound the step time: a100, l20, l40s, rtx4090, h100, h200 or b200.")
    ] = "h100"
    dtype: Annotated[str | None, typer.Option(help="bfloat16 (default), float16 or float32.")] = None
    json_file: JsonFile = None
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a report with pictures and the graphs (.html).")
    ] = None

    def check(self) -> None:
        """Raise InputError for all that is wrong whatever the model; loads nothing."""
        from hvcompile.app import pipelines

        for name in ("frames", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: give 1 or more")
        if self.gpu not in DEVICES:
            raise InputError(f"gpu {self.gpu!r} is unknown: give one of {', '.join(DEVICES)}")
        if self.dtype is not None and self.dtype not in pipelines.DTYPES:
            raise InputError(f"dtype {self.dtype!r} is unknown: give one of {', '.join(pipelines.DTYPES)}")
        if self.mode is not None and self.mode not in MODES:
            raise InputError(f"mode {self.mode!r} is unknown: give {' or '.join(MODES)}, or leave it out")
        if self.json_file is not None:
            outputs.check(self.json_file, name="json", kind="JSON file", suffixes=(".json",))
        if self.html_file is not None:
            report.check(self.html_file)
        if self.is_script:
            for name in ("frames", "height", "width", "mode", "dtype", "prompt"):
                if getattr(self, name) is not None:
                    raise InputError(f"{name} can't be given with a script, which chooses it itself: leave it out")
            if not Path(str(self.model)).is_file():
                raise InputError(f"model {self.model!r}: there is no such script: check its path")
        elif self.arguments:
            raise InputError(f"{' '.join(self.arguments)!r} is more than one model: only a script is given arguments")
        elif self.model is not None:
            pipelines.check_model(self.model)

    @property
    def is_script(self) -> bool:
        """Whether ``model`` names a Python script."""
        return self.model is not None and self.model.endswith(".py")
