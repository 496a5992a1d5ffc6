"""Pictures that a video begins or ends with, as they travel: the machine that makes it need not have their files."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from hvcompile.app.request.ask import PICTURE_FIELDS, Ask
from hvcompile.errors import InputError


def packed(ask: Ask) -> dict[str, bytes]:
    """Give the content of a video's pictures, by name.

    Raises:
        InputError: a file can't be read; it was there when the run began.

    """
    contents = {}
    for name in PICTURE_FIELDS:
        place = getattr(ask, name)
        if place is not None:
            try:
                contents[name] = Path(place).read_bytes()
            except OSError as error:
                raise InputError(
                    f"{name} {place!r} can't be read any more ({error.strerror or error}): put it back"
                ) from error
    return contents


def stand_ins(ask: Ask) -> dict[str, bytes]:
    """Give a blank picture for each that a video has: enough to ask a pipeline whether it takes one there."""
    blank = io.BytesIO()
    Image.new("RGB", (16, 16)).save(blank, "PNG")
    return {name: blank.getvalue() for name in PICTURE_FIELDS if getattr(ask, name) is not None}


@contextlib.contextmanager
def unpacked(ask: Ask, contents: Mapping[str, bytes]) -> Iterator[Ask]:
    """Give a video whose pictures are files of this machine, for as long as the block lasts."""
    if not contents:
        yield ask
        return
    with tempfile.TemporaryDirectory(prefix="hvcompile-pictures-") as folder:
        places: dict[str, Any] = {}
        for name, content in contents.items():
            Path(folder, name).write_bytes(content)
            places[name] = str(Path(folder, name))
        yield dataclasses.replace(ask, **places)
