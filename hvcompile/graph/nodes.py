"""Questions about single nodes of a captured graph, and walks along its edges."""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from hvcompile.torch_private import storages
from hvcompile.torch_private.dynamo import is_float_of_module, is_of_module, source_name
from hvcompile.torch_private.fakes import STORED, shape_key, value

_CONTEXT_SWITCHES = {"_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode"}
_KEYWORD_OPERATORS = {operator.and_, operator.or_, operator.not_, operator.is_}
"""Whose names end in an underscore because the word alone is Python's."""
_IN_PLACE_OPERATORS = {
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod),
    *(operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
    operator.setitem,
}


def is_tensor(node: fx.Node) -> bool:
    """Whether a node's value is one tensor."""
    return isinstance(value(node), torch.Tensor)


def tensor_kind(node: fx.Node) -> tuple[tuple[str, ...], torch.dtype]:
    """Shape and dtype of a tensor: two versions of one stream have the same."""
    return shape_key(value(node)), value(node).dtype


def is_scalar(node: fx.Node) -> bool:
    """Whether a node's value is a number, plain or symbolic: sizes and the arithmetic on them."""
    return isinstance(value(node), (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))


def is_size(node: fx.Node) -> bool:
    """Whether a node's value is a number that a subgraph can take: a whole one, or a truth value, or known now."""
    return is_scalar(node) and not isinstance(value(node), torch.SymFloat)


def is_graph(node: fx.Node) -> bool:
    """Whether a node refers to a graph that an operation takes, such as the function that masks FlexAttention."""
    owner = node.graph.owning_module
    return node.op == "get_attr" and isinstance(getattr(owner, str(node.target), None), fx.GraphModule)


def is_parameter(node: fx.Node) -> bool:
    """Whether a node is a placeholder for a parameter of the model."""
    return node.op == "placeholder" and (
        "_parameters[" in source_name(node) or isinstance(value(node), torch.nn.Parameter)
    )


def is_weight(node: fx.Node) -> bool:
    """Whether a node is a placeholder for a parameter or buffer of the model, or for a tensor stored in its place.

    A tensor of no dimensions that a module holds as an attribute is one too: the scale of an adapter that peft has made
    ready to be swapped.
    """
    return is_parameter(node) or (
        node.op == "placeholder" and ("_buffers[" in source_name(node) or STORED in node.meta or _is_held_number(node))
    )


def _is_held_number(node: fx.Node) -> bool:
    is_number = is_tensor(node) and value(node).ndim == 0
    return is_number and is_of_module(node) and not is_float_of_module(node)


def op_name(node: fx.Node) -> str:
    """A node's operation without its namespace: ``linear``, ``getitem``, ``copy_``."""
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target))


def is_context_switch(node: fx.Node) -> bool:
    """Whether a node changes how the following ones run (autocast) rather than computing a value."""
    return node.op == "call_function" and op_name(node) in _CONTEXT_SWITCHES


def drop_grad_switches(graph: fx.Graph) -> None:
    """Erase the switches of grad mode: they change no value, and nothing here is differentiated."""
    for node in list(graph.nodes):
        if node.op == "call_function" and op_name(node) == "_set_grad_enabled":
            graph.erase_node(node)


def contexts(graph: fx.Graph) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """For each node, the autocast regions around it, outermost first."""
    regions: dict[fx.Node, tuple[fx.Node, ...]] = {}
    entered: tuple[fx.Node, ...] = ()
    for node in graph.nodes:
        if is_context_switch(node) and op_name(node) == "_exit_autocast":
            entered = tuple(region for region in entered if region not in node.all_input_nodes)
        regions[node] = entered
        if is_context_switch(node) and op_name(node) == "_enter_autocast":
            entered = (*entered, node)
    return regions


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of a call by name, however it was passed; None where the function does not declare it."""
    if name in node.kwargs:
        return node.kwargs[name]
    if not isinstance(node.target, types.FunctionType):
        return None
    return inspect.signature(node.target).bind_partial(*node.args, **node.kwargs).arguments.get(name)


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether a node drops out or jitters activations, as in training mode."""
    arguments = (*node.args[1:], *node.kwargs.values())
    rates = [argument for argument in arguments if isinstance(argument, float)]
    if "scaled_dot_product_attention" in op_name(node):
        rate = node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0)
        return isinstance(rate, float) and rate > 0
    if "bernoulli" in op_name(node):
        return True
    is_random = "dropout" in op_name(node) or op_name(node) == "rrelu"
    return is_random and any(argument is True for argument in arguments) and any(rate > 0 for rate in rates)


def argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    """An argument of a call that may be given by its place or by its name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def mutated_operand(node: fx.Node) -> fx.Node | None:
    """The operand that a node writes into, if it is an in-place operation."""
    is_named_so = op_name(node).endswith("_") and not op_name(node).endswith("__")
    if node.op == "call_function":
        in_place = node.target in _IN_PLACE_OPERATORS
        in_place = in_place or _argument(node, "inplace") is True or node.kwargs.get("out") is not None
        in_place = in_place or (is_named_so and node.target not in _KEYWORD_OPERATORS)
    else:
        in_place = node.op == "call_method" and is_named_so
    if not in_place or is_context_switch(node) or is_scalar(node):
        return None
    return next((operand for operand in node.all_input_nodes if is_tensor(operand)), None)


def writers(graph: fx.Graph) -> dict[Hashable, fx.Node]:
    """Each storage that a graph writes to in place (see ``storage``), with the first operation that writes to it."""
    first: dict[Hashable, fx.Node] = {}
    for node in graph.nodes:
        if (mutated := mutated_operand(node)) is not None:
            first.setdefault(storage(mutated), node)
    return first


def storage(node: fx.Node) -> Hashable:
    """A key of the memory that a node's value is in: equal for a tensor, its views, and what writes to it in place.

    It is read from the fake values, which alias as the real ones do, whatever the operations are called.
    """
    while op_name(node) == "dropout":  # in evaluation mode it returns its input, though its fake value is another
        node = node.all_input_nodes[0]
    tensor = value(node)
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        return node
    return storages.storage_id(tensor)


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


def _closure(nodes: Iterable[fx.Node], step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    reached: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        for node in step(stack.pop()):
            if node not in reached:
                reached.add(node)
                stack.append(node)
    return reached


def descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything that depends on these nodes."""
    return _closure(nodes, lambda node: node.users)


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Everything that these nodes depend on."""
    return _closure(nodes, lambda node: node.all_input_nodes)


def reached_from(graph: fx.Graph, sources: Mapping[fx.Node, int]) -> dict[fx.Node, frozenset[int]]:
    """For each node, the sources that it follows from; what is written into a tensor reaches all that share its memory.

    Args:
        graph: the nodes'.
        sources: nodes, each with what stands for it in the result.

    """
    reached: dict[fx.Node, frozenset[int]] = {}
    written: dict[Hashable, frozenset[int]] = {}
    is_settled = False
    while not is_settled:
        is_settled = True
        for node in graph.nodes:
            found = frozenset([sources[node]]) if node in sources else frozenset[int]()
            found = found.union(*(reached[item] for item in node.all_input_nodes))
            if is_tensor(node):
                found |= written.get(storage(node), frozenset())
            target = mutated_operand(node)
            if target is not None and not found <= (before := written.get(storage(target), frozenset())):
                written[storage(target)] = before | found
                is_settled = False
            reached[node] = found
    return reached
