"""Work that all blocks do alike: an activation of the one embedding that each of them modulates by.

Where blocks are modulated by the timestep, each applies the same activation to the same few numbers before its own
linear layer. Within a graph of its own, each would launch a kernel for that. So it is done once, before the blocks.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import fx

from hvcompile.graph.nodes import contexts, is_tensor, mutated_operand, op_name, storage, writers
from hvcompile.torch_private.fakes import TAG, numel_hint, value
from hvcompile.trunk.invariants import drop_dead
from hvcompile.trunk.operands import as_operands
from hvcompile.trunk.trunk import BlockCall, Body, Trunk

_ACTIVATIONS = {"silu", "gelu", "relu", "tanh", "sigmoid", "mish"}
_MOST = 1 << 16
"""Elements. What takes more is cheaper to compute again, within the kernel that reads it, than to write and read."""


def share_activations(trunk: Trunk, tag: str) -> list[str]:
    """Move activations that all calls of a body apply to one and the same small tensor before the blocks.

    Returns:
        A line that says so, or none.

    """
    known: dict[Hashable, fx.Node] = {}
    calls = 0
    for body in trunk.bodies:
        blocks = [block for block in trunk.blocks if block.body is body]
        if any(block.call.graph is not trunk.graph for block in blocks):
            continue
        same = _same_operands(body, blocks)
        for node in _activations(body, same):
            operand = _before(trunk, blocks[0], node, same, known, tag)
            placeholder = trunk.add_operand(body, operand)
            placeholder.meta = {**node.meta, TAG: tag, "example_value": value(operand)}
            node.replace_all_uses_with(placeholder)
            drop_dead(body.module.graph, [node])
            calls += len(blocks)
        for placeholder in [item for item in same if is_tensor(item) and not item.users]:
            trunk.drop_operand(body, placeholder)
    return [f"{calls} activations of what all blocks share are computed as {len(known)}, before them"] if calls else []


def _same_operands(body: Body, blocks: list[BlockCall]) -> dict[fx.Node, fx.Node]:
    """The tensors that all calls of a body are given alike, by their placeholders inside; no streams."""
    places = zip(body.module.graph.find_nodes(op="placeholder"), *(block.operands for block in blocks), strict=True)
    streams = set(body.streams.values())
    return {
        inside: given[0]
        for place, (inside, *given) in enumerate(places)
        if place not in streams and is_tensor(given[0]) and len({_source(node) for node in given}) == 1
    }


def _source(node: fx.Node) -> fx.Node:
    """What an operand was before it was laid out for a call."""
    while node.op == "call_method" and node.target == "contiguous":
        node = node.all_input_nodes[0]
    return node


def _activations(body: Body, same: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """The activations in a body that read nothing but one of the operands that all calls share."""
    graph = body.module.graph
    within, written = contexts(graph), writers(graph)
    return [
        node
        for node in graph.nodes
        if node.op == "call_function"
        and op_name(node) in _ACTIVATIONS
        and is_tensor(node)
        and len(node.all_input_nodes) == 1
        and node.all_input_nodes[0] in same
        and mutated_operand(node) is None
        and not within[node]
        and storage(node) not in written
        and storage(node.all_input_nodes[0]) not in written
        and value(node).is_contiguous()
        and numel_hint(value(node)) <= _MOST
    ]


def _before(
    trunk: Trunk,
    first: BlockCall,
    node: fx.Node,
    same: Mapping[fx.Node, fx.Node],
    known: dict[Hashable, fx.Node],
    tag: str,
) -> fx.Node:
    """A node of a body as one of the top-level graph; of equal ones the first, which stands before all that read it."""
    args: Any = fx.map_arg(node.args, lambda item: _source(same[item]))
    kwargs: Any = fx.map_arg(node.kwargs, lambda item: _source(same[item]))
    key = node.target, args, tuple(sorted(kwargs.items())), contexts(trunk.graph)[first.call]
    if key not in known:
        with trunk.graph.inserting_before(first.call):
            moved = trunk.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
            moved.meta = {**node.meta, TAG: tag, "example_value": torch.empty_like(value(node))}
            known[key] = as_operands(trunk.graph, [moved], tag)[moved]
    return known[key]
