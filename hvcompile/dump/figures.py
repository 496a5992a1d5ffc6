"""The figures of one output against another: how far apart they are, and whether that is a fault."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}
"""The largest difference that rounding in another order may make, by dtype, as a share of the largest value.

Inductor makes 3e-7, 1.6e-3 and 1.4e-2 of it in float32, float16 and bfloat16 over sixty residual blocks, and 2e-5 in a
tiny HunyuanVideo.
"""

Fault = tuple[int | None, str]
"""The output that is wrong, None for all of them, and how."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One output of a stage against the stage before.

    Attributes:
        output: its position among the captured graph's outputs.
        call: 1, or 2 for the call with the state that the first one returned.
        rank: the rank on which the figure is worst, which this one is of; None where a process is alone.
        shape: of this stage's output.
        dtype: of this stage's output.
        largest: largest absolute difference, over the values that are finite in both.
        relative: the same as a share of the largest absolute value of the stage before.
        not_finite: values that are NaN or infinite in this stage.
        newly_not_finite: those of them that were finite in the stage before.

    """

    output: int
    shape: tuple[int, ...]
    dtype: str
    largest: float
    relative: float
    not_finite: int
    newly_not_finite: int
    call: int = 1
    rank: int | None = None


def tolerance_of(dtype: torch.dtype = torch.float32) -> float:
    """The relative difference that is no fault in values of a dtype."""
    return TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])  # float8 is multiplied out in it


def figures_of(before: Sequence[Any], now: Sequence[Any]) -> Iterator[Figure]:
    """The figures of a stage's outputs against those of the stage before; what is no tensor has none."""
    for place, (old, new) in enumerate(zip(before, now, strict=False)):
        if isinstance(new, torch.Tensor) and isinstance(old, torch.Tensor):
            yield _figure(place, old, new)


def _figure(place: int, old: torch.Tensor, new: torch.Tensor) -> Figure:
    is_bad = new.isfinite().logical_not()
    num_bad = int(is_bad.sum())
    if old.shape == new.shape:
        was_finite = old.isfinite()
        both = was_finite & is_bad.logical_not()
        wide = torch.complex128 if new.dtype.is_complex else torch.float64
        largest = (new[both].to(wide) - old[both].to(wide)).abs().max().item() if both.any() else 0.0
        scale = old[was_finite].to(wide).abs().max().item() if was_finite.any() else 0.0
        relative = largest / scale if scale else (math.inf if largest else 0.0)
        num_new = num_bad if old is new else int((is_bad & was_finite).sum())  # the captured graph has none before it
    else:
        largest = relative = math.inf
        num_new = 0
    return Figure(
        output=place,
        shape=tuple(new.shape),
        dtype=str(new.dtype).removeprefix("torch."),
        largest=largest,
        relative=relative,
        not_finite=num_bad,
        newly_not_finite=num_new,
    )


def fault_of(figures: Sequence[Figure], tolerance: float, previous: str) -> Fault | None:
    """The first output that is wrong, and how.

    Args:
        figures: of a stage's outputs, in order.
        tolerance: relative difference that is no fault; integers and bools have to be equal.
        previous: name of the stage that they are compared with; empty for the captured graph.

    """
    for figure in figures:
        output = f"output {figure.output} ({figure.dtype} {list(figure.shape)})"
        if figure.call > 1:
            output += " of a second call on the same inputs"
        if figure.rank is not None:
            output += f" on rank {figure.rank}"
        if figure.newly_not_finite:
            since = f" that {previous} gives as finite numbers" if previous else ""
            return figure.output, f"{output} has {figure.newly_not_finite} values{since} that are NaN or infinite"
        if math.isinf(figure.largest):
            return figure.output, f"{output} has another shape than that of {previous}"
        is_exact_type = not figure.dtype.startswith(("float", "bfloat", "complex"))
        if figure.relative > (0 if is_exact_type else tolerance):
            return figure.output, (
                f"{output} differs from that of {previous} by {figure.largest:.3g} at most, a relative "
                f"{figure.relative:.3g}; the tolerance is {0 if is_exact_type else tolerance:g}"
            )
    return None


def lacking(before: Sequence[Any], now: Sequence[Any]) -> str:
    """That a stage has another number of outputs than the captured graph; empty where it has as many."""
    if len(now) == len(before):
        return ""
    return f"gives {len(now)} outputs where the captured graph gives {len(before)}"


def badness(figure: Figure) -> tuple[int, float, int]:
    """Orders figures of one output, the worst last."""
    return figure.newly_not_finite, figure.relative, figure.not_finite
