"""Follows the steps of a pipeline while it runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hvcompile.app import metrics
from hvcompile.torch_private import dynamo

Observer = Callable[["str | metrics.Step"], None]
"""Told, as a generation goes on, what has begun (a few words) and each step when it is done."""
Decide = Callable[[], list[tuple[bool, float]]]
"""Gives the decisions of the models' caches since it was last called: reused, and the relative difference."""

CALLBACK = "callback_on_step_end"


class Watch:
    """Times the steps of a run, and tells of each when it is done.

    Args:
        backend: what the models are compiled with.
        num_steps: that the pipeline is asked for. One that makes a video in sections runs as many for each.
        device: waited for at the end of each step.
        decide: reads what the caches decided.
        observe: told of steps.

    """

    def __init__(self, backend: str, num_steps: int, device: torch.device, decide: Decide, observe: Observer) -> None:
        self._backend, self._num_steps, self._device = backend, num_steps, device
        self._decide, self._observe = decide, observe
        self._decide()  # those of an earlier run
        self.steps: list[metrics.Step] = []
        self._num_graphs = dynamo.num_captured()
        self._mark = time.perf_counter()

    @contextlib.contextmanager
    def following(self, pipe: Any, accepts: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
        """Within, each step of the pipeline ends in ``end_step``.

        Args:
            pipe: to be called.
            accepts: whether its call has a parameter.

        Yields:
            Keyword arguments of the call. A pipeline without a callback is followed by its scheduler's steps.

        """
        if accepts(CALLBACK):
            yield {CALLBACK: self.end_step, f"{CALLBACK}_tensor_inputs": []}
            return
        scheduler: Any = pipe.scheduler
        step = scheduler.step

        def stepped(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self.end_step()
            return result

        scheduler.step = stepped
        try:
            yield {}
        finally:
            del scheduler.step

    @contextlib.contextmanager
    def beginning_after(self, encoders: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Within, the first step begins when the last of these has run: the text is encoded."""
        hooks = [encoder.register_forward_hook(self._restart) for encoder in encoders]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _restart(self, *_: Any) -> None:
        if not self.steps:  # afterwards, too, models run: the decoder
            self._mark = time.perf_counter()

    def end_step(self, *_: Any) -> dict[str, Any]:
        """Take the time of a step, as the callback of a pipeline."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        before, self._num_graphs = self._num_graphs, dynamo.num_captured()
        now, calls = time.perf_counter(), self._decide()  # several calls where guidance runs the model twice
        index = len(self.steps)
        sections = index // self._num_steps + 1
        self.steps.append(
            metrics.Step(
                backend=self._backend,
                index=index,
                num_steps=sections * self._num_steps,
                seconds=now - self._mark,
                reused=bool(calls) and all(reused for reused, _ in calls),
                difference=max((difference for _, difference in calls), default=None),
                compiled=self._num_graphs > before,
            )
        )
        self._observe(self.steps[-1])
        if len(self.steps) % self._num_steps == 0:
            self._observe("decoding")
        self._mark = time.perf_counter()
        return {}
