"""Weights that lie on the host, brought to the device by the graph: block by block and ahead, or where they are read.

Ahead, the graph that holds some blocks has one ``fetch`` before each: it waits for this block's weights and starts to
bring the next one's. The order is that of data. A fetch takes a result of the block before, whose weights are gone by
then, and the block takes the fetch's token. So no compiler can bring more than two blocks' weights at once, nor bring
them late.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.errors import OffloadedWeightError
from hvcompile.float8.weights import QuantizedWeight
from hvcompile.graph.nodes import is_tensor, storage, writers
from hvcompile.graph.paths import parameter_path
from hvcompile.graph.subgraphs import callees
from hvcompile.hollow.fetch import FETCH, FETCH_NOW
from hvcompile.hollow.host import HostWeight
from hvcompile.torch_private import dynamo, fakes
from hvcompile.torch_private.fakes import STORED, TAG, value
from hvcompile.torch_private.lowering import COND
from hvcompile.trunk.operands import is_activation
from hvcompile.trunk.trunk import BlockCall, Trunk

WHERE_READ = "fetch where read"
"""Name of the stage in which weights are brought from the host that no pass brings."""
_HOST = torch.device("cpu")
TOKEN = "hvcompile_token"  # node.meta key of a block's call: the token of its fetch
DEVICE = "hvcompile_device"  # node.meta key of a placeholder for what lies on the host: where it is needed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetched:
    """What a graph brings: for each block with weights on the host its path and their bytes, in order of execution."""

    blocks: tuple[tuple[str, int], ...]

    @property
    def num_bytes(self) -> int:
        """Of a step that computes every block."""
        return sum(size for _, size in self.blocks)

    @property
    def most_bytes(self) -> int:
        """Of two blocks in turn, which are on the device at once."""
        sizes = [size for _, size in self.blocks]
        return max((sum(sizes[place : place + 2]) for place in range(len(sizes))), default=0)


def is_kept_on_host(weight: Any) -> bool:
    """Whether a weight's values, or its float8 copy, lie on the host."""
    return isinstance(weight, HostWeight) or (isinstance(weight, QuantizedWeight) and weight.joined.memory is not None)


