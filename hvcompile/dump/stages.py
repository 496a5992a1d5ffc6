"""The stages of a dump, in order, and how to run each: the dumped graphs, the last one lowered, and the run itself."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from hvcompile.dump.read import LOWERINGS, Dumped
from hvcompile.dump.source_reader import fix_numbers, load, read_graph
from hvcompile.dump.write import stem_of
from hvcompile.errors import InputError, one_line
from hvcompile.torch_private import lowering

CAPTURED, OUTLINED, SEALED, RUN = "captured", "outlined", "sealed", "run"
"""The stages that are no pass and no lowering."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Second:
    """What a second call returns, and whether it reused the first."""

    results: Sequence[Any]
    reuses: bool


Run = Callable[[int], tuple[list[Any], Second | None]]
"""Takes the number of the captured graph's outputs; returns what a first and, where there is one, a second call do."""

Prepare = Callable[[], Run]
"""Makes a stage ready to run; may raise anything."""


def stages_of(dumped: Dumped, lower: str) -> Iterator[tuple[str, str, Prepare]]:
    """Each stage of a dump: its name, what it is, and how to make it ready.

    Args:
        dumped: the dump of one graph.
        lower: "eager", "aot" or "inductor": how far to go.

    """
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


def _recorded(file: Path) -> Run:
    """The outputs of the run itself, as its dump has them."""
    try:
        results = list(torch.load(file, weights_only=True))
    except Exception as error:  # torch.load raises whatever it stumbles on
        reason = one_line(error)[:300]
        raise InputError(
            f"{str(file)!r} can't be read ({type(error).__name__}: {reason}): dump again, or take the file away"
        ) from error
    if not any(isinstance(item, torch.Tensor) for item in results):
        raise InputError(f"{str(file)!r} holds no tensor, so that nothing can be compared: dump again")
    return lambda _: (results, None)


def _load(file: Path, step: str) -> Run:
    """Make a file's graph ready to run, lowered by ``step`` if given."""
    loaded = load(file)
    inputs = list(loaded.example_inputs())
    module = loaded.build()
    run = lowering.LOWERINGS[step](fix_numbers(read_graph(loaded), inputs), inputs) if step else module
    return functools.partial(_run_twice, loaded, module, run, inputs)


def _run_twice(
    loaded: types.ModuleType, module: torch.nn.Module, run: Callable[..., Any], inputs: list[Any], num_outputs: int
) -> tuple[list[Any], Second | None]:
    """Run a graph, and once more with the state that it returned, if it returned any."""
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
    return results, Second(results=second, reuses=bool(second[num_outputs + num_states][0]))
