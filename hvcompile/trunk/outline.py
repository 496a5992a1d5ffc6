"""Outlining: blocks that compute the same on other operands become calls of one shared body.

A pass then edits a body once, and Inductor compiles it once, however deep the model is. Sharing is structural: two
blocks are alike if they run the same operations with the same literals on operands of the same layout.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.aliasing import refresh
from hvcompile.graph.nodes import (
    contexts,
    draws_random_numbers,
    drop_grad_switches,
    is_context_switch,
    is_graph,
    is_scalar,
    is_tensor,
    mutated_operand,
    op_name,
    settle,
    storage,
)
from hvcompile.graph.paths import module_path
from hvcompile.graph.slices import count_from_start, undo_cuts
from hvcompile.journal import Declined
from hvcompile.torch_private import dynamo, fakes
from hvcompile.torch_private.fakes import TAG, provenance, value
from hvcompile.torch_private.lowering import INVOKE_SUBGRAPH
from hvcompile.trunk.find import Block, describe_lists, entering, find_trunk, leaving
from hvcompile.trunk.match import families_of, viewed_operands
from hvcompile.trunk.numbers import fix_numbers_of_blocks, fix_numbers_of_modules, fix_settled_sizes
from hvcompile.trunk.operands import as_operands, contiguous_like, is_activation, restore_order, symbolic_sizes
from hvcompile.trunk.scales import take_scales
from hvcompile.trunk.streams import find_streams
from hvcompile.trunk.trunk import BlockCall, Body, Trunk

_VECTORISING = {"_vmap_increment_nesting", "_vmap_decrement_nesting"}


def recover(captured: fx.GraphModule) -> Trunk | Declined:
    """Find the repeated blocks of a graph captured by Dynamo and outline them; the captured graph is not changed."""
    module = dynamo.clone_graph_module(captured)
    drop_grad_switches(module.graph)
    vectorised = next((node for node in module.graph.nodes if op_name(node) in _VECTORISING), None)
    if vectorised is not None:
        return Declined(
            f"the graph calls torch.vmap ({vectorised.name}), between whose begin and end nothing may be moved. "
            "FlexAttention does so where a mask is made inside the model, and makes one where it is given none. "
            "Make the mask outside, one that lets all through where you need none, and hand it in as block_mask"
        )
    count_from_start(module.graph)
    fix_numbers_of_modules(module.graph)
    fix_settled_sizes(module.graph)
    blocks = find_trunk(module.graph)
    if isinstance(blocks, Declined):
        return blocks
    scales = take_scales(module, blocks)
    fix_numbers_of_blocks(module.graph, blocks)
    for block in blocks:
        block.nodes = undo_cuts(module.graph, block.nodes)
    # Inductor binds the symbols of a subgraph's shapes from operands that are symbols, never from products of them.
    sizes = symbolic_sizes(module.graph, before=blocks[0].nodes[0])
    _adopt_context_switches(module.graph, blocks)
    _adopt_submodules(module.graph, blocks)
    operands = [sizes + [operand for operand in entering(block) if operand not in sizes] for block in blocks]
    declined = _check_graph(module.graph, blocks)
    if declined is not None:
        return declined
    within = contexts(module.graph)
    for block, reads in zip(blocks, operands, strict=True):
        declined = _check_block(block, reads, within)
        if declined is not None:
            return declined

    families = families_of(blocks, operands, [_autocast_around(block, within) for block in blocks])
    bodies: dict[int, Body] = {}  # by the block's index, as ``outputs``
    outputs: dict[int, list[fx.Node | None]] = {}
    for number, (first, members) in enumerate(families.items()):
        positions = sorted({members[index][node] for index in members for node in leaving(blocks[index])})
        body = Body(f"block_{number}", _build_body(module, blocks[first], operands[first], positions), {})
        for index, position_of in members.items():
            node_at = {position: node for node, position in position_of.items()}
            bodies[index], outputs[index] = body, [node_at.get(position) for position in positions]
    find_streams(blocks, operands, bodies, outputs)

    trunk = Trunk(module, [], describe_lists(blocks), derived=scales)
    renamed: dict[fx.Node, fx.Node] = {}
    for index, block in enumerate(blocks):
        current = [renamed.get(operand, operand) for operand in operands[index]]
        trunk.blocks.append(_outline(module, block, bodies[index], current, outputs[index], renamed))
    for node in reversed(module.graph.nodes):
        if node.op == "call_method" and node.meta.get(TAG) == "outline" and not node.users:
            module.graph.erase_node(node)  # an order restored for blocks that are calls now
    settle(module.graph)
    refresh(module.graph, {output for block in trunk.blocks for output in block.outputs.values()})
    _prepare_operands(trunk)
    module.graph.lint()
    module.recompile()
    return trunk


def _adopt_context_switches(graph: fx.Graph, blocks: Sequence[Block]) -> None:
    """Give a block the autocast regions around its nodes alone: Dynamo records no module for their switches."""
    within = contexts(graph)
    owners = {node: block for block in blocks for node in block.nodes}
    for region in {region for regions in within.values() for region in regions}:
        members = [node for node in graph.nodes if region in within[node] and not is_context_switch(node)]
        holders = {id(owners[node]) if node in owners else None for node in members}
        if len(holders) == 1 and None not in holders:
            block = owners[members[0]]
            switches = {region, *region.users} - set(block.nodes)
            owned = set(block.nodes) | switches
            block.nodes = [node for node in graph.nodes if node in owned]


def _adopt_submodules(graph: fx.Graph, blocks: Sequence[Block]) -> None:
    """Give a block a reference of its own to each graph that its operations take: FlexAttention's masks and scores."""
    for block in blocks:
        inside, own = set(block.nodes), dict[fx.Node, fx.Node]()
        for node in block.nodes:
            for operand in node.all_input_nodes:
                if is_graph(operand) and operand not in own:
                    with graph.inserting_before(node):
                        own[operand] = graph.node_copy(operand)
        for node in block.nodes:
            for operand in [item for item in node.all_input_nodes if item in own]:
                node.replace_input_with(operand, own[operand])
        inside |= set(own.values())
        block.nodes = [node for node in graph.nodes if node in inside]
        for operand in own:
            if not operand.users:
                graph.erase_node(operand)


