"""The door to private torch of dispatch modes: what the operations of some code read, write and draw, and their shapes.

``torch.utils._python_dispatch.TorchDispatchMode`` sees every operation below autograd; nothing public does
(2.11.0, 2.13.0).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Container, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hvcompile.torch_private.storages import storage_id

_POINTWISE = {
    torch.ops.aten.add.Tensor,
    torch.ops.aten.sub.Tensor,
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.div.Tensor,
    torch.ops.aten.copy_.default,
}
"""What tiles are blended with, a row at a time."""


class Shapes(TorchDispatchMode):
    """Within, blending on the meta device is quick: torch does it in Python, in 0.1 ms for each addition.

    A video of 129 frames in 1280x720 is blended by 200,000 operations.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _POINTWISE and not kwargs and _is_plain(*args):
            return args[0] if func is torch.ops.aten.copy_.default else torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, the mode is off; it must be the innermost."""
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            self.__enter__()  # type: ignore[no-untyped-call]


class Draws(Shapes):  # type: ignore[no-untyped-call]
    """Within, ``draws`` gains each operation that draws random numbers; attention without dropout draws none."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and _dropout(func, args, kwargs or {}) != 0:
            self.draws.append(str(func))
        return super().__torch_dispatch__(func, types, args, kwargs)


class ForeignTensorError(Exception):
    """An operation reads or writes what it must not; the message says which and what, as a part of a sentence."""


class Around(Draws):  # type: ignore[no-untyped-call]
    """Within, code runs around calls whose results are on the meta device; it is off (``paused``) in these.

    Args:
        writable: tensors that were there before and may be written into.
        hidden: storages on the meta device that the code must not read, as what they stand for is elsewhere. More may
            come to it.

    Raises:
        ForeignTensorError: from an operation that writes into any other tensor that was there before, that reads what
            is hidden, or that would write a result into a tensor that has memory, which torch skips without a word.

    """

    def __init__(self, writable: Iterable[torch.Tensor], hidden: Container[int]) -> None:
        super().__init__()
        self._hidden = hidden
        self._made = {storage_id(tensor): tensor.untyped_storage() for tensor in writable}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*tensors_in((args, kwargs or {}))]
        results = [tensor for tensor in given if tensor.is_meta]
        if any(storage_id(tensor) in self._hidden for tensor in results):
            raise ForeignTensorError(f"decode reads what its decoder keeps or hands on ({func})")
        for tensor in _written(func, args, kwargs or {}):
            if tensor.is_meta:
                continue
            if results:
                raise ForeignTensorError(f"decode writes a result of its decoder into another tensor ({func})")
            if storage_id(tensor) not in self._made:
                raise ForeignTensorError(f"decode writes into a tensor that was there before ({func})")
        answer = super().__torch_dispatch__(func, types, args, kwargs)
        known = {storage_id(tensor) for tensor in given if not tensor.is_meta}
        for tensor in tensors_in(answer):
            if not tensor.is_meta and storage_id(tensor) not in known:
                self._made[storage_id(tensor)] = tensor.untyped_storage()
        return answer


class Operations(Draws):  # type: ignore[no-untyped-call]
    """Within, every operation is seen: what it reads that came from elsewhere, and what it writes into.

    Args:
        given: tensors that may be read.
        made: tensors that may be read and written into.

    Attributes:
        strays: each operation that reads a tensor which was neither given nor made within.
        writes: each operation that writes into a tensor which was not made within.

    """

    def __init__(self, given: Iterable[torch.Tensor], made: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.strays: list[str] = []
        self.writes: list[str] = []
        self._held: list[Any] = []  # a storage's id is its own as long as the storage is there
        self._made = {self._hold(tensor) for tensor in made}
        self._readable = {self._hold(tensor) for tensor in given} | self._made
        self._told = hashlib.sha256()

    @property
    def digest(self) -> str:
        """Equal for the same operations on the same shapes and numbers, in the same order."""
        return self._told.hexdigest()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(storage_id(tensor) not in self._readable for tensor in tensors_in((args, kwargs))):
            self.strays.append(str(func))
        if any(storage_id(tensor) not in self._made for tensor in _written(func, args, kwargs)):
            self.writes.append(str(func))
            raise ForeignTensorError(f"it writes into what it did not make ({func})")  # before it does
        self._told.update(repr((str(func), _described((args, kwargs)))).encode())
        answer = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tensors_in(answer):
            if storage_id(tensor) not in self._readable:  # a view of what was given was not made here
                made = self._hold(tensor)
                self._made.add(made)
                self._readable.add(made)
        return answer

    def _hold(self, tensor: torch.Tensor) -> int:
        self._held.append(tensor.untyped_storage())
        return storage_id(tensor)


def _is_plain(first: Any, second: Any, *more: Any) -> bool:
    """Whether the result of two operands is like the first, which is a float tensor on the meta device."""
    if more or not isinstance(first, torch.Tensor) or not first.is_meta or not first.is_floating_point():
        return False
    if isinstance(second, torch.Tensor):
        return (
            second.is_meta
            and first.dtype == second.dtype
            and first.shape == second.shape
            and first.stride() == second.stride()
        )
    return isinstance(second, float)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in lists, tuples and dicts, in their order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """The tensors that an operation writes into."""
    is_training = any(_argument(func, args, kwargs, name) is True for name in ("training", "train"))
    for position, argument in enumerate(func._schema.arguments):
        is_write = argument.alias_info is not None and argument.alias_info.is_write
        # Batch norm writes its statistics without saying so.
        if is_write or (argument.name in {"running_mean", "running_var"} and is_training):
            yield from tensors_in(args[position] if position < len(args) else kwargs.get(argument.name))


def _described(value: Any) -> Any:
    """An argument, with shapes in the places of tensors."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), str(value.dtype)
    if isinstance(value, (list, tuple)):
        return [_described(part) for part in value]
    if isinstance(value, dict):
        return [(name, _described(part)) for name, part in value.items()]
    return repr(value)


def _dropout(func: Any, args: Any, kwargs: Any) -> float | None:
    """The probability that an operation drops a value with; None where it has no such argument."""
    given = _argument(func, args, kwargs, "dropout_p")
    return None if given is None else float(given)


def _argument(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    """What an operation is given for an argument, or its default; None where it has none of that name."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[position] if position < len(args) else kwargs.get(name, argument.default_value)
    return None
