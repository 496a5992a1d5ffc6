"""Where in the model a node or parameter comes from: Dynamo's expressions as dotted paths."""

from __future__ import annotations

import re

from torch import fx

from hvcompile.torch_private.dynamo import source_name

_PATH_PART = re.compile(r"\['([^']+)'\]|\[(\d+)\]|\.([^.\[\]]+)")
_PLUMBING = {"__dict__", "_modules", "_parameters", "_buffers"}


def module_path(expression: str) -> tuple[str, ...]:
    """Split Dynamo's expression for a module into attribute names, without the local variable that it starts from.

    Torch 2.13 writes ``L['self'].__dict__['_modules']['blocks'].0.norm``, 2.11 ``L['self'].blocks.0.norm``; both give
    ``("blocks", "0", "norm")``.
    """
    parts = tuple(next(filter(None, match)) for match in _PATH_PART.findall(expression))
    return tuple(part for part in parts[1:] if part not in _PLUMBING)


def parameter_path(placeholder: fx.Node) -> str:
    """A parameter's or buffer's path in the model, such as ``blocks.0.norm.weight``; else the placeholder's name."""
    parts = [part for part in module_path(source_name(placeholder)) if part not in {"_parameters", "_buffers"}]
    return ".".join(parts) or placeholder.name
