"""What a clip is compared with: the same, made by plain torch.compile, or without approximations if that can't be."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

import torch

from hvcompile.app import metrics
from hvcompile.app.denoisers import denoisers
from hvcompile.app.pipelines import Loaded
from hvcompile.app.request.jobs import Job
from hvcompile.app.runner import Runner, is_out_of_memory
from hvcompile.app.steps import Observer
from hvcompile.errors import InputError
from hvcompile.hollow.host import HostWeight

PLAIN, EXACT = "inductor", "hvfast, exact"
"""Systems that make a reference, by the names that stand in tables."""


class Reference:
    """Makes reference clips by plain torch.compile.

    Where the device has too little memory for that, hvfast makes them in its exact mode, which changes no numerics. For
    plain torch.compile writes the padding mask of each attention out as a bias: 28 GB at 1280x720 and 129 frames.

    Args:
        loaded: the pipeline.
        is_dynamic: whether one graph is to serve all sizes.
        observe: told of phases and steps as they come.

    Attributes:
        name: of the system that makes the clips now.
        notes: what a user should know of how they were made.

    """

    def __init__(self, loaded: Loaded, *, is_dynamic: bool, observe: Observer) -> None:
        self._loaded, self._observe = loaded, observe
        self._dynamic = {"dynamic": True} if is_dynamic else {}
        self.name = PLAIN
        self.notes: list[str] = []
        self._runner = Runner(loaded, PLAIN, self._dynamic, observe)
        if any(
            isinstance(weight, HostWeight) for model in denoisers(loaded.pipe).values() for weight in model.parameters()
        ):
            self._make_exactly("plain torch.compile can't read weights that are on the host")

    def run(self, job: Job, arguments: Mapping[str, Any]) -> metrics.Run:
        """Make a clip; arguments and errors are those of ``Runner.run``."""
        try:
            return self._runner.run(job, arguments)
        except InputError as error:
            if self.name != PLAIN or error.__cause__ is None or not is_out_of_memory(error.__cause__):
                raise
        self._make_exactly("plain torch.compile does not fit in the memory")
        _free(self._loaded.device)
        return self._runner.run(job, arguments)

    def _make_exactly(self, why: str) -> None:
        self.name = EXACT
        self.notes.append(f"{why}: hvfast in its exact mode made what was compared with")
        self._runner = Runner(self._loaded, "hvfast", {**self._dynamic, "mode": "exact"}, self._observe, name=EXACT)


def _free(device: torch.device) -> None:
    """Let go of what an attempt has left in memory."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
