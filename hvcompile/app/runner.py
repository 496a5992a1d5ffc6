"""Runs a pipeline whose denoisers are compiled, one job after the other."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from hvcompile.app import decoding, metrics, pipelines
from hvcompile.app.denoisers import Decisions, denoisers, first_denoiser, others
from hvcompile.app.pipelines import Loaded
from hvcompile.app.request.jobs import Job
from hvcompile.app.steps import Observer, Watch
from hvcompile.errors import InputError, RunError, ours_below
from hvcompile.ranks import launch
from hvcompile.torch_private import dynamo
from hvcompile.torch_private.caching import lookups


class Runner:
    """A pipeline with every denoiser compiled by one backend.

    The denoisers are compiled as one graph each (``fullgraph=True``), which some models need to be captured whole. At
    the first run of a model that can't be, all are compiled once more without, and ``notes`` says so.

    Args:
        loaded: the pipeline.
        backend: of ``torch.compile``.
        compile_arguments: keyword arguments of ``Module.compile`` besides the backend.
        observe: told of phases and steps as they come.
        calls: gains the arguments of the first denoiser's first call; None where nobody asks.
        name: of the backend in what is told of steps; its own where None.

    """

    def __init__(
        self,
        loaded: Loaded,
        backend: Any,
        compile_arguments: Mapping[str, Any],
        observe: Observer,
        calls: list[dynamo.Call] | None = None,
        name: str | None = None,
    ) -> None:
        self._loaded, self._backend, self._compile_arguments = loaded, backend, compile_arguments
        self._observe, self._calls, self._name = observe, calls, name or backend
        self.notes: list[str] = []
        self._denoisers = denoisers(loaded.pipe)
        self._decide = Decisions(self._denoisers).new
        self._compile(fullgraph=True)

    def _compile(self, *, fullgraph: bool) -> None:
        for model in self._denoisers.values():
            model.compile(backend=self._backend, fullgraph=fullgraph, **self._compile_arguments)
        self._is_whole = fullgraph
        if self._calls is not None:
            self._calls.clear()
            dynamo.keep_first_call(first_denoiser(self._loaded.pipe), self._calls)

    def run(self, job: Job, arguments: Mapping[str, Any]) -> metrics.Run:
        """Make what a job asks for.

        Args:
            job: of which the prompt and the seed count here.
            arguments: more keyword arguments of the pipeline's call.

        Raises:
            InputError: there is not enough memory for what was asked.
            RunError: the pipeline failed for a reason outside this package.
            HvcompileError: as the backend raises them.

        """
        try:
            return self._run(job, arguments)
        except Exception as error:
            if not (self._is_whole and dynamo.is_graph_break(error)):
                raise
            reason = pipelines.first_line(error)
        self.notes.append(f"{self._name} compiled in pieces, since Dynamo can't keep the model in one graph: {reason}")
        self._compile(fullgraph=False)
        return self._run(job, arguments)

    def _run(self, job: Job, arguments: Mapping[str, Any]) -> metrics.Run:
        pipe, device = self._loaded.pipe, self._loaded.device
        num_steps = int(arguments.get("num_inference_steps") or self._loaded.default("num_inference_steps"))
        watch = Watch(self._name, num_steps, device, self._decide, self._observe)
        self._observe(f"{self._name}: compiling")
        _reset_peak(device)
        looked_up = lookups()
        with (
            watch.beginning_after(others(pipe)),
            watch.following(pipe, self._loaded.accepts) as told,
            decoding.shared(pipe, self._observe) as decoded,
        ):
            start = time.perf_counter()
            output = _called(
                lambda: pipe(
                    prompt=job.prompt,
                    generator=torch.Generator().manual_seed(job.seed),  # on the CPU: the same noise on every device
                    output_type="np",
                    **told,
                    **arguments,
                ),
                type(pipe).__name__,
                watch,
            )
        seconds = time.perf_counter() - start
        self.notes += [line for line in decoding.note(decoded, launch.num_ranks()) if line not in self.notes]
        if not watch.steps:
            raise RunError(f"{type(pipe).__name__} ended without a step: give it one at least, and check what was set")
        return metrics.Run(
            frames=_frames(output),
            seconds=seconds,
            steps=tuple(watch.steps),
            peak_bytes=_peak_bytes(device),
            graphs=lookups().since(looked_up),
        )


def _called(call: Callable[[], Any], name: str, watch: Watch) -> Any:
    """Call a pipeline; what it raises for reasons of its own becomes an error of one line.

    Errors of ours pass, and so does what Dynamo raises: at the first step another way of compiling may help.
    """
    try:
        return call()
    except Exception as error:
        if ours_below(error) is not None or dynamo.is_graph_break(error):
            raise
        where = f"after {len(watch.steps)} steps" if watch.steps else "before its first step ended"
        line = pipelines.first_line(error)
        if is_out_of_memory(error):
            raise InputError(
                f"there is not enough memory ({name}, {where}: {line}): give a smaller height, width or frames, or "
                "dtype bfloat16"
            ) from error
        raise RunError(
            f'{name} failed {where}: {type(error).__name__}: {line}; TORCH_LOGS="+hvcompile" shows the traceback'
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on a GPU or on the host."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in text for words in ("not enough memory", "can't allocate memory", "out of memory", "unable to allocate")
    )


def _frames(output: Any) -> metrics.Frames:
    """What a pipeline made, as (frames, height, width, 3); a picture is a clip of one frame."""
    frames = getattr(output, "frames", None)
    made = frames[0] if frames is not None else output.images[:1]
    return np.asarray(made, dtype=np.float32)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(device: torch.device) -> int:
    """The most memory held at a time: on a GPU in this run, on the host by this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
