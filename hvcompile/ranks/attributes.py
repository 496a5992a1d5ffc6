"""All that a module keeps, so that two looks at it tell whether something changed in between."""

from __future__ import annotations

import collections
import types
from typing import Any

import torch
from torch import nn

from hvcompile.torch_private.storages import storage_id, version_of

PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
"""What is compared by its value."""


def kept_by(module: nn.Module) -> Any:
    """Whatever a module and those in it keep: tensors, numbers, and what lists, dicts and objects hold.

    Two of what it returns are equal where nothing was assigned, written in place or put into a container between them.
    """
    return content_of(vars(module))


def content_of(value: Any) -> Any:
    """What ``kept_by`` says of a module, of any value."""
    return _content(value, set())


def _content(value: Any, seen: set[int]) -> Any:
    """A value by what it is: its identity, and that of all it holds."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, (dict, list, set)) and not value:  # most attributes of a module
        return id(value)
    same = _Same(value)
    if id(value) in seen or isinstance(value, (type, types.ModuleType)):
        return same
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return same, storage_id(value), version_of(value)
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return same, [_content(part, seen) for part in value]
    if isinstance(value, dict):
        return same, [(str(name), _content(part, seen)) for name, part in value.items()]
    if isinstance(value, types.FunctionType):
        return same, [_content(cell.cell_contents, seen) for cell in value.__closure__ or () if _is_filled(cell)]
    if isinstance(value, types.MethodType):
        return same, _content(value.__self__, seen)
    slots = [_content(getattr(value, name, None), seen) for name in slots_of(value)]
    return same, _content(getattr(value, "__dict__", None), seen), slots


def slots_of(value: Any) -> list[str]:
    """The names of an object's attributes that are in slots rather than in its ``__dict__``."""
    found: list[str] = []
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            is_private = name.startswith("__") and not name.endswith("__")
            found.append(f"_{kind.__name__.lstrip('_')}{name}" if is_private else name)
    return [name for name in found if name not in {"__dict__", "__weakref__"}]


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # an empty one raises
    except ValueError:
        return False
    return True


class _Same:
    """Holds an object, so that no other gets its id, and equals what holds the same one."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
