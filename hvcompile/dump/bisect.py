"""Which pass or lowering of a dump goes wrong: every stage is run on the same inputs and compared with the one before.

The stages are the graph that Dynamo captured, the graph after each pass, the last graph lowered by AOTAutograd and by
Inductor, as far as the dumped run went, and what the run itself gave at its first call. Only the captured graph's own
outputs are compared. State that passes added is zeros, so that the blocks behind a first-block cache are computed.
Graphs that hand the next state over are called once more on the same inputs with it: nothing has changed then, so that
a cache reuses, and must give what it has just computed.

The ranks of a run that shared its work go through the stages together, each in its own folder. After every step they
tell each other what came of it: a stage is wrong where it is wrong on any rank, and all go on or stop alike.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import logging
import math
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hvcompile import outputs
from hvcompile.dump.read import LOWERINGS, Dumped, command, folders, read
from hvcompile.dump.source_reader import fix_numbers, load, read_graph
from hvcompile.dump.write import stem_of
from hvcompile.errors import InputError
from hvcompile.ranks.store import Exchange
from hvcompile.torch_private import distributed, lowering

log = logging.getLogger(__name__)

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
        call: 1, or 2 for the call with the state that the first one gave.
        rank: where it was taken, the one on which it is worst; None where a process is alone.
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
    call: int = 1
    rank: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage that was run: its name, what it is, its figures, and the relative difference that it is allowed.

    The figures of the first compare with nothing.
    """

    name: str
    what: str
    figures: tuple[Figure, ...]
    tolerance: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """The first stage that goes wrong, how, and what to switch off; ``output`` is None where it raises."""

    stage: str
    output: int | None
    problem: str
    switch_off: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bisection:
    """What was found in one folder; ``finding`` is None where nothing was.

    ``tolerance`` is that of a stage that changes nothing; what a stage was allowed, the stage says.
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
            told = "; ".join(f"{', '.join(names)} to {allowed:g}" for allowed, names in wider.items())
            return (
                f"nothing found: {names} agree, each with the one before, to a relative {self.tolerance:g}"
                f"{f' ({told})' if told else ''}, and no value is NaN or infinite"
            )
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
    exchange: Exchange | None = None,
) -> Bisection:
    """Find the first stage of one graph folder that goes wrong.

    Args:
        folder: of a graph, with its numbered files and its journal.
        tolerance: relative difference that is no fault; None for that of the inputs' coarsest dtype.
        lower: "eager", "aot" or "inductor": how far to go; None for as far as the dumped run went.
        observe: told what is being run.
        exchange: of the ranks that do the same, each with a folder of its own; None where this process is alone. They
            find the same, and raise where one of them does.

    Raises:
        InputError: the folder is incomplete, or from another version of torch, or an argument is out of range; graphs
            talk to ranks that are not there, or those have other graphs.

    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise InputError(f"tolerance is {tolerance}; allowed is a finite number, 0 or more")
    if lower is not None and lower not in LOWERINGS:
        raise InputError(f"lower is {lower!r}; allowed is one of {', '.join(map(repr, LOWERINGS))}")
    together = _Together(exchange)
    dumped = together.take(lambda: _read(folder, together.size))
    together.compare(f"the dump in {folder.name}", _facts(dumped))
    search = together.take(lambda: _Search(dumped, tolerance, together))
    finding: Finding | None = None
    for name, what, prepare in _stages(dumped, lower or dumped.lower):
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
    """The graph folders of this rank, in the order in which the first rank has its own.

    Raises:
        InputError: it is no dump, or the ranks have other graphs.

    """
    together = _Together(exchange)
    names = {folder.name: folder for folder in together.take(lambda: folders(directory))}
    together.compare("the dump", sorted(names) if together.size > 1 else [])
    return [names[name] for name in together.said(list(names))[0]]


