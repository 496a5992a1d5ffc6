"""Compiled code to ship: what torch's caches hold, as a directory with a manifest of what it was made with.

**Artifacts are code.** They hold pickles and shared libraries, which torch loads and runs when a model is compiled.
The checksums find damage, not malice: load only what you made yourself, or got from whom you would run a program of.

A wrong torch, device or option never gives wrong results: torch's own keys hold all of these, so that what does not fit
is not found. The manifest is there to say so at once and in words, rather than by minutes of compiling.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hvcompile.errors import InputError, OutputError
from hvcompile.journal import Declined
from hvcompile.options import parse
from hvcompile.passes import PASSES
from hvcompile.torch_private.caching import source_digest
from hvcompile.torch_private.compilers import cache_directory
from hvcompile.version import __version__, version_of

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
_GRAPHS = re.compile(r"(?:aotautograd|fxgraph)(?:/[\w-]+)+")
_CODE = re.compile(r"[a-z0-9]{2}/[\w-]+(?:\.\w+)*\.(?:py|cpp|so|h|best_config)")
# Triton's own directory is not among them: it holds absolute paths, and Inductor's graphs bring its kernels along.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifacts:
    """What was saved, or loaded.

    Attributes:
        path: the directory.
        num_files: how many files were saved; of loading, how many were not there yet, or damaged.
        num_bytes: of all files together.
        refused: why nothing was loaded, in one line; empty where all was.

    """

    path: Path
    num_files: int = 0
    num_bytes: int = 0
    refused: str = ""


def save_artifacts(
    path: str | os.PathLike[str], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Artifacts:
    """Save all that Inductor's cache directory holds, for ``load_artifacts`` on another machine.

    The directory is the one that the variable ``TORCHINDUCTOR_CACHE_DIR`` names. Give the process one of its own before
    it compiles, or else what was compiled there before is saved too. ``hvcompile warm --output`` does that.

    Args:
        path: a directory to make; one of artifacts that is there is replaced.
        options: those that the model was compiled with, so that loading can compare them; None to leave that out.
        mode: as ``options``.

    Returns:
        What was saved.

    Raises:
        InputError: ``path`` is something else than artifacts, or nothing has been compiled.
        OutputError: it can't be written.
        OptionError: ``options`` or ``mode`` are invalid.

    """
    place = Path(path).absolute()
    check_place(place)
    made_with = made_here(options, mode)
    directory = cache_directory()
    files = [] if isinstance(directory, Declined) else list(_cached(Path(directory)))
    if not any(_GRAPHS.fullmatch(name) for name in files):
        raise InputError("nothing has been compiled that could be saved: call the compiled model first")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".hvcompile-", dir=place.parent) as made:
            digests = {name: _copied(Path(str(directory), name), Path(made, "new", name)) for name in files}
            manifest = {"format": FORMAT, "made_with": made_with, "files": digests}
            Path(made, "new", MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
            if place.exists():
                place.rename(Path(made, "old"))
            Path(made, "new").rename(place)
    except OSError as error:
        raise OutputError(f"{str(path)!r} can't be written ({error.strerror or error})") from error
    return Artifacts(path=place, num_files=len(files), num_bytes=sum((place / name).stat().st_size for name in files))


def check_place(path: Path) -> None:
    """Raise InputError where artifacts can't be saved, since something else is there."""
    try:
        is_free = not path.exists() or (path / MANIFEST).is_file() or (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise InputError(f"output {str(path)!r} can't be used ({error.strerror}): give another directory") from error
    if not is_free:
        raise InputError(f"output {str(path)!r} is there, and holds no artifacts: give a directory that is not there")


def load_artifacts(
    path: str | os.PathLike[str], *, options: Mapping[str, Any] | None = None, mode: str | None = None
) -> Artifacts:
    """Put saved artifacts where torch looks for compiled code; call it before the compiled model's first call.

    Artifacts are code: load only your own. What was made with another torch, Python, hvcompile, device or options, and
    what is damaged, is refused as a whole. A warning says why, and models are compiled as if it were not there.

    Args:
        path: a directory that ``save_artifacts`` or ``hvcompile warm`` made.
        options: those that the model will be compiled with, to be compared; None to compare none.
        mode: as ``options``; compared only where ``options`` is given.

    Returns:
        What was loaded, and why not.

    Raises:
        InputError: there is no such directory.
        OptionError: ``options`` or ``mode`` are invalid.

    """
    place = Path(path).absolute()
    if not place.is_dir():
        what = "is a file" if place.exists() else "are not there"
        raise InputError(f"artifacts {str(path)!r} {what}: give a directory that hvcompile warm made")
    if not (place / MANIFEST).is_file():
        raise InputError(f"artifacts {str(path)!r}: the directory has no {MANIFEST}: give one that hvcompile warm made")
    contents = _checked(place, made_here(options, mode))
    directory = cache_directory()
    refused = next((item for item in (contents, directory) if isinstance(item, Declined)), None)
    if isinstance(contents, Declined) or isinstance(directory, Declined):
        assert refused is not None
        log.warning("artifacts %s are refused, and models compile without them: %s", place, refused.reason)
        return Artifacts(path=place, refused=refused.reason)
    try:
        num_new = sum(_placed(content, Path(directory, name)) for name, content in contents.items())
    except OSError as error:  # what has been placed by now is whole, and of use
        reason = f"{directory!r} can't be written ({error.strerror or error})"
        log.warning("artifacts %s are loaded in part: %s", place, reason)
        return Artifacts(path=place, refused=reason)
    log.info("artifacts %s: %d files, of which %d are new", place, len(contents), num_new)
    return Artifacts(path=place, num_files=num_new, num_bytes=sum(map(len, contents.values())))


def made_here(options: Mapping[str, Any] | None = None, mode: str | None = None) -> dict[str, Any]:
    """What compiled code is made with, in this process.

    Raises:
        OptionError: ``options`` or ``mode`` are invalid.

    """
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "torch": f"{torch.__version__} ({torch.version.git_version})",
        "hvcompile": f"{__version__} (source {source_digest()[:16]})",
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "triton": version_of("triton"),
        "machine": f"{platform.system()} {platform.machine()}",
        "GPU": None if gpu is None else f"{gpu.name}, sm_{gpu.major}{gpu.minor}, CUDA {torch.version.cuda}",
        "CPU": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "CPU flags": _cpu_flags(),
        "options": None if options is None and mode is None else _described(options, mode),
    }


