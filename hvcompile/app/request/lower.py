"""What ``hvcompile lower`` is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hvcompile.app.request.first_call import FirstCallRequest
from hvcompile.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Request(FirstCallRequest):
    """What to compile, and for what; None leaves a choice to the pipeline. The fields are the command's parameters."""

    gpu: Annotated[str, typer.Option(help="To compile for: h100, h200, b200, l20, l40s, rtx4090 or rtx5090.")] = "h100"
    ranks: Annotated[int, typer.Option(help="How many such GPUs share a call.")] = 1
    options: Annotated[
        str | None, typer.Option(help='Options of the backend, as JSON: \'{"fp8": {"granularity": "tensor"}}\'.')
    ] = None
    plain: Annotated[bool, typer.Option(help="Compile it by plain Inductor as well, and show both.")] = False
    output: Annotated[Path | None, typer.Option(help="A directory for the generated code; made where it is not.")] = (
        None
    )

    def check(self) -> None:
        """Raise InputError, or OptionError, for all that is wrong whatever the model; loads nothing."""
        from hvcompile.lowered.gpus import GPUS
        from hvcompile.lowered.lower import settings_for

        if self.ranks < 1:
            raise InputError(f"ranks is {self.ranks}: give 1 or more")
        with settings_for(self.backend_options(), self.mode, self.ranks):
            pass
        if self.output is not None and self.output.exists() and not self.output.is_dir():
            raise InputError(f"output {str(self.output)!r} is a file: give a directory")
        self.check_call(self.gpu, GPUS, "options")

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
