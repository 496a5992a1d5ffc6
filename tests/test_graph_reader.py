"""Reading a dumped file back gives the graph that was written, node for node."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from hvcompile.dump.source_reader import load, read_graph
from hvcompile.dump.write import Dump


def written(directory: Path, graph: fx.Graph, **attributes: Any) -> tuple[fx.GraphModule, Path]:
    root = torch.nn.Module()
    for name, held in attributes.items():
        setattr(root, name, held)
    module = fx.GraphModule(root, graph)
    Dump(directory, (0, 0)).graph("Made", module)
    return module, directory / "graph_0_0" / "00_made.py"


def nodes(module: fx.GraphModule) -> list[Any]:
    return [
        (node.op, node.name, "" if node.op == "placeholder" else node.target, str(node.args), str(node.kwargs))
        for node in module.graph.nodes
    ]


def test_every_kind_of_node_comes_back(tmp_path: Path) -> None:
    graph, inner = fx.Graph(), fx.Graph()
    inner.output((inner.call_function(torch.neg, (inner.placeholder("x"),)),))
    body = fx.GraphModule(torch.nn.Module(), inner)
    x = graph.placeholder("x")
    size = graph.call_method("size", (x, 0))
    more = graph.call_function(operator.add, (size, 1))
    place = graph.call_function(torch.arange, (more,), {"dtype": torch.float32})  # nothing of it is an input
    switch = graph.call_function(torch.amp.autocast_mode._enter_autocast, ("cpu", torch.bfloat16, True, None))
    graph.call_function(torch.amp.autocast_mode._exit_autocast, (switch,))
    half = graph.call_function(operator.getitem, (place, (slice(None, -1, None),)))
    scaled = graph.call_function(torch.mul, (half, graph.get_attr("held.scale")), {"out": None})
    grown = graph.call_function(operator.iadd, (scaled, 2))
    graph.call_function(operator.setitem, (grown, slice(0, 1), 5.0))
    turned = graph.call_function(getattr, (x, "T"))
    reference = graph.get_attr("body")
    call = graph.call_function(torch.ops.higher_order.invoke_subgraph, (reference, "body", turned))
    again = graph.get_attr("same")
    other = graph.call_function(torch.ops.higher_order.invoke_subgraph, (again, "body", x))
    results = [graph.call_function(operator.getitem, (node, 0)) for node in (call, other)]
    less = graph.call_function(operator.lt, (results[1], float("inf")))
    graph.output((grown, results[0], less, None, 3))
    held = torch.nn.Module()
    held.scale = torch.nn.Parameter(torch.tensor(3.0))
    module, path = written(tmp_path, graph, held=held, body=body, same=body)

    read = read_graph(load(path))
    assert nodes(read) == nodes(module)
    assert isinstance(read.body, fx.GraphModule)
    assert nodes(read.body) == nodes(body)
    assert read.body is read.same
    given = torch.randn(4, 4)
    with torch.no_grad():
        for want, got in zip(module(given), read(given), strict=True):
            assert torch.equal(want, got) if isinstance(want, torch.Tensor) else want == got


def test_what_is_no_statement_of_a_graph_is_said_with_its_line(tmp_path: Path) -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(torch.neg, (graph.placeholder("x"),)),))
    _, path = written(tmp_path, graph)
    path.write_text(
        path.read_text().replace("        return (neg,)", "        if neg:\n            pass\n        return (neg,)")
    )
    with pytest.raises(ValueError, match=r"line \d+ is no statement of a graph: if neg:"):
        read_graph(load(path))
