"""Families in every way, compiled for GPUs that are not there: what compiles, and what it does.

``python benchmarks/lowered_census.py`` takes models as wide as they are published and two or three blocks deep through
hvfast, Inductor, Triton and ptxas. HunyuanVideo goes through every way, every family through the common ones and a
third of the others, each for one of three architectures; so every way and every family meets each architecture.
``--whole`` compiles every family in every way for all three, which takes most of a day. Nothing is computed. A case
that fails is a row that says why. Rows are kept as they come, so that what was broken off goes on where it was.
``--case NAME`` prints one.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from lowered_models import FAMILIES, model_and_inputs
from rich.console import Console
from tables_of_rows import Row, read, write

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "docs" / "measurements" / "lowered_census.json"

err = Console(stderr=True, highlight=False)

GPUS = {"h100": "sm_90", "b200": "sm_100", "l40s": "sm_89"}
"""One GPU of each architecture with float8."""
FIRST = "HunyuanVideo"
"""The family that is compiled in every way."""
COMMON = ("exact", "default")
"""The ways in which every family is compiled, and the first family for every architecture."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """How a model is compiled.

    Attributes:
        name: as it stands in the table.
        mode: as for ``torch.compile``.
        options: as for ``torch.compile``.
        ranks: how many share the call.
        samples: in the call.
        dynamic: whether sizes may change from call to call.

    """

    name: str
    mode: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ranks: int = 1
    samples: int = 1
    dynamic: bool = False


_OFF = {"first_block_cache": False, "fp8": False}
_ALL = {"keep_last_blocks": 0}
WAYS = (
    Way(name="exact", mode="exact"),
    Way(name="cache", options={"fp8": False}),
    Way(name="forecast", options={"fp8": False, "first_block_cache": {"forecast": 2}}),
    Way(name="float8 by row", options={"first_block_cache": False, "fp8": _ALL}),
    Way(name="float8 by tensor", options={"first_block_cache": False, "fp8": {**_ALL, "granularity": "tensor"}}),
    Way(name="float8 attention", options={**_OFF, "attention": {"fp8": True}}),
    Way(name="default", options={"fp8": _ALL}),
    Way(name="max", options={"mode": "max", "fp8": _ALL}),
    Way(name="cuDNN", options={**_OFF, "attention": {"kernel": "cudnn"}}),
    Way(name="flash", options={**_OFF, "attention": {"kernel": "flash"}}),
    Way(name="Ulysses, 2 ranks", options={"fp8": _ALL, "context_parallel": {"ulysses": 2}}, ranks=2),
    Way(name="ring, 2 ranks", options={"fp8": _ALL, "context_parallel": {"ring": 2}}, ranks=2),
    Way(name="2 x 2 of 4 ranks", options={"fp8": _ALL, "context_parallel": {"ulysses": 2, "ring": 2}}, ranks=4),
    Way(
        name="guidance halves, 2 x 2 of 8 ranks",
        options={"fp8": _ALL, "context_parallel": {"cfg": 2, "ulysses": 2, "ring": 2}},
        ranks=8,
        samples=2,
    ),
    Way(name="two samples", samples=2, options={"fp8": _ALL}),
    Way(name="dynamic shapes", dynamic=True, options={"fp8": _ALL}),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A family, a way to compile it, and for what."""

    family: str
    way: Way
    gpu: str

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f"{self.family}; {self.way.name}; {GPUS[self.gpu]}"

    def row(self, **found: Any) -> Row:
        """A row of the table, with what was found."""
        return {"name": self.name, "family": self.family, "way": self.way.name, "gpu": GPUS[self.gpu], **found}


