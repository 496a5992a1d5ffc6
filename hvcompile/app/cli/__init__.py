"""The command line, a file a command; ``app`` runs it, and where typer is missing says how to install it."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from hvcompile.app import extras


def _app() -> Any:
    try:
        message = extras.missing("hvcompile", "cli", modules=("typer", "rich"))
        if message is None:
            from hvcompile.app.cli.main import app as typer_app

            return typer_app
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        raise SystemExit(130) from None

    def say_what_is_missing(*_: object, **__: object) -> NoReturn:
        sys.stderr.write(f"error: {message}\n")
        raise SystemExit(2)

    return say_what_is_missing


app = _app()
"""A ``typer.Typer``, which the installed command calls."""
