"""What memory a model needs on the device, as it is, in float8, and with its blocks' weights on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import fx

from hvcompile.graph.nodes import is_tensor, is_weight, storage
from hvcompile.graph.subgraphs import callees, is_call
from hvcompile.pipeline import Context
from hvcompile.rewriting.float8_plan import Plan
from hvcompile.torch_private.fakes import num_bytes, value
from hvcompile.torch_private.storages import storage_id
from hvcompile.trunk.trunk import BlockCall, Trunk

FLOAT8, HOST = "options={'fp8': True}", "hvcompile.offload(model)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """Memory of one way to run a model, in bytes.

    Attributes:
        how: what the user writes for it; empty for the model as it is.
        weight_bytes: on the device at most.
        host_bytes: of weights that stay on the host.
        brought_bytes: from there, in a step that computes every block.
        activation_bytes: what a step computes and holds at once, operation by operation; fused code takes less.
        state_bytes: kept from step to step by the first-block cache, for one generation.

    """

    how: str
    weight_bytes: int
    host_bytes: int
    brought_bytes: int
    activation_bytes: int
    state_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All of it on the device."""
        return self.weight_bytes + self.activation_bytes + self.state_bytes


def needs_of(trunk: Trunk) -> tuple[Need, ...]:
    """The ways to run a trunk, outlined and not rewritten yet; state is not known then, and counts as none.

    Of linear layers, those become float8 that do by default. The first block stays on the device, as ``offload`` keeps
    it by default.
    """
    weights = {node: num_bytes(value(node)) for node in trunk.inputs if is_tensor(node) and is_weight(node)}
    small = _float8(trunk)
    activations = peak_of(trunk.graph)
    blocks = [{node for node in block.operands if node in weights and value(node).ndim > 1} for block in trunk.blocks]
    found = []
    for how, sizes in (("", weights), (FLOAT8, {**weights, **small})):
        if how and not small:
            continue
        total = sum(sizes.values())
        found.append(_need(how, total, 0, activations, 0))
        hosted = [sum(sizes[node] for node in block - blocks[0]) for block in blocks]
        brought = sum(hosted)
        if brought:
            pair = max(sum(hosted[place : place + 2]) for place in range(1, len(hosted)))
            both = f"{HOST}, {how}" if how else HOST
            found.append(_need(both, total - brought + pair, brought, activations, brought))
    return tuple(found)


def _need(how: str, weight_bytes: int, host_bytes: int, activation_bytes: int, brought_bytes: int) -> Need:
    return Need(
        how=how,
        weight_bytes=weight_bytes,
        host_bytes=host_bytes,
        brought_bytes=brought_bytes,
        activation_bytes=activation_bytes,
        state_bytes=0,
    )


def _float8(trunk: Trunk) -> Mapping[fx.Node, int]:
    """The weights that become float8 by default, and what they take then."""
    context = Context(requested=True, is_first_block_compared=True)
    plan = Plan(trunk, context, granularity="row", skip=(), keep_blocks=0, keep_last_blocks=2)
    return {plan.operand(block, name): _in_float8(plan, block, name) for block, name in plan.done()}


def _in_float8(plan: Plan, block: BlockCall, name: str) -> int:
    weight: torch.Tensor = value(plan.operand(block, name))
    return num_bytes(weight) // weight.element_size() + 4 * weight.shape[0]


def peak_of(graph: fx.Graph, *, with_inputs: bool = True) -> int:
    """The most bytes that what a graph computes takes at once, in its own order. Views take none.

    Args:
        graph: a trunk's, or a body's.
        with_inputs: count those that are no weights, until they are read for the last time.

    """
    last: dict[object, fx.Node] = {}
    for node in graph.nodes:
        for item in node.all_input_nodes:
            last |= dict.fromkeys(_memories(item), node)
    live, known, peak = dict[object, int](), set[object](), 0
    for node in graph.nodes:
        memories = _memories(node)
        if node.op == "placeholder" and (is_weight(node) or not with_inputs):
            known |= memories.keys()
            continue
        live |= {key: size for key, size in memories.items() if key not in known}
        known |= memories.keys()
        peak = max(peak, sum(live.values()) + (_peak_within(graph, node) if is_call(node) else 0))
        live = {key: size for key, size in live.items() if last.get(key) is not node}
    return peak


def _peak_within(graph: fx.Graph, call: fx.Node) -> int:
    """What a call's graph takes beyond its operands and results."""
    owner = graph.owning_module
    assert owner is not None
    graphs, _ = callees(owner, call)
    results = sum(_memories(call).values())
    return max(0, max(peak_of(module.graph, with_inputs=False) for module in graphs.values()) - results)


def _memories(node: fx.Node) -> dict[object, int]:
    """The memory of a node's value, or of each part of it, and how much that is."""
    held = value(node)
    if isinstance(held, torch.Tensor):
        return {storage(node): num_bytes(held)}
    parts = held if isinstance(held, (tuple, list)) else ()
    return {storage_id(part): num_bytes(part) for part in parts if isinstance(part, torch.Tensor)}