def cases(*, is_whole: bool) -> Iterator[Case]:
    """The cases in the order in which they run: those of a family and an architecture share kernels.

    Of the square of families and ways, the first family and the common ways are compiled in full, and of the rest a
    third, each case for one architecture. They are laid out so that each family meets each architecture, and each way
    does.
    """
    for (column, family), (place, gpu) in itertools.product(enumerate(FAMILIES), enumerate(GPUS)):
        for row, way in enumerate(WAYS):
            is_common, is_here = way.name in COMMON, (row + column + column // 3) % 3 == place
            is_first, is_third = family == FIRST, (row // 3 + column) % 3 == 0
            if is_whole or (is_here and (is_first or is_common or is_third)) or (is_first and is_common):
                yield Case(family=family, way=way, gpu=gpu)


def measured(case: Case) -> Row:
    """The row of one case."""
    import hvcompile
    from hvcompile.lowered import walk

    model, inputs = model_and_inputs(case.family, case.way.samples)
    try:
        lowered = hvcompile.lower(
            model,
            **inputs,
            mode=case.way.mode,
            options=case.way.options,
            ranks=case.way.ranks,
            device=case.gpu,
            dynamic=case.way.dynamic,
        )
    except hvcompile.RequestedPassError as error:
        return case.row(refused=" ".join(str(error).split()))
    kinds = (walk.TRITON, walk.LIBRARY, walk.COPY, walk.SYNC, walk.COLLECTIVE)
    return {
        **case.row(),
        "passes": [item.name for item in lowered.journal if item.report.applied],
        "declined": {
            item.name: item.report.declined[0][1]
            for item in lowered.journal
            if not item.report.applied and item.report.declined
        },
        "kernels": len(lowered.kernels),
        "failures": [list(item) for item in lowered.failures],
        "spilling": [f"{kernel.name}, {kernel.spill_bytes} bytes" for kernel in lowered.spilling],
        "measured": list(lowered.measured),
        "computed": {kind: lowered.computed.count(kind) for kind in kinds},
        "reused": None if lowered.reused is None else {kind: lowered.reused.count(kind) for kind in kinds},
        "at once": [name for name, launches in lowered.computed.overlaps() if launches == 0],
        "bytes": lowered.computed.num_bytes,
        "peak bytes": lowered.computed.peak_bytes,
        "seconds": round(lowered.seconds, 1),
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as a page."""
    compiled = [row for row in rows if "computed" in row]
    kernels = sum(row["kernels"] for row in compiled)
    lines = [
        "# Families and ways, compiled for GPUs that were not there",
        "",
        "Models as wide as they are published and two or three blocks deep, in bfloat16. Written by "
        "`python benchmarks/lowered_census.py`. Nothing was computed.",
        "",
        f"{len(rows)} cases: {len(compiled)} compiled, {sum('refused' in row for row in rows)} refused with a reason, "
        f"{sum('error' in row for row in rows)} failed. Of {kernels} Triton kernels, "
        f"{sum(len(row['failures']) for row in compiled)} did not compile and "
        f"{sum(len(row['spilling']) for row in compiled)} spill.",
        "",
        "It is a part of all combinations: HunyuanVideo goes through every way, every family through exact and "
        "default, every family and every way meet each architecture, and a third of the rest is covered. `--whole` "
        "compiles all.",
        "",
        *_spills(compiled),
        "Figures are those of a computed step, and in brackets of one that reuses.",
        "",
        "| family | way | GPU | passes | Triton kernels | library calls | copies | synchronisations "
        "| collectives (waited for at once) | kernels compiled, failed, spilling |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        head = [row["family"], row["way"], row["gpu"]]
        if "computed" not in row:
            told = row.get("error") or f"refused: {row['refused']}"
            lines.append(f"| {' | '.join([*head, told.replace('|', '/')])} | | | | | | |")
            continue
        counts = [str(number) for number in row["computed"].values()]
        if row["reused"]:
            counts = [f"{one} ({other})" for one, other in zip(counts, row["reused"].values(), strict=True)]
        counts[4] = f"{row['computed']['collective']} ({len(row['at once'])})"
        passes = ", ".join(name for name in row["passes"] if name != "outline")
        made = f"{row['kernels']}, {len(row['failures'])}, {len(row['spilling'])}"
        lines.append(f"| {' | '.join([*head, passes or 'none', *counts, made])} |")
    return "\n".join([*lines, ""])


def _spills(rows: Sequence[Row]) -> list[str]:
    """A list of the kernels that spill: what they compute, in which families, and how many bytes a thread writes."""
    found: dict[str, list[tuple[str, int]]] = {}
    for row in rows:
        for told in row["spilling"]:
            name, spilled = told.removesuffix(" bytes").rsplit(", ", 1)
            place = f"{row['family']}, {row['gpu']}"
            found.setdefault(re.sub(r"_\d+$", "", name), []).append((place, int(spilled)))
    if not found:
        return []
    lines = [
        f"- `{name}`: {min(spilled for _, spilled in items)} to {max(spilled for _, spilled in items)} bytes a thread "
        f"({'; '.join(dict.fromkeys(place for place, _ in items))})."
        for name, items in found.items()
    ]
    return ["Kernels that spill:", "", *lines, ""]


def main(
    case: Annotated[str | None, typer.Option(help="Run this case alone, and print its row as JSON.")] = None,
    only: Annotated[str, typer.Option(help="Cases whose names hold this.")] = "",
    whole: Annotated[bool, typer.Option("--whole", help="Every family for every architecture.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure all again.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds a case.")] = 600.0,
    output: Annotated[Path, typer.Option(help="The rows (.json); a table (.md) goes beside it.")] = OUTPUT,
) -> None:
    """Compile every case, and write the table."""
    known = {item.name: item for item in cases(is_whole=True)}
    if case is not None:
        if case not in known:
            raise typer.BadParameter(f"--case {case!r} is none of {'; '.join(known)}")
        sys.stdout.write(json.dumps(measured(known[case])) + "\n")
        return
    rows, worker = {} if fresh else read(output), Worker()
    for item in cases(is_whole=whole):
        if only not in item.name or (item.name in rows and "error" not in rows[item.name]):
            continue
        rows[item.name] = worker.row(item, timeout)
        err.print(f"{item.name}: {_in_short(rows[item.name])}", soft_wrap=True, markup=False)
        write(output, [rows[name] for name in known if name in rows], 0.0, table)


def _in_short(row: Row) -> str:
    if "computed" not in row:
        return str(row.get("error") or f"refused: {row['refused']}")
    return f"{row['seconds']} s, {len(row['failures'])} failed, {len(row['spilling'])} spill"


class Worker:
    """A process that compiles cases, and one in its place after some of them, or where it died."""

    def __init__(self) -> None:
        self._make = functools.partial(
            concurrent.futures.ProcessPoolExecutor,
            max_workers=1,
            mp_context=multiprocessing.get_context("spawn"),
            max_tasks_per_child=24,
        )
        self._pool = self._make()

    def row(self, case: Case, timeout: float) -> Row:
        """The row of a case; of one that failed what was raised."""
        try:
            return self._pool.submit(measured, case).result(timeout)
        except Exception as error:
            if isinstance(error, (TimeoutError, concurrent.futures.BrokenExecutor)):
                for process in self._pool._processes.values():  # a public way to end a worker comes with Python 3.14
                    process.kill()
                self._pool.shutdown()
                self._pool = self._make()
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
            return case.row(error=f"not done after {timeout:.0f} s" if isinstance(error, TimeoutError) else told)


if __name__ == "__main__":
    typer.run(main)
