"""The door to what Inductor compiles with: whether it is there, before a model is loaded and traced in vain.

All names were checked on torch 2.11.0 and 2.13.0.

- ``torch._inductor.cpp_builder.get_cpp_compiler``: the C++ compiler that Inductor takes, by its setting ``cpp.cxx``,
  which the variable ``CXX`` gives; nothing public tells.
- ``torch._inductor.exc.InvalidCxxCompiler``: what it raises where there is none.
- ``torch._inductor.runtime.cache_dir_utils.cache_dir``: where Inductor writes what it compiled, which the variable
  ``TORCHINDUCTOR_CACHE_DIR`` gives.
"""

from __future__ import annotations

import importlib.util
import tempfile

import torch
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.runtime.cache_dir_utils import cache_dir

from hvcompile.journal import Declined

NO_COMPILER = Declined(
    "there is no C++ compiler, which Inductor needs: install g++ (Debian and Ubuntu: apt install g++), or name one in "
    "the environment variable CXX"
)


def cpp_compiler() -> str | Declined:
    """The C++ compiler that Inductor takes, or that there is none."""
    try:
        return get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):  # what CXX names may be no program
        return NO_COMPILER


def cache_directory() -> str | Declined:
    """Where Inductor writes what it compiled, or why it can't."""
    directory = ""
    try:
        directory = cache_dir()
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        return Declined(
            f"Inductor can't write its code to {directory or error.filename!r} ({error.strerror or error}): name "
            "another directory in the environment variable TORCHINDUCTOR_CACHE_DIR"
        )
    return directory


def why_no_compiling(device: torch.device) -> str:
    """Why Inductor can't compile for a device: what is missing, and what to do; empty where it can."""
    if isinstance(compiler := cpp_compiler(), Declined):
        return compiler.reason
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "there is no triton, which Inductor needs for a GPU: pip install triton"
    directory = cache_directory()
    return directory.reason if isinstance(directory, Declined) else ""
