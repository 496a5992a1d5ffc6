"""Which pass or lowering of a dump goes wrong: every stage is run on the same inputs and compared with the one before.

The stages are the graph that Dynamo captured, the graph after each pass, the last graph lowered by AOTAutograd and by
Inductor, as far as the dumped run went, and what the run itself gave at its first call. Only the captured graph's own
outputs are compared. State that passes added is zeros, so that the blocks behind a first-block cache are computed.
Graphs that return a next state are called once more on the same inputs with it. Nothing has changed then, so a cache
reuses, and must return what it has just computed.

The ranks of a run that shared its work go through the stages together, each in its own folder (``together.py``). A
stage is wrong where it is wrong on any rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from hvcompile import outputs
from hvcompile.dump.figures import Fault, Figure, fault_of, figures_of, lacking, tolerance_of
from hvcompile.dump.read import LOWERINGS, Dumped, command, folders, read
from hvcompile.dump.runs import is_run
from hvcompile.dump.stages import CAPTURED, OUTLINED, RUN, SEALED, Prepare, Second, stages_of
from hvcompile.dump.together import Together
from hvcompile.errors import InputError
from hvcompile.ranks.store import Exchange
from hvcompile.torch_private import distributed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage that was run.

    Attributes:
        name: of the pass or the lowering, or "captured", "outlined", "sealed", "run".
        what: what it is: a file, and what lowered it.
        figures: of its outputs against the stage before; those of the first stage compare with nothing.
        tolerance: the relative difference that it is allowed.

    """

    name: str
    what: str
    figures: tuple[Figure, ...]
    tolerance: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """The first stage that goes wrong, how, and what to switch off; ``output`` is None where the stage raises."""

    stage: str
    output: int | None
    problem: str
    switch_off: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bisection:
    """The outcome for one folder.

    Attributes:
        folder: of the graph.
        tolerance: relative difference that a stage is allowed which changes nothing; each stage has its own.
        stages: those that were run, in order.
        finding: None where nothing is wrong.
        notes: what to know before the figures are believed.

    """

    folder: Path
    tolerance: float
    stages: tuple[Stage, ...]
    finding: Finding | None
    notes: tuple[str, ...]

    def verdict(self) -> str:
        """The outcome in one sentence or two."""
        if self.finding is None:
            names = ", ".join(stage.name for stage in self.stages)
            wider: dict[float, list[str]] = {}
            for stage in self.stages:
                if stage.tolerance != self.tolerance:
                    wider.setdefault(stage.tolerance, []).append(stage.name)
            exceptions = "; ".join(f"{', '.join(names)} to {allowed:g}" for allowed, names in wider.items())
            return (
                f"nothing found: {names} agree, each with the one before, to a relative {self.tolerance:g}"
                f"{f' ({exceptions})' if exceptions else ''}, and no value is NaN or infinite"
            )
        return f"{self.finding.stage}: {self.finding.problem}. {self.finding.switch_off}"

    def record(self) -> dict[str, Any]:
        """The bisection as JSON; a number that is not finite, which JSON lacks, as its name."""
        record: dict[str, Any] = _json(dataclasses.asdict(self))
        return record


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, float) and not math.isfinite(value)):
        return str(value)
    return value


