"""The trunk: a captured graph whose repeated blocks are calls of shared bodies. The vocabulary of every pass.

``recover`` finds the blocks (see ``structure``) and outlines them: blocks that compute the same thing on other
operands become ``invoke_subgraph`` calls of one body, so that a pass edits a body once and Inductor compiles it once,
however deep the model is.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile import inductor
from hvcompile.inductor import INVOKE_SUBGRAPH, TAG, layout_key, provenance, shape_key, value
from hvcompile.slices import count_from_start
from hvcompile.structure import Block, describe_lists, entering, find_trunk, is_scalar, is_tensor, leaving

_CONTEXT_SWITCHES = {"_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode"}
_IN_PLACE_OPERATORS = {getattr(operator, name) for name in dir(operator) if name.startswith("i") and "_" not in name} - {
    operator.invert,
    operator.index,
    operator.inv,
    operator.is_,
    operator.itemgetter,
    operator.indexOf,
}
_CARRIERS = {"add", "sub", "getitem", "cat", "clone", "contiguous", "to", "type_as", "dropout", "where", "concat"} | {
    f"{kind}{name}" for kind in ("", "un") for name in ("squeeze", "flatten")
}
_VIEWS = {
    *("getitem", "view", "reshape", "transpose", "permute", "unflatten", "flatten", "squeeze", "unsqueeze", "chunk"),
    *("split", "unbind", "expand", "narrow", "select", "view_as", "contiguous", "to", "detach"),
}


def op_name(node: fx.Node) -> str:
    """A node's operation without its namespace: ``linear``, ``getitem``, ``copy_``."""
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target))


def is_context_switch(node: fx.Node) -> bool:
    """Whether a node changes how the following ones run (autocast, grad mode) rather than computing a value."""
    return node.op == "call_function" and op_name(node) in _CONTEXT_SWITCHES


def mutated_operand(node: fx.Node) -> fx.Node | None:
    """The operand that a node writes into, if it is an in-place operation."""
    if node.op == "call_function":
        in_place = node.target in _IN_PLACE_OPERATORS or node.target is operator.setitem
        in_place = in_place or node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None
        in_place = in_place or (op_name(node).endswith("_") and not op_name(node).endswith("__"))
    else:
        in_place = node.op == "call_method" and op_name(node).endswith("_") and not op_name(node).endswith("__")
    if not in_place or is_context_switch(node) or is_scalar(node):
        return None
    return next((operand for operand in node.all_input_nodes if is_tensor(operand)), None)


def storage_root(node: fx.Node) -> fx.Node:
    """Follow views back to the node whose storage this one may share."""
    root = node
    while node.op in {"call_function", "call_method"} and (op_name(node) in _VIEWS or mutated_operand(node) is not None):
        source = next((operand for operand in node.all_input_nodes if not is_scalar(operand)), None)
        if source is None:
            break
        node = source
        if is_tensor(node):
            root = node  # else a tuple of results: views of one tensor if it is a split, tensors of their own if not
    return root


def settle(graph: fx.Graph) -> None:
    """Move every node that stands before one of its inputs to just after it, keeping the order otherwise."""
    placed: set[fx.Node] = set()
    waiting: list[fx.Node] = []
    for node in list(graph.nodes):
        if not placed.issuperset(node.all_input_nodes):
            waiting.append(node)
            continue
        placed.add(node)
        anchor, progress = node, True
        while progress:
            progress = False
            for late in waiting:
                if placed.issuperset(late.all_input_nodes):
                    anchor.append(late)
                    anchor = late
                    placed.add(late)
                    waiting.remove(late)
                    progress = True
                    break


@dataclasses.dataclass(eq=False)
class Body:
    """One subgraph shared by all blocks that compute the same thing.

    ``streams`` maps an output's position to the position of the operand that it is the next version of: the residual
    streams (video, text) that run through the trunk.
    """

    name: str
    module: fx.GraphModule
    streams: dict[int, int]


@dataclasses.dataclass(eq=False)
class BlockCall:
    """One block of the trunk: a call of its body in ``trunk.module`` or, once a pass has moved it, in a branch of it."""

    path: str
    body: Body
    call: fx.Node

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        """The call's operands, in the order of the body's placeholders."""
        return self.call.args[2:]  # type: ignore[return-value]

    @property
    def outputs(self) -> dict[int, fx.Node]:
        """The outputs that are read, by position."""
        return {user.args[1]: user for user in self.call.users if user.target is operator.getitem}  # type: ignore[misc]


