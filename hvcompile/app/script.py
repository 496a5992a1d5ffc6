"""Runs a user's script up to the first call of a model that it compiles with hvfast."""

from __future__ import annotations

import collections
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from hvcompile import backend
from hvcompile.app import pipelines
from hvcompile.errors import InputError


class ScriptSeenError(BaseException):
    """Ends a script once its model is seen; no Exception, so that neither Dynamo nor the script holds it up."""


def run_up_to(path: str, arguments: Sequence[str], handler: backend.Handler) -> None:
    """Run a script, and hand what Dynamo captures for hvfast to ``handler``, which may end it by ``ScriptSeenError``.

    What was compiled in this process before is compiled anew when it is called again.

    Args:
        path: of the script.
        arguments: its own.
        handler: takes a captured graph, its inputs and the options, and gives what is to run.

    Raises:
        InputError: the script fails before that.

    """
    before, paths = sys.argv, sys.path
    try:
        sys.argv = [path, *arguments]
        sys.path = [str(Path(path).resolve().parent), *paths]  # as python itself has it
        with backend.instead_of_compiling(handler):
            runpy.run_path(path, run_name="__main__")
    except (ScriptSeenError, SystemExit):
        pass  # a script may end as it likes
    except Exception as error:  # whatever the script raises; the cause stays attached
        raise InputError(
            f"script {path!r} fails before it calls a model compiled with hvfast: {pipelines.first_line(error)}; "
            "run it by itself first"
        ) from error
    finally:
        sys.argv, sys.path = before, paths


def nothing_seen(path: str, reasons: list[str]) -> InputError:
    """The error of a script that ended, from the reasons why graphs that it compiled would be left as they are."""
    if not reasons:
        return InputError(
            f"script {path!r} ended and called no model compiled with hvfast: compile one with "
            'backend="hvfast" and call it'
        )
    counts = collections.Counter(reasons)
    summary = "; ".join(reason if number == 1 else f"{reason} ({number} graphs)" for reason, number in counts.items())
    return InputError(
        f"script {path!r} ended, and of the {len(reasons)} graphs that hvfast was given it would have rewritten none: "
        f"{summary}"
    )
