"""Work that does not change from step to step, on conditions, weights and sizes alone, and how to set it apart.

``roles.classify`` tells conditions from the sample and the timestep. A condition that changes after all (a new tensor
in every step) costs time and is never wrong: the runtime looks at the tensors themselves, not at their roles.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence

import torch
from torch import fx

from hvcompile.graph.nodes import (
    ancestors,
    contexts,
    draws_random_numbers,
    is_context_switch,
    is_scalar,
    is_tensor,
    mutated_operand,
    op_name,
    storage,
    writers,
)
from hvcompile.torch_private.dynamo import source_name
from hvcompile.torch_private.fakes import is_data_dependent, value
from hvcompile.trunk.roles import classify
from hvcompile.trunk.trunk import Trunk

_RANDOM = re.compile(r"(rand|randn|randint|randperm|normal|bernoulli|multinomial|poisson|exponential)(_like|_)?$")


def invariants(trunk: Trunk) -> set[fx.Node]:
    """The nodes of the top-level graph whose values follow from conditions, weights and sizes alone.

    They can be run elsewhere. That excludes nodes that draw random numbers, that are written to in place, that stand in
    an autocast region, and lengths that depend on data.
    """
    roles = classify(trunk)
    changing = {*roles.changing, *trunk.added}
    within = contexts(trunk.graph)
    written = writers(trunk.graph)
    constant: set[fx.Node] = set()
    for node in trunk.graph.nodes:
        if node.op == "placeholder":
            # A number that is no size may be a timestep.
            is_constant = node not in changing and not (is_scalar(node) and ".size()" not in source_name(node))
        elif node.op == "get_attr":
            is_constant = is_tensor(node)
        else:
            is_constant = node.op in {"call_function", "call_method"} and constant.issuperset(node.all_input_nodes)
            is_constant = is_constant and not within[node] and not is_context_switch(node) and _stands_alone(node)
        if is_constant and not (is_tensor(node) and storage(node) in written):
            constant.add(node)
    return constant


def _stands_alone(node: fx.Node) -> bool:
    """Whether a node gives the same result wherever it runs, and that is numbers or tensors of known shape."""
    if mutated_operand(node) is not None or draws_random_numbers(node) or _RANDOM.match(op_name(node)):
        return False
    if "unbacked_bindings" in node.meta or "_assert" in op_name(node):
        return False
    result = value(node)
    items = result if isinstance(result, (tuple, list)) else [result]
    if any(isinstance(item, torch.Tensor) and is_data_dependent(item) for item in items):
        return False
    return is_scalar(node) or isinstance(result, torch.Size) or all(isinstance(item, torch.Tensor) for item in items)


def copied_out(trunk: Trunk, nodes: Sequence[fx.Node]) -> tuple[fx.Graph, dict[fx.Node, fx.Node], list[fx.Node]]:
    """Copy some nodes, and all that they depend on, into a graph of their own, which has no output yet.

    Returns:
        The graph, its node for each node of the top-level graph, and the placeholders that it takes, in order.

    """
    graph, copied = fx.Graph(), ancestors(nodes) | set(nodes)
    env: dict[fx.Node, fx.Node] = {}
    sources = [node for node in trunk.inputs if node in copied]
    for node in [*sources, *(node for node in trunk.graph.nodes if node in copied and node.op != "placeholder")]:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = copy.copy(node.meta)
    return graph, env, sources


def drop_dead(graph: fx.Graph, candidates: Iterable[fx.Node]) -> None:
    """Erase those of the candidates, and of what they depend on, whose results nothing reads any more."""
    erasable = set(candidates)
    erasable |= ancestors(erasable)
    for node in reversed(graph.nodes):
        is_work = node.op in {"call_function", "call_method", "get_attr"} and not is_context_switch(node)
        is_work = is_work and mutated_operand(node) is None and "_assert" not in op_name(node)
        if node in erasable and is_work and not node.users:
            graph.erase_node(node)