def _read(folder: Path, num_ranks: int) -> Dumped:
    """A folder whose graphs can run here: the ranks are there that they talk to."""
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
    """What has to be the same on all ranks for them to go through the same stages."""
    rows = [f"{name} {bool(row['matched'])} {row['tolerance']}" for name, row in dumped.rows.items()]
    saved = [name for name in ("inputs.pt", "outputs.pt") if (dumped.folder / name).exists()]
    return [file.name for file in dumped.files] + saved + [f"lowered by {dumped.lower}", *rows]


class _Together:
    """The ranks that bisect one dump in step; a process alone is one of one."""

    def __init__(self, exchange: Exchange | None) -> None:
        self._exchange = exchange if exchange is not None and exchange.size > 1 else None
        self.size = 1 if self._exchange is None else self._exchange.size

    def said(self, held: Any) -> list[Any]:
        """What each rank has, by rank."""
        return (
            [item for _, item in sorted(self._exchange(held), key=lambda pair: pair[0])] if self._exchange else [held]
        )

    def take(self, do: Callable[[], Any]) -> Any:
        """What ``do`` gives, if on no rank it raises InputError; else that one, on all."""
        result, problem = self.attempt(do, ())
        assert not problem
        return result

    def attempt(self, do: Callable[[], Any], caught: tuple[type[BaseException], ...]) -> tuple[Any, str]:
        """What ``do`` gives, and what the first rank raised to raise what is caught; empty where none did."""
        result, refused, problem = None, "", ""
        try:
            result = do()
        except InputError as error:
            if self._exchange is None:
                raise
            refused = str(error)
        except caught as error:
            problem = f"raises {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if self._exchange is None:
            return result, problem
        if problem:  # those that wait for this rank in a collective of NCCL end with their process, and say nothing
            log.warning("rank %d %s", self._exchange.rank, problem)
        # In the order in which they came here: who waited for one that raised, raises later.
        for rank, (said, raised) in self._exchange((refused, problem)):
            if said:
                raise InputError(f"rank {rank}: {said}")
            if raised:
                return result, f"on rank {rank} {raised}"
        return result, ""

    def compare(self, what: str, held: list[str]) -> None:
        """Go on only where all ranks have the same."""
        first, *others = self.said(held)
        for rank, other in enumerate(others, 1):
            if other != first:
                lacking, more = ([item for item in a if item not in b] for a, b in ((first, other), (other, first)))
                told = [f"lacks {', '.join(lacking)}"] * bool(lacking) + [f"has {', '.join(more)}"] * bool(more)
                raise InputError(
                    f"{what} on rank {rank} is another than on rank 0 (it {' and '.join(told) or 'has another order'}"
                    "): ranks are bisected together where they compiled the same graphs; dump again, into an empty "
                    "directory"
                )

    def worst(self, figures: Sequence[Figure]) -> tuple[Figure, ...]:
        """Of each output that of the rank where it is worst."""
        if self._exchange is None:
            return tuple(figures)
        found: dict[tuple[int, int], Figure] = {}
        for rank, rows in enumerate(self.said([dataclasses.asdict(item) for item in figures])):
            for row in rows:
                figure = Figure(**{**row, "shape": tuple(row["shape"]), "rank": rank})
                known = found.get((figure.call, figure.output))
                if known is None or _badness(figure) > _badness(known):
                    found[figure.call, figure.output] = figure
        return tuple(found[place] for place in sorted(found))


def _badness(figure: Figure) -> tuple[int, float, int]:
    return figure.newly_not_finite, figure.relative, figure.not_finite


