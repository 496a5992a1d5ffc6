"""Explaining a pipeline from the command line: its skeleton, the call of its transformer, and the explanation."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvcompile import outputs, pipelines, report, tiny
from hvcompile.costs import DEVICES
from hvcompile.errors import InputError
from hvcompile.explain import Explanation, explain
from hvcompile.options import MODES
from hvcompile.skeleton import skeleton, transformer_call


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to explain; None leaves a choice to the pipeline.

    Attributes:
        model: directory or hub id; None for the embedded tiny pipeline.
        frames, height, width: the clip, in frames and pixels.
        prompt: its length counts only where the pipeline does not pad.
        mode: as for ``torch.compile``.
        gpu: a key of ``costs.DEVICES``.
        dtype: a key of ``pipelines.DTYPES``.
        json_file: where the explanation goes as JSON, without the text of the graphs.
        html_file: where it goes as a report.

    """

    model: str | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    prompt: str = "a cat walks"
    mode: str | None = None
    gpu: str = "h100"
    dtype: str = "bfloat16"
    json_file: Path | None = None
    html_file: Path | None = None

    def check(self) -> None:
        """Raise InputError for all that is wrong whatever the model; loads nothing."""
        for name in ("frames", "height", "width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}: give 1 or more")
        if self.gpu not in DEVICES:
            raise InputError(f"gpu {self.gpu!r} is unknown: give one of {', '.join(DEVICES)}")
        if self.dtype not in pipelines.DTYPES:
            raise InputError(f"dtype {self.dtype!r} is unknown: give one of {', '.join(pipelines.DTYPES)}")
        if self.mode is not None and self.mode not in MODES:
            raise InputError(f"mode {self.mode!r} is unknown: give {' or '.join(MODES)}, or leave it out")
        if self.json_file is not None:
            outputs.check(self.json_file, name="json", kind="JSON file", suffixes=(".json",))
        if self.html_file is not None:
            report.check(self.html_file)
        if self.model is not None:
            pipelines.check_model(self.model)


def explain_pipeline(request: Request) -> Explanation:
    """Explain the transformer of a pipeline as its first step calls it.

    Raises:
        InputError: the request can't be met; the message says why.
        UntraceableModelError: the transformer does not trace as one graph.

    """
    request.check()
    dtype = pipelines.DTYPES[request.dtype]
    sizes = {"num_frames": request.frames, "height": request.height, "width": request.width}
    arguments: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if request.model is None:
        with tempfile.TemporaryDirectory(prefix="hvcompile-tiny-") as directory:
            tiny.write(directory)
            pipe = skeleton(directory, dtype)
        arguments = {**tiny.DEFAULTS, **arguments}
    else:
        pipe = skeleton(request.model, dtype)
    pipelines.Grid.of(pipe).check(height=request.height, width=request.width, frames=request.frames)
    args, kwargs = transformer_call(pipe, request.prompt, arguments)
    explanation = explain(pipe.transformer, *args, **kwargs, mode=request.mode, device=DEVICES[request.gpu])
    if request.json_file is not None:
        figures = dataclasses.asdict(dataclasses.replace(explanation, stages=()))
        del figures["stages"]
        figures |= {"flops": explanation.flops, "seconds": explanation.seconds}
        outputs.write_json(figures, request.json_file)
    if request.html_file is not None:
        facts = {"pipeline": type(pipe).__name__, "transformer": type(pipe.transformer).__name__}
        given = [f"{name.removeprefix('num_')} {size}" for name, size in arguments.items() if name in sizes]
        facts |= {"clip": ", ".join(given)} if given else {}
        title = "the embedded tiny pipeline" if request.model is None else request.model
        report.write(request.html_file, explanation=explanation, title=title, facts=facts)
    return explanation