@dataclasses.dataclass(eq=False, kw_only=True)
class State:
    """A tensor that lives from one call of the compiled graph to the next: a placeholder and the next value.

    ``shape`` may hold symbolic sizes. The runtime owns the tensor; it starts as zeros.
    """

    name: str
    placeholder: fx.Node
    shape: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype
    device: torch.device
    next_value: fx.Node | None = None


@dataclasses.dataclass(eq=False)
class Trunk:
    """A captured graph with its blocks outlined, and the state that passes have added to it.

    Prologue and epilogue are the nodes before the first and after the last block; they stay in ``module``'s graph.
    """

    module: fx.GraphModule
    blocks: list[BlockCall]
    lists: str
    states: list[State] = dataclasses.field(default_factory=list)
    observed: dict[str, fx.Node] = dataclasses.field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        """The top-level graph."""
        return self.module.graph

    @property
    def bodies(self) -> list[Body]:
        """The distinct bodies, in order of first call."""
        return list(dict.fromkeys(block.body for block in self.blocks))

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders of the captured graph, without the added state."""
        states = {state.placeholder for state in self.states}
        return [node for node in self.graph.nodes if node.op == "placeholder" and node not in states]

    @property
    def output(self) -> fx.Node:
        """The graph's output node."""
        return self.graph.output_node()

    def add_state(
        self, name: str, shape: Iterable[int | torch.SymInt], dtype: torch.dtype, device: torch.device
    ) -> State:
        """Add a state tensor as a placeholder after all others; set ``next_value`` once its node exists."""
        placeholders = list(self.graph.find_nodes(op="placeholder"))
        with self.graph.inserting_after(placeholders[-1]):
            placeholder = self.graph.placeholder(f"state_{name}")
        mode = inductor.fake_mode(self.graph)
        if mode is None:
            raise ValueError("the graph has no tensor, so no state can be added to it")
        state = State(name=name, placeholder=placeholder, shape=tuple(shape), dtype=dtype, device=device)
        placeholder._dynamo_source = None  # type: ignore[attr-defined]  # AOTAutograd reads it of every placeholder
        placeholder.meta["example_value"] = inductor.fake_like(mode, state.shape, dtype, device)
        self.states.append(state)
        return state


@dataclasses.dataclass(frozen=True)
class NoTrunk:
    """Why a graph has no trunk."""

    reason: str


def _canonical(argument: Any, number: Callable[[fx.Node], Any]) -> Any:
    if isinstance(argument, fx.Node):
        return number(argument)
    if isinstance(argument, (list, tuple)):
        return (type(argument).__name__, *(_canonical(item, number) for item in argument))
    if isinstance(argument, dict):
        return tuple((key, _canonical(item, number)) for key, item in argument.items())
    if isinstance(argument, slice):
        return ("slice", *(_canonical(item, number) for item in (argument.start, argument.stop, argument.step)))
    return (type(argument).__name__, repr(argument))


def _value_key(node: fx.Node) -> Any:
    held = value(node)
    items = held if isinstance(held, (tuple, list)) else [held]
    return tuple(layout_key(item) if isinstance(item, torch.Tensor) else repr(item) for item in items)


def _row(node: fx.Node, numbers: dict[fx.Node, Any]) -> tuple[Any, ...]:
    """What a node computes, comparable between blocks: operation, wiring and literals, operands given as numbers."""
    # The text of a run-time assertion names symbols that Dynamo numbers anew in every block.
    args = node.args[:1] if op_name(node).startswith("_assert_scalar") else node.args
    return (node.op, node.target, _canonical(args, numbers.get), _canonical(node.kwargs, numbers.get))


def _rows(block: Block, operands: Sequence[fx.Node]) -> Iterator[tuple[Any, ...]]:
    numbers: dict[fx.Node, Any] = {operand: ("operand", place) for place, operand in enumerate(operands)}
    for place, node in enumerate(block.nodes):
        yield _row(node, numbers)
        numbers[node] = ("node", place)


