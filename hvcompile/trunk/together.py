"""What a trunk knows of the ranks that run it together: their group, who has which part, and what all take alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import fx

from hvcompile.journal import Declined

if TYPE_CHECKING:
    from hvcompile.graph.tiles import Part
    from hvcompile.ranks.split import Layout, Split


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Ranks that run a graph together: their process group's name, and how long they wait for each other."""

    name: str
    timeout_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharding:
    """How the sequence is split over ranks.

    Attributes:
        split: of the sequence.
        streams: the layout of the top-level nodes that hold one rank's part of it.
        tokens: what lies along it, as ``sample_tokens`` found before it was split; or why that is not known.

    """

    split: Split
    streams: Mapping[fx.Node, Layout]
    tokens: Sequence[Part] | Declined


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedInputs:
    """Inputs of which every rank takes rank 0's, the sample and the timesteps; and those that must be rank 0's.

    Attributes:
        nodes: for each placeholder, the node of rank 0's value.
        conditions: placeholders whose content must be equal on all ranks.
        apart: how far each rank's own inputs are from rank 0's, float32 ``[ranks, len(nodes) + len(conditions)]``: of
            the former the sum of absolute differences over the sum of rank 0's absolute values; of the latter 0 where
            they are equal, else infinite.

    """

    nodes: Mapping[fx.Node, fx.Node]
    conditions: tuple[fx.Node, ...]
    apart: fx.Node