class _Search:
    """The stages looked at so far, and what the next one is compared with.

    Attributes:
        tolerance: that of a stage that changes nothing.
        stages: those that were run, in order.
        notes: what to know before their figures are believed.

    """

    def __init__(self, dumped: Dumped, tolerance: float | None, together: _Together) -> None:
        self.dumped = dumped
        self.rounding = max(map(_tolerance, dumped.dtypes()), default=_tolerance())
        self.tolerance = self.rounding if tolerance is None else tolerance
        self.stages: list[Stage] = []
        self.notes = list(dumped.notes())
        if together.size > 1:
            self.notes.append(f"{together.size} ranks run together: a figure is that of the rank where it is worst")
        self._together = together
        self._is_given = tolerance is not None
        self._before: Sequence[Any] = ()  # the outputs of the stage before
        self._before_again: Sequence[Any] | None = None  # those of the last second call

    def look_at(self, name: str, what: str, prepare: _Prepare) -> Finding | None:
        """Run the next stage and compare it; None where nothing is wrong with it."""
        within = self._allowed(name)
        caught = (Exception, SystemExit)  # whatever a broken graph raises is what is looked for
        with torch.no_grad():
            run, problem = self._together.attempt(prepare, caught)
            if not problem:  # no rank runs, and waits for the others in it, before all can
                given, problem = self._together.attempt(lambda: run(len(self._before)), caught)
        if problem:
            self.stages.append(Stage(name=name, what=what, figures=(), tolerance=within))
            return self._finding(name, (None, problem), within)
        results, second = given
        if name == CAPTURED:
            self._before = results
        results = results[: len(self._before)]  # what follows is added state
        if second is not None and not second.reuses and self._before_again is None:
            self.notes.append("no reused step is compared: by its options the cache computes a second call too")
        previous = self.stages[-1].name if self.stages else ""
        found = self._together.worst([*_figures(self._before, results), *self._figures_again(results, second)])
        figures, again = (tuple(item for item in found if item.call == call) for call in (1, 2))
        self.stages.append(Stage(name=name, what=what, figures=figures + again, tolerance=within))
        lacking = next(filter(None, self._together.said(_lacking(self._before, results))), "")
        fault = (None, lacking) if lacking else _fault(figures, within, previous)
        finding = self._finding(name, fault, within) if fault else self._judge_again(name, again, within, previous)
        self._before = results
        self._before_again = self._before_again if second is None else second.results
        return finding

    def _allowed(self, name: str) -> float:
        """The relative difference that is no fault of the next stage."""
        is_lowered = name in LOWERINGS or (name == RUN and self.dumped.lower != "eager")
        # Coarsely rounded values are others after another sum; two graphs that run eagerly sum alike.
        coarse = [self._may_change(stage.name) / 10 for stage in self.stages if is_lowered]
        return max(self.tolerance, self._may_change(name), *coarse)

    def _may_change(self, name: str) -> float:
        """The relative difference that a stage's pass may make; 0 where a tolerance was given for all."""
        row = self.dumped.rows.get(name, {"matched": (), "tolerance": 0.0})
        return float(row["tolerance"]) if row["matched"] and not self._is_given else 0.0

    def _figures_again(self, results: Sequence[Any], second: _Second | None) -> tuple[Figure, ...]:
        """Those of a second call, against the one before it, or against its own first call where there is none."""
        if second is None:
            return ()
        before = results if self._before_again is None else self._before_again
        figures = _figures(before, second.results[: len(self._before)])
        return tuple(dataclasses.replace(item, call=2) for item in figures)

    def _judge_again(self, name: str, again: Sequence[Figure], tolerance: float, previous: str) -> Finding | None:
        """What is wrong with a second call; where it is the first such, the pass that reuses is to blame."""
        if self._before_again is None:  # what is cached is a difference, which is rounded
            name, fault = _reusing(self.dumped) or name, _fault(again, max(tolerance, self.rounding), "its first call")
        else:
            fault = _fault(again, tolerance, previous)
        return self._finding(name, fault, tolerance) if fault else None

    def _finding(self, stage: str, fault: _Fault, tolerance: float) -> Finding:
        output, problem = fault
        return Finding(stage=stage, output=output, problem=problem, switch_off=_advice(stage, self.dumped, tolerance))


