"""What the values between the graphs of one model came from, where Dynamo broke the model into several.

The graph that holds the blocks then takes embedded values: neither the sample nor the timestep enters it. They entered
an earlier graph. So every graph says which of its inputs each of its outputs follows from, and the runtime follows that
from call to call. What is here is told of, and computes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

RootKey = tuple[int, int]
"""The number of a compiled graph, and the place of its input."""


@dataclasses.dataclass(frozen=True, eq=False)
class Root:
    """A tensor or number that entered a graph and came from none: an input of the model, mostly.

    Attributes:
        value: itself.
        is_time: whether that graph makes a sinusoidal embedding of it.

    """

    value: Any
    is_time: bool

    @property
    def kind(self) -> Hashable:
        """What stays the same of it from step to step."""
        if isinstance(self.value, torch.Tensor):
            return self.is_time, self.value.ndim, self.value.dtype
        return self.is_time, type(self.value)


class Made(NamedTuple):
    """The weights by which a graph has made a value.

    Attributes:
        revision: of the weights, as far as the host sees writes to them.
        content: what differs where their content does, an int64 scalar; None where the graph has none.

    """

    revision: int
    content: torch.Tensor | None


@dataclasses.dataclass(frozen=True, eq=False)
class Lineage:
    """Where a value came from.

    Attributes:
        roots: all that entered the graphs which it came through, in the order of these graphs' inputs.
        followed: those of them that it follows from.
        made_by: the graphs, each with its weights.

    """

    roots: Mapping[RootKey, Root]
    followed: frozenset[RootKey]
    made_by: Mapping[int, Made]


@dataclasses.dataclass(frozen=True)
class Flow:
    """How a captured graph hands on what enters it, by places.

    Attributes:
        inputs: that are no weights.
        weights: the others.
        times: inputs of which the graph makes a sinusoidal embedding.
        outputs: for each, the inputs that it follows from.

    """

    inputs: tuple[int, ...]
    weights: tuple[int, ...]
    times: frozenset[int]
    outputs: tuple[frozenset[int], ...]


@dataclasses.dataclass(eq=False, kw_only=True)
class Earlier:
    """What is known of the inputs that earlier graphs of the model have made, for a graph that takes no timestep.

    Attributes:
        inputs: places of the captured graph's inputs that earlier graphs have made.
        known: places of those that are the model's sample or timestep itself.
        sample: of ``inputs``, the place of the one that carries the sample.
        kinds: of the roots of ``inputs``, in order.
        sample_root: which of them is the sample.
        clock_roots: which are timesteps.
        num_clocks: how many timesteps these hold.
        clock: added placeholder of the timesteps, float64 ``[num_clocks]``; None until a pass asks for it.
        mark: added placeholder of what tells the sample from another, int64 ``[1]``; None until a pass asks for it.
        content: added placeholder of what differs where the content of the conditions does that entered earlier graphs,
            or of these graphs' weights, int64 ``[1]``; None until a pass asks for it.

    """

    inputs: tuple[int, ...]
    known: tuple[int, ...]
    sample: int
    kinds: tuple[Hashable, ...]
    sample_root: int
    clock_roots: tuple[int, ...]
    num_clocks: int
    clock: fx.Node | None = None
    mark: fx.Node | None = None
    content: fx.Node | None = None

    @property
    def added(self) -> list[fx.Node]:
        """The placeholders that were added."""
        return [node for node in (self.clock, self.mark, self.content) if node is not None]
