"""``hvcompile generate``."""

from __future__ import annotations

from hvcompile.app import extras, quiet, tables
from hvcompile.app.cli.console import leaving_in_turn, let_first_rank_speak, out
from hvcompile.app.cli.display import Display
from hvcompile.app.cli.signature import taking
from hvcompile.app.request.generate import Request


@taking(Request)
def generate(request: Request) -> None:
    """Make a video of PROMPT; what is not given is as the model likes it.

    Under torchrun all ranks share the work on one video, and the first one writes it.
    """
    let_first_rank_speak()
    with leaving_in_turn():
        extras.require("hvcompile generate", "cli", "diffusers")
        with quiet.importing("diffusers", "transformers"):
            from hvcompile.app import generate  # diffusers takes seconds to import; --help must not

        request.check()
        quiet.hide_progress_bars()
        with Display() as display:
            result = generate.generate(request, display)
    out.print(tables.summary(result))
