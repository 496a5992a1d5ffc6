"""``hvcompile doctor``."""

from __future__ import annotations

import typer
from rich.text import Text

from hvcompile.app import doctor as examination
from hvcompile.app import tables
from hvcompile.app.cli.console import leaving, out
from hvcompile.app.cli.signature import taking
from hvcompile.app.request.doctor import Request


@taking(Request)
def doctor(request: Request) -> None:
    """Look at what is here of what compiling needs: torch, devices, compilers, kernels, caches and extras.

    Compiles nothing. Leaves with 0 where all is there that compiling needs, with 1 where something is missing.
    """
    with leaving():
        findings = examination.examine_request(request)
    out.print(tables.diagnosis_table(findings))
    if not examination.can_compile(findings):
        out.print(Text("something is missing that compiling needs"))
        raise typer.Exit(1)
    out.print(Text("everything that compiling needs is here"))
