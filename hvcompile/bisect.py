"""Which pass or lowering of a dump goes wrong: every stage is run on the same inputs and compared with the one before.

The stages are the graph that Dynamo captured, the graph after each pass, the last graph lowered by AOTAutograd and by
Inductor, as far as the dumped run went, and what the run itself gave at its first call. Only the captured graph's own
outputs are compared. State that passes added is zeros, so that the blocks behind a first-block cache are computed:
there, and not in a reused step, the cache is exact.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hvcompile import inductor, outputs
from hvcompile.dump import stem_of
from hvcompile.dumped import LOWERINGS, Dumped, read
from hvcompile.errors import InputError
from hvcompile.graph_reader import load, read_graph

# Largest difference, relative to the largest value, that rounding in another order may make. Inductor makes 3e-7,
# 1.6e-3 and 1.4e-2 of it in float32, float16 and bfloat16 over sixty residual blocks, 2e-5 in a tiny HunyuanVideo.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}
CAPTURED, OUTLINED, SEALED, RUN = "captured", "outlined", "sealed", "run"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One output of a stage against the stage before.

    Attributes:
        output: its position among the captured graph's outputs.
        shape: of this stage's output.
        dtype: of this stage's output.
        largest: largest absolute difference, over what is finite in both.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage that was run: its name, what it is, and its figures; those of the first compare with nothing."""

    name: str
    what: str
    figures: tuple[Figure, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """The first stage that goes wrong, how, and what to switch off; ``output`` is None where it raises."""

    stage: str
    output: int | None
    problem: str
    switch_off: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bisection:
    """What was found in one folder; ``finding`` is None where nothing was."""

    folder: Path
    tolerance: float
    stages: tuple[Stage, ...]
    finding: Finding | None
    notes: tuple[str, ...]

    def verdict(self) -> str:
        """The outcome in one sentence or two."""
        if self.finding is None:
            names = ", ".join(stage.name for stage in self.stages)
            return f"nothing found: {names} agree to a relative {self.tolerance:g}, and no value is NaN or infinite"
        return f"{self.finding.stage}: {self.finding.problem}. {self.finding.switch_off}"

    def record(self) -> dict[str, Any]:
        """The bisection as JSON; a number that is not finite, which JSON lacks, as its name."""
        record: dict[str, Any] = _json(dataclasses.asdict(self))
        return record


def _json(held: Any) -> Any:
    if isinstance(held, dict):
        return {key: _json(item) for key, item in held.items()}
    if isinstance(held, (list, tuple)):
        return [_json(item) for item in held]
    if isinstance(held, Path) or (isinstance(held, float) and not math.isfinite(held)):
        return str(held)
    return held


def bisect(
    folder: Path,
    *,
    tolerance: float | None = None,
    lower: str | None = None,
    observe: Callable[[str], None] = lambda _: None,
) -> Bisection:
    """Find the first stage of one graph folder that goes wrong.

    Args:
        folder: of a graph, with its numbered files and its journal.
        tolerance: relative difference that is no fault; None for that of the inputs' coarsest dtype.
        lower: "eager", "aot" or "inductor": how far to go; None for as far as the dumped run went.
        observe: told what is being run.

    Raises:
        InputError: the folder is incomplete, or from another version of torch, or an argument is out of range.

    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise InputError(f"tolerance is {tolerance}; allowed is a finite number, 0 or more")
    if lower is not None and lower not in LOWERINGS:
        raise InputError(f"lower is {lower!r}; allowed is one of {', '.join(map(repr, LOWERINGS))}")
    dumped = read(folder)
    allowed = tolerance if tolerance is not None else max(map(_tolerance, dumped.dtypes()), default=_tolerance())

    stages: list[Stage] = []
    spread = 0.0
    finding: Finding | None = None
    before: Sequence[Any] = ()
    for name, what, run in _stages(dumped, lower or dumped.lower):
        observe(f"{name}: {what}")
        with torch.no_grad():
            try:
                torch.manual_seed(0)
                results = list(run())
            except InputError:
                raise
            except Exception as error:  # whatever a broken graph raises is what is looked for
                stages.append(Stage(name=name, what=what, figures=()))
                problem = f"raises {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                finding = Finding(stage=name, output=None, problem=problem, switch_off=_advice(name, dumped, allowed))
                break
            if name == CAPTURED:
                before = results
            results = results[: len(before)]  # what follows is added state
            figures = tuple(_figures(before, results))
        stages.append(Stage(name=name, what=what, figures=figures))
        previous = stages[-2].name if len(stages) > 1 else ""
        row = dumped.rows.get(name, {"matched": (), "tolerance": 0.0})
        may_change = row["tolerance"] if row["matched"] and tolerance is None else 0.0
        spread = max(spread, may_change / 10)  # coarsely rounded values are others after another sum
        within = max(allowed, spread, may_change)
        fault = _fault(figures, within, previous) if len(results) == len(before) else (None, _lacking(before, results))
        if fault is not None:
            finding = Finding(stage=name, output=fault[0], problem=fault[1], switch_off=_advice(name, dumped, allowed))
            break
        before = results
    return Bisection(
        folder=folder, tolerance=allowed, stages=tuple(stages), finding=finding, notes=tuple(dumped.notes())
    )


def write_json(found: Sequence[Bisection], file: Path) -> None:
    """Write bisections as JSON."""
    outputs.write_json({"torch": torch.__version__, "graphs": [item.record() for item in found]}, file)


def _stages(dumped: Dumped, lower: str) -> Iterator[tuple[str, str, Callable[[], Sequence[Any]]]]:
    """Each stage: its name, what it is, and how to run it."""
    names = {stem_of(name): name for name in dumped.rows}
    for file in dumped.files:
        stem = file.stem.split("_", 1)[1]
        yield names.get(stem, stem), file.name, functools.partial(_run_file, file)
    last = dumped.files[-1]
    for step in LOWERINGS[1 : 1 + LOWERINGS.index(lower)]:
        yield step, f"{last.name} by {step}", functools.partial(_run_lowered, last, step)
    recorded = dumped.folder / "outputs.pt"
    if lower == dumped.lower and recorded.exists():  # the run as it was ends where its lowering does
        yield RUN, f"its first call, {recorded.name}", functools.partial(torch.load, recorded, weights_only=True)


def _run_file(file: Path) -> Sequence[Any]:
    loaded = load(file)
    results: Sequence[Any] = loaded.build()(*loaded.example_inputs())
    return results


def _run_lowered(file: Path, step: str) -> Sequence[Any]:
    loaded = load(file)
    inputs = list(loaded.example_inputs())
    results: Sequence[Any] = inductor.LOWERINGS[step](read_graph(loaded), inputs)(*inputs)
    return results


def _figures(before: Sequence[Any], now: Sequence[Any]) -> Iterator[Figure]:
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


def _fault(figures: Sequence[Figure], tolerance: float, previous: str) -> tuple[int, str] | None:
    """The first output that is wrong, and how; ``previous`` is empty for the captured graph."""
    for figure in figures:
        output = f"output {figure.output} ({figure.dtype} {list(figure.shape)})"
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


def _lacking(before: Sequence[Any], now: Sequence[Any]) -> str:
    return f"gives {len(now)} outputs where the captured graph gives {len(before)}"


def _advice(name: str, dumped: Dumped, tolerance: float) -> str:
    """What to switch off, as a sentence."""
    ours = "use backend='inductor' for this model, and report this folder"
    known = {
        CAPTURED: "That is the model on these inputs, before anything here touched it: switch off nothing, look at its "
        "inputs (a mask, a dtype that overflows) and weights",
        OUTLINED: f"Outlining is part of hvfast: {ours}",
        SEALED: f"That is hvfast's own last step: {ours}",
        "aot": "The graph is right and AOTAutograd's trace of it is not: options={'lower': 'eager'} does without",
        "inductor": "The graph is right and Inductor's code for it is not: options={'lower': 'aot'} does without",
        RUN: "The same graph lowered again is right: look at what the run had otherwise (symbolic shapes, "
        "TORCHINDUCTOR_... variables, a stale cache: TORCHINDUCTOR_FORCE_DISABLE_CACHES=1)",
    }
    if name in known:
        return known[name]
    row = dumped.rows.get(name, {"section": "", "is_exact": True})
    advice = f"Switch it off with options={{{row['section']!r}: False}}" if row["section"] else "Leave this pass out"
    if not row["is_exact"]:
        advice += f"; it may change numerics, and a tolerance above {tolerance:g} looks past what it may"
    return advice


def _tolerance(dtype: torch.dtype = torch.float32) -> float:
    return TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16])  # float8 is multiplied out in it
