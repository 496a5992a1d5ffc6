"""What ``hvcompile bench`` found: a row a contender, the ratios between them, and the plot."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvcompile import outputs
from hvcompile.app.bench.contenders import CACHE_DIT, CACHED, DIFFUSERS, EAGER, EXACT, HVFAST, INDUCTOR
from hvcompile.app.bench.process import COMPUTED, PARTLY, REUSED
from hvcompile.app.metrics import Quality


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Least, median and largest of some ratios."""

    least: float
    median: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """That of ``values``; None where there are none."""
        return cls(least=min(values), median=statistics.median(values), largest=max(values)) if values else None

    def record(self) -> dict[str, float]:
        """The spread as JSON."""
        return {"min": self.least, "median": self.median, "max": self.largest}


@dataclass(kw_only=True)
class Row:
    """What was measured of one contender so far.

    Attributes:
        system: a name of ``bench.contenders``.
        how: how it was put on the model, in words.
        error: why it is missing, failed, or was not measured; empty where all went well.
        is_interrupted: whether it was not measured since the bench was interrupted: no fault of the contender.
        cases_error: the same of other shapes and prompts alone.
        warm_seconds: of each run that captured graphs, compiling included.
        rounds: seconds of each step of a run, by the number of the round.
        cpu_rounds: the same in processor time of the process, all its threads: where torch has one thread, what a run
            takes on a machine that does nothing else.
        graphs: captured by Dynamo for the first shape.
        steps: a mark a step, of ``bench.process``; empty where that is not known.
        regions: compiled regions that ran, a number a step.
        cases: graphs captured for other shapes and prompts, and the seconds of that run, in order.
        compiling_bytes, running_bytes: peak of memory over the built model, while it compiles and afterwards; None
            where the system does not tell.
        digests: of the latents of each round.
        quality: of the latents of the last round against the eager run's, as ``scaled`` by the latter's range.

    """

    system: str
    how: str = ""
    error: str = ""
    cases_error: str = ""
    is_interrupted: bool = False
    warm_seconds: list[float] = field(default_factory=list)
    rounds: dict[int, list[float]] = field(default_factory=dict)
    cpu_rounds: dict[int, list[float]] = field(default_factory=dict)
    graphs: int | None = None
    steps: str = ""
    regions: list[int] = field(default_factory=list)
    cases: list[dict[str, Any]] | None = None
    compiling_bytes: int | None = None
    running_bytes: int | None = None
    digests: list[str] = field(default_factory=list)
    quality: Quality | None = None

    @property
    def outcome(self) -> str:
        """Either "failed" or "not measured"; empty where it was measured."""
        return "" if not self.error else "not measured" if self.is_interrupted else "failed"

    @property
    def seconds(self) -> dict[int, float]:
        """Seconds of a run, by the number of the round."""
        return {number: sum(steps) for number, steps in self.rounds.items()}

    @property
    def compile_seconds(self) -> float | None:
        """What the runs that compile took beyond as many steady ones; None where nothing compiles, or is known."""
        if not self.graphs or not self.rounds:
            return None
        steady = statistics.median(self.seconds.values())
        return max(0.0, sum(self.warm_seconds) - len(self.warm_seconds) * steady)

    @property
    def num_recompiles(self) -> int | None:
        """Graphs that other shapes and prompts took; None where they were not tried."""
        return None if self.cases is None else sum(case["graphs"] for case in self.cases)

    def step_seconds(self, mark: str) -> float | None:
        """The median of a step with this mark, the first of a run, which sets out, left out; None where none has it."""
        found = [
            seconds
            for steps in self.rounds.values()
            for seconds, held in list(zip(steps, self.steps, strict=False))[1:]
            if held == mark
        ]
        return statistics.median(found) if found else None

    def num_regions(self, mark: str) -> int | None:
        """The most compiled regions that a step with this mark ran; None where none has it."""
        return max(
            (regions for regions, held in zip(self.regions, self.steps, strict=False) if held == mark), default=None
        )

    def record(self) -> dict[str, Any]:
        """The row as JSON."""
        hits = self.steps.count(REUSED) if self.steps else None
        return {
            "system": self.system,
            "how": self.how,
            "error": self.error or None,
            "seconds": {str(number): seconds for number, seconds in self.seconds.items()},
            "step_seconds": {str(number): steps for number, steps in self.rounds.items()},
            "step_cpu_seconds": {str(number): steps for number, steps in self.cpu_rounds.items()},
            "warm_seconds": self.warm_seconds,
            "compile_seconds": self.compile_seconds,
            "median_step_seconds": {
                "computed": self.step_seconds(COMPUTED),
                "partly_reused": self.step_seconds(PARTLY),
                "reused": self.step_seconds(REUSED),
            },
            "steps": self.steps or None,
            "hits": hits,
            "partly_reused": self.steps.count(PARTLY) if self.steps else None,
            "hit_rate": hits / len(self.steps) if hits is not None else None,
            "regions": self.regions,
            "regions_of_a_step": {
                "computed": self.num_regions(COMPUTED),
                "partly_reused": self.num_regions(PARTLY),
                "reused": self.num_regions(REUSED),
            },
            "graphs": self.graphs,
            "recompiles": self.num_recompiles,
            "recompile_cases": self.cases,
            "recompile_error": self.cases_error or None,
            "peak_bytes": {"compiling": self.compiling_bytes, "running": self.running_bytes},
            "repeatable": len(set(self.digests)) == 1 if self.digests else None,
            "quality": self.quality.record() if self.quality else None,
        }


