"""Pieces of a model that Dynamo broke into several graphs: what flows through one, and what is known of its inputs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.nodes import is_tensor, is_weight, reached_from
from hvcompile.journal import Declined
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.lineage import Earlier, Flow, Lineage, Root, RootKey
from hvcompile.trunk.roles import is_time_like, likeness
from hvcompile.trunk.trunk import Trunk


def flow_of(captured: fx.GraphModule) -> Flow:
    """Which inputs each output of a captured graph follows from."""
    placeholders = list(captured.graph.find_nodes(op="placeholder"))
    inputs = [place for place, node in enumerate(placeholders) if not (is_tensor(node) and is_weight(node))]
    reached = reached_from(captured.graph, {placeholders[place]: place for place in inputs})
    results: Any = captured.graph.output_node().args[0]
    return Flow(
        inputs=tuple(inputs),
        weights=tuple(place for place in range(len(placeholders)) if place not in set(inputs)),
        times=frozenset(place for place in inputs if is_time_like(placeholders[place])),
        outputs=tuple(reached.get(node, frozenset()) if isinstance(node, fx.Node) else frozenset() for node in results),
    )


def earlier_of(trunk: Trunk, args: Mapping[int, Any], lineages: Mapping[int, Lineage]) -> Earlier | Declined | None:
    """What earlier graphs tell of a trunk's inputs; None where it takes a timestep itself, or nothing of theirs.

    Args:
        trunk: as recovered.
        args: the inputs of the call that is being compiled, by place.
        lineages: by place, of those inputs that earlier graphs have made.

    Returns:
        None too where no graph came before; why the sample or the timestep can't be told where one did.

    """
    if not lineages or any(map(is_time_like, trunk.inputs)):
        return None
    roots: dict[RootKey, Root] = {}
    for lineage in lineages.values():
        roots.update(lineage.roots)
    keys, found = list(roots), list(roots.values())
    sample = _sample_of(trunk, found)
    if sample is None:
        return Declined(
            "this graph is a piece of the model, and nothing that entered the pieces before it has the rank of what "
            "leaves it, so the sample that is denoised can't be told from its conditions"
        )
    carriers = [place for place, lineage in lineages.items() if keys[sample] in lineage.followed]
    carriers = [place for place in carriers if is_tensor(trunk.inputs[place])]
    if not carriers:
        return Declined(
            "this graph is a piece of the model, and nothing that it takes is known to follow from the sample: Python "
            "between the pieces made another tensor of that or wrote into it"
        )
    followed = frozenset[RootKey]().union(*(lineage.followed for lineage in lineages.values()))
    clocks = _clocks_of(found, sample, [key in followed for key in keys])
    if isinstance(clocks, Declined):
        return clocks
    told = [found[place].value for place in (sample, *clocks)]
    own = [place for place in args if place not in lineages]
    return Earlier(
        inputs=tuple(lineages),
        known=tuple(place for place in own if any(args[place] is item for item in told)),
        sample=max(carriers, key=lambda place: args[place].numel()),
        kinds=tuple(root.kind for root in found),
        sample_root=sample,
        clock_roots=clocks,
        num_clocks=sum(found[place].value.numel() for place in clocks),
    )


def _sample_of(trunk: Trunk, roots: Sequence[Root]) -> int | None:
    results: Any = trunk.output.args[0]
    output = next((value(node) for node in results if isinstance(node, fx.Node) and is_tensor(node)), None)
    if output is None or output.ndim < 2:
        return None
    alike = [
        (likeness(root.value, output), -place)
        for place, root in enumerate(roots)
        if isinstance(root.value, torch.Tensor)
        and root.value.is_floating_point()
        and root.value.ndim == output.ndim
        and not root.is_time
    ]
    return -max(alike)[1] if alike else None


def _clocks_of(roots: Sequence[Root], sample: int, is_followed: Sequence[bool]) -> tuple[int, ...] | Declined:
    if any(root.is_time and not isinstance(root.value, torch.Tensor) for root in roots):
        return Declined("the timestep entered a piece before this graph as a Python number; pass it as a tensor")
    batch = roots[sample].value.shape[0]

    def is_small(root: Root) -> bool:
        tensor = root.value
        is_number = isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.ndim <= 1
        return is_number and tensor.numel() <= max(1, batch)

    times = [place for place, root in enumerate(roots) if root.is_time]
    clocks = times or list(itertools.compress(range(len(roots)), map(is_small, roots)))
    clocks = [place for place in clocks if is_followed[place]]
    if not clocks:
        return Declined(
            "this graph is a piece of the model, and nothing that it takes is known to follow from a timestep: none "
            "entered the pieces before it, or Python between them made other tensors of it or wrote into them"
        )
    return tuple(clocks)
