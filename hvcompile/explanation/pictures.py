"""Geometry of the report's pictures, the trunk and a run; the templates draw it as SVG."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hvcompile.explanation.explain import BlockKind, Explanation, Stretch
from hvcompile.runtime.state import Step

TRUNK_WIDTH = 358
"""Pixels; what a phone of 390 shows without scaling."""
CHART_WIDTHS = {"wide": 900, "narrow": 358}
"""Pixels; the page shows the one that fits, so that letters keep their size."""
_CHARACTERS = 38
"""That fit into a line of a box of the trunk."""
_MOST_STRETCHES = 7
"""Boxes of blocks; where kinds alternate, those in the middle become one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Box:
    """A box of the trunk's picture, in pixels: the first line of text is its heading."""

    kind: str
    y: float
    height: float
    lines: tuple[str, ...]
    title: str

    @property
    def middle(self) -> float:
        """Half-way down."""
        return self.y + self.height / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrunkPicture:
    """The trunk, top to bottom.

    ``branch`` is top and height of the frame around what a reused step skips, None where nothing is skipped; ``fork``
    is the box from which such a step goes straight to the last box.
    """

    width: int
    height: float
    boxes: tuple[Box, ...]
    column: float
    branch: tuple[float, float] | None
    fork: Box | None
    summary: str


def trunk(explanation: Explanation) -> TrunkPicture:
    """Lay out the trunk of an explanation, which must have found one."""
    skips = any(stretch.is_skipped for stretch in explanation.stretches)
    column = TRUNK_WIDTH - (70 if skips else 24)
    boxes: list[Box] = []
    branch_top, fork, y = 0.0, None, 8.0

    def add(kind: str, *lines: str, title: str = "") -> Box:
        nonlocal y
        box = Box(
            kind=kind,
            y=y,
            height=16 + 18 * len(lines),
            lines=tuple(_fit(line) for line in lines),
            title=title or "\n".join(lines),
        )
        boxes.append(box)
        y += box.height + 24
        return box

    add("around", "before the blocks", f"{explanation.num_prologue} operations")
    seen: set[int] = set()
    for stretch in _shortened(explanation.stretches):
        if isinstance(stretch, int):
            add("more", f"{stretch} more blocks, kinds in turn")
            continue
        if stretch.is_skipped and fork is None:
            fork = add("fork", "reuse the last computed step?", *_threshold(explanation))
            branch_top = y - 4
            y += 28  # the frame's heading
        kind = explanation.kinds[stretch.kind]
        streams = _streams(kind) if stretch.kind not in seen else []
        seen.add(stretch.kind)
        place = f"{'skipped' if stretch.is_skipped else 'kept'} kind{stretch.kind % 4}"
        add(place, _span(stretch), f"{stretch.count} x {kind.num_operations} operations", *streams)
    last_skipped = [box for box in boxes if box.kind.startswith("skipped")]
    branch = None
    if last_skipped:
        branch = (branch_top, last_skipped[-1].y + last_skipped[-1].height + 10 - branch_top)
        y = max(y, sum(branch) + 24)
    add("around", "after the blocks", f"{explanation.num_epilogue} operations")
    skipped = sum(stretch.count for stretch in explanation.stretches if stretch.is_skipped)
    total = sum(stretch.count for stretch in explanation.stretches)
    summary = f"The trunk: {explanation.num_prologue} operations, then {total} blocks ({explanation.lists}), "
    summary += f"of which a reused step skips {skipped}, then {explanation.num_epilogue} operations."
    return TrunkPicture(
        width=TRUNK_WIDTH, height=y - 16, boxes=tuple(boxes), column=column, branch=branch, fork=fork, summary=summary
    )


def _shortened(stretches: Sequence[Stretch]) -> Iterator[Stretch | int]:
    """The stretches, or, of many, the first and last of them and the number of blocks between."""
    if len(stretches) <= _MOST_STRETCHES:
        yield from stretches
        return
    yield from stretches[: _MOST_STRETCHES - 2]
    yield sum(stretch.count for stretch in stretches[_MOST_STRETCHES - 2 : -1])
    yield stretches[-1]


def _span(stretch: Stretch) -> str:
    if stretch.count == 1:
        return stretch.first
    owner, _, last = stretch.last.rpartition(".")
    return f"{stretch.first} .. {last if stretch.first.startswith(f'{owner}.') else stretch.last}"


def _streams(kind: BlockKind) -> list[str]:
    return [f"{stream.name} {list(stream.shape)}" for stream in kind.streams]


def _threshold(explanation: Explanation) -> list[str]:
    if any(row.options.get("front_blocks") == 0 for row in explanation.journal):
        return ["yes: the schedule leaves the step out"]
    found = threshold_of(row.options for row in explanation.journal)
    return [f"yes: block 1 changed by at most {found:g}"] if found is not None else []


def threshold_of(options: Iterable[Mapping[str, Any]]) -> float | None:
    """The threshold of the first pass that has one; ``options`` are those of each pass."""
    for held in options:
        if isinstance(held.get("threshold"), (int, float)):
            return float(held["threshold"])
    return None


