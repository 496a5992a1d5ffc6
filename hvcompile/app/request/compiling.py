"""How a command has a model compiled: the backend's options and mode, from its parameters."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hvcompile.app.request.assignments import assignments, merged, nested
from hvcompile.app.request.parameters import COMPILING, EACH, Mode
from hvcompile.inputs import read_options


@dataclass(frozen=True, kw_only=True)
class Compiling:
    """How models are compiled; None leaves a choice to the backend.

    The fields are parameters of the command. ``fp8`` is True to ask for it, on a CPU too.
    """

    fp8: Annotated[
        bool | None,
        typer.Option(
            "--fp8/--no-fp8",
            help="Linear layers in float8, or not (default: where GPUs gain from it).",
            rich_help_panel=COMPILING,
        ),
    ] = None
    mode: Mode = None
    backend_settings: Annotated[
        tuple[str, ...],
        typer.Option(
            "--option",
            help="Any option of hvfast: --option first_block_cache.threshold=0.1. Repeats.",
            rich_help_panel=COMPILING,
        ),
        EACH,
    ] = ()
    options_file: Annotated[
        Path | None,
        typer.Option(
            "--options", help="A JSON file of options, as torch.compile takes them.", rich_help_panel=COMPILING
        ),
    ] = None
    dynamic: Annotated[
        bool,
        typer.Option(
            "--dynamic",
            help="One graph for all sizes, rather than a compilation for each.",
            rich_help_panel=COMPILING,
        ),
    ] = False

    @functools.cached_property
    def _in_file(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the file of options holds, read once: it may go while the run lasts."""
        return read_options(self.options_file) if self.options_file is not None else ({}, {})

    @property
    def options_in_file(self) -> dict[str, Any]:
        """Options of the backend that a file gives."""
        return self._in_file[0]

    @property
    def made_for(self) -> dict[str, Any]:
        """What that file says that its options were made for."""
        return self._in_file[1]

    def own_options(self) -> dict[str, Any]:
        """Options of the backend that parameters of their own give."""
        own: dict[str, Any] = {}
        if self.fp8 is not None:
            own["fp8"] = self.fp8
        return own

    def backend_options(self) -> dict[str, Any]:
        """Options of the backend; raises InputError where two parameters set the same."""
        given = nested(assignments(self.backend_settings, "--option", "first_block_cache.threshold=0.1"), "--option")
        return merged("--option", self.options_in_file, self.own_options(), given)

    def compile_arguments(self) -> dict[str, Any]:
        """Give the keyword arguments of ``Module.compile`` besides the backend."""
        return self.as_arguments(self.backend_options())

    def as_arguments(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the backend as keyword arguments of ``Module.compile``, beside the mode."""
        arguments: dict[str, Any] = {"dynamic": True} if self.dynamic else {}
        if options:  # torch.compile takes a mode or options, never both
            return arguments | {"options": {**options, **({"mode": self.mode} if self.mode is not None else {})}}
        return arguments | ({"mode": self.mode} if self.mode is not None else {})
