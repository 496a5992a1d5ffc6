"""hvcompile: a torch.compile backend, ``hvfast``, for video diffusion transformers.

Installing the package registers the backend; ``torch.compile(model, backend="hvfast")`` needs no import.
"""

from hvcompile.errors import (
    HvcompileError,
    OptionError,
    RequestedPassError,
    UncompiledModelError,
    UntraceableModelError,
)
from hvcompile.explain import explain
from hvcompile.runtime import Stats, Step, reset, stats

__version__ = "0.1.0"

__all__ = [
    "HvcompileError",
    "OptionError",
    "RequestedPassError",
    "Stats",
    "Step",
    "UncompiledModelError",
    "UntraceableModelError",
    "explain",
    "reset",
    "stats",
]
