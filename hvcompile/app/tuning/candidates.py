"""The settings of the first-block cache that are tried, and in which order."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvcompile.app.tuning.results import Row
from hvcompile.passes.first_block_cache import MOST

THRESHOLDS = (0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.12, 0.15, 0.18, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5)
"""Of each rule, from little reuse to much: four of fifteen are enough to find the one where a goal is passed."""
COARSE = (0.03, 0.06, 0.1, 0.15, 0.2, 0.3)
"""Those that draw a curve where there is no goal."""
FRONT_BLOCKS = (1, 0)
"""Of schedules: those that look at block 1, and those that skip it too."""
MOST_SCHEDULES = 15
"""That are tried of each kind, of all numbers of steps."""
LEAST_PSNR = 20.0
"""Decibels; what is further from the reference shows something else, and a larger threshold is not tried."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One setting of the cache; the fields are those of ``FirstBlockCache``."""

    threshold: float
    forecast: int = 0
    decide_by: str = "change"
    computed_steps: tuple[int, ...] = ()
    max_consecutive_hits: int | None = None
    front_blocks: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "computed_steps", tuple(self.computed_steps))  # JSON has lists

    @property
    def rule(self) -> str:
        """What it has in common with the candidates of other thresholds."""
        if self.computed_steps:
            return "schedule" if self.front_blocks else "schedule of no block"
        if not self.forecast:
            return "repeat"
        return f"forecast {self.forecast}" + (", by error" if self.decide_by == "error" else "")

    def section(self) -> dict[str, Any]:
        """The options of the cache, those left out that are as by default."""
        fields = {field.name: (getattr(self, field.name), field.default) for field in dataclasses.fields(self)}
        return {name: setting for name, (setting, default) in fields.items() if setting != default}

    def __str__(self) -> str:
        if self.computed_steps:
            return f"{self.rule}, {len(self.computed_steps)} steps computed"
        return f"{self.rule} at {self.threshold:g}"


RULES: tuple[Mapping[str, Any], ...] = (
    {},
    {"forecast": 1},
    {"forecast": 2},
    {"forecast": 1, "decide_by": "error"},
    {"forecast": 2, "decide_by": "error"},
)
LADDERS = tuple(tuple(Candidate(threshold=threshold, **rule) for threshold in THRESHOLDS) for rule in RULES)
"""The candidates of each rule, from the smallest threshold up."""
Ladders = Sequence[Sequence[Candidate]]


def scheduled(found: Mapping[int, Sequence[int]], front_blocks: int = 1) -> dict[int, Candidate]:
    """Of fixed schedules, see ``schedules``, the candidates by their number of steps computed.

    Every other step is forecast, whatever its change, as long as that is a number. A generation of more steps goes on
    with as many forecasts in a row as the schedule has at most.
    """
    num_steps, candidates = max(found, default=0), {}
    for number, steps in found.items():
        gaps = [after - before - 1 for before, after in itertools.pairwise([*steps, num_steps])]
        candidates[number] = Candidate(
            threshold=MOST,
            forecast=1,
            computed_steps=tuple(steps),
            max_consecutive_hits=max(1, *gaps),
            front_blocks=front_blocks,
        )
    return candidates