def write_json(found: Sequence[Bisection], file: Path) -> None:
    """Write bisections as JSON."""
    outputs.write_json({"torch": torch.__version__, "graphs": [item.record() for item in found]}, file)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Second:
    """What a second call gives, and whether it reused the first."""

    results: Sequence[Any]
    reuses: bool


_Run = Callable[[int], tuple[list[Any], _Second | None]]  # given the number of the captured graph's outputs
_Prepare = Callable[[], _Run]
_Fault = tuple[int | None, str]  # the output that is wrong, None for all of them, and how


def _stages(dumped: Dumped, lower: str) -> Iterator[tuple[str, str, _Prepare]]:
    """Each stage: its name, what it is, and how to make ready what is run."""
    names = {stem_of(name): name for name in dumped.rows}
    for file in dumped.files:
        stem = file.stem.split("_", 1)[1]
        yield names.get(stem, stem), file.name, functools.partial(_load, file, "")
    last = dumped.files[-1]
    for step in LOWERINGS[1 : 1 + LOWERINGS.index(lower)]:
        yield step, f"{last.name} by {step}", functools.partial(_load, last, step)
    recorded = dumped.folder / "outputs.pt"
    if lower == dumped.lower and recorded.exists():  # the run as it was ends where its lowering does
        yield RUN, f"its first call, {recorded.name}", functools.partial(_recorded, recorded)


def _recorded(file: Path) -> _Run:
    try:
        results = list(torch.load(file, weights_only=True))
    except Exception as error:  # torch.load raises whatever it stumbles on
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{str(file)!r} can't be read ({type(error).__name__}: {reason}): dump again, or take the file away"
        ) from error
    if not any(isinstance(item, torch.Tensor) for item in results):
        raise InputError(f"{str(file)!r} holds no tensor, so that nothing can be compared: dump again")
    return lambda _: (results, None)


def _load(file: Path, step: str) -> _Run:
    """Make a file's graph ready to run, lowered by ``step`` if given."""
    loaded = load(file)
    inputs = list(loaded.example_inputs())
    module = loaded.build()
    run = lowering.LOWERINGS[step](fix_numbers(read_graph(loaded), inputs), inputs) if step else module
    return functools.partial(_run_twice, loaded, module, run, inputs)


def _run_twice(
    loaded: types.ModuleType, module: torch.nn.Module, run: Callable[..., Any], inputs: list[Any], num_outputs: int
) -> tuple[list[Any], _Second | None]:
    """Run a graph, and once more with the state that it gave, if it gave any."""
    torch.manual_seed(0)
    results = list(run(*inputs))
    names = list(inspect.signature(module.forward).parameters)
    num_states = len(list(itertools.takewhile(lambda name: name.startswith("state_"), reversed(names))))
    added = results[num_outputs:]  # the next state, then the decision
    if not num_states or not num_outputs or len(added) <= num_states:
        return results, None
    again = list(loaded.example_inputs())  # a graph may have written into its inputs
    again[-num_states:] = added[:num_states]
    torch.manual_seed(0)
    second = list(run(*again))
    return results, _Second(results=second, reuses=bool(second[num_outputs + num_states][0]))


def _reusing(dumped: Dumped) -> str:
    """The pass that lets a step reuse another; empty where no row of the journal is one."""
    rows = dumped.rows.items()
    found = [name for name, row in rows if row["matched"] and not row["is_exact"] and not row["tolerance"]]
    return found[-1] if found else ""


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


def _fault(figures: Sequence[Figure], tolerance: float, previous: str) -> _Fault | None:
    """The first output that is wrong, and how; ``previous`` is empty for the captured graph."""
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


def _lacking(before: Sequence[Any], now: Sequence[Any]) -> str:
    few = f"gives {len(now)} outputs where the captured graph gives {len(before)}"
    return few if len(now) != len(before) else ""


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
