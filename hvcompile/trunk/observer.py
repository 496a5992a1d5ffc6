"""Observers: whoever wants to hear of a compilation's stages without standing between its lines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.journal import Declined, JournalRow
from hvcompile.trunk.trunk import StoredWeights, Trunk

CAPTURED, OUTLINED, SEALED = "captured", "outlined", "sealed"
"""Stages of a graph beside those that are named after a pass."""


class Observer:
    """Hears of one compilation, in the order of these methods; here each does nothing.

    An observer changes nothing that it is handed. It may end the compilation by raising.
    """

    def on_stage(self, name: str, module: fx.GraphModule, trunk: Trunk | None) -> None:
        """Hear of the graph as it was captured (when there is no trunk yet), outlined, after each pass, and sealed."""

    def on_fault(self, declined: Declined) -> None:
        """Hear that something failed in a way that nobody foresaw, and what and why.

        The stages since the graph was captured are void: those without it follow, if any.
        """

    def on_rewritten(self, trunk: Trunk | None, journal: Sequence[JournalRow], error: BaseException | None) -> None:
        """Hear, before the graph is sealed, that the passes are done or why they end.

        Args:
            trunk: as the passes left it; None for a graph without one, which stays as it is.
            journal: what they did.
            error: what a pass or a check raised, and what is raised again afterwards; None where all is well.

        """

    def on_sealed(self, trunk: Trunk, fault: Declined | None) -> None:
        """Hear that the graph is sealed, or why it can't be, in which case it is compiled as it was captured."""

    @contextlib.contextmanager
    def lowering(self, trunk: Trunk | None) -> Iterator[None]:
        """Give a context in which the graph is lowered."""
        del trunk
        yield

    def before_weights_go(self, args: Sequence[Any], places: Sequence[int]) -> None:
        """Hear that the inputs at these places are about to lose their memory to float8 copies."""

    def on_stored(self, weights: StoredWeights, data: torch.Tensor, scale: torch.Tensor) -> None:
        """Hear of a float8 copy, which the compiled graph takes in the place of weights."""

    def around_calls(self, run: Callable[..., Any], derive: Callable[[Sequence[Any]], Any]) -> Callable[..., Any]:
        """Give what Dynamo is to call in place of ``run``, with the same inputs and outputs.

        Args:
            run: the compiled graph.
            derive: given a call's inputs, what the runtime adds to them, by the placeholder's name; or why another
                graph runs that call.

        """
        del derive
        return run


class Observers(Observer):
    """Several observers as one, each told in turn; of the lowering's contexts the first observer's ends first."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def on_stage(self, name: str, module: fx.GraphModule, trunk: Trunk | None) -> None:
        """Tell each; as do all methods here."""
        for observer in self._observers:
            observer.on_stage(name, module, trunk)

    def on_fault(self, declined: Declined) -> None:
        """See ``Observer``."""
        for observer in self._observers:
            observer.on_fault(declined)

    def on_rewritten(self, trunk: Trunk | None, journal: Sequence[JournalRow], error: BaseException | None) -> None:
        """See ``Observer``; where one raises, those after it hear of that error."""
        for place, observer in enumerate(self._observers):
            try:
                observer.on_rewritten(trunk, journal, error)
            except BaseException as own:
                Observers(*self._observers[place + 1 :]).on_rewritten(trunk, journal, error or own)
                raise

    def on_sealed(self, trunk: Trunk, fault: Declined | None) -> None:
        """See ``Observer``."""
        for observer in self._observers:
            observer.on_sealed(trunk, fault)

    @contextlib.contextmanager
    def lowering(self, trunk: Trunk | None) -> Iterator[None]:
        """See ``Observer``."""
        with contextlib.ExitStack() as contexts:
            for observer in reversed(self._observers):
                contexts.enter_context(observer.lowering(trunk))
            yield

    def before_weights_go(self, args: Sequence[Any], places: Sequence[int]) -> None:
        """See ``Observer``."""
        for observer in self._observers:
            observer.before_weights_go(args, places)

    def on_stored(self, weights: StoredWeights, data: torch.Tensor, scale: torch.Tensor) -> None:
        """See ``Observer``."""
        for observer in self._observers:
            observer.on_stored(weights, data, scale)

    def around_calls(self, run: Callable[..., Any], derive: Callable[[Sequence[Any]], Any]) -> Callable[..., Any]:
        """See ``Observer``."""
        for observer in self._observers:
            run = observer.around_calls(run, derive)
        return run
