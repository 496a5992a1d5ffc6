"""Operands of a subgraph call: which nodes are activations, how they lie in memory, and how to hand them over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from hvcompile.graph.nodes import is_tensor, is_weight, storage
from hvcompile.torch_private import fakes
from hvcompile.torch_private.fakes import provenance, value


def is_activation(node: fx.Node) -> bool:
    """Whether a node is a tensor that is new in each step: an input, or computed from inputs."""
    return is_tensor(node) and node.op != "get_attr" and not is_weight(node)


def contiguous_like(fake: torch.Tensor) -> torch.Tensor:
    """The fake value of a contiguous copy."""
    return torch.clone(fake, memory_format=torch.contiguous_format)


def stride_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Dimensions from the largest stride to the smallest; in their own order where the tensor is contiguous."""
    order = range(tensor.ndim)
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return tuple(order)
    strides = [fakes.size_hint(stride) for stride in tensor.stride()]
    return tuple(sorted(order, key=lambda dim: -strides[dim]))


def restore_order(graph: fx.Graph, node: fx.Node, original: torch.Tensor) -> fx.Node:
    """Give a contiguous tensor the stride order that it had before outlining, since a ``view`` may rely on it.

    Args:
        graph: the node's.
        node: a contiguous tensor; the new nodes are inserted right after it.
        original: the tensor before outlining, real or fake, whose stride order is wanted.

    Returns:
        The last new node, or ``node`` itself where the order is the usual one.

    """
    order = stride_order(original)
    if order == tuple(range(original.ndim)):
        return node
    inverse = tuple(order.index(dim) for dim in range(len(order)))
    restored = node
    steps: list[tuple[str, tuple[Any, ...]]] = [("permute", order), ("contiguous", ()), ("permute", inverse)]
    fake = value(node)
    for method, arguments in steps:
        fake = getattr(fake, method)(*arguments)
        before = restored
        with graph.inserting_after(before):
            restored = graph.call_method(method, (before, *arguments))
        restored.meta = provenance(node, "outline", fake)
    return restored


def as_operands(
    graph: fx.Graph, nodes: Iterable[fx.Node], tag: str, ready: Iterable[fx.Node] = ()
) -> dict[fx.Node, fx.Node]:
    """Prepare nodes as operands of a subgraph, at the graph's insertion point.

    Activations are made contiguous: Inductor fails on a stride assertion at run time if the caller chose an operand's
    layout. Activations that may share storage with another operand are copied: operands of ``cond`` may not alias. So
    are those that ``contiguous`` would leave with other strides than the same operand of another call may have.
    Weights, numbers and constants pass as they are.

    Args:
        graph: the nodes'.
        nodes: what the subgraph reads.
        tag: the name of the pass, for the meta of new nodes.
        ready: nodes that are contiguous and share no storage; they pass as they are.

    Returns:
        For each node, the one to pass.

    """
    as_is, ordered = set(ready), list(dict.fromkeys(nodes))
    passed = {node: node for node in ordered if node in as_is or not is_activation(node)}
    storages = {storage(node) for node in passed}
    for node in ordered:
        if node in passed:
            continue
        if storage(node) in storages or _has_odd_strides(value(node)):
            operand = graph.call_function(torch.clone, (node,), {"memory_format": torch.contiguous_format})
            operand.meta = provenance(node, tag, contiguous_like(value(node)))
        else:
            operand = graph.call_method("contiguous", (node,))
            operand.meta = provenance(node, tag, value(node).contiguous())
        storages.add(storage(node))
        passed[node] = operand
    return {node: passed[node] for node in ordered}


def _has_odd_strides(fake: torch.Tensor) -> bool:
    """Whether a dimension of one element has a stride that is not the usual one; ``contiguous`` leaves it as it is."""
    if fake.layout is not torch.strided or 1 not in [size for size in fake.shape if isinstance(size, int)]:
        return False
    strides = zip(fake.shape, fake.contiguous().stride(), contiguous_like(fake).stride(), strict=True)
    return any(isinstance(size, int) and size == 1 and str(own) != str(usual) for size, own, usual in strides)


def symbolic_sizes(graph: fx.Graph, before: fx.Node) -> list[fx.Node]:
    """One node for each symbol of a shape that is known before a node: from inputs, or a size that depends on data."""
    node_of: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node is before:
            break
        symbol = fakes.symbol_of(node)
        if symbol is not None:
            node_of.setdefault(symbol, node)
    return list(node_of.values())
