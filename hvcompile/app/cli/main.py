"""The commands together, and what ``hvcompile`` does without one."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Annotated, Any

import typer
import typer.core

from hvcompile.app.cli.console import in_one_line, out

COMMANDS = {
    "generate": "Make a video of PROMPT, or a picture; what is not given is as the model likes it.",
    "batch": "Make the videos of a file of prompts by several replicas side by side, on Ray.",
    "serve": "Serve MODEL over HTTP, as clients of OpenAI's videos know it, by several replicas on Ray.",
    "warm": "Compile MODEL ahead at some sizes, so that the first step of generate needs no compiling.",
    "compare": "Measure the video file CLIP against REFERENCE, each frame and its motion.",
    "explain": "Say what hvfast would do with MODEL, what it would not and why, and what a step costs; runs nothing.",
    "lower": "Compile MODEL for a GPU that is not there, and say what the code would do on it; runs nothing.",
    "bisect": "Find the first pass or lowering of a dump after which outputs differ, or a NaN appears.",
    "bench": "Measure hvfast beside eager, torch.compile and other caches, compiled as far as they compile.",
    "tune": "Find the cache's options that keep a fidelity or reach a speed, on clips of your own PROMPT or prompts.",
    "doctor": "Look at what is here of what compiling needs: torch, devices, compilers, kernels, caches and extras.",
}
"""The commands in the order of the help, each with the first sentence of its own; each has a file here."""


def load(name: str) -> Any:
    """Import a command, and make of it what typer runs."""
    function = getattr(importlib.import_module(f"hvcompile.app.cli.{name}"), name)
    alone = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
    alone.command(name)(function)
    return typer.main.get_command(alone)


class _Commands(typer.core.TyperGroup):
    """Imports a command when it is run, and not those beside it; an interrupt or a full disk ends it in one line."""

    def resolve_command(self, ctx: Any, args: Any) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, load(str(name)), rest

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with in_one_line():
            return super().invoke(ctx)


app = typer.Typer(
    name="hvcompile", cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False
)


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


def _stand_in() -> None:
    """Hold a command's place in the help until it is loaded."""


for name, sentence in COMMANDS.items():
    app.command(name, help=sentence)(_stand_in)
