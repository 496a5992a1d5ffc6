"""The first call of a compiled graph, saved: the inputs that a dump's files run on, and the outputs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


class FirstCall:
    """Runs a compiled graph, and passes on the inputs of its first call, and then the outputs.

    Args:
        run: the compiled graph.
        save_inputs: called with the inputs, before the first call; returns whether the outputs are wanted.
        save_outputs: called with the outputs, after it.

    """

    def __init__(
        self,
        run: Callable[..., Sequence[Any]],
        save_inputs: Callable[[Sequence[Any]], bool],
        save_outputs: Callable[[Sequence[Any]], None],
    ) -> None:
        self._run, self._save_inputs, self._save_outputs = run, save_inputs, save_outputs
        self._is_first = threading.Lock()  # taken by the first call, of whatever thread, and never given back

    def __call__(self, *args: Any) -> Sequence[Any]:
        """Run the graph."""
        if not self._is_first.acquire(blocking=False):
            return self._run(*args)
        wants_outputs = self._save_inputs(args)
        results = self._run(*args)
        if wants_outputs:
            self._save_outputs(results)
        return results


def can_save(item: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` restores an input as it was; it doesn't for subclasses of tensors."""
    if isinstance(item, torch.Tensor):
        return type(item) in {torch.Tensor, torch.nn.Parameter} and item.layout is torch.strided
    return item is None or isinstance(item, (bool, int, float))


def num_bytes(item: Any) -> int:
    """The bytes that an input takes on disk."""
    return _length(item) * item.element_size() if isinstance(item, torch.Tensor) else 0


def compact(item: Any) -> Any:
    """A tensor of the same strides without the rest of the storage that it may be a view of; others as they are."""
    if not isinstance(item, torch.Tensor):
        return item
    item = item.detach()
    if num_bytes(item) < item.untyped_storage().nbytes():
        line = item.as_strided((_length(item),), (1,)).clone()
        return line.as_strided(item.shape, item.stride())
    return item


def _length(tensor: torch.Tensor) -> int:
    """Elements from a strided tensor's first to its last."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def save(content: Any, file: Path) -> None:
    """Write a file with ``torch.save``; it is complete, or not there.

    Raises:
        OSError: the disk is full, or the file can't be written.

    """
    part = file.with_suffix(".part")
    try:
        torch.save(content, part)
        part.replace(file)
    except RuntimeError as error:  # torch's archive writer raises it for an error of the system
        raise OSError(str(error)) from error
    finally:
        part.unlink(missing_ok=True)
