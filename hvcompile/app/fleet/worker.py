"""A worker: one pipeline, loaded and compiled once, that makes one video at a time, alone or as one of several ranks.

It knows nothing of what hands it work. All ranks of a mesh are given the same videos in the same order; the first one
alone decides whether a video is stopped, and alone has its file.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

import hvcompile
from hvcompile.app import metrics, pictures, video
from hvcompile.app.arguments import call_arguments
from hvcompile.app.denoisers import denoisers, stats_of_all
from hvcompile.app.fleet.made import Made
from hvcompile.app.generate import BACKEND, Observer, opened
from hvcompile.app.pipelines import Loaded
from hvcompile.app.records import device_name
from hvcompile.app.request.ask import Ask
from hvcompile.app.request.clips import Clips
from hvcompile.app.request.generate import PICTURES, VIDEOS
from hvcompile.app.request.jobs import Job
from hvcompile.app.runner import Runner
from hvcompile.errors import HvcompileError, UncompiledModelError
from hvcompile.ranks import launch

CANCELLED, LATE = "cancelled", "late"
"""Why a video was stopped: somebody asked for it, or its time was up."""
_REASONS = (None, CANCELLED, LATE)

ShouldStop = Callable[[], str | None]
"""Asked of the first rank after each step: ``CANCELLED``, ``LATE``, or None to go on."""


class StoppedError(HvcompileError):
    """A video was stopped between two steps; ``reason`` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason} between two steps")
        self.reason = reason


class Worker:
    """Makes videos with one pipeline. It is used from one thread, in which ``at_work`` made it.

    Args:
        base: what all videos share, and what a video that asks for nothing else gets; see ``ask.settled``.
        loaded: the pipeline, which base's adapters are fused into.
        holds_all_sizes: whether the graphs of every size are kept, each compiled for its size alone. Otherwise a size
            that follows another is compiled as a new process would, and the graphs of the one before are dropped.

    """

    def __init__(self, base: Clips, loaded: Loaded, *, holds_all_sizes: bool = False) -> None:
        self._base, self._loaded, self._holds_all_sizes = base, loaded, holds_all_sizes
        self._observe: Observer = _ignore
        self._runner: tuple[str, Runner] | None = None
        # Of its own, on the host: what the ranks agree on is a number, and a GPU's group would wait for the device.
        self._agreement = dist.new_group(backend="gloo") if launch.num_ranks() > 1 else None

    @property
    def suffix(self) -> str:
        """Of the files that it makes."""
        return (VIDEOS if self._loaded.makes_video else PICTURES)[0]

    def check(self, ask: Ask) -> None:
        """Raise InputError where this pipeline can't make a video of such a kind."""
        call_arguments(ask.of(self._base), self._loaded)

    def make(self, ask: Ask, observe: Observer, should_stop: ShouldStop) -> Made:
        """Make a video, the same to the bit as ``hvcompile generate`` would in a process of its own.

        Whatever becomes of it, nothing of it is left for the next one.

        Args:
            ask: for what; the same on all ranks.
            observe: told of phases and steps as they come.
            should_stop: asked after each step.

        Raises:
            StoppedError: ``should_stop`` gave a reason; on all ranks after the same step.
            InputError: it can't be met, its pixels are not finite, or there is not enough memory.
            RunError: the pipeline failed for a reason outside this package.
            OutputError: the video can't be encoded.

        """
        begin = time.perf_counter()
        request = ask.of(self._base)
        arguments = call_arguments(request, self._loaded)
        runner = self._compiled(request, ask)
        self._forget()
        self._observe = self._stopping(observe, should_stop)
        job = Job(prompt=ask.prompt, seed=ask.seed, output=Path("none"))
        with self._mended():
            run = runner.run(job, arguments)
            stats_of_all(denoisers(self._loaded.pipe))  # raises where ranks disagreed in the last steps
        observe("writing")
        video.check_finite(run.frames, "the video")
        return self._made(run, ask, begin)

    def _made(self, run: metrics.Run, ask: Ask, begin: float) -> Made:
        content = b""
        if launch.rank() == 0:
            if self._loaded.makes_video:
                content = video.encoded(run.frames, self.suffix, fps=ask.fps)
            else:
                content = pictures.encoded(run.frames, self.suffix)
        frames, height, width = run.size
        return Made(
            content=content,
            suffix=self.suffix,
            frames=frames,
            height=height,
            width=width,
            steps=len(run.steps),
            reused=run.num_reused,
            captured=sum(step.compiled for step in run.steps),
            seconds=time.perf_counter() - begin,
            compile_seconds=run.compile_seconds if any(step.compiled for step in run.steps) else 0.0,
            peak_bytes=run.peak_bytes,
            maker={
                "device": device_name(self._loaded.device),
                "torch": torch.__version__,
                "hvcompile": hvcompile.__version__,
            },
        )

    def _compiled(self, request: Clips, ask: Ask) -> Runner:
        """What runs a video's shape; made anew where the one before had another."""
        compiling = request.compile_arguments()
        if self._holds_all_sizes and not request.dynamic:
            compiling = {**compiling, "dynamic": False}
        key = repr(compiling) if self._holds_all_sizes or request.dynamic else ask.shape + repr(compiling)
        if self._runner is not None and self._runner[0] == key:
            return self._runner[1]
        if self._runner is not None:
            # Else Dynamo would make a second size a graph of all sizes, whose bits may differ, and keep every graph.
            torch.compiler.reset()
        self._runner = None
        runner = Runner(self._loaded, BACKEND, compiling, self._tell)
        self._runner = key, runner
        return runner

    def _tell(self, event: str | metrics.Step) -> None:
        self._observe(event)

    def _stopping(self, observe: Observer, should_stop: ShouldStop) -> Observer:
        """Tell of what comes, and raise StoppedError after a step where the first rank says so."""

        def tell(event: str | metrics.Step) -> None:
            observe(event)
            if isinstance(event, metrics.Step) and (reason := self._agreed(should_stop)) is not None:
                raise StoppedError(reason)

        return tell

    def _agreed(self, should_stop: ShouldStop) -> str | None:
        """The first rank's reason to stop, on all ranks."""
        reason = should_stop() if launch.rank() == 0 else None
        if self._agreement is None:
            return reason
        number = torch.tensor([_REASONS.index(reason)])
        dist.broadcast(number, src=0, group=self._agreement)
        return _REASONS[int(number)]

    def _forget(self) -> None:
        """Forget every cache's state: of a video that was stopped, the next one with its prompt would find some."""
        for model in denoisers(self._loaded.pipe).values():
            with contextlib.suppress(UncompiledModelError):
                hvcompile.reset(model)

    @contextlib.contextmanager
    def _mended(self) -> Iterator[None]:
        """Within, a call that ends in an error leaves the pipeline as one that ends well does."""
        try:
            yield
        except BaseException:
            self._loaded.pipe.maybe_free_model_hooks()  # an offloaded pipeline lets go of the device at its end alone
            raise
        finally:
            self._observe = _ignore


@contextlib.contextmanager
def at_work(
    base: Clips, observe: Observer, loaded: Loaded | None = None, *, holds_all_sizes: bool = False
) -> Iterator[Worker]:
    """Load a pipeline, join the other ranks, and give a worker; at the end the ranks part.

    Raises:
        InputError, OptionError: what ``base`` asks for can't be met.

    """
    with opened(base, observe, loaded) as pipeline:
        yield Worker(base, pipeline, holds_all_sizes=holds_all_sizes)


def _ignore(event: object) -> None:
    """Nobody wants to know."""
