"""hvcompile: a torch.compile backend, ``hvfast``, for video diffusion transformers.

Installing the package registers the backend; ``torch.compile(model, backend="hvfast")`` needs no import.
"""

from hvcompile.errors import (
    DisagreementError,
    HvcompileError,
    InputError,
    InvalidRewriteError,
    LoweringError,
    OptionError,
    OutputError,
    QuantizedWeightError,
    RequestedPassError,
    RunError,
    UncompiledModelError,
    UntraceableModelError,
)
from hvcompile.explanation.explain import explain
from hvcompile.float8.weights import Restored
from hvcompile.lowered.lower import Lowered, lower
from hvcompile.runtime.state import Stats, Step, reset, restore, stats
from hvcompile.version import __version__

__all__ = [
    "DisagreementError",
    "HvcompileError",
    "InputError",
    "InvalidRewriteError",
    "Lowered",
    "LoweringError",
    "OptionError",
    "OutputError",
    "QuantizedWeightError",
    "RequestedPassError",
    "Restored",
    "RunError",
    "Stats",
    "Step",
    "UncompiledModelError",
    "UntraceableModelError",
    "__version__",
    "explain",
    "lower",
    "reset",
    "restore",
    "stats",
]
