"""Picture files to and from arrays."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hvcompile import outputs
from hvcompile.app.metrics import Frames
from hvcompile.app.video import check_finite, keep
from hvcompile.errors import InputError, OutputError

FORMATS: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
"""How a format is written, where Pillow's own way would lose more than need be."""


def read(path: Path, name: str) -> Image.Image:
    """Read a picture as RGB.

    Args:
        path: any file that Pillow reads.
        name: of the option that gave it, for messages.

    Raises:
        InputError: there is no such file, it is no picture, is damaged, or is larger than Pillow deems safe.

    """
    try:
        with Image.open(path) as picture:
            return _as_rgb(ImageOps.exif_transpose(picture), f"{name} {str(path)!r}")
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError(f"{name} {str(path)!r} is no picture: give a PNG, JPEG or WebP file") from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{name} {str(path)!r} is too large ({error}): give a smaller picture") from error
    except (OSError, ValueError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name} {str(path)!r} can't be read ({reason}): give a whole picture file") from error


def _as_rgb(picture: Image.Image, what: str) -> Image.Image:
    """Eight bits a channel, with white behind what is transparent; Pillow alone would clamp and uncover."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture).astype(np.uint32) // 257).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise InputError(f"{what} has 32 bits a channel, whose range is not known: save it with 8 or 16")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")


def write(frames: Frames, output: Path) -> None:
    """Write the first of ``frames``; a file that was at ``output`` is replaced only when all went well.

    Raises:
        InputError: a pixel is not finite.
        OutputError: the file can't be written; the pixels are kept elsewhere, and the message says where.

    """
    check_finite(frames, output.name)
    pixels = _pixels(frames)
    try:
        with outputs.replacing(output) as part:
            part.write_bytes(_encoded(pixels, output.suffix))
    except OutputError as error:
        raise OutputError(f"{error}: {keep(pixels, output, 1)}") from error.__cause__


def encoded(frames: Frames, suffix: str) -> bytes:
    """The content of the file that ``write`` makes.

    Args:
        frames: of which the first counts.
        suffix: of the file, such as ".png".

    Raises:
        InputError: a pixel is not finite.

    """
    check_finite(frames, "the picture")
    return _encoded(_pixels(frames), suffix)


def _pixels(frames: Frames) -> Any:
    return (frames[:1].clip(0, 1) * 255).round().astype(np.uint8)


def _encoded(pixels: Any, suffix: str) -> bytes:
    content = io.BytesIO()
    kind = Image.registered_extensions()[suffix.lower()]
    Image.fromarray(pixels[0]).save(content, format=kind, **FORMATS.get(kind, {}))
    return content.getvalue()