def _cpu_flags() -> list[str]:
    """What the processor can do, as Linux says; empty elsewhere. Kernels are compiled for all of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return sorted(next((line.partition(":")[2].split() for line in lines if re.match("flags|Features", line)), []))


def _described(options: Mapping[str, Any] | None, mode: str | None) -> dict[str, str]:
    settings = parse(PASSES, options, mode)
    return {type(item).__name__: repr(item) for item, _ in settings.passes} | {"lower": settings.lower}


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """How what artifacts were made with differs from what there is here; empty where it doesn't."""
    for name in ("torch", "hvcompile", "Python", "triton", "machine", "GPU", "CPU", "threads"):
        if there.get(name) != here[name]:
            return f"they were made with {name} {there.get(name)}, and here it is {here[name]}"
    lacking = sorted({*map(str, there.get("CPU flags") or ())} - {*here["CPU flags"]})
    if lacking:
        return f"they were made for a CPU with {', '.join(lacking[:8])}, which this one lacks"
    known, wanted = there.get("options"), here["options"]
    if known is None or wanted is None:
        return ""
    for name in {**known, **wanted}:
        if known.get(name) != wanted.get(name):
            made, asked = (item.get(name, f"{name} off") for item in (known, wanted))
            return f"they were made with {made}, and wanted is {asked}"
    return ""


def _checked(place: Path, here: Mapping[str, Any]) -> dict[str, bytes] | Declined:
    """The files of artifacts by their names, or why they are refused; nothing in them is run or unpickled."""
    try:
        manifest = json.loads((place / MANIFEST).read_text("utf-8"))
        if manifest["format"] != FORMAT:
            return Declined(f"their format is {manifest['format']!r}; this hvcompile reads {FORMAT}")
        reason = _difference(manifest["made_with"], here)
        if reason:
            return Declined(reason)
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return Declined(f"they are damaged: {MANIFEST} can't be read ({error}); make or copy them again")
    contents = {}
    for name, digest in files.items():
        if not (_GRAPHS.fullmatch(name) or _CODE.fullmatch(name)):
            return Declined(f"they are damaged: {name!r} is no file of a cache; make or copy them again")
        try:
            contents[name] = (place / name).read_bytes()
        except OSError as error:
            return Declined(f"they are damaged: {name} can't be read ({error.strerror}); make or copy them again")
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            return Declined(f"they are damaged: {name} is not what was saved; make or copy them again")
    return contents


def _cached(directory: Path) -> Iterator[str]:
    """The files of a cache directory that are worth to be shipped, by their paths in it."""
    for file in sorted(directory.rglob("*")):
        name = file.relative_to(directory).as_posix()
        if (_GRAPHS.fullmatch(name) or _CODE.fullmatch(name)) and file.is_file():
            yield name


def _copied(source: Path, target: Path) -> str:
    """Copy a file; returns the digest of its content."""
    target.parent.mkdir(parents=True, exist_ok=True)
    content = source.read_bytes()
    target.write_bytes(content)
    shutil.copymode(source, target)
    return hashlib.sha256(content).hexdigest()


def _placed(content: bytes, target: Path) -> bool:
    """Write a file whole, as other processes see it; False where it is there as it should be."""
    if target.exists() and target.read_bytes() == content:
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".hvcompile-", delete=False) as part:
        part.write(content)
    Path(part.name).chmod(0o755 if target.suffix == ".so" else 0o644)
    Path(part.name).replace(target)
    return True
