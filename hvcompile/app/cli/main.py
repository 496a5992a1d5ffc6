"""The commands together, and what ``hvcompile`` does without one."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated

import typer

from hvcompile.app.cli.bench import bench
from hvcompile.app.cli.bisect import bisect
from hvcompile.app.cli.compare import compare
from hvcompile.app.cli.console import out
from hvcompile.app.cli.explain import explain
from hvcompile.app.cli.generate import generate
from hvcompile.app.cli.lower import lower

app = typer.Typer(name="hvcompile", no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


def _version(wanted: bool) -> None:
    if wanted:
        try:
            number = importlib.metadata.version("hvcompile")
        except importlib.metadata.PackageNotFoundError:
            number = "(run from its source, not installed)"
        out.print(f"hvcompile {number}", markup=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Fast video diffusion: the torch.compile backend hvfast, at the command line."""


for command in (generate, compare, explain, lower, bisect, bench):  # the order of the help
    app.command()(command)
