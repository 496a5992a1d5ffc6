"""``hvcompile bench``."""

from __future__ import annotations

import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from hvcompile import outputs
from hvcompile.app import extras, quiet, tables
from hvcompile.app.bench.contenders import PEERS
from hvcompile.app.cli.console import err, leaving, out
from hvcompile.app.cli.signature import taking
from hvcompile.app.request.bench import Request

if TYPE_CHECKING:
    from hvcompile.app.bench.results import Result


@taking(Request)
def bench(request: Request) -> None:
    """Measure hvfast beside eager, torch.compile and other caches, compiled as far as they compile.

    All are given the same weights, latents, prompt, threshold and schedule; each runs in a process of its own, and
    only one at a time. A peer that is missing (it comes with the extra "bench") or fails is a row that says so.

    Leaves with 1 where eager, torch.compile or hvfast itself failed.
    """
    with leaving():
        extras.require("hvcompile bench", "cli", "diffusers")
        result = _measure(request)
        _write(request, result)
    out.print(Text(result.title()), soft_wrap=True)
    for table in tables.bench_tables(result):
        out.print(table)
    for path in (request.json_file, request.plot_file):
        if path is not None and path.exists():
            out.print(Text(f"written to {path}"), soft_wrap=True)
    if result.conditions.get("interrupted"):
        err.print("interrupted: the figures are of what was measured until then")
        raise typer.Exit(130)
    if any((row.error or row.cases_error) and row.system not in PEERS for row in result.rows):
        raise typer.Exit(1)


def _measure(request: Request) -> Result:
    with quiet.importing("diffusers", "transformers"):
        from hvcompile.app.bench import run

    quiet.hide_progress_bars()
    with err.status("") as status:

        def show(doing: str) -> None:
            if err.is_terminal:
                status.update(Text(doing))
            else:
                err.print(Text(doing), soft_wrap=True)

        terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)  # then, too, what is there is kept
        try:
            return run.bench(request, show)
        finally:
            signal.signal(signal.SIGTERM, terminate)


def _write(request: Request, result: Result) -> None:
    """Write the files that the request asks for."""
    from hvcompile.app.bench import results

    if request.json_file is not None:
        outputs.write_json({"command": _command(), **result.record()}, request.json_file)
    if request.plot_file is not None:
        try:
            results.plot(result, request.plot_file)
        except ImportError as error:
            if error.name != "matplotlib":
                raise
            err.print(Text("no plot, for matplotlib is missing: pip install 'hvcompile[bench]'"), soft_wrap=True)


def _command() -> str:
    """What the user typed, in the words of the installed command."""
    name = Path(sys.argv[0]).name
    return shlex.join(["hvcompile" if name == "__main__.py" else name, *sys.argv[1:]])
