"""What a module's code can change beside its tensors: globals, closures, attributes of classes, objects it holds."""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hvcompile.ranks.attributes import PLAIN, slots_of

_LIBRARIES = {
    *sys.stdlib_module_names,
    "__future__",
    "torch",
    "numpy",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
}
"""Packages whose functions are not followed, but for the files that the modules' own classes are in."""


class Surroundings:
    """Tells whether code changed something around a module, and puts it back.

    Looked at is what the functions of the modules' classes name: their globals and closures, and from there lists,
    dicts, objects, and functions in turn; besides, the attributes of these classes, and what the modules hold other
    than modules and tensors. The content of tensors is not looked at.

    Args:
        module: it and all modules in it.
        but: names of attributes of the module itself that are left out.

    """

    def __init__(self, module: nn.Module, *, but: tuple[str, ...] = ()) -> None:
        self._seen: dict[int, Any] = {}
        self._containers: list[tuple[Any, Any]] = []
        self._names: list[tuple[Any, str, Any]] = []  # a dict of globals or an object, a name in it, and its value
        usual = vars(nn.Module())
        self._files = {type(part).__module__ for part in module.modules()}
        for part in module.modules():
            self._see(type(part))
            for name, value in vars(part).items():
                if name not in usual and not (part is module and name in but):
                    self._see(value)

    def have_changed(self) -> bool:
        """Whether another object stands somewhere."""
        return any(not _is_same(container, content) for container, content in self._containers) or any(
            _value(holder, name) is not value for holder, name, value in self._names
        )

    def restore(self) -> None:
        """Put back what was there."""
        for container, content in self._containers:
            if not _is_same(container, content):
                container.clear()
                container.update(content) if isinstance(container, (dict, set)) else container.extend(content)
        for holder, name, value in self._names:
            if _value(holder, name) is value:
                continue
            if isinstance(holder, dict):
                holder[name] = value
            elif value is not _ABSENT:
                setattr(holder, name, value)
            else:
                delattr(holder, name)

    def _see(self, value: Any) -> None:
        if id(value) in self._seen or isinstance(value, (*PLAIN, torch.Tensor, nn.Module, types.ModuleType)):
            return
        self._seen[id(value)] = value
        if isinstance(value, type):
            self._see_class(value)
        elif isinstance(value, types.FunctionType):
            self._see_function(value)
        elif isinstance(value, types.MethodType):
            self._see(value.__func__)
            self._see(value.__self__)
        elif isinstance(value, functools.partial):
            self._see((value.func, value.args, value.keywords))
        elif isinstance(value, (list, dict, set, collections.deque)):
            self._containers.append((value, value.copy()))
            for part in (*value.values(),) if isinstance(value, dict) else (*value,):
                self._see(part)
        elif isinstance(value, (tuple, frozenset)):
            for part in value:
                self._see(part)
        elif isinstance(value, (staticmethod, classmethod, property)) or hasattr(value, "__wrapped__"):
            self._see(getattr(value, "fget", None) or getattr(value, "__wrapped__", None))
        elif self._is_own(type(value)) or isinstance(value, (types.SimpleNamespace, threading.local)):
            self._see(type(value))
            self._see(getattr(value, "__dict__", None))
            self._names += [(value, name, _value(value, name)) for name in slots_of(value)]

    def _see_class(self, owner: type) -> None:
        for kind in owner.__mro__:
            if not self._is_own(kind):
                continue
            for name, value in vars(kind).items():
                if isinstance(value, (*PLAIN, torch.Tensor)) and not name.startswith("__"):
                    self._names.append((kind, name, value))
                self._see(value)

    def _see_function(self, function: types.FunctionType) -> None:
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty one
                self._names.append((cell, "cell_contents", cell.cell_contents))
                self._see(cell.cell_contents)
        if not self._is_own(function):
            return
        namespace = function.__globals__
        for name in _names_in(function.__code__):
            if name in namespace:
                self._names.append((namespace, name, namespace[name]))
                self._see(namespace[name])

    def _is_own(self, owner: Any) -> bool:
        file = getattr(owner, "__module__", None) or "torch"
        return file in self._files or file.partition(".")[0] not in _LIBRARIES


@contextlib.contextmanager
def kept(module: nn.Module, *, but: tuple[str, ...] = ()) -> Iterator[None]:
    """Within, a module's surroundings may change; afterwards they are as before."""
    before = Surroundings(module, but=but)
    try:
        yield
    finally:
        before.restore()


_ABSENT = object()


def _value(holder: Any, name: str) -> Any:
    if isinstance(holder, dict):
        return holder.get(name, _ABSENT)
    return vars(holder).get(name, _ABSENT) if isinstance(holder, type) else getattr(holder, name, _ABSENT)


def _is_same(container: Any, content: Any) -> bool:
    """Whether a container has the very objects that it had."""
    if len(container) != len(content):
        return False
    if isinstance(container, set):
        return bool(container == content)
    pairs = zip(container, content, strict=True)
    if isinstance(container, dict):
        return all(mine is its and container[mine] is content[its] for mine, its in pairs)
    return all(mine is its for mine, its in pairs)


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _names_in(part)
