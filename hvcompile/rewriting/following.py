"""What a decision to reuse a step reads of the graph: timesteps, what weights and conditions hold, a rank's tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.inline import inline
from hvcompile.rewriting import guidance
from hvcompile.rewriting.reuse import contents
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.roles import classify
from hvcompile.trunk.together import Sharding
from hvcompile.trunk.trunk import Trunk


def contents_of(trunk: Trunk, device: torch.device, anchor: fx.Node, tag: str) -> fx.Node:
    """Add what tells whether weights and conditions hold what they did in the step before."""
    conditions = {f"condition_{place}": node for place, node in enumerate(classify(trunk).conditions)}
    if trunk.earlier is not None and trunk.earlier.content is not None:
        conditions["earlier"] = trunk.earlier.content
    operands = {"weights": trunk.add_weights_content(device), **conditions}
    function = functools.partial(contents, fakes={name: value(node) for name, node in operands.items()})
    return inline(trunk.graph, function, operands, before=anchor, tag=tag)["contents"]


def marks_of(contents: fx.Node, sample: fx.Node, anchor: fx.Node, tag: str) -> fx.Node:
    """Add what tells calls of one step of guidance from each other and from those of other steps."""
    function = functools.partial(guidance.marks, like=value(sample), device=value(contents).device)
    return inline(contents.graph, function, {"contents": contents, "sample": sample}, before=anchor, tag=tag)["marks"]


def is_ours(sharding: Sharding, stream: fx.Node, before: fx.Node, tag: str) -> fx.Node:
    """Add a mask of a stream's tokens on this rank: no padding, and of what all ranks have only the first one's."""
    split, layout, ndim = sharding.split, sharding.streams[stream], value(stream).ndim

    def mask(stream: Any) -> dict[str, Any]:
        parts = []
        for place, _, item in layout.offsets(split):
            size = split.local if item.is_split else item.stop - item.start
            count = min(max(split.length - split.start, 0), size) if item.is_split else size * (split.rank == 0)
            part = torch.ones_like(stream.narrow(layout.dim, place, size), dtype=torch.bool)
            if count < size:
                part = torch.nn.functional.pad(
                    part.narrow(layout.dim, 0, count), (0, 0) * (ndim - 1 - layout.dim) + (0, size - count)
                )
            parts.append(part)
        return {"is_ours": parts[0] if len(parts) == 1 else torch.cat(parts, dim=layout.dim)}

    graph = stream.graph
    return inline(graph, mask, {"stream": stream}, before=before, tag=tag)["is_ours"]


def clock_of(trunk: Trunk, inputs: Sequence[fx.Node], device: torch.device, before: fx.Node, tag: str) -> fx.Node:
    """Add the timesteps of all inputs that carry one, as one float64 vector."""

    def gather(**clocks: torch.Tensor) -> dict[str, Any]:
        return {"clock": torch.cat([clock.to(device, torch.float64).flatten() for clock in clocks.values()])}

    operands = {f"clock_{place}": node for place, node in enumerate(inputs)}
    return inline(trunk.graph, gather, operands, before=before, tag=tag)["clock"]
