"""Compiling ahead: a pipeline's models at some sizes, for the commands' own store or as artifacts to ship."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

from hvcompile import outputs
from hvcompile.app import pipelines, store
from hvcompile.app.arguments import call_arguments
from hvcompile.app.denoisers import denoisers, stats
from hvcompile.app.generate import BACKEND, ready
from hvcompile.app.request.jobs import Job
from hvcompile.app.request.warm import Request
from hvcompile.app.runner import Runner
from hvcompile.app.steps import Observer
from hvcompile.artifacts import Artifacts, save_artifacts
from hvcompile.torch_private.caching import Lookups


@dataclass(frozen=True, kw_only=True)
class Size:
    """A size that was compiled: frames, height and width as made, seconds of the first step and of all, and graphs."""

    num_frames: int
    height: int
    width: int
    first_seconds: float
    seconds: float
    graphs: Lookups


@dataclass(frozen=True, kw_only=True)
class Warmed:
    """What was compiled; ``artifacts`` is None where none were asked for, ``missed`` are models no step has reached."""

    sizes: tuple[Size, ...]
    missed: tuple[str, ...]
    artifacts: Artifacts | None


def warm(request: Request, observe: Observer = lambda event: None, loaded: pipelines.Loaded | None = None) -> Warmed:
    """Run each size for a few steps, so that what that compiles is kept; save it where the request says so.

    Args:
        request: what to compile. With ``output``, all is compiled anew in a directory of its own.
        observe: told of phases and steps as they come.
        loaded: a pipeline to use in place of ``request.model``.

    Raises:
        InputError, OptionError: the request can't be met.
        RunError: the pipeline failed for a reason outside this package.
        OutputError: the artifacts, or the JSON file, can't be written.

    """
    request.check()
    with contextlib.ExitStack() as stack:
        if request.output is not None:
            stack.enter_context(store.fresh())
        asked = request.generations()
        pipeline, _ = stack.enter_context(ready(asked[0], observe, loaded))
        runner = Runner(pipeline, BACKEND, asked[0].compile_arguments(), observe)
        sizes = []
        for item in asked:
            start = time.perf_counter()
            run = runner.run(Job(prompt=request.prompt, seed=0, output=Path("none")), call_arguments(item, pipeline))
            num_frames, height, width = run.size
            sizes.append(
                Size(
                    num_frames=num_frames,
                    height=height,
                    width=width,
                    first_seconds=run.steps[0].seconds,
                    seconds=time.perf_counter() - start,
                    graphs=run.graphs,
                )
            )
        missed = tuple(name for name, model in denoisers(pipeline.pipe).items() if stats(model) is None)
        artifacts = None
        if request.output is not None:
            observe("writing")
            artifacts = save_artifacts(request.output, options=asked[0].backend_options(), mode=request.mode)
    result = Warmed(sizes=tuple(sizes), missed=missed, artifacts=artifacts)
    if request.json_file is not None:
        outputs.write_json(record(result), request.json_file)
    return result


def record(result: Warmed) -> dict[str, object]:
    """What was compiled, as JSON."""
    artifacts = result.artifacts
    return {
        "sizes": [dataclasses.asdict(size) for size in result.sizes],
        "missed": list(result.missed),
        "artifacts": None
        if artifacts is None
        else {"path": str(artifacts.path), "files": artifacts.num_files, "bytes": artifacts.num_bytes},
    }
