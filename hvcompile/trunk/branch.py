"""Building a ``torch.cond`` into a captured graph: branches over shared operands, and the call."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.nodes import is_tensor
from hvcompile.torch_private.fakes import TAG, is_data_dependent, value
from hvcompile.torch_private.lowering import COND
from hvcompile.trunk.operands import contiguous_like


class Branch:
    """A branch of a ``cond`` under construction.

    Both branches of a ``cond`` take the same operands and return tensors of equal strides, and neither may return an
    operand. ``finish`` sees to the strides and the results.

    Attributes:
        graph: the branch's.
        env: for each node of the outer graph, the node inside that stands for it.
        results: what the branch returns, once it is finished.

    """

    def __init__(self, root: fx.GraphModule, passed: Mapping[fx.Node, fx.Node], tag: str) -> None:
        """Make a placeholder for each operand.

        Args:
            root: the module whose submodules (bodies) the branch may call.
            passed: for each outer node, the node to pass for it (see ``operands.as_operands``).
            tag: the pass's name.

        """
        self.root, self.tag, self.graph = root, tag, fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.results: list[fx.Node] = []
        self._own: set[fx.Node] = set()
        for outer, operand in passed.items():
            self.env[outer] = self.graph.placeholder(operand.name)
            self.env[outer].meta["example_value"] = value(operand)

    def copy(self, nodes: Iterable[fx.Node]) -> None:
        """Copy outer nodes, in order, with the submodules that they call."""
        for node in nodes:
            for operand in node.all_input_nodes:
                if operand.op == "get_attr" and operand not in self.env:
                    self.env[operand] = self.graph.node_copy(operand)
            self.env[node] = self.graph.node_copy(node, self.env.__getitem__)

    def call(self, function: Any, first: fx.Node, *others: Any, example: torch.Tensor | None = None) -> fx.Node:
        """Add an operation that returns a tensor like ``example``; like its first operand, where there is none."""
        node = self.graph.call_function(function, (first, *others))
        node.meta = {TAG: self.tag, "example_value": value(first) if example is None else example}
        return node

    def make(self, function: Any, like: fx.Node) -> fx.Node:
        """Add an operation that returns a contiguous tensor of its own, of the shape of its operand."""
        node = self.call(function, like)
        node.meta["example_value"] = contiguous_like(value(like))
        self._own.add(node)
        return node

    def finish(self, results: Sequence[fx.Node], flat: Sequence[bool]) -> fx.GraphModule:
        """Return these nodes, each as a contiguous tensor of its own, of one dimension where ``flat`` says so."""
        for result, is_flat in zip(results, flat, strict=True):
            copied = result
            if result not in self._own:
                copied = self.graph.call_function(torch.clone, (result,), {"memory_format": torch.contiguous_format})
                copied.meta = {TAG: self.tag, "example_value": contiguous_like(value(result))}
            if is_flat:
                copied = self.graph.call_function(torch.flatten, (copied,))
                copied.meta = {TAG: self.tag, "example_value": contiguous_like(value(result)).flatten()}
            self.results.append(copied)
        self.graph.output(tuple(self.results))
        return fx.GraphModule(self.root, self.graph)


def add_cond(
    root: fx.GraphModule,
    predicate: fx.Node,
    branches: Mapping[str, tuple[Branch, Sequence[fx.Node]]],
    operands: Iterable[fx.Node],
    *,
    before: fx.Node,
) -> list[fx.Node]:
    """Add ``cond(predicate, first branch, second branch)`` before a node.

    Args:
        root: gains the branches as submodules.
        predicate: a bool scalar.
        branches: by the name of the submodule, a branch and the nodes that it returns; the first runs if the predicate
            holds.
        operands: what both branches take, in the order of their placeholders; no two may share storage.
        before: the node before which the call is inserted.

    Returns:
        The nodes of the results.

    """
    operands = tuple(operands)
    tag = ""
    shapes: list[list[int | tuple[fx.Node, int]] | None] = []
    results: list[Any] = []
    for name, (branch, returned) in branches.items():
        shapes = shapes or [_shape_by_operands(value(node), operands) for node in returned]
        setattr(root, name, branch.finish(returned, [shape is not None for shape in shapes]))
        results, tag = [value(node) for node in branch.results], branch.tag
    outputs = []
    with root.graph.inserting_before(before):
        targets = [root.graph.get_attr(name) for name in branches]
        call = root.graph.call_function(COND, (predicate, *targets, operands))
        call.meta = {TAG: tag, "example_value": tuple(results)}
        for index, (result, shape) in enumerate(zip(results, shapes, strict=True)):
            output = root.graph.call_function(operator.getitem, (call, index))
            output.meta = {TAG: tag, "example_value": result}
            outputs.append(output if shape is None else _unflatten(output, shape, tag))
    return outputs


def _shape_by_operands(fake: torch.Tensor, operands: Sequence[fx.Node]) -> list[int | tuple[fx.Node, int]] | None:
    """Each size of a tensor, or the operand and dimension that has it; None where the tensor need not be flattened.

    ``cond`` compares the strides of its branches' results as products of sizes. If a contiguous tensor's size holds a
    floor division, a stride is of the form ``Max(1, s0 * (s1 // 2))``, which ``cond`` does not take for a product.
    """
    if not any(isinstance(stride, torch.SymInt) for stride in fake.stride()) or is_data_dependent(fake):
        return None
    sizes = {
        str(size): (operand, dim)
        for operand in operands
        if is_tensor(operand)
        for dim, size in enumerate(value(operand).shape)
    }
    shape = [sizes.get(str(size)) if isinstance(size, torch.SymInt) else int(size) for size in fake.shape]
    return None if None in shape else [size for size in shape if size is not None]


def _unflatten(node: fx.Node, shape: Sequence[int | tuple[fx.Node, int]], tag: str) -> fx.Node:
    """Give a flattened result its shape back."""
    sizes: list[int | fx.Node] = []
    for size in shape:
        if isinstance(size, int):
            sizes.append(size)
            continue
        operand, dim = size
        length = node.graph.call_method("size", (operand, dim))
        length.meta = {TAG: tag, "example_value": value(operand).shape[dim]}
        sizes.append(length)
    viewed = node.graph.call_method("view", (node, *sizes))
    fakes = [value(size) if isinstance(size, fx.Node) else size for size in sizes]
    viewed.meta = {TAG: tag, "example_value": value(node).view(fakes)}
    return viewed


def is_submodule(node: fx.Node) -> bool:
    """Whether a node refers to a submodule (a body) rather than to a constant tensor."""
    return node.op == "get_attr" and not is_tensor(node)
