"""A training run on disk: its checkpoint, its log and its progress bar; the same for the VAE and the transformer."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@dataclass(kw_only=True)
class Run:
    """Counts steps and minutes over interruptions, and keeps what is needed to go on.

    Attributes:
        directory: made if absent; holds ``state.pt`` and ``log.jsonl`` (a line of figures each ``log_every`` steps).
        steps: optimiser steps in all.
        minutes: wall-clock minutes in all, interruptions left out; the run ends at whichever comes first.
        parts: what a checkpoint holds besides the counts; each has ``state_dict`` and ``load_state_dict``.
        warmup: share of the run over which the learning rate rises.

    """

    directory: Path
    steps: int
    minutes: float
    parts: dict[str, Any]
    warmup: float = 0.03
    log_every: int = 20
    save_every_seconds: float = 30.0
    step: int = 0
    seconds: float = 0.0
    _sums: dict[str, float] = field(default_factory=dict)

    def resume(self) -> bool:
        """Take up the last checkpoint of the directory, if there is one; tells whether there was."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "state.pt"
        if not path.is_file():
            return False
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        return True

    def save(self) -> None:
        """Write a checkpoint; a crash while writing leaves the old one."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        new = self.directory / "state.new"
        torch.save({**state, "step": self.step, "seconds": self.seconds}, new)
        os.replace(new, self.directory / "state.pt")

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return min(1.0, max(self.step / self.steps, self.seconds / (60 * self.minutes)))

    def learning_rate_share(self) -> float:
        """What the peak learning rate is to be multiplied by now: a linear rise, then half a cosine down to 2 %."""
        if self.progress < self.warmup:
            return max(self.progress, 1 / self.steps) / self.warmup
        return 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * (self.progress - self.warmup) / (1 - self.warmup)))

    def loop(self) -> Iterator[int]:
        """Yield the number of each step to do, with a progress bar; saves at times and at the end."""
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        last_save = time.monotonic()
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("training", total=self.steps, completed=self.step)
            while self.progress < 1:
                began = time.monotonic()
                yield self.step
                self.step += 1
                self.seconds += time.monotonic() - began
                loss = f"loss {self._last_loss:.4f}" if self._last_loss is not None else "training"
                bar.update(task, completed=self.step, description=loss)
                if time.monotonic() - last_save > self.save_every_seconds:
                    self.save()
                    last_save = time.monotonic()
        self.save()

    _last_loss: float | None = None
    _num_summed: int = 0

    def log(self, **figures: float) -> None:
        """Add the figures of this step; their means are written each ``log_every`` steps."""
        self._last_loss = next(iter(figures.values()))
        for name, value in figures.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._num_summed += 1
        if (self.step + 1) % self.log_every == 0:  # fewer than log_every after a resume
            means = {name: round(total / self._num_summed, 6) for name, total in self._sums.items()}
            self._sums.clear()
            self._num_summed = 0
            self.note(**means)

    def note(self, **figures: Any) -> None:
        """Write a line of figures to the log at once, with the step, the minutes of work and the time of day."""
        when = {"step": self.step, "minutes": round(self.seconds / 60, 2), "time": time.strftime("%H:%M:%S")}
        with (self.directory / "log.jsonl").open("a") as log:
            log.write(json.dumps({**when, **figures}) + "\n")


class Averaged:
    """An exponential moving average of the parameters of some modules, kept in fp32.

    ``decay`` is reached slowly, (1 + n) / (10 + n) after n updates, so that the start is forgotten.
    """

    def __init__(self, modules: dict[str, torch.nn.Module], decay: float) -> None:
        self.modules, self.decay, self.updates = modules, decay, 0
        self.values = [value.detach().clone() for value in self.parameters()]

    def parameters(self) -> list[torch.Tensor]:
        """List the parameters themselves, not their averages."""
        return [value for module in self.modules.values() for value in module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters as they are now."""
        self.updates += 1
        share = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.values, self.parameters(), share)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange average and parameters; a second call undoes the first."""
        for average, value in zip(self.values, self.parameters(), strict=True):
            held = value.clone()
            value.copy_(average)
            average.copy_(held)

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {"values": self.values, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.updates = state["updates"]
        for average, value in zip(self.values, state["values"], strict=True):
            average.copy_(value)


def device() -> torch.device:
    """A GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
