"""A model's trunk, as the backend sees it before the passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hvcompile.trunk.outline import recover
from hvcompile.trunk.trunk import Trunk


def recovered(model: nn.Module, **inputs: Any) -> Trunk:
    """The trunk of a model as one call of it is captured."""
    found: list[Trunk] = []

    def backend(module: Any, _: object) -> Callable[..., Any]:
        trunk = recover(module)
        assert isinstance(trunk, Trunk), trunk
        found.append(trunk)
        return module.forward  # type: ignore[no-any-return]

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    return found[0]
