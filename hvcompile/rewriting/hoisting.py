"""Hoisting: work on sizes and Python numbers alone is taken out of the step and done once for each set of them.

Rotary tables, frequencies of sinusoidal embeddings, positions: each becomes a derived input. They are computed eagerly,
by the operations that were captured: once a shape is too seldom to compile for.

What reads a tensor, be it a weight, a buffer or a condition, stays in the step. Nothing tells for certain that the
content of a tensor is what it was (a write through ``.data`` moves no version), and such work is small beside a step.
What is hoisted can't be stale: it is a function of numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from hvcompile.graph.aliasing import refresh
from hvcompile.graph.nodes import ancestors, is_tensor, op_name, storage
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.invariants import copied_out, drop_dead, invariants
from hvcompile.trunk.operands import contiguous_like
from hvcompile.trunk.trunk import Trunk

# What moves nothing; done in the step, on what was hoisted.
_VIEWS = {
    *("view", "reshape", "unsqueeze", "squeeze", "expand", "expand_as", "permute", "transpose", "getitem", "flatten"),
    *("unflatten", "chunk", "split", "unbind", "narrow", "select", "t", "movedim", "swapaxes"),
}
# What is no reason to hoist, and is taken along where there is one.
_CHEAP = _VIEWS | {
    *("to", "type", "type_as", "float", "half", "bfloat16", "double", "bool", "int", "long", "contiguous", "clone"),
    *("arange", "ones", "zeros", "full", "empty", "tensor", "ones_like", "zeros_like", "full_like", "getattr", "size"),
}


def hoist(trunk: Trunk, tag: str) -> list[str]:
    """Take what follows from sizes and numbers alone out of the top-level graph; returns a line that says so."""
    same = _of_numbers(trunk)
    written_by_others = {storage(node) for node in trunk.output.all_input_nodes}  # a caller may write into its results
    cuts: dict[fx.Node, None] = {}
    for node in trunk.graph.nodes:
        if node in same and is_tensor(node) and any(user not in same for user in node.users):
            base = _base(node, same)
            if base is not None and _pays(base) and storage(base) not in written_by_others:
                cuts[base] = None
    if not cuts:
        return []
    _take_out(trunk, list(cuts), tag)
    return [f"{len(cuts)} values that follow from sizes are computed once, not once a step"]


def _of_numbers(trunk: Trunk) -> set[fx.Node]:
    """The invariant nodes that read no tensor which is not made here."""
    same = invariants(trunk)
    pure: set[fx.Node] = set()
    for node in trunk.graph.nodes:
        is_source = node.op == "get_attr" or (node.op == "placeholder" and is_tensor(node))
        if node in same and not is_source and pure.issuperset(node.all_input_nodes):
            pure.add(node)
    return pure


def _base(node: fx.Node, same: set[fx.Node]) -> fx.Node | None:
    """What a view is a view of; None where that is an input, or no tensor."""
    while node.op != "placeholder" and op_name(node) in {*_VIEWS, "contiguous"}:  # what is hoisted is contiguous
        tensors = [item for item in node.all_input_nodes if item in same and not _is_number(item)]
        if len(tensors) != 1:
            break
        node = tensors[0]
    return node if is_tensor(node) and node.op in {"call_function", "call_method"} else None


def _is_number(node: fx.Node) -> bool:
    return isinstance(value(node), (int, float, torch.SymInt, torch.SymFloat))


def _pays(node: fx.Node) -> bool:
    """Whether something is computed on the way to a node, rather than cast or laid out anew.

    One number never pays, and it may be there to be read as a Python number, which no derived input is.
    """
    if value(node).ndim == 0:
        return False
    work = [
        item
        for item in {node, *ancestors([node])}
        if item.op in {"call_function", "call_method"} and not _is_number(item)
    ]
    return any(op_name(item) not in _CHEAP for item in work)


def _take_out(trunk: Trunk, nodes: list[fx.Node], tag: str) -> None:
    graph, env, sources = copied_out(trunk, nodes)
    how: Any = {"memory_format": torch.contiguous_format}
    results = [graph.call_function(torch.clone, (env[node],), how) for node in nodes]
    graph.output(tuple(results))
    examples = [contiguous_like(value(node)) for node in nodes]
    derived = trunk.add_derived(
        [f"hoisted_{node.name}" for node in nodes],
        examples,
        made_by=tag,
        module=fx.GraphModule(trunk.module, graph),
        sources=sources,
    )
    for node, placeholder in zip(nodes, derived.placeholders, strict=True):
        node.replace_all_uses_with(placeholder)
        for user in [user for user in placeholder.users if op_name(user) == "contiguous"]:
            user.replace_all_uses_with(placeholder)  # one operand of all blocks, not one a kind of block
            trunk.graph.erase_node(user)
    drop_dead(trunk.graph, nodes)
    refresh(trunk.graph, set(derived.placeholders))
