"""What a user should know of a generation beside its figures, a line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hvcompile.app import metrics, tiny
from hvcompile.app.pipelines import Loaded
from hvcompile.app.request.clips import Clips
from hvcompile.errors import OutputError, one_line
from hvcompile.inputs import unlike

EMBEDDED = "embedded"
"""The name of the model that is used where none is given."""


def notes(request: Clips, loaded: Loaded, run: metrics.Run | None, more: Sequence[str]) -> tuple[str, ...]:
    """The notes of a request.

    Args:
        request: what was asked for.
        loaded: the pipeline.
        run: one that was made; None where none was.
        more: notes of whatever ran it.

    """
    found = list(more)
    if request.model is None and (unknown := tiny.unknown_words(request.prompts)):
        found.append(
            f"the tiny model was not trained on {', '.join(unknown)}, and draws something else; it knows shapes, "
            "colours and directions, such as: a red circle moves to the left over a blue background"
        )
    asked = (request.frames, request.height, request.width)
    if run is not None and any(size not in (None, made) for size, made in zip(asked, run.size, strict=True)):
        frames, height, width = run.size
        length = f", {frames} frames" if loaded.makes_video else ""
        found.append(f"{loaded.kind} made {width}x{height}{length}, which is not what was asked for")
    if run is not None and request.made_for:
        sampler, model = sampler_of(loaded), request.model or EMBEDDED
        now = {"num_steps": len(run.steps), "sampler": sampler, "model": model}
        found += [
            f"{request.options_file}: {line}" for line in unlike(request.backend_options(), request.made_for, **now)
        ]
    return tuple(found)


def sampler_of(loaded: Loaded) -> str | None:
    """The class of a pipeline's sampler; None where it has none."""
    scheduler = getattr(loaded.pipe, "scheduler", None)
    return None if scheduler is None else type(scheduler).__name__


def written(*files: tuple[Path | None, Callable[[Path], object]]) -> tuple[str, ...]:
    """Write files one by one; what can't be written is a line here, and the others are written all the same.

    Args:
        files: where each goes, None for one that is not asked for, and what writes it there.

    """
    problems = []
    for path, write in files:
        try:
            if path is not None:
                write(path)
        except OutputError as error:
            problems.append(one_line(error))
    return tuple(problems)
