"""What values between the graphs of a model came from, followed from call to call; see ``trunk.lineage``.

A value is known by the object that it is. Python code between two graphs that makes another tensor of it ends what is
known, and so does a write into it. Then a step of the graph that holds the blocks is computed. Of writes that leave no
trace on the host some elements tell, on the device, when the value is taken.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary

from hvcompile.ranks.fingerprints import hash_of, sketch
from hvcompile.torch_private.storages import version_of
from hvcompile.trunk.lineage import Flow, Lineage, Made, Root, RootKey

# What a value came from is forgotten beyond this number of inputs: it has come through a loop of graphs.
MOST_ROOTS = 256

# An index, not a store: it holds what graphs returned weakly.
_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()
_LOCK = threading.Lock()


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else version_of(tensor)  # made in inference mode, it carries no counter


def lineage_of(item: Any) -> Lineage | None:
    """Where a value came from; None where it came from no graph, or was seen to be written to since."""
    known = _known(item)
    return None if known is None else known.lineage


class _Known(NamedTuple):
    """What is remembered of a value that a graph returned; ``content`` is its ``sketch``."""

    lineage: Lineage
    version: int
    content: torch.Tensor

    def written(self, item: torch.Tensor) -> torch.Tensor:
        """0 where the value's elements that are looked at are what they were, else another number; int64 scalar."""
        return sketch(item) - self.content


def _known(item: Any) -> _Known | None:
    if not isinstance(item, torch.Tensor):
        return None
    with _LOCK:
        known: _Known | None = _KNOWN.get(item)  # type: ignore[no-untyped-call]
    return known if known is not None and known.version == _version(item) else None


def record(number: int, weights: Callable[[], Made], flow: Flow, args: Sequence[Any], results: Sequence[Any]) -> None:
    """Remember where the outputs of a call came from.

    Args:
        number: of the compiled graph.
        weights: tells of its weights; asked only where there is something to remember.
        flow: of the captured graph.
        args: of the call, in the order of the captured graph.
        results: of the call.

    """
    given = set(map(id, args))
    made = [
        place
        for place, item in enumerate(results)
        if isinstance(item, torch.Tensor) and id(item) not in given and flow.outputs[place]
    ]
    if not made:
        return
    roots: dict[RootKey, Root] = {}
    makers = {number: weights()}
    follows: dict[int, frozenset[RootKey]] = {}
    for place in flow.inputs:
        lineage = lineage_of(args[place])
        if lineage is None or number in lineage.made_by:  # a graph that runs again begins anew
            roots[number, place] = Root(args[place], place in flow.times)
            follows[place] = frozenset([(number, place)])
        else:
            roots.update(lineage.roots)
            makers.update(lineage.made_by)
            follows[place] = lineage.followed
    if len(roots) > MOST_ROOTS:
        return
    with _LOCK:
        for place in made:
            followed = frozenset[RootKey]().union(*(follows[source] for source in flow.outputs[place]))
            result = results[place]
            _KNOWN[result] = _Known(Lineage(roots, followed, makers), _version(result), sketch(result))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origins:
    """How a graph learns of the sample and the timestep, which entered earlier graphs; see ``trunk.lineage.Earlier``.

    Attributes:
        places: of the inputs that earlier graphs have made.
        known: of inputs that are the sample or the timestep itself.
        kinds: of the roots, in order.
        sample: which root it is.
        clocks: which roots they are.
        num_clocks: how many timesteps these hold.
        device: of what the graph is given.

    """

    places: tuple[int, ...]
    known: tuple[int, ...]
    kinds: tuple[Hashable, ...]
    sample: int
    clocks: tuple[int, ...]
    num_clocks: int
    device: torch.device

    def trace(self, args: Sequence[Any]) -> Traced | None:
        """What earlier graphs tell of a call; None where they tell nothing, or something else than when compiled."""
        roots: dict[RootKey, Root] = {}
        makers: dict[int, Made] = {}
        contents: list[torch.Tensor] = []
        for place in self.places:
            known = _known(args[place])
            if known is None:
                return None
            roots.update(known.lineage.roots)
            makers.update(known.lineage.made_by)
            contents.append(known.written(args[place]))
        found = list(roots.values())
        if tuple(root.kind for root in found) != self.kinds:
            return None
        told = [found[place].value for place in (self.sample, *self.clocks)]
        if sum(item.numel() for item in told[1:]) != self.num_clocks:
            return None
        if any(all(args[place] is not item for item in told) for place in self.known):
            return None
        others = [root.value for root in found if all(root.value is not item for item in told)]
        clock = torch.cat([item.detach().reshape(-1).to(self.device, torch.float64) for item in told[1:]])
        contents += [hash_of(item) for item in others if isinstance(item, torch.Tensor)]
        contents += [made.content for made in makers.values() if made.content is not None]
        content = hash_of(torch.stack([item.to(self.device) for item in contents])) if contents else self._nothing()
        return Traced(
            given=[clock, hash_of(told[0]).reshape(1).to(self.device), content.reshape(1)],
            others=others,
            revisions=frozenset((number, made.revision) for number, made in makers.items()),
        )

    def untold(self) -> list[torch.Tensor]:
        """What the graph is given where nothing is known; with fresh state the step is computed, whatever it is."""
        clock = torch.zeros(self.num_clocks, dtype=torch.float64, device=self.device)
        return [clock, self._nothing(), self._nothing()]

    def _nothing(self) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.int64, device=self.device)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced:
    """What earlier graphs tell of one call.

    Attributes:
        given: to the graph: ``Earlier.clock``, ``mark`` and ``content``.
        others: the conditions: tensors and numbers.
        revisions: the earlier graphs, each with the revision of its weights.

    """

    given: Sequence[torch.Tensor]
    others: Sequence[Any]
    revisions: frozenset[tuple[int, int]]

    def generation(self, fingerprint_of: Callable[[torch.Tensor], int]) -> Hashable:
        """What tells the call's generation from others."""
        others = tuple(fingerprint_of(item) if isinstance(item, torch.Tensor) else item for item in self.others)
        return others, self.revisions