@dataclass(frozen=True, kw_only=True)
class Result:
    """All rows in the order of ``bench.contenders``, and the conditions that they have in common."""

    conditions: Mapping[str, Any]
    rows: tuple[Row, ...]

    def row(self, system: str) -> Row | None:
        """The row of a contender that went well; None where it failed or was not asked for."""
        return next((row for row in self.rows if row.system == system and not row.error), None)

    def ratio(self, slower: str, faster: str, mark: str | None = None, *, cpu: bool = False) -> Spread | None:
        """How many times as long the one takes as the other, each compared within a round.

        Args:
            slower: the numerator.
            faster: the denominator.
            mark: of the steps that count (the median of a round's); None for whole runs.
            cpu: in processor time rather than wall time.

        """
        above, below = self.row(slower), self.row(faster)
        if above is None or below is None:
            return None
        sides = [row.cpu_rounds if cpu else row.rounds for row in (above, below)]
        found = []
        for number in sorted(sides[0].keys() & sides[1].keys()):
            taken = [_taken(side[number], row.steps, mark) for side, row in zip(sides, (above, below), strict=True)]
            if all(taken):
                found.append(taken[0] / taken[1])
        return Spread.of(found)

    def has_same_steps(self, one: str, other: str) -> bool | None:
        """Whether two contenders reused the same steps; None where that is not known of both."""
        first, second = self.row(one), self.row(other)
        if first is None or second is None or not first.steps or not second.steps:
            return None
        return first.steps == second.steps

    def ratios(self) -> list[dict[str, Any]]:
        """Every contender against eager, and hvfast against every other, as JSON."""
        found = []
        pairs = [(EAGER, row.system) for row in self.rows if row.system != EAGER]
        pairs += [(row.system, HVFAST) for row in self.rows if row.system not in (EAGER, HVFAST)]
        for slower, faster in pairs:
            spread = self.ratio(slower, faster)
            if spread is None:
                continue
            by_step = {
                name: held.record() if (held := self.ratio(slower, faster, mark)) else None
                for name, mark in (("computed_step", COMPUTED), ("reused_step", REUSED))
            }
            found.append(
                {
                    "numerator": slower,
                    "denominator": faster,
                    "run": spread.record(),
                    "run_cpu": cpu.record() if (cpu := self.ratio(slower, faster, cpu=True)) else None,
                    **by_step,
                    "same_steps_reused": self.has_same_steps(slower, faster),
                }
            )
        return found

    def record(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            **self.conditions,
            "contenders": [row.record() for row in self.rows],
            "ratios": self.ratios(),
        }

    def title(self) -> str:
        """The conditions in a line."""
        held = self.conditions["protocol"]
        clip = f"{held['width']}x{held['height']}, {held['frames']} frames ({held['tokens']} tokens)"
        lowered = "" if held["lower"] == "inductor" else f", lowered to {held['lower']} alone"
        return (
            f"{held['model']}, {held['blocks']} blocks, hidden {held['hidden']}, {clip}, {held['steps']} steps, "
            f"threshold {held['threshold']:g}, {held['dtype']} on {held['device']}, {held['repeats']} rounds{lowered}"
        )


def _taken(seconds: Sequence[float], steps: str, mark: str | None) -> float:
    """What a run took in all, or its steps with a mark, but for the first, in the median; 0 where none has it."""
    if mark is None:
        return sum(seconds)
    chosen = [second for second, held in list(zip(seconds, steps, strict=False))[1:] if held == mark]
    return statistics.median(chosen) if chosen else 0.0


COLOURS = {
    EAGER: "#8a8f98",
    INDUCTOR: "#8a8f98",
    DIFFUSERS: "#c8553d",
    CACHE_DIT: "#2e8b57",
    EXACT: "#7ea6e0",
    HVFAST: "#1f5fbf",
}


