"""hvcompile: a torch.compile backend, ``hvfast``, for video diffusion transformers.

Installing the package registers the backend; ``torch.compile(model, backend="hvfast")`` needs no import.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hvcompile.errors import (
    DisagreementError,
    HvcompileError,
    InputError,
    InvalidRewriteError,
    LoweringError,
    OffloadedWeightError,
    OptionError,
    OutputError,
    QuantizedWeightError,
    RequestedPassError,
    RunError,
    UncompiledModelError,
    UntraceableModelError,
)
from hvcompile.version import __version__

if TYPE_CHECKING:
    from hvcompile.artifacts import Artifacts, load_artifacts, save_artifacts
    from hvcompile.explanation.explain import explain
    from hvcompile.float8.saved import load_float8, save_float8
    from hvcompile.float8.weights import Restored
    from hvcompile.hollow.host import Offloaded, offload
    from hvcompile.inputs import load_options
    from hvcompile.lowered.lower import Lowered, lower
    from hvcompile.ranks.decoding import Decoding, share_decoding
    from hvcompile.runtime.state import Stats, Step, reset, restore, stats

__all__ = [
    "Artifacts",
    "Decoding",
    "DisagreementError",
    "HvcompileError",
    "InputError",
    "InvalidRewriteError",
    "Lowered",
    "LoweringError",
    "Offloaded",
    "OffloadedWeightError",
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
    "load_artifacts",
    "load_float8",
    "load_options",
    "lower",
    "offload",
    "reset",
    "restore",
    "save_artifacts",
    "save_float8",
    "share_decoding",
    "stats",
]

# Imported when they are first asked for: they import torch, which takes seconds, and the command line's help must not.
_MODULES = {
    "explain": "hvcompile.explanation.explain",
    **dict.fromkeys(("Artifacts", "load_artifacts", "save_artifacts"), "hvcompile.artifacts"),
    "Restored": "hvcompile.float8.weights",
    **dict.fromkeys(("load_float8", "save_float8"), "hvcompile.float8.saved"),
    "load_options": "hvcompile.inputs",
    **dict.fromkeys(("Offloaded", "offload"), "hvcompile.hollow.host"),
    **dict.fromkeys(("Lowered", "lower"), "hvcompile.lowered.lower"),
    **dict.fromkeys(("Decoding", "share_decoding"), "hvcompile.ranks.decoding"),
    **dict.fromkeys(("Stats", "Step", "reset", "restore", "stats"), "hvcompile.runtime.state"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
