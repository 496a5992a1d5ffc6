"""Derived inputs: computed from a call's other inputs, and kept for as long as those come again."""

from __future__ import annotations

import collections
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hvcompile.journal import Declined
from hvcompile.torch_private.storages import mark_of

# Sets of inputs whose results are kept at most: guidance halves and prompts that run in turn.
MOST_KEPT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class DerivedCall:
    """How to compute some derived inputs: see ``trunk.Derived``.

    ``sources`` are positions of a call's inputs, ``names`` are those of the placeholders.
    """

    made_by: str
    names: tuple[str, ...]
    run: Callable[..., Sequence[torch.Tensor]]
    sources: tuple[int, ...]
    is_kept: bool
    read: Callable[[Sequence[torch.Tensor]], Sequence[Any] | Declined] | None


class _Seen:
    """One set of inputs and what followed from it; tensors are told by identity, version and address."""

    def __init__(self, sources: Sequence[Any], result: Sequence[Any] | Declined) -> None:
        self.thread, self.result = threading.get_ident(), result
        self._sources: list[tuple[weakref.ref[Any] | None, Any]] = [
            (weakref.ref(item), mark_of(item)) if isinstance(item, torch.Tensor) else (None, item) for item in sources
        ]

    def is_of(self, sources: Sequence[Any]) -> bool:
        """Whether these are the same inputs, unmodified."""
        for item, (reference, known) in zip(sources, self._sources, strict=True):
            if isinstance(item, torch.Tensor):
                is_other = reference is None or reference() is not item
                if is_other or mark_of(item) != known:
                    return False
            elif type(item) is not type(known) or item != known:
                return False
        return self.thread == threading.get_ident()

    def is_over(self) -> bool:
        """Whether one of the inputs is gone, so that they can't come again."""
        return any(reference is not None and reference() is None for reference, _ in self._sources)


class Kept:
    """What one graph derived from one model's inputs lately."""

    def __init__(self) -> None:
        self._seen: collections.deque[_Seen] = collections.deque(maxlen=MOST_KEPT)
        self._lock = threading.Lock()

    def values_for(self, call: DerivedCall, args: Sequence[Any]) -> Sequence[Any] | Declined:
        """The derived inputs of a call, or why there are none; computed where its sources are not those of late."""
        sources = [args[place] for place in call.sources]
        # A tensor made in inference mode carries no version counter, so that it may change unseen.
        is_tracked = not any(isinstance(item, torch.Tensor) and item.is_inference() for item in sources)
        is_kept = call.is_kept and is_tracked
        if is_kept:
            with self._lock:
                for seen in self._seen:
                    if seen.is_of(sources):
                        return seen.result
        with torch.no_grad():
            results = call.run(*sources)
        values: Sequence[Any] | Declined = results if call.read is None else call.read(results)
        if is_kept:
            with self._lock:
                fresh = [seen for seen in self._seen if not seen.is_over()]
                self._seen.clear()
                self._seen.extend([*fresh, _Seen(sources, values)])
        return values

    def tensors(self) -> Iterator[torch.Tensor]:
        """The tensors that are kept."""
        with self._lock:
            for seen in self._seen:
                if not isinstance(seen.result, Declined):
                    yield from (item for item in seen.result if isinstance(item, torch.Tensor))
