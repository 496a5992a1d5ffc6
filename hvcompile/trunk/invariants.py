"""What of a step does not change from step to step: work on conditions, weights and sizes alone; setting it apart.

Conditions are told from the sample and the timestep by ``inputs.classify``. One that changes after all (a new tensor in
every step) costs time and is never wrong: the runtime looks at the tensors that it is given, not at their roles.
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

    Only those that can be run elsewhere: not what draws random numbers, what is written to in place, what stands in an
    autocast region, and lengths that depend on data.
    """
    roles = classify(trunk)
    changing = {*roles.changing, *trunk.added}
    within = contexts(trunk.graph)
    written = writers(trunk.graph)
    found: set[fx.Node] = set()
    for node in trunk.graph.nodes:
        if node.op == "placeholder":
            # A number that is no size may be a timestep.
            is_same = node not in changing and not (is_scalar(node) and ".size()" not in source_name(node))
        elif node.op == "get_attr":
            is_same = is_tensor(node)
        else:
            is_same = node.op in {"call_function", "call_method"} and found.issuperset(node.all_input_nodes)
            is_same = is_same and not within[node] and not is_context_switch(node) and _stands_alone(node)
        if is_same and not (is_tensor(node) and storage(node) in written):
            found.add(node)
    return found


def _stands_alone(node: fx.Node) -> bool:
    if mutated_operand(node) is not None or draws_random_numbers(node) or _RANDOM.match(op_name(node)):
        return False
    if "unbacked_bindings" in node.meta or "_assert" in op_name(node):
        return False
    held = value(node)
    items = held if isinstance(held, (tuple, list)) else [held]
    if any(isinstance(item, torch.Tensor) and is_data_dependent(item) for item in items):
        return False
    return is_scalar(node) or all(isinstance(item, torch.Tensor) for item in items)


def copied_out(trunk: Trunk, wanted: Sequence[fx.Node]) -> tuple[fx.Graph, dict[fx.Node, fx.Node], list[fx.Node]]:
    """Copy what some nodes depend on into a graph of its own, which has no output yet.

    Returns:
        The graph, its node for each node of the top-level graph, and the placeholders that it takes, in order.

    """
    graph, among = fx.Graph(), ancestors(wanted) | set(wanted)
    env: dict[fx.Node, fx.Node] = {}
    sources = [node for node in trunk.inputs if node in among]
    for node in [*sources, *(node for node in trunk.graph.nodes if node in among and node.op != "placeholder")]:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = copy.copy(node.meta)
    return graph, env, sources


def drop_dead(graph: fx.Graph, candidates: Iterable[fx.Node]) -> None:
    """Erase those of these nodes, and of what they depend on, whose results are read by nothing any more."""
    wanted = set(candidates)
    among = ancestors(wanted) | wanted
    for node in reversed(graph.nodes):
        is_work = node.op in {"call_function", "call_method", "get_attr"} and not is_context_switch(node)
        is_work = is_work and mutated_operand(node) is None and "_assert" not in op_name(node)
        if node in among and is_work and not node.users:
            graph.erase_node(node)
