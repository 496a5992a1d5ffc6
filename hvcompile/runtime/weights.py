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
from hvcompile.torch_private.storages import version_of

log = logging.getLogger(__name__)

# There are over a thousand weights to look at in every step: what runs for each of them runs in C.
_JOINED = operator.attrgetter("joined")


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that returns the items at these positions of a sequence."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda items: tuple(items[position] for position in positions)


class WeightRevisions:
    """The weights of the last call of one compiled graph, and a number that changes when any of them does.

    A weight changes if it is written to in place (a fused LoRA, ``load_state_dict``) or is another tensor, even one
    that was another weight before. All is read on the host. Two kinds of write leave no trace and are not seen: through
    ``.data``, and into a tensor made under ``torch.inference_mode()``.
    """

    def __init__(self) -> None:
        self.revision = 0
        self._seen: list[weakref.ref[torch.Tensor]] = []
        self._versioned: list[weakref.ref[torch.Tensor]] = []
        self._versions = -1

    def revision_of(self, weights: Sequence[torch.Tensor]) -> int:
        """Compare a call's weights with those of the last call; returns their revision."""
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
        versions = sum(map(version_of, map(operator.call, self._versioned)))
        if not is_same or versions != self._versions:
            self._versions = versions
            self.revision += 1
        return self.revision


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightLayout:
    """Weights that the graph takes as one float8 matrix.

    Attributes:
        positions: of the weights among the captured graph's inputs.
        paths: of the weights in the model.
        granularity: "row" for a scale a row of the matrix, else one for all.
        keep_original: whether exact copies stay in the CPU's memory.

    """

    positions: tuple[int, ...]
    paths: tuple[str, ...]
    granularity: Granularity
    keep_original: bool

    def quantise_and_free(self, args: Sequence[Any]) -> Joined:
        """The float8 matrix of a call's weights.

        Where it does not exist yet it is made, and the memory of the original weights is freed.

        Args:
            args: the captured graph's inputs.

        """
        weights = [args[position] for position in self.positions]
        return join(weights, self.paths, granularity=self.granularity, keep_original=self.keep_original)


class StoredFloat8:
    """One model's float8 weights, as one compiled graph takes them, and a number that changes when any of them does."""

    def __init__(self, layouts: Sequence[WeightLayout]) -> None:
        self._layouts = layouts
        self._sources = picker([position for layout in layouts for position in layout.positions])
        self.revision = 0
        self._seen: list[weakref.ref[torch.Tensor]] = []
        self._joined: list[Joined] = []
        self._tensors: list[torch.Tensor] = []

    def tensors_for(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """The matrices and scales to pass in a call, in the order of the layouts; weights may be freed for it.

        Args:
            args: the captured graph's inputs.

        """
        sources = self._sources(args)
        if not self._is_as_before(sources):
            joined = [(layout, layout.quantise_and_free(args)) for layout in self._layouts]
            self._tensors = [tensor for _, item in joined for tensor in (item.data, item.scale)]
            self._joined = [item for layout, item in joined for _ in layout.positions]
            self._seen = [weakref.ref(source) for source in sources]
            self.revision += 1
        return self._tensors

    def forget(self) -> None:
        """Release the tensors; the next call makes or looks up its own."""
        self._seen, self._joined, self._tensors = [], [], []

    def _is_as_before(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether these are the weights of the last call, neither restored since then nor quantised anew."""
        if len(sources) != len(self._seen) or not all(map(operator.is_, sources, map(operator.call, self._seen))):
            return False
        try:
            return all(map(operator.is_, map(_JOINED, sources), self._joined))
        except AttributeError:  # a restored weight, which not every version of Dynamo guards against
            return False
