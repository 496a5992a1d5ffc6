"""``hvcompile warm``."""

from __future__ import annotations

from rich.text import Text

from hvcompile.app import extras, quiet, store, tables
from hvcompile.app.cli.console import err, leaving, out
from hvcompile.app.cli.display import Display
from hvcompile.app.cli.signature import taking
from hvcompile.app.request.warm import Request


@taking(Request)
def warm(request: Request) -> None:
    """Compile MODEL ahead at some sizes, so that the first step of generate needs no compiling.

    Without --output it fills the store that generate uses. With it, artifacts are written that
    hvcompile.load_artifacts puts into place on another machine with the same torch, device and options. Artifacts are
    code: load only your own.
    """
    store.use_own()
    with leaving():
        extras.require("hvcompile warm", "cli", "diffusers")
        with quiet.importing("diffusers", "transformers"):
            from hvcompile.app import warm

        request.check()
        quiet.hide_progress_bars()
        with Display() as display:
            made = warm.warm(request, display)
    for name in made.missed:
        err.print(Text(f"note: no step has reached {name}, which is not compiled: give more steps"), soft_wrap=True)
    for table in tables.warm_tables(made):
        out.print(table)
