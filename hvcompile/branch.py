"""Building a ``torch.cond`` into a captured graph: branches over shared operands, and the call."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.inductor import COND, TAG, value
from hvcompile.nodes import is_tensor
from hvcompile.trunk import contiguous_like


class Branch:
    """A branch of a ``cond`` under construction.

    ``env`` maps nodes of the outer graph to what stands for them inside. Both branches of a ``cond`` take the same
    operands, return tensors of equal strides, and may not return an operand; ``finish`` sees to the last two.
    """

    def __init__(self, root: fx.GraphModule, passed: Mapping[fx.Node, fx.Node], tag: str) -> None:
        """Make a placeholder for each operand.

        Args:
            root: the module whose submodules (bodies) the branch may call.
            passed: for each outer node, the node to pass for it (see ``trunk.as_operands``).
            tag: the pass's name.

        """
        self.root, self.tag, self.graph = root, tag, fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.results: list[fx.Node] = []
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

    def call(self, function: Any, *args: fx.Node) -> fx.Node:
        """Add an operation that returns a tensor like its first operand."""
        node = self.graph.call_function(function, args)
        node.meta = {TAG: self.tag, "example_value": value(args[0])}
        return node

    def finish(self, results: Sequence[fx.Node]) -> fx.GraphModule:
        """Return these nodes, each as a contiguous tensor of its own."""
        for result in results:
            copied = self.graph.call_function(torch.clone, (result,), {"memory_format": torch.contiguous_format})
            copied.meta = {TAG: self.tag, "example_value": contiguous_like(value(result))}
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
    """Add ``cond(predicate, first branch, second branch)`` before a node and return the nodes of its results.

    Args:
        root: gains the branches as submodules under the names given.
        predicate: a bool scalar.
        branches: name -> branch and its results; the first runs where the predicate holds.
        operands: what both branches take, in the order of their placeholders; no two may share storage.
        before: the node before which the call stands.

    """
    tag = ""
    results: list[Any] = []
    for name, (branch, returned) in branches.items():
        setattr(root, name, branch.finish(returned))
        results, tag = [value(node) for node in branch.results], branch.tag
    outputs = []
    with root.graph.inserting_before(before):
        targets = [root.graph.get_attr(name) for name in branches]
        call = root.graph.call_function(COND, (predicate, *targets, tuple(operands)))
        call.meta = {TAG: tag, "example_value": tuple(results)}
        for place, result in enumerate(results):
            output = root.graph.call_function(operator.getitem, (call, place))
            output.meta = {TAG: tag, "example_value": result}
            outputs.append(output)
    return outputs


def is_submodule(node: fx.Node) -> bool:
    """Whether a node refers to a submodule (a body) rather than to a constant tensor."""
    return node.op == "get_attr" and not is_tensor(node)
