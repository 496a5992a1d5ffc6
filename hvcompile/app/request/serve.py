"""What ``hvcompile serve`` is asked for."""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from hvcompile.app.request.ask import Ask
from hvcompile.app.request.clips import Clips
from hvcompile.app.request.fleet import Fleet
from hvcompile.errors import InputError

KEYS = "HVCOMPILE_API_KEYS"
"""The environment variable that holds the keys of clients, with commas between."""
TINY_SIZE = "48x32x17"
"""Of the embedded pipeline."""
MOST_SIZES = 8
"""torch's limit on how often a function is compiled."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A size that is served: pixels, and frames."""

    width: int
    height: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, kw_only=True)
class Request(Fleet):
    """What to serve, where, and within which limits. The fields are the command's parameters."""

    model: Annotated[
        str | None, typer.Argument(help="Directory or hub id of a diffusers pipeline (default: the embedded tiny one).")
    ] = None
    sizes: Annotated[
        tuple[str, ...],
        typer.Option(help="WIDTHxHEIGHTxFRAMES that clients may ask for, with commas; all are compiled at the start."),
    ] = ()
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000
    most_queued: Annotated[int, typer.Option(help="Videos that may wait; above, clients are told to come back.")] = 16
    most_steps: Annotated[int, typer.Option(help="Denoising steps that a client may ask for.")] = 100
    timeout: Annotated[float, typer.Option(help="Seconds that a video may take, once it has begun.")] = 1800.0
    keep: Annotated[float, typer.Option(help="Seconds for which a video that has ended is kept.")] = 3600.0
    drain: Annotated[float, typer.Option(help="Seconds that videos are given to end when the server is stopped.")] = (
        60.0
    )
    store: Annotated[
        Path | None,
        typer.Option(help="A directory for videos, to be found after a restart (default: a temporary one)."),
    ] = None
    fps: Annotated[int, typer.Option(help="Frames a second of the files.")] = 24

    def check(self) -> None:
        """Raise InputError, or OptionError, for all that is wrong; loads nothing."""
        for name, low, high in (("port", 1, 65535), ("most_queued", 1, 100_000), ("most_steps", 1, 10_000)):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name.replace('_', '-')} is {getattr(self, name)}: give {low} to {high}")
        for name in ("timeout", "keep", "drain"):
            if not 0 < getattr(self, name) < 1e9:
                raise InputError(f"{name} is {getattr(self, name):g}: give a number of seconds above 0")
        Ask(prompt="-", fps=self.fps)
        _ = self.served
        if self.store is not None and not self.store.is_dir():
            raise InputError(f"store {str(self.store)!r} is no directory: make it first")
        if any(len(key) < 16 for key in self.keys):
            raise InputError(
                f"{KEYS} has a key of fewer than 16 characters: give long random ones, with commas between"
            )
        if not self.keys and not self._is_local:
            raise InputError(
                f"host {self.host!r} may be reached by others, and {KEYS} has no keys: set it, or listen on 127.0.0.1"
            )
        self.check_fleet(self.model)

    @property
    def _is_local(self) -> bool:
        return is_loopback(self.host)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that clients may have; none where everybody may come."""
        return tuple(key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip())

    @property
    def served(self) -> tuple[Size, ...]:
        """The sizes that clients may ask for; raises InputError where there is none, or one is none."""
        texts = self.sizes or ((TINY_SIZE,) if self.model is None else ())
        if not texts:
            raise InputError("sizes are not given: say what clients may ask for, such as --sizes 1280x720x129")
        if len(set(texts)) > MOST_SIZES or len(set(texts)) < len(texts):
            raise InputError(f"sizes has {len(texts)} sizes: give up to {MOST_SIZES}, each once")
        for text in texts:
            if not re.fullmatch(r"[0-9]{1,5}x[0-9]{1,5}x[0-9]{1,5}", text):
                raise InputError(f"sizes has {text!r}: give WIDTHxHEIGHTxFRAMES, such as 1280x720x129")
        numbers = (map(int, text.split("x")) for text in texts)
        return tuple(Size(width=width, height=height, frames=frames) for width, height, frames in numbers)

    @property
    def base(self) -> Clips:
        """What all videos share; a client names its size."""
        return dataclasses.replace(self.clips(self.model), frames=None, height=None, width=None)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own, which no other can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in ("localhost", "localhost.")
