"""Scales of low-rank branches that are Python floats: one input a block, so that another value compiles nothing anew.

Dynamo passes a float that has changed as a float64 tensor of no dimensions, and reads it by ``item()``; see
``trunk.numbers``, which makes literals of such floats. A scale need be no literal: it multiplies a tensor, and tells no
block from another. So the scales of a block become one vector, an input that the runtime fills in every call. A product
is computed as torch computes it with a Python float, in float32 where the tensor is of a smaller type.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.inline import run_on_fakes
from hvcompile.graph.nodes import is_tensor
from hvcompile.graph.paths import module_path
from hvcompile.torch_private import dynamo, fakes, kernels
from hvcompile.torch_private.fakes import TAG, value
from hvcompile.trunk.find import Block
from hvcompile.trunk.low_rank import branches_of
from hvcompile.trunk.trunk import Derived

MADE_BY = "outline"


def scales_of(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that read a float which a module holds, and which does nothing but scale low-rank branches."""
    scaled = {branch.scaled for branch in branches_of(graph.nodes)}
    return {
        node
        for node in graph.find_nodes(op="call_method", target="item")
        if dynamo.is_float_of_module(node.all_input_nodes[0])
        and node.users
        and all(user in scaled and _factors(user, node) is not None for user in node.users)
    }


def _factors(product: fx.Node, number: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """A product's tensor and its number; None where it is of another kind, or of another dtype than the tensor."""
    tensors = [item for item in product.args if isinstance(item, fx.Node) and is_tensor(item)]
    if len(tensors) != 1 or set(product.args) != {tensors[0], number}:
        return None
    fake = value(tensors[0])
    is_kept = is_tensor(product) and fake.is_floating_point() and value(product).dtype == fake.dtype
    return (tensors[0], number) if is_kept and fake.ndim > 0 else None


def take_scales(module: fx.GraphModule, blocks: Sequence[Block]) -> list[Derived]:
    """Make an input of the scales of each block, in place; the floats' own placeholders stay.

    Args:
        module: a captured graph, before its blocks are outlined.
        blocks: its blocks, which lose the nodes that read the floats.

    Returns:
        The new inputs, for ``Trunk.derived``.

    """
    graph, numbers = module.graph, scales_of(module.graph)
    wanted: list[tuple[Block, list[fx.Node]]] = []
    for block in blocks:
        inside = set(block.nodes)
        read = dict.fromkeys(item for node in block.nodes for item in node.all_input_nodes)
        held = [number for number in read if number in numbers and inside.issuperset(number.users)]
        if held:
            wanted.append((block, held))
    mode = fakes.fake_mode(graph)
    if not wanted or mode is None:
        return []
    placeholders = []
    groups = [[number.all_input_nodes[0] for number in held] for _, held in wanted]
    for block, held in wanted:
        device = value(next(iter(held[0].users))).device
        with graph.inserting_after(list(graph.find_nodes(op="placeholder"))[-1]):
            vector = graph.placeholder(f"{block.path.replace('.', '_')}_scales")
        dynamo.mark_as_added(vector)
        vector.meta = {TAG: MADE_BY, "example_value": fakes.fake_like(mode, (len(held),), torch.float64, device)}
        placeholders.append(vector)
        with mode, torch.no_grad():
            for place, number in enumerate(held):
                for product in list(number.users):
                    _scale_by(graph, block, product, number, vector, place)
        kept = set(block.nodes).difference(held)
        block.nodes = [node for node in graph.nodes if node in kept]
        for number in held:
            graph.erase_node(number)
    return [_derived(module, groups, placeholders)]


def _scale_by(graph: fx.Graph, block: Block, product: fx.Node, number: fx.Node, vector: fx.Node, place: int) -> None:
    """Put a product with a number of the vector in the place of one with a float."""
    factors = _factors(product, number)
    assert factors is not None
    tensor, dtype = factors[0], value(factors[0]).dtype
    precise = dtype if dtype in {torch.float32, torch.float64} else torch.float32

    def call(op: str, target: Any, *args: Any) -> fx.Node:
        node = graph.create_node(op, target, args)
        node.meta = {key: product.meta[key] for key in ("nn_module_stack", "stack_trace") if key in product.meta}
        node.meta |= {TAG: MADE_BY, "example_value": run_on_fakes(node)}
        block.nodes.append(node)
        return node

    with graph.inserting_before(product):
        scale = call("call_method", "to", call("call_function", operator.getitem, vector, place), precise)
        result = tensor if precise == dtype else call("call_method", "to", tensor, precise)
        result = call("call_function", operator.mul, result, scale)
        result = result if precise == dtype else call("call_method", "to", result, dtype)
    product.replace_all_uses_with(result)
    block.nodes.remove(product)
    graph.erase_node(product)


def _derived(module: fx.GraphModule, groups: Sequence[Sequence[fx.Node]], placeholders: Sequence[fx.Node]) -> Derived:
    sources = list(dict.fromkeys(source for group in groups for source in group))
    graph = fx.Graph()
    inside = {source: graph.placeholder(source.name) for source in sources}
    devices = [value(placeholder).device for placeholder in placeholders]
    stacked = graph.call_function(
        kernels.stack_each, ([[inside[source] for source in group] for group in groups], devices)
    )
    graph.output(tuple(graph.call_function(operator.getitem, (stacked, place)) for place in range(len(groups))))
    return Derived(
        made_by=MADE_BY,
        module=fx.GraphModule(module, graph),
        sources=tuple(sources),
        placeholders=tuple(placeholders),
        is_kept=False,
    )


def constant_scales(graph: fx.Graph) -> Callable[[str, float], bool] | None:
    """What tells whether a float, by the name of its source and its value, is a scale that is a literal of a graph.

    None where the graph has no low-rank branch with such a scale.
    """
    found: set[tuple[tuple[str, ...], float]] = set()
    for branch in branches_of(graph.nodes):
        stack = list((branch.scaled.meta.get("nn_module_stack") or {}).values()) if branch.scaled is not None else []
        literals = [item for item in branch.scaled.args if isinstance(item, float)] if branch.scaled is not None else []
        if stack and literals:
            found.add((module_path(str(stack[-1][0])), literals[0]))
    if not found:
        return None

    def is_one(name: str, number: float) -> bool:
        path = module_path(name)
        return any((path[:end], number) in found for end in (len(path) - 1, len(path) - 2))

    return is_one