def _embed(block: Block, operands: Sequence[fx.Node], rows: Sequence[tuple[Any, ...]]) -> dict[fx.Node, int] | None:
    """Match a block's nodes to the rows of another; None unless all match in order.

    Rows may be left over: Dynamo drops work whose result is not read, so that the last block of a trunk often lacks
    the text stream's last nodes. Computing them after all costs less than compiling one more body.
    """
    numbers: dict[fx.Node, Any] = {operand: ("operand", place) for place, operand in enumerate(operands)}
    matched: dict[fx.Node, int] = {}
    place = 0
    for node in block.nodes:
        row = _row(node, numbers)
        while place < len(rows) and rows[place] != row:
            place += 1
        if place == len(rows):
            return None
        matched[node] = place
        numbers[node] = ("node", place)
        place += 1
    return matched


def _families(
    found: Sequence[Block], operands: Sequence[Sequence[fx.Node]]
) -> dict[int, dict[int, dict[fx.Node, int]]]:
    """Group the blocks that can share a body: first member -> member -> its nodes' numbers in the first member."""
    families: dict[int, dict[int, dict[fx.Node, int]]] = {}
    rows: dict[int, list[tuple[Any, ...]]] = {}
    layouts = [tuple(map(_operand_key, reads)) for reads in operands]
    for place, block in enumerate(found):
        for first, members in families.items():
            if layouts[place] != layouts[first]:
                continue
            matched = _embed(block, operands[place], rows[first])
            if matched is not None:
                members[place] = matched
                break
        else:
            rows[place] = list(_rows(block, operands[place]))
            families[place] = {place: {node: number for number, node in enumerate(block.nodes)}}
    return families


def _operand_key(operand: fx.Node) -> Any:
    """An activation's strides do not matter: it is made contiguous before the call."""
    held = value(operand)
    if isinstance(held, torch.Tensor) and operand.op != "placeholder":
        return ("activation", shape_key(held), str(held.dtype), str(held.device))
    if operand.op == "get_attr":
        return ("constant", _value_key(operand))
    return ("input", _value_key(operand))


def _decline(block: Block, operands: Sequence[fx.Node]) -> str:
    """Why a block can't become a call of a subgraph; empty if it can."""
    inside, depth = set(block.nodes), 0
    for node in block.nodes:
        mutated = mutated_operand(node)
        if mutated is not None and storage_root(mutated) not in inside:
            return f"{block.path} writes into a tensor from outside it ({node.format_node()})"
        if is_context_switch(node):
            depth += {"_enter_autocast": 1, "_exit_autocast": -1}.get(op_name(node), 0)
        if op_name(node) in {"dropout", "alpha_dropout", "feature_dropout"} and _draws_random_numbers(node):
            return f"{block.path} drops out activations ({node.format_node()}): the model is in training mode, call .eval()"
    if depth:
        return f"{block.path} enters an autocast region that it does not leave"
    unsupported = [operand for operand in operands if not is_tensor(operand) and not is_scalar(operand)]
    if unsupported:
        return f"{block.path} reads {unsupported[0].format_node()}, which is neither a tensor nor a number"
    feedback = set(inside)
    for node in _between(block):
        if any(operand in feedback for operand in node.all_input_nodes):
            feedback.add(node)
            if any(user in inside for user in node.users):
                return f"{block.path} reads back its own result through work outside it ({node.format_node()})"
    return ""


def _draws_random_numbers(dropout: fx.Node) -> bool:
    arguments = (*dropout.args[1:], *dropout.kwargs.values())
    training = any(argument is True for argument in arguments)
    rates = [argument for argument in arguments if isinstance(argument, float)]
    return training and any(rate > 0 for rate in rates)


def _between(block: Block) -> Iterator[fx.Node]:
    inside, node, last = set(block.nodes), block.nodes[0], block.nodes[-1]
    while node is not last:
        if node not in inside:
            yield node
        node = node.next


