"""Python floats that Dynamo has made inputs of a graph: those that the blocks depend on become literals again.

Under ``dynamic=True``, or once a float has changed, Dynamo passes it as a float64 tensor of no dimensions, and reads it
by ``item()`` where it is used: a layer norm's eps, a LoRA's scale, a guidance given as a number. Inside a subgraph that
is a number which depends on data, and no operator takes that for its eps; as literals, such floats are also what tells
unlike blocks apart. Dynamo guards on each that becomes a literal: another value compiles again, and is never ignored.

Floats that are given to the call and read outside the blocks alone, such as a timestep, stay inputs.

Sizes are symbols under ``dynamic=True``, and where a model needs a certain one, numbers with a symbol's type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.nodes import descendants, is_scalar
from hvcompile.torch_private import fakes
from hvcompile.torch_private.dynamo import is_of_module
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.find import Block
from hvcompile.trunk.scales import scales_of


def fix_numbers_of_modules(graph: fx.Graph) -> None:
    """Make literals of the floats that modules hold, and of those on whose value Dynamo guards already.

    Scales of low-rank branches stay inputs; see ``trunk.scales``.
    """
    scales = scales_of(graph)
    fix_numbers(graph, lambda number: number not in scales and is_of_module(number.all_input_nodes[0]))


def fix_numbers_of_blocks(graph: fx.Graph, blocks: Sequence[Block]) -> None:
    """Make literals of the floats that are read from the first block to the last, also between them.

    Those that ``trunk.scales`` has made inputs of blocks are read no more.
    """
    first, last = blocks[0].nodes[0], blocks[-1].nodes[-1]
    within = {first}
    node = first
    while node is not last:
        node = node.next
        within.add(node)

    def is_read_within(number: fx.Node) -> bool:
        derived = {number, *(node for node in descendants([number]) if is_scalar(node))}
        return not within.isdisjoint(derived | {user for node in derived for user in node.users})

    gone = fix_numbers(graph, is_read_within)
    for block in blocks:
        block.nodes = [node for node in block.nodes if node not in gone]


def fix_numbers(graph: fx.Graph, is_wanted: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Make literals of some of the floats that Dynamo has made inputs of, and of what is computed from them alone.

    Args:
        graph: changed in place; its placeholders stay.
        is_wanted: whether the float that a node reads by ``item()`` becomes a literal.

    Returns:
        The nodes that are gone.

    """
    numbers = [node for node in graph.find_nodes(op="call_method", target="item") if is_float_input(node)]
    for node in numbers:
        if is_wanted(node):
            fakes.fix_number(value(node))
    gone: set[fx.Node] = set()
    for node in sorted({*numbers, *descendants(numbers)}):
        if node.op not in {"call_method", "call_function"} or not fakes.is_fixed(value(node)):
            continue
        literal = fakes.literal_of(value(node))
        for user in list(node.users):
            user.args, user.kwargs = _replaced((user.args, user.kwargs), node, literal)
        graph.erase_node(node)
        gone.add(node)
    return gone


def fix_settled_sizes(graph: fx.Graph) -> None:
    """Make literals of the symbolic sizes that can be but one, on which Dynamo guards already.

    AOTAutograd would make them literals later, and Inductor takes no literal as an operand of a body.
    """
    for node in list(graph.nodes):
        size = value(node)
        if not isinstance(size, torch.SymInt) or not fakes.is_fixed(size):
            continue
        literal = fakes.literal_of(size)
        for user in list(node.users):
            user.args, user.kwargs = _replaced((user.args, user.kwargs), node, literal)
        if node.op != "placeholder":
            graph.erase_node(node)


def is_float_input(node: fx.Node) -> bool:
    """Whether a node reads a Python float that Dynamo has made an input of."""
    (source,) = node.all_input_nodes[:1] or (node,)
    number = value(node)
    return source.op == "placeholder" and isinstance(number, torch.SymFloat) and fakes.number_hint(number) is not None


def _replaced(arguments: Any, node: fx.Node, literal: int | float) -> Any:
    return fx.map_arg(arguments, lambda item: literal if item is node else item)