def _autocast_around(block: Block, within: dict[fx.Node, tuple[fx.Node, ...]]) -> Hashable:
    """The settings of the autocast regions around a block, outermost first."""
    return tuple(repr(region.args) for region in within[block.nodes[0]] if region not in block.nodes)


def _check_graph(graph: fx.Graph, blocks: Sequence[Block]) -> Declined | None:
    """Why no block of a graph can be outlined."""
    owned = {node for block in blocks for node in block.nodes}
    first, last = blocks[0].nodes[0], blocks[-1].nodes[-1]
    reached = False
    for node in graph.nodes:
        reached = reached or node is first
        if draws_random_numbers(node):
            return Declined(f"{node.name} drops out activations: the model is in training mode, call .eval() on it")
        if reached and node not in owned and mutated_operand(node) is not None:
            return Declined(
                f"between the blocks stands {node.format_node()}, which writes into a tensor that they may read"
            )
        if node is last:
            break
    return None


def _check_block(
    block: Block, operands: Sequence[fx.Node], within: dict[fx.Node, tuple[fx.Node, ...]]
) -> Declined | None:
    """Why a block can't become a call of a subgraph."""
    inside = set(block.nodes)
    regions = {tuple(region for region in within[node] if region not in inside) for node in block.nodes}
    if len(regions) > 1:
        return Declined(f"{block.path} stands partly in an autocast region that it shares with work outside it")
    outside = {storage(operand) for operand in operands if is_tensor(operand)}
    for node in block.nodes:
        mutated = mutated_operand(node)
        if mutated is not None and storage(mutated) in outside:
            return Declined(f"{block.path} writes into a tensor from outside it ({node.format_node()})")
    unsupported = [operand for operand in operands if not is_tensor(operand) and not is_scalar(operand)]
    if unsupported:
        return Declined(f"{block.path} reads {unsupported[0].format_node()}, which is neither a tensor nor a number")
    special = [operand for operand in operands if is_tensor(operand) and not isinstance(value(operand), fakes.FAKES)]
    if special:
        kind = type(value(special[0])).__name__
        return Declined(f"{block.path} reads {special[0].name}, a {kind}: no subgraph takes tensors of such a kind")
    feedback = set(inside)
    for node in _between(block):
        if any(operand in feedback for operand in node.all_input_nodes):
            feedback.add(node)
            if any(user in inside for user in node.users):
                return Declined(
                    f"{block.path} reads back its own result through work outside it ({node.format_node()})"
                )
    return None


