"""Matching blocks: which of them compute the same thing, so that one body can serve them all.

Two blocks are alike if they run the same operations with the same literals on operands of the same layout; where only
a little dead work is missing in one of them, they are alike still.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.flops import FlopCounter
from hvcompile.graph.nodes import is_context_switch, mutated_operand, op_name
from hvcompile.torch_private.fakes import layout_key, shape_key, value
from hvcompile.trunk.find import Block
from hvcompile.trunk.operands import is_activation, stride_order

# Of a block's arithmetic, what its body may compute beyond it so that no body of its own is needed.
MOST_WASTE = 0.1

# Operations that succeed or fail by their input's strides, and those whose result does not inherit its input's.
_BY_STRIDES = {"view", "view_as", "as_strided", "stride"}
_NEW_LAYOUT = {"linear", "matmul", "bmm", "addmm", "scaled_dot_product_attention", "layer_norm", "cat", "contiguous"}


def families_of(
    found: Sequence[Block], operands: Sequence[Sequence[fx.Node]], settings: Sequence[Hashable]
) -> dict[int, dict[int, dict[fx.Node, int]]]:
    """Group the blocks that can share a body: first member -> member -> its nodes' numbers in the first member.

    Args:
        found: the blocks in order.
        operands: of each, what it reads.
        settings: of each, what else decides how it runs (autocast around it); only equal ones share.

    """
    families: dict[int, dict[int, dict[fx.Node, int]]] = {}
    counter = FlopCounter()
    rows: dict[int, list[tuple[Any, ...]]] = {}
    viewed = [viewed_operands(block, reads) for block, reads in zip(found, operands, strict=True)]
    layouts = [
        (setting, *(_operand_key(operand, operand in among) for operand in reads))
        for reads, among, setting in zip(operands, viewed, settings, strict=True)
    ]
    for place, block in enumerate(found):
        for first, members in families.items():
            if layouts[place] != layouts[first]:
                continue
            matched = _embed(block, operands[place], found[first], rows[first], counter)
            if matched is not None:
                members[place] = matched
                break
        else:
            rows[place] = list(_rows(block, operands[place]))
            families[place] = {place: {node: number for number, node in enumerate(block.nodes)}}
    return families


def viewed_operands(block: Block, operands: Sequence[fx.Node]) -> set[fx.Node]:
    """The operands whose strides reach a ``view``, which fails or not by them."""
    inside, wanted = set(block.nodes), set(operands)
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [node for node in block.nodes if op_name(node) in _BY_STRIDES]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in seen:
                continue
            seen.add(source)
            if source in wanted:
                found.add(source)
            elif source in inside and op_name(source) not in _NEW_LAYOUT:
                stack.append(source)
    return found


def _canonical(argument: Any, number: Callable[[fx.Node], Any]) -> Any:
    if isinstance(argument, fx.Node):
        return number(argument)
    if isinstance(argument, (list, tuple)):
        return (type(argument).__name__, *(_canonical(item, number) for item in argument))
    if isinstance(argument, dict):
        return tuple((key, _canonical(item, number)) for key, item in argument.items())
    if isinstance(argument, slice):
        return ("slice", *(_canonical(item, number) for item in (argument.start, argument.stop, argument.step)))
    return (type(argument).__name__, repr(argument))


def _value_key(node: fx.Node) -> Any:
    held = value(node)
    items = held if isinstance(held, (tuple, list)) else [held]
    return tuple(layout_key(item) if isinstance(item, torch.Tensor) else repr(item) for item in items)


def _row(node: fx.Node, numbers: dict[fx.Node, Any]) -> tuple[Any, ...]:
    """What a node computes, comparable between blocks: operation, wiring and literals, operands given as numbers."""
    # The text of a run-time assertion names symbols that Dynamo numbers anew in every block.
    args = node.args[:1] if op_name(node).startswith("_assert_scalar") else node.args
    return (node.op, node.target, _canonical(args, numbers.get), _canonical(node.kwargs, numbers.get))


def _rows(block: Block, operands: Sequence[fx.Node]) -> Iterator[tuple[Any, ...]]:
    numbers: dict[fx.Node, Any] = {operand: ("operand", place) for place, operand in enumerate(operands)}
    for place, node in enumerate(block.nodes):
        yield _row(node, numbers)
        numbers[node] = ("node", place)


def _embed(
    block: Block, operands: Sequence[fx.Node], other: Block, rows: Sequence[tuple[Any, ...]], counter: FlopCounter
) -> dict[fx.Node, int] | None:
    """Match a block's nodes in order to those of another, given with its rows; None unless all match.

    A little of the other may be left over: Dynamo drops work whose result is not read, so that the last block of a
    trunk often lacks the text stream's last nodes. Computing them after all costs less than compiling one more body.
    """
    numbers: dict[fx.Node, Any] = {operand: ("operand", place) for place, operand in enumerate(operands)}
    matched: dict[fx.Node, int] = {}
    place = 0
    for node in block.nodes:
        row = _row(node, numbers)
        while place < len(rows) and rows[place] != row:
            place += 1
        if place == len(rows):
            return None
        matched[node] = place
        numbers[node] = ("node", place)
        place += 1
    taken = set(matched.values())
    left_over = [node for place, node in enumerate(other.nodes) if place not in taken]
    if any(mutated_operand(node) is not None or is_context_switch(node) for node in left_over):
        return None  # that acts on what the matched nodes compute
    wasted, useful = (sum(map(counter.arithmetic, nodes)) for nodes in (left_over, block.nodes))
    return matched if wasted <= MOST_WASTE * useful else None


def _operand_key(operand: fx.Node, is_viewed: bool) -> Any:
    held = value(operand)
    if is_activation(operand):  # made contiguous before the call
        order = stride_order(held) if is_viewed else ()
        return ("activation", shape_key(held), order, str(held.dtype), str(held.device))
    return ("constant" if operand.op == "get_attr" else "weight", _value_key(operand))
