"""``hvcompile bisect``."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.status import Status
from rich.text import Text

from hvcompile import outputs
from hvcompile.app import extras, quiet, tables
from hvcompile.app.cli.console import err, leaving_in_turn, let_first_rank_speak, out
from hvcompile.app.request.parameters import JsonFile, RankTimeout
from hvcompile.errors import InputError
from hvcompile.ranks import launch

if TYPE_CHECKING:
    from hvcompile.dump.bisect import Bisection


def bisect(
    directory: Annotated[
        Path,
        typer.Argument(
            help="What HVCOMPILE_DUMP named (the latest run counts), or a run_... or graph_... folder in it."
        ),
    ],
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Relative difference that is no fault (default: by dtype; 1e-4 in float32, 3e-2 in bfloat16)."
        ),
    ] = None,
    lower: Annotated[
        str | None, typer.Option(help="eager, aot or inductor: how far to go (default: as far as the dumped run).")
    ] = None,
    json_file: JsonFile = None,
    rank_timeout: RankTimeout = launch.TIMEOUT_SECONDS,
) -> None:
    """Find the first pass or lowering of a dump after which outputs differ, or a NaN appears.

    The dump of several ranks is looked at by as many, under torchrun: torchrun --nproc-per-node=N -m hvcompile bisect.

    Leaves with 1 where a fault is found, with 0 where none is.
    """
    let_first_rank_speak()
    with leaving_in_turn():
        extras.require("hvcompile bisect", "cli")
        if not 0 < rank_timeout < math.inf:
            raise InputError(f"rank-timeout is {rank_timeout:g}; allowed is a finite number of seconds, above 0")
        if json_file is not None:
            outputs.check(json_file, name="json", kind="JSON file", suffixes=(".json",))
        bisections = _bisect_all(directory, tolerance, lower, json_file, rank_timeout)
    if any(bisection.finding for bisection in bisections):
        raise typer.Exit(1)


def _bisect_all(
    directory: Path, tolerance: float | None, lower: str | None, json_file: Path | None, rank_timeout: float
) -> list[Bisection]:
    """Bisect every graph of a dump, in step with the other ranks, and print each as it is done."""
    with quiet.importing():
        from hvcompile.dump import bisect, runs
        from hvcompile.dump import read as dump_read
        from hvcompile.ranks.store import Exchange

    directory = dump_read.of_rank(directory, launch.rank(), launch.num_ranks())
    bisections = []
    with launch.joined(launch.own_device(dump_read.device(directory)), rank_timeout):
        exchange = Exchange(rank_timeout)
        if run := runs.describe(directory):
            out.print(Text(f"looking at {run}"), soft_wrap=True)
        for folder in bisect.folders_of_all(directory, exchange):
            with err.status(folder.name) as status:
                show = functools.partial(_show, status, folder.name)
                bisection = bisect.bisect(folder, tolerance=tolerance, lower=lower, observe=show, exchange=exchange)
            bisections.append(bisection)
            _print(bisection)
        if json_file is not None and launch.rank() == 0:
            bisect.write_json(bisections, json_file)
        exchange.finish()  # torchrun ends all when the first leaves with 1
    return bisections


def _show(status: Status, name: str, what: str) -> None:
    status.update(Text(f"{name}: {what}"))


def _print(bisection: Bisection) -> None:
    out.print(tables.bisection_table(bisection))
    for note in bisection.notes:
        out.print(Text(f"note: {note}"), soft_wrap=True)
    out.print(Text(bisection.verdict()), soft_wrap=True)
