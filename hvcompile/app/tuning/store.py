"""The directory that a tuning works in: what was measured so far, and the reference's clips while they are needed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvcompile import outputs
from hvcompile.app.metrics import Frames
from hvcompile.app.tuning.candidates import Candidate
from hvcompile.app.tuning.results import Measured, Row
from hvcompile.errors import InputError, OutputError
from hvcompile.passes.first_block_cache import FirstBlockCache

RESULTS = "results.json"
REFERENCE = "reference"
LEVELS = 65535
"""Of a pixel's value in the files of the reference: half of a float32's bytes, and an error of 107 dB."""


class Store:
    """What is kept of a tuning, so that it can go on where it was broken off.

    Args:
        directory: made where it is missing.
        conditions: what figures must have in common to stand in one table, as JSON.
        num_clips: of each setting, and of the reference.

    Raises:
        InputError: the directory holds something else, or figures of other conditions.

    """

    def __init__(self, directory: Path, conditions: Mapping[str, Any], num_clips: int) -> None:
        self._directory, self._conditions = directory, json.loads(json.dumps(conditions))
        self._num_clips = num_clips
        self.rows: dict[Candidate, Row] = {}
        self.reference_seconds: list[float] = []
        self.num_steps: int | None = None  # of a clip
        # By front blocks, then by the number of steps; None where not yet sought.
        self.schedules: dict[int, dict[int, tuple[int, ...]]] | None = None
        if self.results.exists():
            self._read()
        elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise InputError(f"store {str(directory)!r} is there and is no earlier tuning: give another directory")

    @property
    def results(self) -> Path:
        """The file of the figures."""
        return self._directory / RESULTS

    def _read(self) -> None:
        try:
            content = json.loads(self.results.read_text())
            earlier = dict(content["conditions"])
            reference_seconds = [float(seconds) for seconds in content["reference_seconds"]]
            if not all(0 < seconds < math.inf for seconds in reference_seconds):
                raise ValueError("a time is no number of seconds")
            schedules = None
            if content["schedules"] is not None:
                schedules = {
                    int(front_blocks): {len(steps): tuple(map(int, steps)) for steps in found}
                    for front_blocks, found in content["schedules"].items()
                }
            num_steps = None if content["num_steps"] is None else int(content["num_steps"])
            rows = dict(self._row(record) for record in content["settings"])
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError, AttributeError) as error:
            raise InputError(
                f"store {str(self._directory)!r} holds a {RESULTS} that can't be read ({type(error).__name__}: {error})"
                ": give another directory, or remove it"
            ) from error
        if not rows and schedules is None and earlier != self._conditions:
            return  # a tuning that was broken off before anything was measured keeps none from another
        for name in sorted({*earlier, *self._conditions}):
            before, now = earlier.get(name), self._conditions.get(name)
            if before != now:
                raise InputError(
                    f"store {str(self._directory)!r} is of other conditions: {name} was {_short(before)} and is "
                    f"{_short(now)}: give another directory, or remove it"
                )
        self.rows, self.reference_seconds, self.schedules = rows, reference_seconds, schedules
        self.num_steps = num_steps

    def _row(self, record: Mapping[str, Any]) -> tuple[Candidate, Row]:
        """A setting and its figures from JSON; raises ValueError or TypeError where they are none."""
        FirstBlockCache(**record["first_block_cache"])  # says what is no option of the cache
        row = Row([Measured.read(clip) for clip in record["clips"]])
        row.check()
        if len(row.clips) != self._num_clips:
            raise ValueError(f"a setting has {len(row.clips)} clips of {self._num_clips}")
        return Candidate(**record["first_block_cache"]), row

    def record(self) -> dict[str, Any]:
        """All figures as JSON."""
        settings = [
            {"first_block_cache": candidate.section(), "clips": [clip.record() for clip in row.clips]}
            for candidate, row in self.rows.items()
        ]
        schedules: dict[str, Any] | None = None
        if self.schedules is not None:
            schedules = {str(front_blocks): list(found.values()) for front_blocks, found in self.schedules.items()}
        return {
            "conditions": self._conditions,
            "reference_seconds": self.reference_seconds,
            "num_steps": self.num_steps,
            "schedules": schedules,
            "settings": settings,
        }

    def keep(self) -> None:
        """Write the figures; raises OutputError where they can't be."""
        self._make(self._directory)
        outputs.write_json(self.record(), self.results)

    def has_references(self) -> bool:
        """Whether the reference's clips are there, and can be read."""
        return len(self.reference_seconds) == self._num_clips and all(map(self._is_whole, range(self._num_clips)))

    def _is_whole(self, place: int) -> bool:
        """Whether the file of a clip holds one; reads no pixel."""
        try:
            levels = np.load(self._clip(place), mmap_mode="r")
        except (OSError, ValueError, EOFError):
            return False
        return bool(levels.ndim == 4 and levels.dtype == np.uint16)

    def write_reference(self, place: int, frames: Frames) -> None:
        """Keep a clip of the reference; raises OutputError where that can't be."""
        self._make(self._directory / REFERENCE)
        with outputs.replacing(self._clip(place)) as part, part.open("wb") as file:
            np.save(file, _levels(frames))

    def reference(self, place: int) -> Frames:
        """A clip of the reference, its values rounded as ``rounded`` does it."""
        return _values(np.load(self._clip(place)))

    def drop_references(self) -> None:
        """Remove the reference's clips: all is measured."""
        shutil.rmtree(self._directory / REFERENCE, ignore_errors=True)

    def _clip(self, place: int) -> Path:
        return self._directory / REFERENCE / f"{place}.npy"

    def _make(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{str(directory)!r} can't be made ({error.strerror or error})") from error


def rounded(frames: Frames) -> Frames:
    """A clip as it would come back from a file; an identical clip stays identical to its reference."""
    return _values(_levels(frames))


def _levels(frames: Frames) -> NDArray[np.uint16]:
    return (frames.clip(0, 1) * LEVELS).round().astype(np.uint16)


def _values(levels: NDArray[np.uint16]) -> Frames:
    return levels.astype(np.float32) / np.float32(LEVELS)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