def plot(result: Result, path: Path) -> None:
    """Draw what a run takes against eager, the compile time, and what each step took.

    Raises:
        ImportError: matplotlib is not installed.

    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    good = [row for row in result.rows if not row.error and row.rounds]
    with mpl.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 7.2), layout="constrained")
        grid = figure.subplot_mosaic([["speed", "compile", "regions"], ["steps"] * 3])
        names = [row.system for row in result.rows]
        places = {name: len(names) - 1 - place for place, name in enumerate(names)}
        _bars(grid["speed"], result, places)
        _compile_bars(grid["compile"], result, places)
        _region_bars(grid["regions"], result, places)
        for name in ("compile", "regions"):
            grid[name].set_yticks([])
        _steps(grid["steps"], good)
        figure.suptitle(_wrapped(result.title()), fontsize=10)
        with outputs.replacing(path) as part:
            figure.savefig(part, dpi=130)


def _bars(axes: Any, result: Result, places: Mapping[str, int]) -> None:
    for row in result.rows:
        spread = Spread(least=1, median=1, largest=1) if row.system == EAGER else result.ratio(EAGER, row.system)
        if row.error or spread is None:
            text = f"  {row.outcome or '-'}"
            axes.text(0, places[row.system], text, va="center", color="#a00000", transform=axes.get_yaxis_transform())
            continue
        whisker = [[spread.median - spread.least], [spread.largest - spread.median]]
        axes.barh(places[row.system], spread.median, xerr=whisker, color=COLOURS[row.system], height=0.62, capsize=3)
        axes.text(spread.largest, places[row.system], f"  {spread.median:.2f}", va="center")
    axes.axvline(1, color="#444444", linewidth=0.8, linestyle=":")
    axes.set_yticks(list(places.values()), list(places))
    axes.set_ylim(-0.6, len(places) - 0.4)
    axes.margins(x=0.18)
    axes.set_xlim(left=0)
    axes.set_title("times as fast as eager, after compiling\n(median; whiskers: min to max)", loc="left", fontsize=10)


def _compile_bars(axes: Any, result: Result, places: Mapping[str, int]) -> None:
    for row in result.rows:
        seconds = None if row.error else row.compile_seconds
        if seconds is not None:
            axes.barh(places[row.system], seconds, color=COLOURS[row.system], height=0.62)
            axes.text(seconds, places[row.system], f"  {seconds:.1f}", va="center")
    axes.set_ylim(-0.6, len(places) - 0.4)
    axes.margins(x=0.18)
    axes.set_xlim(left=0)
    axes.set_title("seconds compiling, cold", loc="left", fontsize=10)


def _region_bars(axes: Any, result: Result, places: Mapping[str, int]) -> None:
    most = 1
    for row in result.rows:
        for mark, offset, alpha, name in ((COMPUTED, 0.17, 1.0, "computed"), (REUSED, -0.17, 0.5, "reused")):
            count = None if row.error else row.num_regions(mark)
            if count:
                most = max(most, count)
                place = places[row.system] + offset
                axes.barh(place, count, color=COLOURS[row.system], height=0.3, alpha=alpha)
                axes.text(count, place, f"  {count} {name}", va="center", fontsize=8)
    axes.set_xlim(0, most * 1.45)
    axes.set_ylim(-0.6, len(places) - 0.4)
    axes.set_title("compiled regions run in a step", loc="left", fontsize=10)


def _steps(axes: Any, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    for row in rows:
        steps = row.rounds[max(row.rounds)]
        is_cached = row.system in CACHED
        axes.plot(
            range(1, len(steps) + 1),
            [1e3 * seconds for seconds in steps],
            color=COLOURS[row.system],
            linestyle="-" if is_cached else "--" if row.system != INDUCTOR else ":",
            linewidth=1.8 if row.system == HVFAST else 1.2,
            marker="o" if is_cached else "",
            markersize=3.5,
            label=row.system,
        )
    if not rows:
        axes.text(0.5, 0.5, "nothing was measured", ha="center", va="center", color="#a00000")
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_title("milliseconds of each step in the last round", loc="left", fontsize=10)
    axes.legend(frameon=False, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _wrapped(text: str, width: int = 150) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))


def scaled(latents: Any, reference: Any) -> tuple[Any, Any]:
    """Latents and the reference's on the scale of pixels: 0 and 1 are the reference's least and largest value."""
    low, high = float(reference.min()), float(reference.max())
    span = (high - low) if math.isfinite(high - low) and high > low else 1.0
    return (latents - low) / span, (reference - low) / span