def residual_sources(output: fx.Node) -> set[fx.Node]:
    """The placeholders whose value reaches a node through additions, slices and concatenations alone."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [output]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "placeholder":
            found.add(node)
        elif op_name(node).rstrip("_") in _CARRIERS or node.target is operator.iadd:
            stack.extend(operand for operand in node.all_input_nodes if is_tensor(operand))
    return found


def _stream_of(body: fx.GraphModule, position: int, likely: set[int]) -> int | None:
    """The operand that an output continues, found inside the body: by its residual path, else by its shape alone."""
    placeholders = list(body.graph.find_nodes(op="placeholder"))
    (outputs,) = body.graph.output_node().args
    shape = shape_key(value(outputs[position]))  # type: ignore[index]
    carried = residual_sources(outputs[position])  # type: ignore[index, arg-type]
    alike = [place for place, node in enumerate(placeholders) if is_tensor(node) and shape_key(value(node)) == shape]
    by_residual = [place for place in alike if placeholders[place] in carried]
    for candidates in (by_residual, [p for p in by_residual if p in likely], [p for p in alike if p in likely]):
        if len(candidates) == 1:
            return candidates[0]
    return None


def _placeholder_name(operand: fx.Node, block: Block, names: dict[str, str]) -> str:
    if operand.op != "placeholder":
        return operand.name
    path = names.get(str(operand.target), "")
    prefix = f"{block.path}."
    return path[path.index(prefix) + len(prefix) :].replace(".", "_") if prefix in path else operand.name


def _build_body(
    root: fx.GraphModule, block: Block, operands: Sequence[fx.Node], outputs: Sequence[int]
) -> fx.GraphModule:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    names = inductor.parameter_names(root)
    for operand in operands:
        env[operand] = graph.placeholder(_placeholder_name(operand, block, names))
        env[operand].meta["example_value"] = value(operand)
    for node in block.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
        env[node].meta = copy.copy(node.meta)
    # A body may not hand back one of its operands or a view of one, and its caller relies on contiguous streams.
    results = []
    for place in outputs:
        result = env[block.nodes[place]]
        cloned = graph.call_function(torch.clone, (result,), {"memory_format": torch.contiguous_format})
        cloned.meta = provenance(result, "outline", _contiguous(value(result)))
        results.append(cloned)
    graph.output(tuple(results))
    body = fx.GraphModule(root, graph)
    body.graph.lint()
    return body


def _contiguous(fake: torch.Tensor) -> torch.Tensor:
    return torch.clone(fake, memory_format=torch.contiguous_format)


def as_operands(
    graph: fx.Graph, nodes: Iterable[fx.Node], tag: str, ready: Iterable[fx.Node] = ()
) -> dict[fx.Node, fx.Node]:
    """Prepare nodes as operands of a subgraph, at the graph's insertion point; returns what to pass for each.

    Activations are made contiguous: Inductor fails on a stride assertion at run time where an operand has a layout of
    its caller's choosing. Those that may share storage with another operand are copied, since operands of ``cond`` may
    not alias. Inputs, numbers, constants and ``ready`` nodes (results of a body: contiguous and unshared) pass as they
    are.
    """
    as_is, ordered = set(ready), list(dict.fromkeys(nodes))
    passed = {
        node: node for node in ordered if node.op in {"placeholder", "get_attr"} or node in as_is or not is_tensor(node)
    }
    roots = {storage_root(node) for node in passed}
    for node in ordered:
        if node in passed:
            continue
        root = storage_root(node)
        if root in roots:
            made = graph.call_function(torch.clone, (node,), {"memory_format": torch.contiguous_format})
        else:
            made = graph.call_method("contiguous", (node,))
        roots.add(root)
        made.meta = provenance(node, tag, _contiguous(value(node)))
        passed[node] = made
    return {node: passed[node] for node in ordered}


def symbolic_sizes(graph: fx.Graph, before: fx.Node) -> list[fx.Node]:
    """One node for each symbol of the shapes that are known before a node: inputs, and sizes that depend on data."""
    found: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node is before:
            break
        symbol = inductor.symbol_of(node)
        if symbol is not None:
            found.setdefault(symbol, node)
    return list(found.values())


def recover(captured: fx.GraphModule) -> Trunk | NoTrunk:
    """Find the repeated blocks of a graph captured by Dynamo and outline them; the captured graph is not changed."""
    module = inductor.clone_graph_module(captured)
    count_from_start(module.graph)
    found, reason = find_trunk(module.graph)
    if not found:
        return NoTrunk(reason)
    # Inductor binds the symbols of a subgraph's shapes from operands that are plain symbols, never from products of them.
    sizes = symbolic_sizes(module.graph, before=found[0].nodes[0])
    operands = [sizes + [operand for operand in entering(block) if operand not in sizes] for block in found]
    for block, reads in zip(found, operands, strict=True):
        declined = _decline(block, reads)
        if declined:
            return NoTrunk(declined)

    families = _families(found, operands)
    bodies: dict[int, Body] = {}
    outputs: dict[int, list[fx.Node | None]] = {}
    for number, (first, members) in enumerate(families.items()):
        read = {members[place][node] for place in members for node in leaving(found[place])}
        positions = sorted(read)
        body = Body(f"block_{number}", _build_body(module, found[first], operands[first], positions), {})
        for place, numbers in members.items():
            nodes = {row: node for node, row in numbers.items()}
            bodies[place], outputs[place] = body, [nodes.get(position) for position in positions]
    _find_streams(found, operands, bodies, outputs)

    trunk = Trunk(module, [], describe_lists(found))
    renamed: dict[fx.Node, fx.Node] = {}
    for place, block in enumerate(found):
        current = [renamed.get(operand, operand) for operand in operands[place]]
        trunk.blocks.append(_outline(module, block, bodies[place], current, outputs[place], renamed))
    settle(module.graph)
    _prepare_operands(trunk)
    module.graph.lint()
    module.recompile()
    return trunk


def _find_streams(
    found: Sequence[Block],
    operands: Sequence[Sequence[fx.Node]],
    bodies: dict[int, Body],
    outputs: dict[int, list[fx.Node | None]],
) -> None:
    """Fill in each body's streams: from what consecutive calls of it hand on, else from inside the body."""
    likely: dict[Body, set[int]] = {body: set() for body in bodies.values()}
    for place in range(1, len(found)):
        before = {node: number for number, node in enumerate(outputs[place - 1]) if node is not None}
        for position, operand in enumerate(operands[place]):
            if operand in before and is_tensor(operand):
                likely[bodies[place]].add(position)
                if bodies[place] is bodies[place - 1]:
                    bodies[place].streams[before[operand]] = position
    for place, body in bodies.items():
        for number in range(len(outputs[place])):
            if number not in body.streams:
                source = _stream_of(body.module, number, likely[body])
                if source is not None and source not in body.streams.values():
                    body.streams[number] = source


