"""The weights of a call: whether any has changed since the last one, and their float8 copies."""

from __future__ import annotations

import dataclasses
import logging
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hvcompile.float8.format import Granularity
from hvcompile.float8.weights import Joined, join

log = logging.getLogger(__name__)

# There are over a thousand weights to look at in every step: what runs for each of them runs in C.
_VERSION = operator.attrgetter("_version")
_JOINED = operator.attrgetter("joined")


def picker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes the items at these places out of a sequence."""
    if len(places) > 1:
        return operator.itemgetter(*places)
    return lambda items: tuple(items[place] for place in places)


class WeightRevisions:
    """The weights of the last call of one compiled graph, and a number that changes when any of them does.

    That is where a weight is written to in place (a fused LoRA, ``load_state_dict``) or is another tensor, be it one
    that stood elsewhere before. Read on the host alone. A write through ``.data``, or into a tensor made under
    ``torch.inference_mode()``, leaves no trace and is not seen.
    """

    def __init__(self) -> None:
        self.revision = 0
        self._seen: list[weakref.ref[torch.Tensor]] = []
        self._versioned: list[weakref.ref[torch.Tensor]] = []
        self._versions = -1

    def look(self, weights: Sequence[torch.Tensor]) -> int:
        """The revision of these weights."""
        # Compared by identity, as id() would not do: a freed weight's id comes again.
        is_same = len(weights) == len(self._seen) and all(map(operator.is_, weights, map(operator.call, self._seen)))
        if not is_same:
            self._seen = [weakref.ref(weight) for weight in weights]
            self._versioned = [weakref.ref(weight) for weight in weights if not weight.is_inference()]
            if len(self._versioned) < len(self._seen):
                log.warning(
                    "%d weights were made under torch.inference_mode(): writes into them are not seen, so call "
                    "hvcompile.reset(model) after one",
                    len(self._seen) - len(self._versioned),
                )
        versions = sum(map(_VERSION, map(operator.call, self._versioned)))
        if not is_same or versions != self._versions:
            self._versions = versions
            self.revision += 1
        return self.revision


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """Weights that the graph takes as one float8 matrix: their positions among the inputs and paths in the model."""

    positions: tuple[int, ...]
    paths: tuple[str, ...]
    granularity: Granularity
    keep_original: bool

    def of(self, args: Sequence[Any]) -> Joined:
        """The matrix for a call with these inputs; made, and the weights freed, where it is not there yet."""
        weights = [args[place] for place in self.positions]
        return join(weights, self.paths, granularity=self.granularity, keep_original=self.keep_original)


class StoredFloat8:
    """One model's float8 weights as they are passed to one compiled graph, and a number that changes when any does."""

    def __init__(self, layouts: Sequence[WeightLayout]) -> None:
        self._layouts = layouts
        self._sources = picker([place for layout in layouts for place in layout.positions])
        self.revision = 0
        self._seen: list[weakref.ref[torch.Tensor]] = []
        self._joined: list[Joined] = []
        self._tensors: list[torch.Tensor] = []

    def of(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """What to pass for a call with these inputs."""
        sources = self._sources(args)
        if not self._is_as_before(sources):
            joined = [(layout, layout.of(args)) for layout in self._layouts]
            self._tensors = [tensor for _, item in joined for tensor in (item.data, item.scale)]
            self._joined = [item for layout, item in joined for _ in layout.positions]
            self._seen = [weakref.ref(source) for source in sources]
            self.revision += 1
        return self._tensors

    def forget(self) -> None:
        """Let go of what is held; the next call looks anew."""
        self._seen, self._joined, self._tensors = [], [], []

    def _is_as_before(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether these are the weights of the last call, neither restored since then nor quantised anew."""
        if len(sources) != len(self._seen) or not all(map(operator.is_, sources, map(operator.call, self._seen))):
            return False
        try:
            return all(map(operator.is_, map(_JOINED, sources), self._joined))
        except AttributeError:  # restored, which not every version of Dynamo guards against
            return False
