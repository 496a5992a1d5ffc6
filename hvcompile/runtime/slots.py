"""Slots: the state of the generations that run in one model, each from its first call until it is over."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import torch

STALE_AFTER_CALLS = 32
"""A slot that was not used in this many calls of its model belongs to a generation that is over."""
MOST_SLOTS = 8
"""Generations (or guidance halves) that run at the same time in one model; each holds two or more activations."""


@dataclasses.dataclass(eq=False)
class Slot:
    """The state of one generation.

    Attributes:
        number: tells it from all others of the model.
        tensors: what the graph is given and gives back.
        last_call: number of the model's call that used it last.
        calls: how many have used it.
        is_over: whether a condition that stayed the same object from call to call has been freed.
        seen: the conditions of the last call.
        stable: those that were the same objects in two calls, by place.

    """

    number: int
    tensors: list[torch.Tensor]
    last_call: int = 0
    calls: int = 0
    is_over: bool = False
    seen: list[weakref.ref[torch.Tensor]] = dataclasses.field(default_factory=list)
    stable: dict[int, weakref.ref[torch.Tensor]] = dataclasses.field(default_factory=dict)

    def note(self, conditions: Sequence[torch.Tensor]) -> None:
        """Remember the conditions of a call, which hold none alive.

        A pipeline hands the same tensors in at every step of a generation, and lets them go at its end. One that makes
        them anew at every step lets them go at every step, so that tells nothing.
        """
        self.calls += 1
        for place, (reference, tensor) in enumerate(zip(self.seen, conditions, strict=False)):
            if reference() is not tensor:
                self.stable.pop(place, None)
            elif place not in self.stable:
                self.stable[place] = weakref.ref(tensor, self._end)
        self.seen = list(map(weakref.ref, conditions))

    def _end(self, reference: weakref.ref[torch.Tensor]) -> None:
        # Called wherever a tensor happens to be freed, so it takes no lock; a slot that is over is used by no call.
        if any(reference is held for held in self.stable.values()):
            self.is_over, self.tensors = True, []

    def has_lost(self) -> bool:
        """Whether some condition of the last call is gone."""
        return any(reference() is None for reference in self.seen)


class Slots:
    """The slots of one model, by thread, graph and what tells generations apart."""

    def __init__(self) -> None:
        self.calls = 0
        self._shared: dict[tuple[weakref.ref[threading.Thread], Hashable], list[torch.Tensor]] = {}
        self._numbers = itertools.count()
        self._slots: dict[tuple[weakref.ref[threading.Thread], Hashable], Slot] = {}
        self._single = 0

    def __len__(self) -> int:
        """How many hold state."""
        return sum(not slot.is_over for slot in self._slots.values())

    def values(self) -> Iterable[Slot]:
        """All slots."""
        return self._slots.values()

    def tensors(self) -> Iterator[torch.Tensor]:
        """All that is held."""
        for slot in list(self._slots.values()):
            yield from slot.tensors
        for held in list(self._shared.values()):
            yield from held

    def clear(self) -> None:
        """Forget all."""
        self._slots.clear()
        self._shared.clear()

    def shared(self, key: Hashable, fresh: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
        """What all generations of this thread share, in a list whose items a call replaces.

        Args:
            key: of the graphs that share it.
            fresh: makes the tensors where there are none.

        """
        place = weakref.ref(threading.current_thread()), key
        if place not in self._shared:
            self._shared = {other: held for other, held in self._shared.items() if _is_alive(other[0]())}
            self._shared[place] = fresh()
        return self._shared[place]

    def of_one_call(self, fresh: Callable[[], list[torch.Tensor]]) -> Slot:
        """A slot that no other call will find."""
        return Slot(next(self._numbers), fresh())

    def find(
        self, key: Hashable, conditions: Sequence[torch.Tensor], fresh: Callable[[], list[torch.Tensor]]
    ) -> tuple[Slot, str]:
        """The slot of a call of this thread.

        Args:
            key: of its generation.
            conditions: the tensors of the call that stay as they are for a generation.
            fresh: makes the tensors of a new slot.

        Returns:
            The slot, and why others were of no use, where that has become plain; else an empty text.

        """
        place = weakref.ref(threading.current_thread()), key
        self.calls += 1
        self._drop_finished()
        found, told = self._slots.get(place), ""
        if found is None:
            latest = max(self._slots.values(), key=lambda slot: slot.last_call, default=None)
            self._single = self._single + 1 if latest is not None and latest.calls == 1 else 0
            if self._single >= MOST_SLOTS:
                told = "an input beside the sample and the timestep changes at every step, or generations have one step"
            if len(self._slots) >= MOST_SLOTS:
                lost = [other for other, slot in self._slots.items() if slot.has_lost()]
                if not lost and not told:
                    told = f"more than {MOST_SLOTS} generations, or sets of conditions, run at the same time"
                del self._slots[min(lost or self._slots, key=lambda other: self._slots[other].last_call)]
            found = self._slots[place] = Slot(next(self._numbers), fresh())
        found.last_call = self.calls
        found.note(conditions)
        return found, told

    def _drop_finished(self) -> None:
        """Drop what belongs to generations that are over."""
        for other, slot in list(self._slots.items()):
            is_alive, idle = _is_alive(other[0]()), self.calls - slot.last_call
            # One that lost its conditions may get new ones with the same content, while others run beside it.
            is_lost = slot.has_lost() and idle > 2 * len(self._slots)
            if slot.is_over or not is_alive or is_lost or idle > STALE_AFTER_CALLS:
                del self._slots[other]


def _is_alive(thread: threading.Thread | None) -> bool:
    return thread is not None and thread.is_alive()