def _outline(
    module: fx.GraphModule,
    block: Block,
    body: Body,
    operands: Sequence[fx.Node],
    outputs: Sequence[fx.Node | None],
    renamed: dict[fx.Node, fx.Node],
) -> BlockCall:
    """Replace a block's nodes by a call of its body; ``renamed`` gathers what stands for the nodes that were read."""
    graph, inside, last = module.graph, set(block.nodes), block.nodes[-1]
    setattr(module, body.name, body.module)
    with graph.inserting_after(last):
        reference = graph.get_attr(body.name)
    with graph.inserting_after(reference):
        call = graph.call_function(INVOKE_SUBGRAPH, (reference, body.name, *operands))
    (results,) = body.module.graph.output_node().args
    call.meta = provenance(last, "outline", tuple(value(result) for result in results))  # type: ignore[union-attr]
    reference.meta = {TAG: "outline"}
    anchor = call
    for number, result in enumerate(outputs):
        readers = [user for user in result.users if user not in inside] if result is not None else []
        if result is None or not readers:
            continue
        with graph.inserting_after(anchor):
            anchor = graph.call_function(operator.getitem, (call, number))
        anchor.meta = provenance(result, "outline", call.meta["example_value"][number])
        renamed[result] = anchor
        for reader in readers:
            reader.replace_input_with(result, anchor)
    for node in reversed(block.nodes):
        graph.erase_node(node)
    return BlockCall(block.path, body, call)


def _prepare_operands(trunk: Trunk) -> None:
    """Make the operands of every call fit for a subgraph, each once where several blocks read it."""
    results = [output for block in trunk.blocks for output in block.outputs.values()]
    known: dict[tuple[fx.Node, ...], dict[fx.Node, fx.Node]] = {}
    for block in trunk.blocks:
        activations = tuple(node for node in block.operands if node.op != "placeholder" and node not in results)
        if activations not in known:
            with trunk.graph.inserting_before(block.call):
                known[activations] = as_operands(trunk.graph, block.operands, "outline", results)
        prepared = known[activations]
        block.call.args = (*block.call.args[:2], *(prepared.get(node, node) for node in block.operands))
