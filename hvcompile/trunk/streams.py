"""Which output of a block is the next version of which operand: the residual streams that run through the trunk."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from hvcompile.graph.nodes import is_tensor, op_name, tensor_kind
from hvcompile.trunk.find import Block
from hvcompile.trunk.trunk import Body

# Operations whose result is a tuple of parts of a tensor.
_SPLITTING = {"split", "chunk", "unbind", "tensor_split"}

# Operations through which a residual stream passes; they add to it or scale it, but change nothing else.
_CARRIERS = {
    *("add", "sub", "mul", "where", "cat", "concat", "getitem", "narrow", *_SPLITTING),
    *("permute", "transpose", "view", "reshape", "clone", "contiguous", "to", "type_as", "dropout"),
} | {f"{kind}{name}" for kind in ("", "un") for name in ("squeeze", "flatten")}


def find_streams(
    blocks: Sequence[Block],
    operands: Sequence[Sequence[fx.Node]],
    bodies: dict[int, Body],
    outputs: dict[int, list[fx.Node | None]],
) -> None:
    """Fill in each body's streams: from what consecutive calls of it pass on, else from inside the body.

    Args:
        blocks: in order.
        operands: of each block, what it reads.
        bodies: by the index of the block.
        outputs: by the index of the block, its node for each output of the body; None where it has none.

    """
    likely: dict[Body, set[int]] = {body: set() for body in bodies.values()}
    for index in range(1, len(blocks)):
        output_of = {node: output for output, node in enumerate(outputs[index - 1]) if node is not None}
        for position, operand in enumerate(operands[index]):
            if operand in output_of and is_tensor(operand):
                likely[bodies[index]].add(position)
                if bodies[index] is bodies[index - 1]:
                    bodies[index].streams[output_of[operand]] = position
    for index, body in bodies.items():
        for output in range(len(outputs[index])):
            if output not in body.streams:
                carried = _stream_of(body.module, output, likely[body])
                if carried is not None and carried not in body.streams.values():
                    body.streams[output] = carried


def is_residual(body: Body, position: int) -> bool:
    """Whether an output is the operand that it continues plus something, rather than a new value in its place."""
    placeholders = list(body.module.graph.find_nodes(op="placeholder"))
    results: Any = body.module.graph.output_node().args[0]
    return placeholders[body.streams[position]] in residual_sources(results[position])


def residual_sources(output: fx.Node) -> set[fx.Node]:
    """The placeholders whose value reaches a node through additions, slices and concatenations alone."""
    sources: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [output]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            sources.add(node)
        elif op_name(node).rstrip("_") in _CARRIERS or node.target is operator.iadd:
            stack.extend(item for item in node.all_input_nodes if is_tensor(item) or op_name(item) in _SPLITTING)
    return sources


def _stream_of(body: fx.GraphModule, position: int, likely: set[int]) -> int | None:
    """The operand that an output continues, found inside the body: by its residual path, else by its shape alone."""
    placeholders = list(body.graph.find_nodes(op="placeholder"))
    results: Any = body.graph.output_node().args[0]
    kind = tensor_kind(results[position])
    carried = residual_sources(results[position])
    alike = [place for place, node in enumerate(placeholders) if is_tensor(node) and tensor_kind(node) == kind]
    by_residual = [place for place in alike if placeholders[place] in carried]
    for candidates in (by_residual, [p for p in by_residual if p in likely], [p for p in alike if p in likely]):
        if len(candidates) == 1:
            return candidates[0]
    return None
