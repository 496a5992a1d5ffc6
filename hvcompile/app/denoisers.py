"""The models of a pipeline that denoise, and what was done with all of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import hvcompile
from hvcompile.errors import UncompiledModelError
from hvcompile.runtime.state import Stats, Step


def denoisers(pipe: Any) -> dict[str, torch.nn.Module]:
    """The transformers of a pipeline by attribute, in order; some have one for noise and one for detail."""
    parts = pipe.components.items()
    return {name: part for name, part in parts if name.startswith("transformer") and isinstance(part, torch.nn.Module)}


def first_denoiser(pipe: Any) -> torch.nn.Module:
    """The transformer that a pipeline calls first."""
    return next(iter(denoisers(pipe).values()))


def others(pipe: Any) -> list[torch.nn.Module]:
    """The models of a pipeline that don't denoise: encoders and decoders."""
    known = denoisers(pipe)
    parts = pipe.components.items()
    return [part for name, part in parts if name not in known and isinstance(part, torch.nn.Module)]


def stats(model: torch.nn.Module) -> Stats | None:
    """What was done with a model; None where it has not been compiled and run, or Dynamo is switched off."""
    try:
        return hvcompile.stats(model)
    except UncompiledModelError:
        return None


def stats_of_all(models: Mapping[str, torch.nn.Module]) -> Stats | None:
    """What was done with all models of a pipeline together; None where none was compiled and run."""
    found = [item for model in models.values() if (item := stats(model)) is not None]
    return _together(found) if found else None


def _together(parts: Sequence[Stats]) -> Stats:
    """Sums and lists of several models' figures; the slots of each are numbered after those of the one before."""
    if len(parts) == 1:
        return parts[0]
    begins = itertools.accumulate((_num_slots(part) for part in parts), initial=0)
    steps = [
        Step(slot=begin + step.slot, reused=step.reused, difference=step.difference)
        for begin, part in zip(begins, parts, strict=False)
        for step in part.steps
    ]
    sums = {
        field.name: sum(getattr(part, field.name) for part in parts)
        for field in dataclasses.fields(Stats)
        if field.name not in {"steps", "journal"}
    }
    return Stats(**sums, steps=steps, journal=[rows for part in parts for rows in part.journal])


def _num_slots(part: Stats) -> int:
    return max((step.slot + 1 for step in part.steps), default=0)


class Decisions:
    """Reads what the caches of several models decided, each decision once."""

    def __init__(self, models: Mapping[str, torch.nn.Module]) -> None:
        self._models = models
        self._seen = dict.fromkeys(models, 0)
        self.new()  # those of an earlier generation on the same models

    def new(self) -> list[tuple[bool, float]]:
        """The decisions since this was last asked: whether the step was reused, and the relative difference."""
        found: list[tuple[bool, float]] = []
        for name, model in self._models.items():
            known = stats(model)
            if known is None:  # its first call is still to come
                continue
            total = known.hits + known.misses
            num_new, self._seen[name] = total - self._seen[name], total
            found += [(bool(step.reused), float(step.difference)) for step in known.steps[-num_new:]] if num_new else []
        return found
