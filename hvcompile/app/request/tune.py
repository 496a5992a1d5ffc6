"""What ``hvcompile tune`` is asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hvcompile import outputs
from hvcompile.app.request.assignments import merged
from hvcompile.app.request.clips import Clips, spelled
from hvcompile.app.request.jobs import Job, jobs
from hvcompile.app.request.parameters import JsonFile
from hvcompile.errors import InputError

SECTION, RANKS = "first_block_cache", "context_parallel"
SOUGHT = ("threshold", "forecast", "decide_by", "front_blocks")
"""Fields of the cache that are looked for, and can't be given."""


@dataclass(frozen=True, kw_only=True)
class Request(Clips):
    """What to tune, and for what. The fields are the parameters of the command."""

    psnr: Annotated[
        float | None, typer.Option(help="Goal: this many decibels against plain torch.compile, in the mean.")
    ] = None
    worst_psnr: Annotated[float | None, typer.Option(help="Goal: this many decibels in each clip.")] = None
    speedup: Annotated[
        float | None, typer.Option(help="Goal: denoising this many times as fast as by plain torch.compile.")
    ] = None
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The options that meet the goal (.json), for generate --options.")
    ] = Path("tuned.json")
    store: Annotated[
        Path | None,
        typer.Option(help="Directory of what was measured, to go on with (default: beside the output)."),
    ] = None
    json_file: JsonFile = None
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw the curves (.png).")] = None

    def check(self) -> None:
        """Raise InputError, or OptionError, for all that is wrong whatever the model; loads nothing."""
        for name in ("psnr", "worst_psnr", "speedup"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{spelled(name)} is {value}: give a finite number above 0")
        if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            raise InputError("tune has nothing to tune where TORCHDYNAMO_DISABLE=1 switches compiling off")
        super().check()
        if self.mode == "exact":
            raise InputError("mode 'exact' switches the cache off, which tune is for: give another, or leave it out")
        given = self.backend_options().get(SECTION, {})
        if not isinstance(given, Mapping) or given.keys() & set(SOUGHT):
            name = SECTION if not isinstance(given, Mapping) else f"{SECTION}.{min(given.keys() & set(SOUGHT))}"
            raise InputError(f"{name} is given, which tune looks for: leave it out")
        self._check_files()
        _ = self.jobs()  # reads prompts and seeds

    def _check_files(self) -> None:
        outputs.check(self.output, name="output", kind="JSON file", suffixes=(".json",))
        for name, path, kind, suffix in (
            ("json", self.json_file, "JSON file", ".json"),
            ("plot", self.plot_file, "PNG picture", ".png"),
        ):
            if path is not None:
                outputs.check(path, name=name, kind=kind, suffixes=(suffix,))
        self.check_apart([("output", self.output), ("json", self.json_file), ("plot", self.plot_file)])

    @property
    def directory(self) -> Path:
        """Where what was measured is kept."""
        return self.store or self.output.with_name(f"{self.output.stem}.store")

    def jobs(self) -> tuple[Job, ...]:
        """Every prompt with every seed; nothing is written at their outputs."""
        return jobs(self.prompts, self.all_seeds(), Path("clip.mp4"))

    def options_with(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """Options of the backend, with fields of the cache beside those given, as they serve on any number of ranks."""
        options: dict[str, Any] = dict(self.compile_arguments_with(section)["options"])
        if ours := self.own_options().get(RANKS):  # a --rank-timeout of this run
            given = {name: setting for name, setting in options.pop(RANKS).items() if name not in ours}
            options |= {RANKS: given} if given else {}
        return options

    def compile_arguments_with(self, section: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of ``Module.compile`` besides the backend, with fields of the cache beside those given."""
        return self.as_arguments(merged("--option", self.backend_options(), {SECTION: section}))
