"""Which values share memory: fake values brought up to date, and calls of subgraphs held against what torch allows.

Fake values alias as the real ones do, so they tell what is a view of what, whatever the operations are called. A
rewrite that puts a new tensor in a node's place leaves the views of the old one behind: ``refresh`` makes them anew.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import fx

from hvcompile.graph.inline import run_on_fakes
from hvcompile.graph.nodes import (
    draws_random_numbers,
    is_context_switch,
    is_graph,
    is_tensor,
    mutated_operand,
    op_name,
    storage,
)
from hvcompile.graph.subgraphs import callees, is_call
from hvcompile.torch_private import fakes, storages
from hvcompile.torch_private.fakes import layout_key, value


def refresh(graph: fx.Graph, changed: set[fx.Node]) -> None:
    """Bring the fake values of views up to date after nodes have got others, or have taken others' places.

    A node that reads one of these is run on fake values. If it gives the same memory on, or its result lies in memory
    otherwise, it gets the new value, and what reads it is looked at in turn.

    Args:
        graph: in topological order.
        changed: its nodes whose fake values are new; gains those that are made anew.

    """
    mode = fakes.fake_mode(graph)
    if mode is None:
        return
    with mode, torch.no_grad():
        for node in graph.nodes:
            sources = [item for item in node.all_input_nodes if item in changed]
            if not sources or not _may_run(node):
                continue
            new, old = run_on_fakes(node), value(node)
            hands_on = not _memory(new).isdisjoint(item for source in sources for item in _memory(value(source)))
            if hands_on or _layouts(new) != _layouts(old):
                node.meta["example_value"] = new
                changed.add(node)


def shared_memory(root: fx.GraphModule) -> str:
    """What torch does not allow of memory at a call of a branch or a body, at any depth; empty where all is well.

    Operands of a call must not share memory, no result may share it with an operand or another result, and no operand
    may be written to.
    """
    looked_at: set[fx.GraphModule] = set()  # blocks share bodies
    for owner in _graphs(root):
        for call in filter(is_call, owner.graph.nodes):
            graphs, operands = callees(owner, call)
            given = [node for node in operands if isinstance(node, fx.Node) and is_tensor(node)]
            twice = _first_pair(dict.fromkeys(given))
            if twice:
                return f"{call.name} takes {twice[0].name} and {twice[1].name}, which share memory"
            for name, graph in graphs.items():
                fault = "" if graph in looked_at else _fault_inside(graph)
                if fault:
                    return f"{name}, which {call.name} runs, {fault}"
                looked_at.add(graph)
    return ""


def _graphs(root: fx.GraphModule) -> Iterator[fx.GraphModule]:
    return (module for module in root.modules() if isinstance(module, fx.GraphModule))


def _may_run(node: fx.Node) -> bool:
    if node.op not in {"call_function", "call_method"} or is_call(node) or is_context_switch(node):
        return False
    if draws_random_numbers(node) or mutated_operand(node) is not None or any(map(is_graph, node.all_input_nodes)):
        return False
    # A length that depends on data would be another one.
    return "unbacked_bindings" not in node.meta and "_assert" not in op_name(node)


def _tensors(held: Any) -> list[torch.Tensor]:
    items = held if isinstance(held, (tuple, list)) else [held]
    return [item for item in items if isinstance(item, torch.Tensor) and item.layout is torch.strided]


def _memory(held: Any) -> set[Hashable]:
    return set(map(storages.storage_id, _tensors(held)))


def _layouts(held: Any) -> list[Hashable]:
    return list(map(layout_key, _tensors(held)))


def _fault_inside(module: fx.GraphModule) -> str:
    taken = {storage(node): node for node in module.graph.find_nodes(op="placeholder") if is_tensor(node)}
    returned: Any = module.graph.output_node().args[0]
    results = [node for node in returned if isinstance(node, fx.Node) and is_tensor(node)]
    for node in results:
        if storage(node) in taken:
            return f"returns {node.name}, which shares memory with what it takes as {taken[storage(node)].name}"
    twice = _first_pair(results)
    if twice:
        return f"returns {twice[0].name} and {twice[1].name}, which share memory"
    for node in module.graph.nodes:
        written = mutated_operand(node)
        if written is not None and storage(written) in taken:
            return f"writes into {taken[storage(written)].name}, which it takes ({node.format_node()})"
    return ""


def _first_pair(nodes: Any) -> tuple[fx.Node, fx.Node] | None:
    seen: dict[Hashable, fx.Node] = {}
    for node in nodes:
        if storage(node) in seen:
            return seen[storage(node)], node
        seen[storage(node)] = node
    return None
