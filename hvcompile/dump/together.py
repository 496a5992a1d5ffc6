"""Ranks that bisect one dump in step: they tell each other what came of every step, and go on or stop alike."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

from hvcompile.dump.figures import Figure, badness
from hvcompile.errors import InputError
from hvcompile.ranks.store import Exchange

log = logging.getLogger(__name__)


class Together:
    """The ranks that bisect one dump in step; a process alone is one of one.

    Args:
        exchange: of all ranks; None where this process is alone.

    """

    def __init__(self, exchange: Exchange | None) -> None:
        self._exchange = exchange if exchange is not None and exchange.size > 1 else None
        self.size = 1 if self._exchange is None else self._exchange.size

    def gather(self, item: Any) -> list[Any]:
        """Each rank's item, by rank; as JSON has it where there are several."""
        if self._exchange is None:
            return [item]
        return [theirs for _, theirs in sorted(self._exchange(item), key=lambda pair: pair[0])]

    def run(self, function: Callable[[], Any]) -> Any:
        """Call a function on every rank and return what it returns here.

        Raises:
            InputError: the function raises it on some rank; all ranks raise it then.

        """
        result, problem = self.attempt(function, ())
        assert not problem
        return result

    def attempt(self, function: Callable[[], Any], caught: tuple[type[BaseException], ...]) -> tuple[Any, str]:
        """Call a function on every rank.

        Args:
            function: what to call.
            caught: exceptions that are a result rather than an error.

        Returns:
            What the function returns here, and the exception of the first rank to raise one of ``caught``, as text;
            empty where none did.

        Raises:
            InputError: the function raises it on some rank; all ranks raise it then.

        """
        result, refused, problem = None, "", ""
        try:
            result = function()
        except InputError as error:
            if self._exchange is None:
                raise
            refused = str(error)
        except caught as error:
            problem = f"raises {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if self._exchange is None:
            return result, problem
        if problem:  # ranks that wait for this one in a collective of NCCL end with their process, and say nothing
            log.warning("rank %d %s", self._exchange.rank, problem)
        # In the order in which the ranks came here: one that waited for a rank that raised, raises later.
        for rank, (refusal, theirs) in self._exchange((refused, problem)):
            if refusal:
                raise InputError(f"rank {rank}: {refusal}")
            if theirs:
                return result, f"on rank {rank} {theirs}"
        return result, ""

    def compare(self, what: str, items: list[str]) -> None:
        """Return only where all ranks have the same items.

        Raises:
            InputError: they differ; ``what`` says in the message what it is that they are of.

        """
        first, *others = self.gather(items)
        for rank, other in enumerate(others, 1):
            if other != first:
                lacking, more = ([item for item in a if item not in b] for a, b in ((first, other), (other, first)))
                differences = [f"lacks {', '.join(lacking)}"] if lacking else []
                differences += [f"has {', '.join(more)}"] if more else []
                raise InputError(
                    f"{what} on rank {rank} is another than on rank 0 (it "
                    f"{' and '.join(differences) or 'has another order'}): ranks are bisected together where they "
                    "compiled the same graphs; dump again, into an empty directory"
                )

    def worst(self, figures: Sequence[Figure]) -> tuple[Figure, ...]:
        """For each output, the figure of the rank where it is worst."""
        if self._exchange is None:
            return tuple(figures)
        worst: dict[tuple[int, int], Figure] = {}
        for rank, rows in enumerate(self.gather([dataclasses.asdict(item) for item in figures])):
            for row in rows:
                figure = Figure(**{**row, "shape": tuple(row["shape"]), "rank": rank})
                known = worst.get((figure.call, figure.output))
                if known is None or badness(figure) > badness(known):
                    worst[figure.call, figure.output] = figure
        return tuple(worst[place] for place in sorted(worst))
