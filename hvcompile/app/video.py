"""Video files to and from ``Frames``."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from hvcompile import outputs
from hvcompile.app.metrics import Frames
from hvcompile.errors import InputError, OutputError

_FORMATS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov"}
# x264's macroblock tree reads what it was not given where frames are small: the same frames gave up to four files.
_DETERMINISTIC = {"x264-params": "mbtree=0"}


def check_finite(frames: Frames, name: str) -> None:
    """Raise InputError where a value is NaN or infinite; ``name`` says whose pixels they are."""
    if not np.isfinite(frames).all():
        raise InputError(
            f"the pixels of {name} are not all finite: give dtype float32 or bfloat16, or, where it is one of these, "
            "look for NaN in the weights"
        )


def write(frames: Frames, output: Path, *, fps: int) -> None:
    """Write ``frames`` as H.264 in full size; a file that was at ``output`` is replaced only when all went well.

    Raises:
        InputError: a pixel is not finite.
        OutputError: the file can't be written; the frames are kept elsewhere, and the message says where.

    """
    check_finite(frames, output.name)
    pixels = _pixels(frames)
    try:
        with outputs.replacing(output) as part:
            part.write_bytes(_encoded(pixels, output.suffix, fps))
    except OutputError as error:
        raise OutputError(f"{error}: {keep(pixels, output, fps)}") from error.__cause__


def encoded(frames: Frames, suffix: str, *, fps: int) -> bytes:
    """The content of the file that ``write`` makes.

    Args:
        frames: of the clip.
        suffix: of the file, such as ".mp4".
        fps: frames a second.

    Raises:
        InputError: a pixel is not finite.
        OutputError: the encoder fails.

    """
    check_finite(frames, "the video")
    try:
        return _encoded(_pixels(frames), suffix, fps)
    except OSError as error:
        raise OutputError(f"the video can't be encoded ({error})") from error


def _pixels(frames: Frames) -> npt.NDArray[np.uint8]:
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)


def _encoded(pixels: npt.NDArray[np.uint8], suffix: str, fps: int) -> bytes:
    """H.264; raises OSError where the encoder fails."""
    # Players expect colour at half resolution, which takes even sizes only.
    is_even = not any(size % 2 for size in pixels.shape[1:3])
    content = io.BytesIO()  # in memory: an encoder that can't finish its file complains when it is collected
    try:
        with av.open(content, "w", format=_FORMATS[suffix.lower()]) as container:
            stream = container.add_stream("libx264", rate=fps, options=_DETERMINISTIC)
            stream.height, stream.width = pixels.shape[1:3]
            stream.pix_fmt = "yuv420p" if is_even else "yuv444p"
            for picture in pixels:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    except (av.error.FFmpegError, EOFError, OverflowError, ValueError) as error:
        raise OSError(str(error)) from error
    return content.getvalue()


def keep(pixels: npt.NDArray[np.uint8], output: Path, fps: int) -> str:
    """Keep the frames of a video that can't be written; says where they are and how to read them."""
    kept = outputs.keep_elsewhere(
        f"{output.stem}-frames.npz",
        lambda file: np.savez_compressed(file, frames=pixels, fps=np.array(fps)),
        instead_of=output,
    )
    if kept is None:
        return "free some space; the frames could be kept nowhere, so they are lost"
    return f'the frames are kept in {str(kept)!r}; numpy.load(...)["frames"] is [frames, height, width, 3] in uint8'


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
