"""Low-rank branches: two linear layers with nothing between them, whose product is added to a layer's result.

That is how an adapter (LoRA) stands beside a layer, ``result + up(down(x)) * scale``. Such a branch is told by what it
computes, never by a name. It is small, it may be swapped for another at any time, and so may its scale.
Convolutions are linear layers here too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from torch import fx

from hvcompile.graph.nodes import is_tensor, op_name
from hvcompile.torch_private.fakes import value

_CASTS = {"to", "type", "type_as", "float", "half", "bfloat16", "double"}
_PASSING = _CASTS | {"dropout", "contiguous", "clone"}
_ADDING = {"add", "iadd"}
_LINEAR = {"linear", "conv1d", "conv2d", "conv3d"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankBranch:
    """A branch beside a linear layer.

    Attributes:
        down: the branch's first linear layer.
        up: its second.
        scaled: what multiplies the second one's result by a number; None where nothing does.
        beside: the linear layer that the result is added to.

    """

    down: fx.Node
    up: fx.Node
    scaled: fx.Node | None
    beside: fx.Node


def branches_of(nodes: Iterable[fx.Node]) -> Iterator[LowRankBranch]:
    """The low-rank branches whose second layer is among these nodes."""
    for node in nodes:
        branch = _branch(node)
        if branch is not None:
            yield branch


def _branch(up: fx.Node) -> LowRankBranch | None:
    down = _linear_before(up)
    source = None if down is None else _input_of(down)
    if down is None or source is None or len(up.users) != 1:
        return None
    last, user = up, next(iter(up.users))
    scaled = None
    while not (op_name(user) in _ADDING and len(user.all_input_nodes) == 2):
        if op_name(user) == "mul" and scaled is None and _is_by_a_number(user, last):
            scaled = user
        elif op_name(user) not in _CASTS:
            return None
        if len(user.users) != 1:
            return None
        last, user = user, next(iter(user.users))
    others = [item for item in user.all_input_nodes if item is not last]
    beside = _base(others[0]) if others else None
    if beside is None or beside is down or _origin(_input_of(beside)) is not _origin(source):
        return None
    return LowRankBranch(down=down, up=up, scaled=scaled, beside=beside)


def _base(node: fx.Node) -> fx.Node | None:
    """The linear layer whose result a node is, or is with other branches added to it."""
    while True:
        node = _through(node, _CASTS)
        if op_name(node) in _LINEAR:
            return node
        if op_name(node) not in _ADDING or not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]  # the layer's own result comes first: ``result = result + branch``


def _linear_before(node: fx.Node) -> fx.Node | None:
    """The linear layer whose result, read by nothing else, is a linear layer's input."""
    source = _input_of(node)
    if source is None:
        return None
    source = _through(source, _PASSING)
    return source if op_name(source) in _LINEAR and len(source.users) == 1 else None


def _input_of(node: fx.Node | None) -> fx.Node | None:
    if node is None or op_name(node) not in _LINEAR:
        return None
    source = node.kwargs.get("input", node.args[0] if node.args else None)
    return source if isinstance(source, fx.Node) else None


def _origin(node: fx.Node | None) -> fx.Node | None:
    return None if node is None else _through(node, _PASSING)


def _through(node: fx.Node, names: set[str]) -> fx.Node:
    while op_name(node) in names and node.op in {"call_function", "call_method"} and is_tensor(node):
        node = node.all_input_nodes[0]
    return node


def _is_by_a_number(node: fx.Node, tensor: fx.Node) -> bool:
    """Whether a product is of a tensor and a number, be that a tensor of no dimensions."""
    others = [item for item in node.args if item is not tensor]
    if len(node.args) != 2 or len(others) != 1:
        return False
    other = others[0]
    return not isinstance(other, fx.Node) or not is_tensor(other) or value(other).ndim == 0
