"""What an environment has of what compiling and the commands need, and what to do about the rest."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvcompile import outputs
from hvcompile.app.extras import EXTRAS, is_there
from hvcompile.app.request.doctor import Request
from hvcompile.journal import Declined
from hvcompile.version import __version__

if TYPE_CHECKING:
    import torch

SUPPORTED = ("2.11", "2.13")
"""The first and the last version of torch that this is tested with."""
LEAST_FREE = 2**28
"""Bytes; a cache directory with less may be full before a model is compiled."""
CACHE = "Inductor's cache"
VARIABLES = (
    *("CXX", "HVCOMPILE_DUMP", "HVCOMPILE_STRICT", "TORCHDYNAMO_DISABLE", "TORCHINDUCTOR_CACHE_DIR"),
    *("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "TRITON_CACHE_DIR", "TRITON_INTERPRET"),
)
"""Variables of the environment that change what is compiled, or how."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked for.

    Attributes:
        name: what it is.
        found: what was found, in words.
        advice: what to do about it; empty where nothing is amiss.
        is_needed: whether compiling fails until that is done.

    """

    name: str
    found: str
    advice: str = ""
    is_needed: bool = False

    @property
    def status(self) -> str:
        """``ok``, ``missing`` (compiling needs it) or ``note``."""
        return "ok" if not self.advice else "missing" if self.is_needed else "note"


def examine_request(request: Request) -> list[Finding]:
    """Look at the environment, and write the JSON file that the request asks for; raises InputError where it can't."""
    request.check()
    findings = list(examine())
    if request.json_file is not None:
        rows = [dataclasses.asdict(item) | {"status": item.status} for item in findings]
        outputs.write_json({"can_compile": can_compile(findings), "findings": rows}, request.json_file)
    return findings


def can_compile(findings: list[Finding]) -> bool:
    """Whether everything is there that compiling needs."""
    return all(item.status != "missing" for item in findings)


def examine() -> Iterator[Finding]:
    """Look at what compiling needs, and then at what the commands need; nothing is compiled."""
    settings = {name: os.environ[name] for name in VARIABLES if name in os.environ}  # torch sets one when imported
    yield Finding(name="python", found=f"{platform.python_version()}, {platform.platform()}")
    yield _backend()
    version = _torch_version()
    yield version
    if version.status != "missing":
        yield from _compiling()
    yield from map(_extra, EXTRAS)
    is_off = settings.get("TORCHDYNAMO_DISABLE") == "1"
    yield Finding(
        name="environment",
        found=", ".join(f"{name}={value}" for name, value in settings.items()) or "nothing that changes compiling",
        advice="nothing is compiled with TORCHDYNAMO_DISABLE=1: unset it" if is_off else "",
    )


def _backend() -> Finding:
    names = [item.name for item in importlib.metadata.entry_points(group="torch_dynamo_backends")]
    if "hvfast" in names:
        return Finding(name="hvcompile", found=f"{__version__}, registers the backend hvfast")
    advice = "torch.compile finds no backend hvfast: install the package, pip install ."
    return Finding(name="hvcompile", found=f"{__version__}, not installed", advice=advice, is_needed=True)


def _torch_version() -> Finding:
    first, last = SUPPORTED
    install = f"install torch {first} to {last}: https://pytorch.org/get-started/locally"
    if not is_there("torch"):
        return Finding(name="torch", found="not installed", advice=install, is_needed=True)
    try:
        import torch
    except (ImportError, OSError) as error:
        return Finding(name="torch", found=f"can't be imported: {error}", advice=install, is_needed=True)
    release = tuple(map(int, torch.__version__.split(".")[:2]))
    bounds = [tuple(map(int, text.split("."))) for text in SUPPORTED]
    tested = bounds[0] <= release <= bounds[1]
    advice = "" if tested else f"tested are torch {first} to {last}: {install}"
    return Finding(name="torch", found=torch.__version__, advice=advice, is_needed=release < bounds[0])