def ladder_of(schedules: Mapping[int, Sequence[int]], front_blocks: int = 1) -> tuple[Candidate, ...]:
    """The candidates of schedules, at most ``MOST_SCHEDULES``: from 85 % of the steps computed down to a fifth."""
    most, every = max(schedules, default=0), scheduled(schedules, front_blocks)
    shares = [0.85 - 0.65 * place / (MOST_SCHEDULES - 1) for place in range(MOST_SCHEDULES)]
    numbers = dict.fromkeys(round(share * most) for share in shares)
    return tuple(every[number] for number in numbers if number in every and number < most)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is asked of a setting; None asks nothing.

    Attributes:
        psnr: the mean over the clips is to be this many decibels or more.
        worst_psnr: so is each clip.
        speedup: the denoising of all clips is to be this many times as fast as by plain torch.compile, or faster.

    """

    psnr: float | None = None
    worst_psnr: float | None = None
    speedup: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether nothing is asked."""
        return self == Goal()

    def is_met(self, row: Row) -> bool:
        """Whether a measured setting does all that is asked."""
        return self._keeps(row) and (self.speedup is None or row.speedup >= self.speedup)

    def _keeps(self, row: Row) -> bool:
        """Whether it is as close to the reference as is asked."""
        return row.psnr >= (self.psnr or 0) and row.worst_psnr >= (self.worst_psnr or 0)

    def is_passed(self, row: Row) -> bool:
        """Whether larger thresholds of the same rule have nothing better.

        They reuse more: they can be faster, and not closer to the reference.
        """
        is_fast = self.speedup is not None and row.speedup >= self.speedup
        return row.psnr < LEAST_PSNR or not self._keeps(row) or is_fast

    def choose(self, rows: Mapping[Candidate, Row]) -> Candidate | None:
        """The best setting that does all that is asked; None where none does.

        Where a speed-up is asked for, that is the one closest to the reference, in the mean; else the one that reuses
        the most steps.
        """
        met = {candidate: row for candidate, row in rows.items() if self.is_met(row)}

        def merit(candidate: Candidate) -> tuple[float, float]:
            row = met[candidate]
            return (row.reused, row.psnr) if self.speedup is None else (row.psnr, row.reused)

        return max(met, key=merit, default=None)


def missing(rows: Mapping[Candidate, Row], goal: Goal, ladders: Ladders) -> list[Candidate]:
    """The candidates to measure next, one of each rule that may still have something better; none when all is known.

    Of a rule, a larger threshold reuses more and is less like the reference. So with a goal, the threshold at which it
    is passed is found by bisection; without one, a curve is drawn upwards.
    """
    open_ends = [_ahead(ladder, rows, goal) for ladder in ladders]
    return [ahead[0 if goal.is_open else len(ahead) // 2] for ahead in open_ends if ahead]


def most_missing(rows: Mapping[Candidate, Row], goal: Goal, ladders: Ladders, *, finds_schedules: bool = False) -> int:
    """How many candidates may still have to be measured at most, with those of schedules that are still to be found."""
    numbers = [len(_ahead(ladder, rows, goal)) for ladder in ladders]
    if finds_schedules:
        numbers += [MOST_SCHEDULES // 3 if goal.is_open else MOST_SCHEDULES] * len(FRONT_BLOCKS)
    return sum(number if goal.is_open else number.bit_length() for number in numbers)


def _ahead(ladder: Sequence[Candidate], rows: Mapping[Candidate, Row], goal: Goal) -> Sequence[Candidate]:
    """The candidates of one rule of which it is not known whether they pass the goal, from the least reuse."""
    known = {place: goal.is_passed(rows[candidate]) for place, candidate in enumerate(ladder) if candidate in rows}
    above = min((place for place, is_passed in known.items() if is_passed), default=len(ladder))
    if goal.is_open:
        return [item for item in ladder[:above] if _draws(item, ladder) and item not in rows]
    below = max((place for place, is_passed in known.items() if not is_passed), default=-1)
    return ladder[below + 1 : above]


def _draws(candidate: Candidate, ladder: Sequence[Candidate]) -> bool:
    """Whether it is one of those that draw a curve."""
    return candidate in ladder[::3] if candidate.computed_steps else candidate.threshold in COARSE


def front(rows: Mapping[Candidate, Row]) -> list[Candidate]:
    """The candidates that no other beats in both the steps reused and the mean PSNR, by the steps reused.

    Of several that are equal in both, the first.
    """
    best: dict[tuple[float, float], Candidate] = {}
    for candidate, row in rows.items():
        is_beaten = any(
            other.reused >= row.reused
            and other.psnr >= row.psnr
            and (other.reused, other.psnr) != (row.reused, row.psnr)
            for other in rows.values()
        )
        if not is_beaten:
            best.setdefault((row.reused, row.psnr), candidate)
    return [best[place] for place in sorted(best)]
