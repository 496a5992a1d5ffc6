"""Which pass or lowering of a dump goes wrong: every stage is run on the same inputs and compared with the one before.

The stages are the graph that Dynamo captured, the graph after each pass, the last graph lowered by AOTAutograd and by
Inductor, as far as the dumped run went, and what the run itself gave at its first call. Only the captured graph's own
outputs are compared. State that passes added is zeros, so that the blocks behind a first-block cache are computed:
there, and not in a reused step, the cache is exact.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hvcompile import inductor, outputs
from hvcompile.dump import stem_of
from hvcompile.errors import InputError
from hvcompile.graph_reader import load, read_graph

# Largest difference, relative to the largest value, that rounding in another order may make over sixty blocks.
TOLERANCES = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}
CAPTURED, OUTLINED, SEALED, RUN = "captured", "outlined", "sealed", "run"
LOWERINGS = ("eager", "aot", "inductor")
"""From the least to the most that is done to a graph."""


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
    """A stage that was run: its name, what it is in words, and its figures; those of the first compare with nothing."""

    name: str
    what: str
    figures: tuple[Figure, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """The first stage that goes wrong: what, in one line, and what to switch off; ``output`` is None where it raises."""

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
            return f"nothing found: {names} agree to a relative {self.tolerance:g}, and every value is finite or always was"
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
    if isinstance(held, Path) or (isinstance(held, float) and held - held != 0):
        return str(held)
    return held


def folders(directory: Path) -> list[Path]:
    """The graph folders of a dump, oldest first; ``directory`` may be one itself.

    Raises:
        InputError: there is no such directory, or it is no dump.

    """
    if not directory.exists():
        raise InputError(f"there is no directory {str(directory)!r}: give one that HVCOMPILE_DUMP or options['dump'] named")
    if not directory.is_dir():
        raise InputError(f"{str(directory)!r} is a file: give the directory of a dump, such as {str(directory.parent)!r}")
    if (directory / "journal.json").exists() or _files(directory):
        return [directory]
    found = [path for path in directory.iterdir() if path.is_dir() and path.name.startswith("graph_") and _files(path)]
    if not found:
        raise InputError(
            f"{str(directory)!r} is no dump: it has no graph_... folder with numbered graphs. Run the model with "
            "HVCOMPILE_DUMP set to a directory, and give that"
        )
    return sorted(found, key=lambda path: (_files(path)[0].stat().st_mtime_ns, path.name))


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
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise InputError(f"tolerance is {tolerance}; allowed is a finite number, 0 or more")
    if lower is not None and lower not in LOWERINGS:
        raise InputError(f"lower is {lower!r}; allowed is one of {', '.join(map(repr, LOWERINGS))}")
    journal = _journal(folder)
    files = _files(folder)
    _check_files(folder, files)
    rows = {row["name"]: row for row in journal["passes"]}
    steps = LOWERINGS[1 : 1 + LOWERINGS.index(lower or journal["lower"])]
    allowed = _tolerance(files[0]) if tolerance is None else tolerance
    notes = [*journal["notes"], *_notes(folder, files, rows)]

    stages: list[Stage] = []
    finding: Finding | None = None
    before: Sequence[Any] = ()
    for name, what, run in _stages(folder, files, rows, steps, is_whole_run=lower in {None, journal["lower"]}):
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
                finding = Finding(stage=name, output=None, problem=problem, switch_off=_advice(name, rows, allowed))
                break
            if name == CAPTURED:
                before = results
            results = results[: len(before)]  # what follows is added state
            figures = tuple(_figures(before, results))
        stages.append(Stage(name=name, what=what, figures=figures))
        previous = stages[-2].name if len(stages) > 1 else ""
        fault = _fault(figures, allowed, previous) if len(results) == len(before) else (None, _lacking(before, results))
        if fault is not None:
            finding = Finding(stage=name, output=fault[0], problem=fault[1], switch_off=_advice(name, rows, allowed))
            break
        before = results
    return Bisection(
        folder=folder, tolerance=allowed, stages=tuple(stages), finding=finding, notes=tuple(dict.fromkeys(notes))
    )


def write_json(found: Sequence[Bisection], file: Path) -> None:
    """Write bisections as JSON."""
    outputs.write_json({"torch": torch.__version__, "graphs": [item.record() for item in found]}, file)


def _stages(
    folder: Path, files: Sequence[Path], rows: dict[str, Any], steps: Sequence[str], *, is_whole_run: bool
) -> Iterator[tuple[str, str, Callable[[], Sequence[Any]]]]:
    """Each stage: its name, what it is, and how to run it."""
    names = {stem_of(name): name for name in rows}
    for file in files:
        stem = file.stem.split("_", 1)[1]
        yield names.get(stem, stem), file.name, functools.partial(_run_file, file)
    for step in steps:
        yield step, f"{files[-1].name} by {step}", functools.partial(_run_lowered, files[-1], step)
    recorded = folder / "outputs.pt"
    if is_whole_run and recorded.exists():  # the run as it was ends where its lowering does
        yield RUN, "its first call, outputs.pt", functools.partial(torch.load, recorded, weights_only=True)


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
        if not isinstance(new, torch.Tensor) or not isinstance(old, torch.Tensor):
            continue
        is_bad = new.isfinite().logical_not()
        shared = {"output": place, "shape": tuple(new.shape), "dtype": str(new.dtype).removeprefix("torch.")}
        bad = int(is_bad.sum())
        if old.shape != new.shape:
            yield Figure(**shared, largest=float("inf"), relative=float("inf"), not_finite=bad, newly_not_finite=bad)
            continue
        was_finite = old.isfinite()
        both = was_finite & is_bad.logical_not()
        wide = torch.complex128 if new.dtype.is_complex else torch.float64
        largest = (new[both].to(wide) - old[both].to(wide)).abs().max().item() if both.any() else 0.0
        scale = old[was_finite].to(wide).abs().max().item() if was_finite.any() else 0.0
        relative = largest / scale if scale else (float("inf") if largest else 0.0)
        newly = int((is_bad & was_finite).sum()) if old is not new else bad
        yield Figure(**shared, largest=largest, relative=relative, not_finite=bad, newly_not_finite=newly)


def _fault(figures: Sequence[Figure], tolerance: float, previous: str) -> tuple[int, str] | None:
    """The first output that is wrong, and how; ``previous`` is empty for the captured graph."""
    for figure in figures:
        output = f"output {figure.output} ({figure.dtype} {list(figure.shape)})"
        if figure.newly_not_finite:
            since = f" that {previous} gives as finite numbers" if previous else ""
            return figure.output, f"{output} has {figure.newly_not_finite} values{since} that are NaN or infinite"
        is_exact_type = not figure.dtype.startswith(("float", "bfloat", "complex"))
        if figure.relative > (0 if is_exact_type else tolerance):
            return figure.output, (
                f"{output} differs from that of {previous} by {figure.largest:.3g} at most, a relative "
                f"{figure.relative:.3g}; the tolerance is {0 if is_exact_type else tolerance:g}"
            )
    return None


def _lacking(before: Sequence[Any], now: Sequence[Any]) -> str:
    return f"gives {len(now)} outputs where the captured graph gives {len(before)}"


def _advice(name: str, rows: dict[str, Any], tolerance: float) -> str:
    """What to switch off, as a sentence."""
    if name == CAPTURED:
        return (
            "That is the model on these inputs, before anything here touched it: switch off nothing, look at its "
            "inputs (a mask, a dtype that overflows) and weights"
        )
    if name == OUTLINED:
        return "Outlining is part of hvfast: use backend='inductor' for this model, and report this folder"
    if name == SEALED:
        return "That is hvfast's own last step: use backend='inductor' for this model, and report this folder"
    if name == "aot":
        return "The graph is right and AOTAutograd's trace of it is not: options={'lower': 'eager'} does without"
    if name == "inductor":
        return "The graph is right and Inductor's code for it is not: options={'lower': 'aot'} does without"
    if name == RUN:
        return (
            "The same graph compiled again is right: compare the run's settings (dynamic=True, TORCHINDUCTOR_ variables), "
            "and run it with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1; options={'lower': 'eager'} does without compiled code"
        )
    section = rows.get(name, {}).get("section", "")
    advice = f"Switch it off with options={{{section!r}: False}}" if section else "Leave this pass out"
    if not rows.get(name, {}).get("is_exact", True):
        advice += f"; it may change numerics, and a tolerance above {tolerance:g} looks past what it may"
    return advice


def _tolerance(captured: Path) -> float:
    """The tolerance of the coarsest dtype among a graph's inputs; float8 counts as what it is multiplied in."""
    inputs = _loading(captured, lambda: load(captured).example_inputs())
    dtypes = {item.dtype for item in inputs if isinstance(item, torch.Tensor) and item.dtype.is_floating_point}
    return max((TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) for dtype in dtypes), default=TOLERANCES[torch.float32])


