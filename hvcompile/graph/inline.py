"""Writing graph code as plain Python: a function of tensors, run on proxies, appends its operations to a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from hvcompile.torch_private import fakes, kernels
from hvcompile.torch_private.fakes import TAG, value
from hvcompile.torch_private.subclasses import as_dynamo_runs, is_wrapper


def inline(
    graph: fx.Graph,
    function: Callable[..., Mapping[str, fx.Proxy]],
    operands: Mapping[str, fx.Node],
    *,
    before: fx.Node,
    tag: str,
) -> dict[str, fx.Node]:
    """Place a function's operations into a graph, each with its fake value.

    Args:
        graph: the graph that gains the nodes.
        function: takes tensors by keyword and returns a dict of tensors. It runs once, on proxies, so a branch on an
            option is resolved here.
        operands: the node for each keyword.
        before: the node before which the new ones are inserted.
        tag: the pass's name, for the meta of the new nodes.

    Returns:
        The node of each entry of the returned dict.

    Raises:
        torch.fx.proxy.TraceError: the function branches on a tensor.

    """
    mode = fakes.fake_mode(graph)
    node = before.prev
    tracer = fx.proxy.GraphAppendingTracer(graph)
    with graph.inserting_before(before):
        results = function(**{name: fx.Proxy(operand, tracer) for name, operand in operands.items()})
    while (node := node.next) is not before:
        node.meta = {TAG: tag}
        if mode is not None:
            with mode, torch.no_grad():
                node.meta["example_value"] = run_on_fakes(node)
    return {name: proxy.node for name, proxy in results.items()}


def run_on_fakes(node: fx.Node) -> Any:
    """Run a node's operation on the fake values of its inputs.

    The graph's fake mode must be active if the operation makes a tensor from none.
    """
    return run_on(node, value)


def run_on(node: fx.Node, values: Callable[[fx.Node], Any]) -> Any:
    """Run a node's operation on the values that ``values`` has for its inputs."""
    if any(map(is_wrapper, map(values, node.all_input_nodes))):
        with as_dynamo_runs():
            return _run_on(node, values)
    return _run_on(node, values)


def _run_on(node: fx.Node, values: Callable[[fx.Node], Any]) -> Any:
    args: Any = fx.map_arg(node.args, values)
    kwargs: Any = fx.map_arg(node.kwargs, values)
    target: Any = node.target
    if node.op == "call_method":
        receiver, *rest = args
        return getattr(receiver, target)(*rest, **kwargs)
    if target is torch.nn.functional.scaled_dot_product_attention:
        target = kernels.attended
    return target(*args, **kwargs)