def _compiling() -> Iterator[Finding]:
    """What compiling needs besides torch, which is there."""
    import torch

    gpus = [torch.device("cuda", place) for place in range(torch.cuda.device_count())] if _has_gpu() else []
    yield Finding(name="devices", found="; ".join([_cpu(), *map(_gpu, gpus)]))
    yield _headers()
    yield _triton(is_needed=bool(gpus))
    try:  # torch makes the directory as its compiler is imported
        from hvcompile.torch_private import compilers
    except OSError as error:
        yield _no_cache(f"Inductor can't make {error.filename!r} ({error.strerror or error})")
        return
    yield _compiler(compilers.cpp_compiler())
    yield _cache(compilers.cache_directory())
    for device in (torch.device("cpu"), *gpus[:1]):
        yield Finding(name=f"attention on {device.type}", found=_attention(device))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _cpu() -> str:
    import torch

    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{number} CPU cores ({platform.machine()}, {instructions})"


def _gpu(device: torch.device) -> str:
    import torch

    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{device} {properties.name} ({memory:.0f} GiB, sm_{properties.major}{properties.minor})"


def _compiler(compiler: str | Declined) -> Finding:
    if isinstance(compiler, Declined):
        return Finding(name="C++ compiler", found="none", advice=compiler.reason, is_needed=True)
    lines = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return Finding(name="C++ compiler", found=f"{shutil.which(compiler) or compiler}: {lines[0] if lines else '?'}")


def _headers() -> Finding:
    """Python's own headers, which the code that Inductor and Triton compile includes."""
    file = Path(sysconfig.get_path("include"), "Python.h")
    if file.exists():
        return Finding(name="Python's headers", found=str(file))
    advice = "install them (Debian and Ubuntu: apt install python3-dev): compiled code includes Python.h"
    return Finding(name="Python's headers", found=f"no {file}", advice=advice, is_needed=True)


def _triton(*, is_needed: bool) -> Finding:
    if is_there("triton"):
        return Finding(name="Triton", found=_version_of("triton"))
    if is_needed:
        return Finding(name="Triton", found="none", advice="a GPU needs it: pip install triton", is_needed=True)
    return Finding(name="Triton", found="none, and none is needed without a GPU")


def _attention(device: torch.device) -> str:
    """The kernels that compute an attention of head size 128 in bfloat16 without a mask."""
    import torch

    from hvcompile.graph import attention_kernels

    heads = torch.empty(1, 1, 16, 128, dtype=torch.bfloat16, device=device)
    attention = attention_kernels.describe(heads, heads, heads, has_mask=False)
    usable = [name for name in attention_kernels.KERNELS[1:] if not attention_kernels.refusal(name, attention)]
    return f"{', '.join(usable)}; {attention_kernels.expected(attention)} by itself ({attention})"


def _no_cache(reason: str) -> Finding:
    advice = "name another directory in the environment variable TORCHINDUCTOR_CACHE_DIR"
    return Finding(name=CACHE, found=reason, advice=advice, is_needed=True)


def _cache(directory: str | Declined) -> Finding:
    if isinstance(directory, Declined):
        return _no_cache(directory.reason.split(": name another")[0])
    free = shutil.disk_usage(directory).free
    advice = f"less than {LEAST_FREE >> 20} MiB are free: free some, or name another in TORCHINDUCTOR_CACHE_DIR"
    return Finding(
        name=CACHE,
        found=f"{directory}, {free / 2**30:.1f} GiB free",
        advice=advice if free < LEAST_FREE else "",
        is_needed=True,
    )


def _extra(extra: str) -> Finding:
    packages = EXTRAS[extra]
    found = [f"{package} {_version_of(package)}" for module, package in packages.items() if is_there(module)]
    missing = [package for module, package in packages.items() if not is_there(module)]
    advice = f"pip install 'hvcompile[{extra}]' for {', '.join(missing)}" if missing else ""
    return Finding(name=f"extra {extra}", found=", ".join(found) or "none of it", advice=advice)


def _version_of(package: str) -> Any:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(no version)"
