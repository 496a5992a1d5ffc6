"""The door to private torch of dispatch modes: whether what runs draws random numbers.

``torch.utils._python_dispatch.TorchDispatchMode`` sees every operation below autograd; nothing public does
(2.11.0, 2.13.0).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Drawing(TorchDispatchMode):
    """Within, ``names`` gains each operation that draws random numbers; attention without dropout draws none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and _dropout(func, args, kwargs) != 0:
            self.names.append(str(func))
        return func(*args, **kwargs)


def _dropout(func: Any, args: Any, kwargs: Any) -> float | None:
    """The probability that an operation drops a value with; None where it has no such argument."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
            return float(given)
    return None
