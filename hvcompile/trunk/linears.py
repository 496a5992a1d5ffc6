"""Linear layers of a body, and what they are applied to."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.inline import run_on
from hvcompile.graph.nodes import argument, is_tensor, mutated_operand, op_name, storage
from hvcompile.torch_private import fakes
from hvcompile.torch_private.fakes import value
from hvcompile.torch_private.subclasses import is_together
from hvcompile.trunk.trunk import Body


@dataclasses.dataclass(eq=False, kw_only=True)
class Linear:
    """One linear layer of a body.

    Attributes:
        node: the call of ``linear``.
        weight: placeholder of its weight.
        bias: its bias.
        source: its input; if that is a tensor cut into slices and put together again, the tensor.
        is_written_to: whether something in the body writes into the input.

    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    source: fx.Node
    is_written_to: bool


def linears_of(body: Body) -> Iterator[Linear]:
    """The linear layers of a body whose weight is an operand that nothing else reads."""
    mutated = (mutated_operand(node) for node in body.module.graph.nodes)
    written = {storage(node) for node in mutated if node is not None}
    for node in body.module.graph.nodes:
        if node.op != "call_function" or op_name(node) != "linear":
            continue
        arguments = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        weight, bias = arguments["weight"], arguments.get("bias")
        if isinstance(weight, fx.Node) and weight.op == "placeholder" and list(weight.users) == [node]:
            source = whole(arguments["input"])
            read = {storage(item) for item in (source, *node.all_input_nodes) if is_tensor(item)}
            is_written_to = not written.isdisjoint(read)
            yield Linear(node=node, weight=weight, bias=bias, source=source, is_written_to=is_written_to)


def special_linears(body: Body) -> Iterator[str]:
    """Of each linear layer whose weight is no operand, what it is instead."""
    for node in body.module.graph.nodes:
        if node.op != "call_function" or op_name(node) != "linear":
            continue
        weight = argument(node, 1, "weight")
        if isinstance(weight, fx.Node) and is_together(weight):
            kind = type(value(weight)).__name__
            yield f"its weight is quantised already, as a {kind}, and is left as it is"
        elif isinstance(weight, fx.Node) and weight.op != "placeholder":
            yield "its weight is computed in every step, as from a checkpoint in GGUF, and is left as it is"


def may_join(linears: Sequence[Linear]) -> bool:
    """Whether the layers' results may become columns of one wider tensor, for all that reads them.

    A view that is legal of a whole tensor may not be legal of a part of another.
    """
    sizes = [int(value(item.weight).shape[0]) for item in linears]
    for index, item in enumerate(linears):
        result: torch.Tensor = value(item.node)
        with fakes.fake_mode_of(result):
            wide = result.new_empty((*result.shape[:-1], sum(sizes)))
            if not _views_hold(item.node, torch.split(wide, sizes, -1)[index]):
                return False
    return True


def _views_hold(node: fx.Node, result: torch.Tensor) -> bool:
    """Whether every view of a node, and every view of these, is also legal where the node has another result."""
    values: dict[fx.Node, Any] = {node: result}
    waiting = list(node.users)
    while waiting:
        user = waiting.pop(0)
        if not is_tensor(user) or storage(user) != storage(node):
            continue
        if mutated_operand(user) is not None:
            return False
        try:
            values[user] = run_on(user, lambda item: values.get(item, value(item)))
        except (RuntimeError, ValueError):
            return False
        waiting += user.users
    return True


def whole(node: fx.Node) -> fx.Node:
    """The tensor that a node is made of, if it is all the pieces of it, joined in order; else the node itself."""
    if op_name(node) not in {"cat", "concat"} or not isinstance(node.args[0], (tuple, list)):
        return node
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    pieces = [_piece(item, dim) for item in node.args[0] if isinstance(item, fx.Node)]
    if len(pieces) != len(node.args[0]) or any(piece is None for piece in pieces):
        return node
    sources, starts, stops = zip(*pieces, strict=True)
    size = fakes.expression_of(value(sources[0]).shape[dim])
    is_all = len(set(sources)) == 1 and starts[0] == 0 and stops[-1] == size and starts[1:] == stops[:-1]
    return whole(sources[0]) if is_all else node


def _piece(node: fx.Node, dim: Any) -> tuple[fx.Node, Any, Any] | None:
    """The tensor that a slice along one dimension is cut from, and its bounds as expressions; None for all else."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node) or not is_tensor(node.args[0]):
        return None
    source, index = node.args[0], node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    tensor: torch.Tensor = value(source)
    if not isinstance(dim, int) or not all(isinstance(item, slice) and item.step in {None, 1} for item in index):
        return None
    dim %= tensor.ndim
    if dim >= len(index) or any(item != slice(None) for other, item in enumerate(index) if other != dim):
        return None
    size = fakes.expression_of(tensor.shape[dim])
    bounds = []
    for bound, default in ((index[dim].start, 0), (index[dim].stop, size)):
        number = value(bound) if isinstance(bound, fx.Node) else bound
        expression = default if number is None else fakes.expression_of(number)
        if expression is None:
            return None
        is_from_end = getattr(expression, "could_extract_minus_sign", lambda: expression < 0)()  # noqa: B023
        bounds.append(size + expression if is_from_end else expression)
    # A bound beyond the tensor would be cut off. The piece is as long as its bounds say, so none was.
    if fakes.expression_of(value(node).shape[dim]) != bounds[1] - bounds[0]:
        return None
    return source, bounds[0], bounds[1]