def _between(block: Block) -> Iterator[fx.Node]:
    inside, node, last = set(block.nodes), block.nodes[0], block.nodes[-1]
    while node is not last:
        if node not in inside:
            yield node
        node = node.next


def _placeholder_name(operand: fx.Node, block: Block) -> str:
    """A weight's path inside its block, such as ``attn_to_q_weight``; else the operand's own name."""
    path = ".".join(module_path(dynamo.source_name(operand)))
    prefix = f"{block.path}."
    if operand.op != "placeholder" or not path.startswith(prefix):
        return operand.name
    name = re.sub(r"\W+", "_", path.removeprefix(prefix))  # an attribute of a class is reached by a call
    return name if name.isidentifier() else f"part_{name}"  # "0.weight", of a Sequential


def _build_body(
    root: fx.GraphModule, block: Block, operands: Sequence[fx.Node], positions: Sequence[int]
) -> fx.GraphModule:
    """A block's nodes as a graph of their own, which returns the nodes at these positions."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for operand in operands:
        env[operand] = graph.placeholder(_placeholder_name(operand, block))
        env[operand].meta["example_value"] = value(operand)
    for operand in viewed_operands(block, operands):
        if is_activation(operand):
            env[operand] = restore_order(graph, env[operand], value(operand))
    for node in block.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = copy.copy(node.meta)
    # A body may not return one of its operands or a view of one, and its caller relies on contiguous streams.
    results = []
    for position in positions:
        result = env[block.nodes[position]]
        cloned = graph.call_function(torch.clone, (result,), {"memory_format": torch.contiguous_format})
        cloned.meta = provenance(result, "outline", contiguous_like(value(result)))
        results.append(cloned)
    graph.output(tuple(results))
    body = fx.GraphModule(root, graph)
    body.graph.lint()
    return body


def _outline(
    module: fx.GraphModule,
    block: Block,
    body: Body,
    operands: Sequence[fx.Node],
    outputs: Sequence[fx.Node | None],
    renamed: dict[fx.Node, fx.Node],
) -> BlockCall:
    """Replace a block by a call of its body; ``renamed`` collects what later calls take for the nodes that go."""
    graph, inside, last = module.graph, set(block.nodes), block.nodes[-1]
    setattr(module, body.name, body.module)
    with graph.inserting_after(last):
        reference = graph.get_attr(body.name)
    with graph.inserting_after(reference):
        call = graph.call_function(INVOKE_SUBGRAPH, (reference, body.name, *operands))
    results: Any = body.module.graph.output_node().args[0]
    # Each call has results of its own, whose fake values tell them from those of other calls.
    call.meta = provenance(last, "outline", tuple(contiguous_like(value(result)) for result in results))
    reference.meta = {TAG: "outline"}
    anchor = call
    for number, result in enumerate(outputs):
        readers = [user for user in result.users if user not in inside] if result is not None else []
        if result is None or not readers:
            continue
        with graph.inserting_after(anchor):
            anchor = graph.call_function(operator.getitem, (call, number))
        anchor.meta = provenance(result, "outline", call.meta["example_value"][number])
        renamed[result] = anchor  # later blocks restore the order inside their bodies, where they need it
        with graph.inserting_after(anchor):
            anchor = restore_order(graph, anchor, value(result))
        for reader in readers:
            reader.replace_input_with(result, anchor)
    for node in reversed(block.nodes):
        graph.erase_node(node)
    return BlockCall(block.path, body, call)


def _prepare_operands(trunk: Trunk) -> None:
    """Make the operands of every call fit for a subgraph, each once where several blocks read it."""
    results = [output for block in trunk.blocks for output in block.outputs.values()]
    known: dict[tuple[fx.Node, ...], dict[fx.Node, fx.Node]] = {}
    for block in trunk.blocks:
        activations = tuple(node for node in block.operands if is_activation(node) and node not in results)
        if activations not in known:
            with trunk.graph.inserting_before(block.call):
                known[activations] = as_operands(trunk.graph, block.operands, "outline", results)
        prepared = known[activations]
        block.call.args = (*block.call.args[:2], *(prepared.get(node, node) for node in block.operands))
