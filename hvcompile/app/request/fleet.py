"""What ``batch`` and ``serve`` are told alike: a pipeline, how it is compiled, and how many replicas run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import typer

from hvcompile.app.request.ask import settled
from hvcompile.app.request.clips import Clips
from hvcompile.app.request.compiling import Compiling
from hvcompile.app.request.parameters import (
    Adapters,
    CallSettings,
    CompiledCode,
    CompileVae,
    Device,
    Dtype,
    Frames,
    Height,
    VaeTiling,
    Width,
)
from hvcompile.errors import InputError
from hvcompile.ranks import launch

FLEET = "Where it runs"
"""Where the help lists what is about replicas and ranks."""
MOST = 1024
"""Replicas, or ranks of each."""


@dataclass(frozen=True, kw_only=True)
class Fleet(Compiling):
    """Replicas of a pipeline, each on ranks of its own; None leaves a choice to the pipeline or the device.

    The fields are parameters of the commands.
    """

    replicas: Annotated[
        int, typer.Option(help="Copies of the pipeline; each makes one video at a time.", rich_help_panel=FLEET)
    ] = 1
    ranks: Annotated[
        int, typer.Option(help="Processes that share one video, a GPU each, on one machine.", rich_help_panel=FLEET)
    ] = 1
    cpus: Annotated[
        int, typer.Option(help="CPU cores of a rank, and threads that it computes with.", rich_help_panel=FLEET)
    ] = 1
    address: Annotated[
        str | None,
        typer.Option(
            help="Of a Ray cluster, such as auto or ray://head:10001 (default: one of its own, here).",
            rich_help_panel=FLEET,
        ),
    ] = None
    rank_timeout: Annotated[
        float,
        typer.Option(help="Seconds after which a rank that waits for another gives up.", rich_help_panel=FLEET),
    ] = launch.TIMEOUT_SECONDS
    steps: Annotated[int | None, typer.Option(help="Denoising steps, where a video asks for none.")] = None
    frames: Frames = None
    height: Height = None
    width: Width = None
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, where a video asks for none.")] = None
    call_settings: CallSettings = ()
    lora: Adapters = ()
    vae_tiling: VaeTiling = True
    compile_vae: CompileVae = False
    artifacts: CompiledCode = None
    device: Device = None
    dtype: Dtype = None

    def check_fleet(self, model: str | None) -> None:
        """Raise InputError, or OptionError, for all that is wrong whatever the videos; loads nothing."""
        for name in ("replicas", "ranks", "cpus"):
            if not 1 <= getattr(self, name) <= MOST:
                raise InputError(f"{name} is {getattr(self, name)}: give 1 to {MOST}")
        if not 0 < self.rank_timeout < math.inf:
            raise InputError(f"rank-timeout is {self.rank_timeout:g}: give a finite number of seconds above 0")
        if self.device not in (None, "cpu", "cuda"):
            raise InputError(
                f"device {self.device!r} can't be shared out: give cpu or cuda; each rank gets its own GPU"
            )
        # Not the device: this machine may have none, where the replicas run on others.
        self.clips(model, device="cpu").check()

    def clips(self, model: str | None, device: str | None = None) -> Clips:
        """What all videos share, as the other commands know it; the options are read from their file here."""
        return settled(
            Clips(
                prompt="-",
                model=model,
                steps=self.steps,
                frames=self.frames,
                height=self.height,
                width=self.width,
                guidance=self.guidance,
                call_settings=self.call_settings,
                lora=self.lora,
                vae_tiling=self.vae_tiling,
                compile_vae=self.compile_vae,
                artifacts=self.artifacts,
                device=device or self.device,
                dtype=self.dtype,
                rank_timeout=self.rank_timeout,
                fp8=self.fp8,
                mode=self.mode,
                backend_settings=self.backend_settings,
                options_file=self.options_file,
                dynamic=self.dynamic,
            )
        )
