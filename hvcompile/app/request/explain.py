"""What ``hvcompile explain`` is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hvcompile.app.request.first_call import FirstCallRequest
from hvcompile.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Request(FirstCallRequest):
    """What to explain; None leaves a choice to the pipeline. The fields are the parameters of the command."""

    gpu: Annotated[
        str, typer.Option(help="Whose peaks bound the step time: a100, l20, l40s, rtx4090, h100, h200 or b200.")
    ] = "h100"
    memory_gib: Annotated[
        float | None,
        typer.Option(help="Memory of the GPU, in GiB: says what the transformer needs, and which options fit."),
    ] = None
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write a report with pictures and the graphs (.html).")
    ] = None

    def check(self) -> None:
        """Raise InputError for all that is wrong whatever the model; loads nothing."""
        from hvcompile.explanation import report
        from hvcompile.graph.costs import DEVICES
        from hvcompile.options import MODES

        if self.mode is not None and self.mode not in MODES:
            raise InputError(f"mode {self.mode!r} is unknown: give {' or '.join(MODES)}, or leave it out")
        if self.memory_gib is not None and not 0 < self.memory_gib < math.inf:
            raise InputError(f"memory-gib is {self.memory_gib}: give a finite number of GiB above 0")
        if self.html_file is not None:
            report.check(self.html_file)
        self.check_call(self.gpu, DEVICES)
