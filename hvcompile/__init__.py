"""hvcompile: a torch.compile backend, ``hvfast``, for video diffusion transformers.

Installing the package registers the backend; ``torch.compile(model, backend="hvfast")`` needs no import.
"""

from hvcompile.errors import (
    HvcompileError,
    OptionError,
    QuantizedWeightError,
    RequestedPassError,
    UncompiledModelError,
    UntraceableModelError,
)
from hvcompile.explain import explain
from hvcompile.quantized_weights import Restored
from hvcompile.runtime import Stats, Step, reset, restore, stats

__version__ = "0.1.0"

__all__ = [
    "HvcompileError",
    "OptionError",
    "QuantizedWeightError",
    "RequestedPassError",
    "Restored",
    "Stats",
    "Step",
    "UncompiledModelError",
    "UntraceableModelError",
    "explain",
    "reset",
    "restore",
    "stats",
]