def _notes(folder: Path, files: Sequence[Path], rows: dict[str, Any]) -> Iterator[str]:
    if not (folder / "inputs.pt").exists():
        yield "no call was saved (the model was compiled and not run, or inputs.pt was removed): inputs are drawn at random"
    if len(files) > 1 and not files[-1].stem.endswith(f"_{SEALED}"):
        yield f"the compilation broke off after {files[-1].name}, and the lowerings are those of that graph"
    for row in rows.values():
        if row["matched"] and not row["is_exact"]:
            yield f"{row['name']} may change numerics; it is compared in a step that it computes, not in one that it reuses"


def _journal(folder: Path) -> dict[str, Any]:
    file = folder / "journal.json"
    if not file.exists():
        raise InputError(f"{str(folder)!r} has no journal.json: a dump writes one; dump again and leave its files there")
    try:
        journal: dict[str, Any] = json.loads(file.read_text("utf-8"))
        made_by = journal["torch"]
        known = journal["lower"] in LOWERINGS and isinstance(journal["passes"], list) and "notes" in journal
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(file)!r} is no journal of a dump ({error!r}): dump again") from error
    if made_by != torch.__version__:
        raise InputError(
            f"{str(folder)!r} was dumped on torch {made_by} and this is torch {torch.__version__}, whose lowerings are "
            "others: bisect it in the environment that it comes from, or dump again here"
        )
    if not known:
        raise InputError(f"{str(file)!r} is no journal of this version of hvcompile: dump again")
    return journal


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if re.match(r"\d\d_", path.name))


def _check_files(folder: Path, files: Sequence[Path]) -> None:
    numbers = [int(path.name[:2]) for path in files]
    lacking = sorted(set(range(max(numbers, default=0) + 1)) - set(numbers))
    if lacking:
        raise InputError(
            f"{str(folder)!r} lacks the graph file number {', '.join(f'{number:02d}' for number in lacking)}: each stage is "
            "compared with the one before; dump again and leave its files there"
        )
    for file in files:
        if "constants = torch.load" in file.read_text("utf-8") and not file.with_suffix(".pt").exists():
            raise InputError(
                f"{str(folder)!r} lacks {file.with_suffix('.pt').name}, the constants of {file.name}: dump again"
            )


def _loading(file: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{str(file)!r} can't be read ({type(error).__name__}: {reason}): dump again, or undo what was changed in it"
        ) from error
