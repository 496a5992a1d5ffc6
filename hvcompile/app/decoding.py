"""The decoding of a generation: its tiles shared by the ranks, and told of one by one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from hvcompile.app.steps import Observer
from hvcompile.ranks.decoding import Decoding, share_decoding

WORD = "decoding"
"""What observers are told of a decoding begins with."""


@contextlib.contextmanager
def shared(pipe: Any, observe: Observer) -> Iterator[Decoding | None]:
    """Within, the ranks share the tiles that a pipeline decodes, and ``observe`` is told of each of this rank's.

    Args:
        pipe: a pipeline; one whose VAE has no decoder of its own decodes as it does.
        observe: told of tiles.

    Yields:
        What becomes of the decoding; None where it is left as it is.

    """
    vae: Any = getattr(pipe, "vae", None)
    is_shareable = isinstance(vae, nn.Module) and isinstance(getattr(vae, "decoder", None), nn.Module)
    if not is_shareable or "decode" in vars(vae):
        yield None
        return

    def tell(done: int, total: int) -> None:
        if total > 1:
            observe(f"{WORD} {done} of {total} tiles")

    with share_decoding(vae, tell=tell) as decoding:
        yield decoding


def note(decoding: Decoding | None, num_ranks: int) -> list[str]:
    """What a user should know: that each rank decoded all of a clip of several tiles, and why."""
    if decoding is None or num_ranks == 1 or decoding.reason is None or decoding.num_tiles == 1:
        return []
    return [f"each of the {num_ranks} ranks decoded the whole clip: {decoding.reason}"]