def bisect(
    folder: Path,
    *,
    tolerance: float | None = None,
    lower: str | None = None,
    observe: Callable[[str], None] = lambda _: None,
    exchange: Exchange | None = None,
) -> Bisection:
    """Find the first stage of one graph folder that goes wrong.

    Args:
        folder: of a graph, with its numbered files and its journal.
        tolerance: relative difference that is no fault; None for that of the inputs' coarsest dtype.
        lower: "eager", "aot" or "inductor": how far to go; None for as far as the dumped run went.
        observe: called with what is about to run, as text.
        exchange: of the ranks that do the same, each with a folder of its own; None where this process is alone. All
            ranks return the same finding, and all raise where one does.

    Raises:
        InputError: the folder is incomplete or from another version of torch; an argument is out of range; the graphs
            talk to ranks that are not there, or those ranks have other graphs.

    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise InputError(f"tolerance is {tolerance}; allowed is a finite number, 0 or more")
    if lower is not None and lower not in LOWERINGS:
        raise InputError(f"lower is {lower!r}; allowed is one of {', '.join(map(repr, LOWERINGS))}")
    together = Together(exchange)
    dumped = together.run(lambda: _read(folder, together.size))
    together.compare(f"the dump in {folder.name}", _facts(dumped))
    search = together.run(lambda: _Search(dumped, tolerance, together))
    finding: Finding | None = None
    for name, what, prepare in stages_of(dumped, lower or dumped.lower):
        observe(f"{name}: {what}")
        finding = search.look_at(name, what, prepare)
        if finding is not None:
            break
    return Bisection(
        folder=folder,
        tolerance=search.tolerance,
        stages=tuple(search.stages),
        finding=finding,
        notes=tuple(search.notes),
    )


def folders_of_all(directory: Path, exchange: Exchange) -> list[Path]:
    """The graph folders of this rank, in the order of rank 0's.

    Args:
        directory: this rank's part of a dump.
        exchange: of all ranks.

    Raises:
        InputError: the directory is no dump, or the ranks have other graphs.

    """
    together = Together(exchange)
    names = {folder.name: folder for folder in together.run(lambda: folders(directory))}
    together.compare("the run", [directory.name] if is_run(directory) else [])
    together.compare("the dump", sorted(names) if together.size > 1 else [])
    return [names[name] for name in together.gather(list(names))[0]]


def _read(folder: Path, num_ranks: int) -> Dumped:
    """Read a folder, and check that the ranks are there which its graphs talk to."""
    dumped = read(folder)
    for group, file in dumped.groups().items():
        if num_ranks == 1:
            ranks = int(dumped.journal.get("ranks", 1))
            advice = command("DIRECTORY", ranks) if ranks > 1 else "under torchrun, hvcompile bisect DIRECTORY"
            raise InputError(
                f"{file} in {str(folder)!r} is one rank's share of the work and talks to the others: run all of them, "
                f"{advice}"
            )
        try:
            distributed.process_group(group)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{file} in {str(folder)!r} talks over the process group {group!r}, one of a mesh that the script "
                "made, and of groups only the default one of all ranks can be made again from a dump: dump a run "
                "without options['context_parallel']['mesh'], or with 'context_parallel' off, where that goes wrong too"
            ) from error
    return dumped


def _facts(dumped: Dumped) -> list[str]:
    """What all ranks must have alike, to go through the same stages."""
    rows = [f"{name} {bool(row['matched'])} {row['tolerance']}" for name, row in dumped.rows.items()]
    saved = [name for name in ("inputs.pt", "outputs.pt") if (dumped.folder / name).exists()]
    return [file.name for file in dumped.files] + saved + [f"lowered by {dumped.lower}", *rows]


class _Search:
    """The stages looked at so far, and what the next one is compared with.

    Attributes:
        rounding: relative difference that rounding makes in the inputs' coarsest dtype.
        tolerance: relative difference that a stage is allowed which changes nothing.
        stages: those that were run, in order.
        notes: what to know before their figures are believed.

    """

    def __init__(self, dumped: Dumped, tolerance: float | None, together: Together) -> None:
        self.dumped = dumped
        self.rounding = max(map(tolerance_of, dumped.dtypes()), default=tolerance_of())
        self.tolerance = self.rounding if tolerance is None else tolerance
        self.stages: list[Stage] = []
        self.notes = list(dumped.notes())
        if together.size > 1:
            self.notes.append(f"{together.size} ranks run together: a figure is that of the rank where it is worst")
        self._together = together
        self._is_one_for_all = tolerance is not None
        self._before: Sequence[Any] = ()  # the outputs of the stage before
        self._before_again: Sequence[Any] | None = None  # those of the last second call

    def look_at(self, name: str, what: str, prepare: Prepare) -> Finding | None:
        """Run the next stage and compare it; None where nothing is wrong with it."""
        tolerance = self._allowed(name)
        calls, problem = self._run(prepare)
        if problem:
            self.stages.append(Stage(name=name, what=what, figures=(), tolerance=tolerance))
            return self._finding(name, (None, problem), tolerance)
        results, second = calls
        if name == CAPTURED:
            self._before = results
        results = results[: len(self._before)]  # what follows is added state
        if second is not None and not second.reuses and self._before_again is None:
            self.notes.append("no reused step is compared: by its options the cache computes a second call too")
        previous = self.stages[-1].name if self.stages else ""
        worst = self._together.worst([*figures_of(self._before, results), *self._figures_again(results, second)])
        figures, again = (tuple(item for item in worst if item.call == call) for call in (1, 2))
        self.stages.append(Stage(name=name, what=what, figures=figures + again, tolerance=tolerance))
        problem = next(filter(None, self._together.gather(lacking(self._before, results))), "")
        fault = (None, problem) if problem else fault_of(figures, tolerance, previous)
        if fault:
            finding: Finding | None = self._finding(name, fault, tolerance)
        else:
            finding = self._judge_again(name, again, tolerance, previous)
        self._before = results
        self._before_again = self._before_again if second is None else second.results
        return finding

    def _run(self, prepare: Prepare) -> tuple[Any, str]:
        """What a stage's calls return, and what is raised on the way; empty where nothing is."""
        caught = (Exception, SystemExit)  # whatever a broken graph raises is what is looked for
        with torch.no_grad():
            run, problem = self._together.attempt(prepare, caught)
            if problem:  # no rank runs, and waits for the others in it, before all can
                return None, problem
            return self._together.attempt(lambda: run(len(self._before)), caught)

    def _allowed(self, name: str) -> float:
        """The relative difference that is no fault of the next stage."""
        is_lowered = name in LOWERINGS or (name == RUN and self.dumped.lower != "eager")
        # Coarsely rounded values change with the order of a sum; two graphs that run eagerly sum alike.
        coarse = [self._may_change(stage.name) / 10 for stage in self.stages if is_lowered]
        return max(self.tolerance, self._may_change(name), *coarse)

    def _may_change(self, name: str) -> float:
        """The relative difference that a stage's pass may make; 0 where a tolerance was given for all."""
        row = self.dumped.rows.get(name, {"matched": (), "tolerance": 0.0})
        return float(row["tolerance"]) if row["matched"] and not self._is_one_for_all else 0.0

    def _figures_again(self, results: Sequence[Any], second: Second | None) -> tuple[Figure, ...]:
        """The figures of a second call, against the last second call; where there is none, against its first call."""
        if second is None:
            return ()
        before = results if self._before_again is None else self._before_again
        figures = figures_of(before, second.results[: len(self._before)])
        return tuple(dataclasses.replace(item, call=2) for item in figures)

    def _judge_again(self, name: str, again: Sequence[Figure], tolerance: float, previous: str) -> Finding | None:
        """What is wrong with a second call; if it is the first such, the pass that reuses is to blame."""
        if self._before_again is None:  # what is cached is a difference, which is rounded
            name, fault = (
                _reusing(self.dumped) or name,
                fault_of(again, max(tolerance, self.rounding), "its first call"),
            )
        else:
            fault = fault_of(again, tolerance, previous)
        return self._finding(name, fault, tolerance) if fault else None

    def _finding(self, stage: str, fault: Fault, tolerance: float) -> Finding:
        output, problem = fault
        return Finding(stage=stage, output=output, problem=problem, switch_off=_advice(stage, self.dumped, tolerance))


def write_json(bisections: Sequence[Bisection], file: Path) -> None:
    """Write bisections as JSON."""
    outputs.write_json({"torch": torch.__version__, "graphs": [item.record() for item in bisections]}, file)


def _reusing(dumped: Dumped) -> str:
    """The name of the pass that lets a step reuse another; empty where the journal has none."""
    rows = dumped.rows.items()
    names = [name for name, row in rows if row["matched"] and not row["is_exact"] and not row["tolerance"]]
    return names[-1] if names else ""


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
