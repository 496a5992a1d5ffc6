"""Matching blocks: which of them compute the same, so that one body can serve them all.

Two blocks are alike if they run the same operations with the same literals on operands of the same layout. They still
are if only a little dead work is missing in one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.flops import FlopCounter
from hvcompile.graph.nodes import is_context_switch, is_graph, mutated_operand, op_name
from hvcompile.torch_private.fakes import layout_key, shape_key, value
from hvcompile.trunk.find import Block
from hvcompile.trunk.operands import is_activation, stride_order

# What a body may compute beyond what a block needs, as a share of the block's arithmetic.
MOST_WASTE = 0.1

# Operations that succeed or fail by their input's strides, and those whose result does not inherit these strides.
_BY_STRIDES = {"view", "view_as", "as_strided", "stride"}
_NEW_LAYOUT = {"linear", "matmul", "bmm", "addmm", "scaled_dot_product_attention", "layer_norm", "cat", "contiguous"}


def families_of(
    blocks: Sequence[Block], operands: Sequence[Sequence[fx.Node]], settings: Sequence[Hashable]
) -> dict[int, dict[int, dict[fx.Node, int]]]:
    """Group the blocks that can share a body.

    Args:
        blocks: in order.
        operands: of each block, what it reads.
        settings: of each block, what else decides how it runs (autocast around it); only blocks of equal ones share.

    Returns:
        For the index of each family's first block: for the index of each of its blocks: for each of that block's
        nodes, the position of the like node in the first block.

    """
    families: dict[int, dict[int, dict[fx.Node, int]]] = {}
    counter = FlopCounter()
    rows: dict[int, list[tuple[Any, ...]]] = {}
    viewed = [viewed_operands(block, reads) for block, reads in zip(blocks, operands, strict=True)]
    layouts = [
        (setting, *(_operand_key(operand, operand in among) for operand in reads))
        for reads, among, setting in zip(operands, viewed, settings, strict=True)
    ]
    for index, block in enumerate(blocks):
        for first, members in families.items():
            if layouts[index] != layouts[first]:
                continue
            matched = _embed(block, operands[index], blocks[first], rows[first], counter)
            if matched is not None:
                members[index] = matched
                break
        else:
            rows[index] = list(_rows(block, operands[index]))
            families[index] = {index: {node: position for position, node in enumerate(block.nodes)}}
    return families


def viewed_operands(block: Block, operands: Sequence[fx.Node]) -> set[fx.Node]:
    """The operands whose strides reach a ``view``, which succeeds or fails by them."""
    inside, candidates = set(block.nodes), set(operands)
    viewed: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [node for node in block.nodes if op_name(node) in _BY_STRIDES]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in seen:
                continue
            seen.add(source)
            if source in candidates:
                viewed.add(source)
            elif source in inside and op_name(source) not in _NEW_LAYOUT:
                stack.append(source)
    return viewed


def _canonical(argument: Any, label: Callable[[fx.Node], Any]) -> Any:
    """A node's argument, comparable between blocks: each node in it as its label, each literal as text."""
    if isinstance(argument, fx.Node):
        return label(argument)
    if isinstance(argument, (list, tuple)):
        return (type(argument).__name__, *(_canonical(item, label) for item in argument))
    if isinstance(argument, dict):
        return tuple((key, _canonical(item, label)) for key, item in argument.items())
    if isinstance(argument, slice):
        return ("slice", *(_canonical(item, label) for item in (argument.start, argument.stop, argument.step)))
    return (type(argument).__name__, repr(argument))


def _value_key(node: fx.Node) -> Any:
    result = value(node)
    items = result if isinstance(result, (tuple, list)) else [result]
    return tuple(layout_key(item) if isinstance(item, torch.Tensor) else repr(item) for item in items)


def _row(node: fx.Node, labels: dict[fx.Node, Any]) -> tuple[Any, ...]:
    """What a node computes, comparable between blocks: operation, wiring and literals, its inputs as labels."""
    # The text of a run-time assertion names symbols, which Dynamo numbers anew in every block.
    args = node.args[:1] if op_name(node).startswith("_assert_scalar") else node.args
    target = _graph_key(getattr(node.graph.owning_module, str(node.target))) if is_graph(node) else node.target
    return (node.op, target, _canonical(args, labels.get), _canonical(node.kwargs, labels.get))


def _graph_key(module: fx.GraphModule) -> Any:
    """What a graph that an operation takes computes, comparable between blocks, whatever its nodes are called."""
    labels: dict[fx.Node, Any] = {}
    rows: list[tuple[Any, ...]] = []
    for position, node in enumerate(module.graph.nodes):
        held = getattr(module, str(node.target), None) if node.op == "get_attr" else None
        if node.op == "placeholder":
            rows.append((node.op,))
        elif node.op == "get_attr" and not is_graph(node):
            rows.append((node.op, id(held)))  # a constant, which the graph keeps alive
        else:
            rows.append(_row(node, labels))
        labels[node] = ("node", position)
    return tuple(rows)


def _rows(block: Block, operands: Sequence[fx.Node]) -> Iterator[tuple[Any, ...]]:
    labels = _labels(operands)
    for position, node in enumerate(block.nodes):
        yield _row(node, labels)
        labels[node] = ("node", position)


def _labels(operands: Sequence[fx.Node]) -> dict[fx.Node, Any]:
    return {operand: ("operand", position) for position, operand in enumerate(operands)}


def _embed(
    block: Block, operands: Sequence[fx.Node], other: Block, rows: Sequence[tuple[Any, ...]], counter: FlopCounter
) -> dict[fx.Node, int] | None:
    """Match a block's nodes, in order, to those of another block with its rows; None unless all match.

    A little of the other block may be left over. Dynamo drops work whose result is not read, so the last block of a
    trunk often lacks the text stream's last nodes. Computing them anyway costs less than compiling one more body.
    """
    labels = _labels(operands)
    position_of: dict[fx.Node, int] = {}
    position = 0
    for node in block.nodes:
        row = _row(node, labels)
        while position < len(rows) and rows[position] != row:
            position += 1
        if position == len(rows):
            return None
        position_of[node] = position
        labels[node] = ("node", position)
        position += 1
    matched = set(position_of.values())
    left_over = [node for index, node in enumerate(other.nodes) if index not in matched]
    if any(mutated_operand(node) is not None or is_context_switch(node) for node in left_over):
        return None  # these act on what the matched nodes compute
    wasted, useful = (sum(map(counter.arithmetic, nodes)) for nodes in (left_over, block.nodes))
    return position_of if wasted <= MOST_WASTE * useful else None


def _operand_key(operand: fx.Node, is_viewed: bool) -> Any:
    if is_activation(operand):  # made contiguous before the call
        tensor = value(operand)
        order = stride_order(tensor) if is_viewed else ()
        return ("activation", shape_key(tensor), order, str(tensor.dtype), str(tensor.device))
    return ("constant" if operand.op == "get_attr" else "weight", _value_key(operand))
