"""What ``hvcompile bench`` is asked for, and the protocol that follows from it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hvcompile import outputs
from hvcompile.app.bench import contenders
from hvcompile.app.bench.process import Protocol, Shape
from hvcompile.app.grid import Grid
from hvcompile.app.request.parameters import Device, Dtype, JsonFile
from hvcompile.errors import InputError

KEYS = {
    "eager": contenders.EAGER,
    "inductor": contenders.INDUCTOR,
    "diffusers": contenders.DIFFUSERS,
    "cache-dit": contenders.CACHE_DIT,
    "exact": contenders.EXACT,
    "hvfast": contenders.HVFAST,
}
"""Contenders as the command line names them, in the order of the table."""

GRID = Grid(spatial=16, temporal=4)
"""Of HunyuanVideo's VAE and patches: a token is 16x16 pixels of 4 frames."""
SMALL = {"frames": 9, "height": 96, "width": 96, "steps": 20, "dual": 2, "single": 4, "hidden": 128}
FULL = {"frames": 129, "height": 720, "width": 1280, "steps": 30}
HEAD_DIM = 16
"""Of the tiny transformer."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure; None leaves a choice to ``full`` and the device.

    The fields are the parameters of the command. ``contenders`` holds keys of ``KEYS``. A process that is ended after
    its turn (``restart``) starts again over its own compile cache: one more run a turn, which warms it up.
    """

    model: Annotated[
        str | None,
        typer.Argument(help="Directory or hub id of a HunyuanVideo pipeline (default: a tiny one, random weights)."),
    ] = None
    blocks: Annotated[
        str | None, typer.Option(help="Dual-stream and single-stream blocks of the random model, such as 20+40.")
    ] = None
    hidden: Annotated[int | None, typer.Option(help="Width of the random model, a multiple of 16.")] = None
    tokens: Annotated[int | None, typer.Option(help="Size of the clip in video tokens, about.")] = None
    frames: Annotated[int | None, typer.Option(help="Or: length of the clip,")] = None
    height: Annotated[int | None, typer.Option(help="its height in pixels,")] = None
    width: Annotated[int | None, typer.Option(help="and its width in pixels.")] = None
    steps: Annotated[int | None, typer.Option(help="Denoising steps of a run.")] = None
    threshold: Annotated[float, typer.Option(help="Of every first-block cache.")] = 0.06
    repeats: Annotated[int, typer.Option(help="Rounds, in each of which every contender runs once.")] = 3
    contenders: Annotated[tuple[str, ...], typer.Option(help="Which, with commas between; eager always runs.")] = tuple(
        KEYS
    )
    seed: Annotated[int, typer.Option(help="Of the first latents and the prompt's embedding.")] = 0
    device: Device = None
    dtype: Dtype = None
    threads: Annotated[int | None, typer.Option(help="Of torch, on the CPU.")] = None
    lower: Annotated[str, typer.Option(help="inductor; aot or eager try the command out without compiling.")] = (
        "inductor"
    )
    full: Annotated[
        bool, typer.Option("--full", help="The full model at 1280x720, 129 frames, 30 steps, in bfloat16.")
    ] = False
    shapes: Annotated[
        bool | None,
        typer.Option("--shapes/--no-shapes", help="Count recompilations over other shapes too (default: not in full)."),
    ] = None
    restart: Annotated[
        bool | None,
        typer.Option("--restart/--resident", help="End a process after its turn, to free memory (default: in full)."),
    ] = None
    timeout: Annotated[
        float | None, typer.Option(help="Seconds for one answer of a contender (default: 1800; in full 21600).")
    ] = None
    json_file: JsonFile = None
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Draw it (.png).")] = None

    def check(self) -> None:
        """Raise InputError for all that is wrong, before anything is built."""
        self._check_run()
        self._check_model()
        self._check_clip()
        for name, path, kind in (("json", self.json_file, "JSON file"), ("plot", self.plot_file, "PNG picture")):
            if path is not None:
                outputs.check(path, name=name, kind=kind, suffixes=(".json",) if name == "json" else (".png",))

    def _check_run(self) -> None:
        from hvcompile.torch_private.lowering import LOWERINGS

        self._check_least(steps=2, repeats=1, threads=1, tokens=32)
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise InputError(f"threshold is {self.threshold}: give a finite number, 0 or more")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed}: give a number from 0 that fits in 63 bits")
        if self.timeout is not None and not self.timeout > 0:
            raise InputError(f"timeout is {self.timeout}: give seconds, more than 0")
        unknown = [key for key in self.contenders if key not in KEYS]
        if unknown or not self.contenders:
            names = ", ".join(map(repr, unknown)) or "nothing"
            raise InputError(f"contenders has {names}: give some of {','.join(KEYS)}")
        if self.lower not in LOWERINGS:
            raise InputError(f"lower is {self.lower!r}: give one of {', '.join(LOWERINGS)}")

    def _check_model(self) -> None:
        from hvcompile.app import pipelines

        device = pipelines.resolve_device(self.device)
        pipelines.resolve_dtype(self.dtype, device)
        if self.model is not None:
            for name in ("blocks", "hidden"):
                if (value := getattr(self, name)) is not None:
                    raise InputError(f"{name} is {value}, but a model with weights of its own is given: leave out one")
            pipelines.transformer_config(self.model)
        if self.blocks is not None:
            self._depth()
        if self.hidden is not None and (self.hidden < HEAD_DIM or self.hidden % HEAD_DIM):
            raise InputError(f"hidden is {self.hidden}: give a multiple of {HEAD_DIM}, the width of a head")
        if self.full and self.model is None and self.blocks is None and device.type == "cpu":
            raise InputError(
                "full, on the CPU, is a model of 12.8 billion parameters and days of computing: give device cuda, or "
                "blocks, frames, height and width to try the protocol out at a small size"
            )

    def _check_clip(self) -> None:
        if self.tokens is not None and any(size is not None for size in (self.frames, self.height, self.width)):
            raise InputError(
                f"tokens is {self.tokens}, and frames, height or width are given too: give one or the other"
            )
        GRID.check(height=self.height, width=self.width, frames=self.frames)
        self._check_least(frames=1, height=32, width=32)

    def _check_least(self, **least: int) -> None:
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InputError(f"{name} is {value}: give {smallest} or more")

    def _depth(self) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)\+(\d+)", (self.blocks or "").strip())
        if match is None or not int(match[1]) or not int(match[2]):
            raise InputError(f"blocks is {self.blocks!r}: give dual-stream and single-stream blocks, such as 20+40")
        return int(match[1]), int(match[2])

    def protocol(self) -> Protocol:
        """What all contenders are given."""
        from hvcompile.app import pipelines

        device = pipelines.resolve_device(self.device)
        dtype = pipelines.resolve_dtype(self.dtype, device)
        if self.full and self.dtype is None:
            dtype = pipelines.DTYPES["bfloat16"]
        sizes, config = self._sizes(), self._config()
        text_tokens, prompt_tokens = (10, 7) if config else (256, 40)
        return Protocol(
            model=self.model,
            config=config,
            shape=Shape(
                num_frames=sizes["frames"],
                height=sizes["height"],
                width=sizes["width"],
                text_tokens=text_tokens,
                prompt_tokens=prompt_tokens,
            ),
            steps=sizes["steps"],
            threshold=self.threshold,
            seed=self.seed,
            device=str(device),
            dtype=str(dtype).removeprefix("torch."),
            threads=self.threads,
            lower=self.lower,
        )

    def _sizes(self) -> dict[str, int]:
        """The clip, in frames and pixels, and the steps of a run."""
        sizes: dict[str, int] = {**SMALL, **(FULL if self.full else {})}
        if self.tokens is not None:
            side = 16 * max(2, round(math.sqrt(self.tokens / 8)))
            sizes |= {"frames": 29, "height": side, "width": side}
        requested = {name: getattr(self, name) for name in ("frames", "height", "width", "steps")}
        return sizes | {name: value for name, value in requested.items() if value is not None}

    def _config(self) -> dict[str, Any]:
        """The transformer's configuration; empty for that of ``model``, or for the full model's own."""
        from hvcompile.app import tiny

        is_full_model = self.full and self.blocks is None
        if self.model is not None or (is_full_model and self.hidden is None):
            return {}
        dual, single = self._depth() if self.blocks else (20, 40) if self.full else (SMALL["dual"], SMALL["single"])
        return tiny.transformer_config(dual, single, (self.hidden or SMALL["hidden"]) // HEAD_DIM)

    def systems(self) -> list[str]:
        """The contenders to run, by their names in ``bench.contenders``."""
        return [system for key, system in KEYS.items() if key in self.contenders or system == contenders.EAGER]

    @property
    def timeout_s(self) -> float:
        """The time limit of a request in seconds."""
        return self.timeout if self.timeout is not None else 6 * 3600.0 if self.full else 1800.0
