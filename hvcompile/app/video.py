"""Video files to and from ``Frames``."""

from __future__ import annotations

from pathlib import Path

import av
import imageio.v3
import numpy as np

from hvcompile import outputs
from hvcompile.app.metrics import Frames
from hvcompile.errors import InputError

CONTAINERS = (".mp4", ".mkv", ".mov")


def check_finite(frames: Frames, name: str) -> None:
    """Raise InputError where a value is NaN or infinite; ``name`` says whose pixels they are."""
    if not np.isfinite(frames).all():
        raise InputError(f"the pixels of {name} are not all finite: give dtype float32 or bfloat16")


def write(frames: Frames, output: Path, *, fps: int) -> None:
    """Write ``frames`` as H.264 in full size; a file that was at ``output`` is replaced only when all went well."""
    check_finite(frames, output.name)
    pixels = (frames.clip(0, 1) * 255).round().astype(np.uint8)
    # Players expect colour at half resolution, which takes even sizes only.
    is_even = not any(size % 2 for size in pixels.shape[1:3])
    with outputs.replacing(output) as part:
        imageio.v3.imwrite(
            part, pixels, plugin="pyav", codec="libx264", fps=fps, out_pixel_format="yuv420p" if is_even else "yuv444p"
        )


def read(path: Path, name: str) -> Frames:
    """Decode the first video stream of a file.

    Args:
        path: any file that FFmpeg reads; of a picture, one frame.
        name: what the file is to the user, for messages.

    Raises:
        InputError: there is no such file, it holds no video, or its frames change size.

    """
    if not path.exists():
        raise InputError(f"{name} {str(path)!r} is not there: give a video file")
    if path.is_dir():
        raise InputError(f"{name} {str(path)!r} is a directory: give a video file in it")
    try:
        with av.open(str(path)) as container:
            pictures = (
                [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
                if container.streams.video
                else []
            )
    except (av.error.FFmpegError, OSError) as error:
        reason = error.strerror or type(error).__name__
        raise InputError(
            f"{name} {str(path)!r} can't be read as a video ({reason}): give a whole video file"
        ) from error
    if not pictures:
        raise InputError(f"{name} {str(path)!r} holds no video frames: give a video file")
    if len({picture.shape for picture in pictures}) > 1:
        raise InputError(f"{name} {str(path)!r} changes its size on the way: give a video of one size")
    return np.stack(pictures).astype(np.float32) / np.float32(255)