def hosted_in(trunk: Trunk, given: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """The placeholders that the graph reads for what lies on the host, and does not fetch yet.

    Args:
        trunk: rewritten so far.
        given: the inputs of the call that is compiled.

    """
    kept = {node for node, weight in given.items() if is_kept_on_host(weight)}
    stored = [item.data for item in trunk.stored if not kept.isdisjoint(item.sources)]
    nodes = [node for node in (*trunk.inputs, *stored) if node in kept or node in stored]
    return [node for node in nodes if node.users and node not in trunk.hosted]


def fetch_ahead(trunk: Trunk, nodes: Sequence[fx.Node], tag: str) -> Fetched:
    """Have each block's weights brought while the block before computes; whatever else reads some brings them itself.

    Args:
        trunk: its blocks may stand in branches, which then take the weights on the host.
        nodes: placeholders of what lies on the host.
        tag: the pass's name.

    """
    sizes = tuple(_sizes(trunk, nodes))
    for graph, local in _where_read(trunk, _take_from_host(trunk, nodes)).items():
        blocks = [block for block in trunk.blocks if block.call.graph is graph]
        _fetch_blocks(graph, blocks, local, tag)
        _fetch_elsewhere(graph, local, tag, spared=COND)
    _pass_tokens(trunk, tag)
    return Fetched(blocks=sizes)


def fetch_where_read(trunk: Trunk, given: Mapping[fx.Node, Any]) -> bool:
    """Bring what lies on the host, and is not fetched yet, just before each operation that reads it.

    Args:
        trunk: rewritten by all passes.
        given: the inputs of the call that is compiled.

    Returns:
        Whether there was such.

    """
    rest = hosted_in(trunk, given)
    if rest:
        _fetch_elsewhere(trunk.graph, _take_from_host(trunk, rest), WHERE_READ)
        trunk.module.graph.lint()
        trunk.module.recompile()
    return bool(rest)


def fetch_in_plain(captured: fx.GraphModule, places: Iterable[int]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """A copy of a captured graph that brings what lies on the host where it is read.

    Args:
        captured: as Dynamo gives it.
        places: of the weights among its inputs.

    Returns:
        The graph, whose inputs lack these weights and have the tensors on the host at the end, and their placeholders.

    """
    module = dynamo.clone_graph_module(captured)
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    nodes = [placeholders[place] for place in places]
    _refuse_written(module.graph, nodes)
    hosts, last = [], placeholders[-1]
    for node in nodes:
        last = _host_placeholder(module.graph, node, last)
        node.replace_all_uses_with(last)
        hosts.append(last)
    _fetch_elsewhere(module.graph, hosts, WHERE_READ)
    for node in nodes:
        module.graph.erase_node(node)
    module.graph.lint()
    module.recompile()
    return module, hosts


def _refuse_written(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Raise where a graph writes into a weight: what it writes into would be a copy on the device."""
    written = writers(graph).keys()
    for node in nodes:
        if storage(node) in written:
            raise OffloadedWeightError(
                f"the model writes into {parameter_path(node)} as it runs, and hvcompile.offload keeps that on the "
                "host, where the write would not arrive: call hvcompile.restore(model), and move it with .to(device)"
            )


def _host_placeholder(graph: fx.Graph, node: fx.Node, last: fx.Node) -> fx.Node:
    """Add an input after ``last`` for what a placeholder stands for, on the host."""
    with graph.inserting_after(last):
        placeholder = graph.placeholder(re.sub(r"\W+", "_", f"{parameter_path(node)}_on_host"))
    dynamo.mark_as_added(placeholder)
    placeholder.meta |= {STORED: True, DEVICE: value(node).device, "example_value": _on_host(value(node))}
    return placeholder


def _on_host(fake: torch.Tensor) -> torch.Tensor:
    with fakes.fake_mode_of(fake):
        return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=_HOST)


def _take_from_host(trunk: Trunk, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Have the graph take tensors on the host in the place of weights; returns their placeholders."""
    _refuse_written(trunk.graph, nodes)
    hosts = []
    stored = {item.data for item in trunk.stored}
    for node in nodes:
        if node in stored:
            node.meta |= {DEVICE: value(node).device, "example_value": _on_host(value(node))}
            trunk.hosted[node] = node
        else:
            later = set(trunk.added_late)
            last = [item for item in trunk.graph.find_nodes(op="placeholder") if item not in later][-1]
            trunk.hosted[node] = _host_placeholder(trunk.graph, node, last)
            node.replace_all_uses_with(trunk.hosted[node])
        hosts.append(trunk.hosted[node])
    return hosts


def _where_read(trunk: Trunk, hosts: Sequence[fx.Node]) -> dict[fx.Graph, dict[fx.Node, None]]:
    """For the top-level graph and each branch, the nodes that stand for tensors on the host there."""
    found: dict[fx.Graph, dict[fx.Node, None]] = {trunk.graph: dict.fromkeys(hosts)}
    for call in trunk.graph.find_nodes(op="call_function", target=COND):
        graphs, operands = callees(trunk.module, call)
        for module in graphs.values():
            local = found.setdefault(module.graph, {})
            for placeholder, operand in zip(module.graph.find_nodes(op="placeholder"), operands, strict=True):
                if operand in found[trunk.graph]:
                    placeholder.meta |= {DEVICE: _device(operand), "example_value": value(operand)}
                    local[placeholder] = None
    return found


def _fetch_blocks(graph: fx.Graph, blocks: Sequence[BlockCall], local: Mapping[fx.Node, None], tag: str) -> None:
    """Put a fetch before each block of a graph; see the module."""
    wanted = [(block, [item for item in dict.fromkeys(block.operands) if item in local]) for block in blocks]
    wanted = [(block, hosts) for block, hosts in wanted if hosts]
    if not wanted:
        return
    device = _device(wanted[0][1][0])
    arriving = _fetch(graph, wanted[0][0].call, wanted[0][1], [], [], device, tag)
    before: BlockCall | None = None
    for (block, hosts), (_, following) in zip(wanted, [*wanted[1:], (None, [])], strict=True):
        after = [] if before is None else _results_before(before, block.call)
        turn = _fetch(graph, block.call, following, arriving[:1], after, device, tag)
        new = dict(zip(hosts, arriving, strict=False))
        args = [new.get(item, item) if isinstance(item, fx.Node) else item for item in block.call.args]
        block.call.args = (*args, turn[-1])
        block.call.meta[TOKEN] = turn[-1]
        arriving, before = turn, block


def _results_before(block: BlockCall, call: fx.Node) -> list[fx.Node]:
    """A result of a block that is there before another call."""
    return [item for item in block.outputs.values() if item < call and is_tensor(item)][:1]


def _fetch(
    graph: fx.Graph,
    before: fx.Node,
    hosts: Sequence[fx.Node],
    arriving: Sequence[fx.Node],
    after: Sequence[fx.Node],
    device: torch.device,
    tag: str,
) -> list[fx.Node]:
    """Put a fetch before a node; returns the nodes of the weights that it brings, and last of its token."""
    made = []
    with graph.inserting_before(before):
        call = graph.call_function(FETCH, (list(hosts), list(arriving), list(after), device))
        fake = [value(item) for item in hosts]
        some = next(item for item in (*hosts, *arriving, *after))
        with fakes.fake_mode_of(value(some)):
            results = FETCH(fake, [], [], device) if fake else [torch.empty((), device=device)]
        call.meta = {TAG: tag, "example_value": results}
        for place, result in enumerate(results):
            part = graph.call_function(operator.getitem, (call, place))
            part.meta = {TAG: tag, "example_value": result}
            made.append(part)
    return made


def _fetch_elsewhere(graph: fx.Graph, local: Iterable[fx.Node], tag: str, spared: Any = None) -> None:
    """Bring what other operations read than fetches and ``spared``, all that one reads just before it."""
    readers: dict[fx.Node, list[fx.Node]] = {}
    for host in local:
        for user in host.users:
            if user.target not in {FETCH, spared}:
                readers.setdefault(user, []).append(host)
    for user, hosts in readers.items():
        with graph.inserting_before(user):
            call = graph.call_function(FETCH_NOW, (hosts, _device(hosts[0])))
            with fakes.fake_mode_of(value(hosts[0])):
                results = FETCH_NOW([value(host) for host in hosts], _device(hosts[0]))
            call.meta = {TAG: tag, "example_value": results}
            for place, host in enumerate(hosts):
                part = graph.call_function(operator.getitem, (call, place))
                part.meta = {TAG: tag, "example_value": results[place]}
                user.replace_input_with(host, part)


def _pass_tokens(trunk: Trunk, tag: str) -> None:
    """Have every call of a body take a token where some do: that of its own fetch, or an earlier one of its graph."""
    last: dict[fx.Graph, fx.Node] = {}
    for body in trunk.bodies:
        calls = [block.call for block in trunk.blocks if block.body is body]
        if not any(TOKEN in call.meta for call in calls):
            continue
        fake = next(value(call.meta[TOKEN]) for call in calls if TOKEN in call.meta)
        placeholders = list(body.module.graph.find_nodes(op="placeholder"))
        with body.module.graph.inserting_after(placeholders[-1]):
            placeholder = body.module.graph.placeholder("fetched")
        placeholder.meta = {TAG: tag, "example_value": fake}
    for block in trunk.blocks:
        call, graph = block.call, block.call.graph
        taken = len(list(block.body.module.graph.find_nodes(op="placeholder")))
        if TOKEN in call.meta:
            last[graph] = call.meta[TOKEN]
        elif len(block.operands) < taken:
            if graph not in last:
                operand = next(item for item in block.operands if is_activation(item))
                last[graph] = _fetch(graph, call, [], [], [operand], value(operand).device, tag)[-1]
            call.args = (*call.args, last[graph])


def _device(host: fx.Node) -> torch.device:
    """Where what lies on the host is needed."""
    device: torch.device = host.meta[DEVICE]
    return device


def _sizes(trunk: Trunk, nodes: Sequence[fx.Node]) -> Iterator[tuple[str, int]]:
    """Of each block that reads some of these top-level nodes, its path and their bytes."""
    outer = dict(zip(nodes, nodes, strict=True))
    for call in trunk.graph.find_nodes(op="call_function", target=COND):
        graphs, operands = callees(trunk.module, call)
        for module in graphs.values():
            placeholders = module.graph.find_nodes(op="placeholder")
            outer |= {inner: node for inner, node in zip(placeholders, operands, strict=True) if node in nodes}
    for block in trunk.blocks:
        read = {outer[item] for item in block.operands if item in outer}
        if read:
            yield block.path, sum(fakes.num_bytes(value(node)) for node in read)
