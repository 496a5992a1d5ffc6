"""``hvcompile explain``."""

from __future__ import annotations

from hvcompile.app import extras, quiet, tables
from hvcompile.app.cli.console import leaving, out
from hvcompile.app.cli.signature import taking
from hvcompile.app.request.explain import Request


@taking(Request)
def explain(request: Request) -> None:
    """Say what hvfast would do with MODEL, what it would not and why, and what a step costs; runs nothing.

    Of a pipeline only the configuration is read, no weights: a model of any size is explained on any machine. A script
    runs up to the first call of a model that it compiles with hvfast.
    """
    with leaving():
        extras.require("hvcompile explain", "cli", "diffusers")
        with quiet.importing("diffusers", "transformers"):
            from hvcompile.app import explain

        quiet.hide_progress_bars()
        explanation = explain.explain_request(request)
    for part in tables.explanation_tables(explanation, request.gpu, request.memory_gib):
        out.print(part)
