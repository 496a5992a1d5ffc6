"""Parameters that several commands have alike."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

COMPILING = "How it is compiled"
"""Where the help lists options of the backend."""

EACH = object()
"""Beside the ``typer.Option`` of a field ``tuple[str, ...]``: the option repeats, and gives a part each time."""

Frames = Annotated[int | None, typer.Option(help="Length of the clip.")]
Height = Annotated[int | None, typer.Option(help="Pixels.")]
Width = Annotated[int | None, typer.Option(help="Pixels.")]
Mode = Annotated[
    str | None,
    typer.Option(
        help="'exact': only rewrites that don't change numerics; 'max': all, float8 attention too.",
        rich_help_panel=COMPILING,
    ),
]
CallSettings = Annotated[
    tuple[str, ...],
    typer.Option("--set", help="Any other argument of the pipeline: --set max_sequence_length=128. Repeats."),
    EACH,
]
Adapters = Annotated[
    tuple[str, ...],
    typer.Option("--lora", help="An adapter to fuse: a file, directory or hub id, and :scale if not 1. Repeats."),
    EACH,
]
VaeTiling = Annotated[bool, typer.Option("--vae-tiling/--no-vae-tiling", help="Decode large sizes in tiles, or whole.")]
CompileVae = Annotated[
    bool, typer.Option("--compile-vae", help="Compile the decoder of the VAE too.", rich_help_panel=COMPILING)
]
CompiledCode = Annotated[
    Path | None,
    typer.Option(
        help="A directory of compiled code that hvcompile warm made. It is code: give only your own.",
        rich_help_panel=COMPILING,
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N (default: a GPU if there is one).")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on the CPU).")
]
RankTimeout = Annotated[
    float, typer.Option(help="Under torchrun: seconds after which a rank that waits for another gives up.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write it all (.json).")]
