"""``hvcompile lower``."""

from __future__ import annotations

from hvcompile.app import extras, quiet, tables
from hvcompile.app.cli.console import leaving, out
from hvcompile.app.cli.signature import taking
from hvcompile.app.request.lower import Request


@taking(Request)
def lower(request: Request) -> None:
    """Compile MODEL for a GPU that is not there, and say what the code would do on it; runs nothing.

    Of a pipeline only the configuration is read, no weights. A script runs up to the first call of a model that it
    compiles with hvfast. Needs triton, and g++ where torch was built for CPUs.
    """
    with leaving():
        extras.require("hvcompile lower", "cli", "diffusers")
        with quiet.importing("diffusers", "transformers"):
            from hvcompile.app import lower

        quiet.hide_progress_bars()
        quiet.hide_cache_notice()
        results = lower.lower_request(request)
    for part in tables.lowering_tables(results):
        out.print(part)