def _fit(text: str) -> str:
    """Shorten in the middle, where names differ least."""
    if len(text) <= _CHARACTERS:
        return text
    return f"{text[: _CHARACTERS // 2 - 1]}…{text[len(text) - _CHARACTERS // 2 :]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Steps of one slot from one beginning to the next, oldest first.

    ``number`` counts generations in their slot from 1; ``first`` is the number of the first of ``steps``.
    """

    slot: int
    number: int
    steps: tuple[Step, ...]
    first: int = 1

    @property
    def num_reused(self) -> int:
        """Steps that reused the cached residuals."""
        return sum(step.reused for step in self.steps)

    def latest(self, most: int) -> Generation:
        """Its last steps, ``most`` of them or all."""
        dropped = max(0, len(self.steps) - most)
        return dataclasses.replace(self, steps=self.steps[dropped:], first=self.first + dropped)

    @property
    def largest_reused(self) -> float | None:
        """The largest difference at which a step was reused; None where none was."""
        return max((step.difference for step in self.steps if step.reused), default=None)


def generations(steps: Sequence[Step]) -> list[Generation]:
    """Tell generations apart: a slot each, and in it anew where a step had nothing to compare with."""
    found: list[tuple[int, int, list[Step]]] = []
    current: dict[int, tuple[int, int, list[Step]]] = {}
    for step in steps:
        run = current.get(step.slot)
        if run is None or math.isinf(step.difference):
            run = (step.slot, run[1] + 1 if run else 1, [])
            current[step.slot] = run
            found.append(run)
        run[2].append(step)
    return [Generation(slot=slot, number=number, steps=tuple(held)) for slot, number, held in found]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """A step in a chart: the left edge and width of its column, and its point; ``y`` is None without a difference."""

    x: float
    width: float
    y: float | None
    is_above: bool
    reused: bool
    title: str

    @property
    def middle(self) -> float:
        """The middle of its column."""
        return self.x + self.width / 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """Differences of one generation as a curve over a strip of its steps, in pixels."""

    width: int
    left: float
    right: float
    top: float
    bottom: float
    strip: float
    height: float
    marks: tuple[Mark, ...]
    curves: tuple[str, ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_ticks: tuple[tuple[float, str], ...]
    threshold: tuple[float, str] | None
    summary: str


def chart(generation: Generation, threshold: float | None, width: int) -> Chart:
    """Lay out one generation.

    Args:
        generation: at least one step.
        threshold: drawn as a line where it is known; a relative difference, as those of the steps.
        width: pixels of the picture.

    """
    left, right, top, bottom = 52.0, width - 14.0, 34.0, 204.0
    known = [step.difference for step in generation.steps if math.isfinite(step.difference)]
    limit = _limit(known, threshold)
    column = (right - left) / len(generation.steps)

    def height(difference: float) -> float:
        return bottom - (bottom - top) * min(difference, limit) / limit

    marks = tuple(
        Mark(
            x=left + place * column,
            width=column,
            y=height(step.difference) if math.isfinite(step.difference) else None,
            is_above=math.isfinite(step.difference) and step.difference > limit,
            reused=step.reused,
            title=_step_title(generation.first + place, step, threshold),
        )
        for place, step in enumerate(generation.steps)
    )
    tick = _nice(limit / 5)
    ticks = [(height(tick * n), f"{tick * n:.3g}") for n in range(int(limit / tick + 1e-9) + 1)]
    limit_y = height(threshold) if threshold is not None else math.inf
    every = math.ceil(len(marks) * 26 / width)  # a number takes 26 pixels
    every = next((size for size in (1, 5, 10, 20, 25, 50, 100, 250, 500, 1000) if size >= every), every)
    numbers = [(mark, generation.first + place) for place, mark in enumerate(marks)]
    return Chart(
        width=width,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        strip=bottom + 12,
        height=bottom + 74,
        marks=marks,
        curves=tuple(_curves(marks)),
        y_ticks=tuple((y, label if abs(y - limit_y) > 11 else "") for y, label in ticks),
        x_ticks=tuple((mark.middle, str(number)) for mark, number in numbers if number == 1 or number % every == 0),
        threshold=(limit_y, f"{threshold:g}") if threshold is not None else None,
        summary=f"{len(marks)} steps, {generation.num_reused} reused; differences from "
        + (f"{min(known):.3g} to {max(known):.3g}." if known else "none."),
    )


def _limit(known: Sequence[float], threshold: float | None) -> float:
    """Where the axis of differences ends: above all, but not so high that the threshold lies flat on the ground."""
    most = 1.08 * max(known, default=0.0)
    if threshold:
        most = max(1.4 * threshold, min(most, 8 * threshold))
    return most or 1.0


def _nice(size: float) -> float:
    """The step of a scale: 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= size * 0.999)


def _curves(marks: Sequence[Mark]) -> Iterator[str]:
    """The points of each unbroken piece of the curve."""
    points: list[str] = []
    for mark in marks:
        if mark.y is None:
            if len(points) > 1:
                yield " ".join(points)
            points = []
        else:
            points.append(f"{mark.middle:.1f},{mark.y:.1f}")
    if len(points) > 1:
        yield " ".join(points)


def describe(difference: float) -> str:
    """A difference in words and figures."""
    if math.isinf(difference):
        return "nothing to compare with"
    return "not a number" if math.isnan(difference) else f"{difference:.4g}"


def _step_title(number: int, step: Step, threshold: float | None) -> str:
    limit = f" (threshold {threshold:g})" if threshold is not None and math.isfinite(step.difference) else ""
    done = "reused" if step.reused else "computed"
    return f"step {number}: {done}; difference: {describe(step.difference)}{limit}"
