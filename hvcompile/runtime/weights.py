"""The weights of a call: whether any has changed since the last one, and their float8 copies."""

from __future__ import annotations

import dataclasses
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hvcompile.float8.format import Granularity
from hvcompile.float8.weights import Joined, join
from hvcompile.runtime.samples import WeightSamples, is_plain
from hvcompile.torch_private.storages import version_of

# There are over a thousand weights to look at in every step: what runs for each of them runs in C.
_JOINED = operator.attrgetter("joined")
_ADDRESS: Callable[[Any], int] = torch.Tensor.data_ptr


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that returns the items at these positions of a sequence."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda items: tuple(items[position] for position in positions)


class WeightRevisions:
    """The weights of the last call of one compiled graph, and a number that changes when any of them does.

    A weight changes if it is written to in place (``load_state_dict``), is given other memory (``.data = other``,
    ``module.to``), or is another tensor, even one that was another weight before. All is read on the host. A write
    through ``.data``, and one into a tensor made under ``torch.inference_mode()``, leaves no trace there:
    ``content_of`` is for these.
    """

    def __init__(self) -> None:
        self.revision = 0
        self._seen: list[weakref.ref[torch.Tensor]] = []
        self._versioned = self._located = picker(())
        self._versions = -1
        self._addresses: list[int] = []
        self._samples: WeightSamples | None = None

    def revision_of(self, weights: Sequence[torch.Tensor]) -> int:
        """Compare a call's weights with those of the last call; returns their revision."""
        # Compared by identity, as id() would not do: a freed weight's id comes again.
        is_same = len(weights) == len(self._seen) and all(map(operator.is_, weights, map(operator.call, self._seen)))
        if not is_same:
            self._seen = [weakref.ref(weight) for weight in weights]
            self._versioned = picker([place for place, weight in enumerate(weights) if not weight.is_inference()])
            self._located = picker([place for place, weight in enumerate(weights) if is_plain(weight)])
        versions = sum(map(version_of, self._versioned(weights)))
        addresses = list(map(_ADDRESS, self._located(weights)))
        if not is_same or versions != self._versions or addresses != self._addresses:
            if not is_same or addresses != self._addresses:
                self._samples = None  # it reads from these addresses
            self._versions, self._addresses = versions, addresses
            self.revision += 1
        return self.revision

    def content_of(self, weights: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
        """What differs where the content of the weights does, an int64 scalar on ``device``; see ``WeightSamples``.

        Args:
            weights: those that ``revision_of`` was just given.
            device: of the result; the host does not wait for it.

        """
        if self._samples is None:
            self._samples = WeightSamples(weights)
        return self._samples.content(weights).to(device, non_blocking=True)


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
        # Of each source, and each once. Their tensors are not held: weights that move leave no memory behind.
        self._joined: list[Joined] = []
        self._matrices: list[Joined] = []

    def tensors_for(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """The matrices and scales to pass in a call, in the order of the layouts; weights may be freed for it.

        Args:
            args: the captured graph's inputs.

        """
        sources = self._sources(args)
        if not self._is_as_before(sources):
            joined = [(layout, layout.quantise_and_free(args)) for layout in self._layouts]
            self._matrices = [item for _, item in joined]
            self._joined = [item for layout, item in joined for _ in layout.positions]
            self._seen = [weakref.ref(source) for source in sources]
            self.revision += 1
        return [tensor for item in self._matrices for tensor in (item.data, item.scale)]

    def forget(self) -> None:
        """Release the matrices; the next call makes or looks up its own."""
        self._seen, self._joined, self._matrices = [], [], []

    def _is_as_before(self, sources: Sequence[torch.Tensor]) -> bool:
        """Whether these are the weights of the last call, neither restored since then nor quantised anew."""
        if len(sources) != len(self._seen) or not all(map(operator.is_, sources, map(operator.call, self._seen))):
            return False
        try:
            return all(map(operator.is_, map(_JOINED, sources), self._joined))
        except AttributeError:  # a restored weight, which not every version of Dynamo guards against
            return False
