"""Slices that count from the end, made to count from the start where the size allows, and slices joined as they were.

Dynamo can't derive the length of ``x[:, :-n]`` with a data-dependent ``n``. So it invents a symbol for every such
slice, and no two blocks of a trunk agree on any shape. Where the sliced size is ``36 + n``, the bound is just 36. Then
the invented symbols go away, with the run-time assertions that tied them together, and the blocks are alike again.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from hvcompile.graph.inline import run_on_fakes
from hvcompile.graph.nodes import argument, is_scalar, is_tensor, op_name, storage, writers
from hvcompile.torch_private import fakes
from hvcompile.torch_private.fakes import layout_key, value


def count_from_start(graph: fx.Graph) -> int:
    """Rewrite the slices of a captured graph in place, and update the fake values of all nodes that follow from them.

    Returns:
        How many slices were rewritten.

    """
    mode = fakes.fake_mode(graph)
    known: dict[Any, fx.Node] = {}
    stale: set[fx.Node] = set()
    count = 0
    for node in list(graph.nodes):
        if node.op in {"call_function", "call_method"}:
            index = _index_from_start(node, known)
            if index is not None:
                node.args = (node.args[0], index)
                count += 1
            if mode is not None and (index is not None or node in stale or stale.intersection(node.all_input_nodes)):
                with mode, torch.no_grad():
                    node.meta["example_value"] = run_on_fakes(node)
                node.meta.pop("unbacked_bindings", None)
                stale.add(node)
        if is_scalar(node):
            stale.update(_share(node, known, node in stale))
    _drop(graph, stale)
    return count


def _share(node: fx.Node, known: dict[Any, fx.Node], is_stale: bool) -> list[fx.Node]:
    """Remember a size. If an updated one turns out to be a number or a known size, use that in its place.

    Returns:
        The nodes whose operands changed.

    """
    expression = fakes.expression_of(value(node))
    if expression is None:
        return []
    users = list(node.users)
    replacement = int(expression) if expression.is_number else known.setdefault(expression, node)
    if not is_stale or replacement is node:
        return []
    for user in users:
        user.args = fx.map_arg(user.args, lambda item: replacement if item is node else item)
        user.kwargs = fx.map_arg(user.kwargs, lambda item: replacement if item is node else item)
    return users


def _index_from_start(node: fx.Node, known: dict[Any, Any]) -> Any:
    """A slice's index, its negative symbolic bounds counted from the start; None where there is nothing to rewrite."""
    if node.target is not operator.getitem or not is_tensor(node.args[0]):  # type: ignore[arg-type]
        return None
    tensor: torch.Tensor = value(node.args[0])  # type: ignore[arg-type]
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if not all(isinstance(item, slice) for item in index):
        return None
    slices, is_rewritten = [], False
    for item, size in zip(index, tensor.shape, strict=False):
        start, stop = (_from_start(bound, size, known) for bound in (item.start, item.stop))
        is_rewritten |= start is not item.start or stop is not item.stop
        slices.append(slice(start, stop, item.step))
    return tuple(slices) if is_rewritten else None


def _from_start(bound: Any, size: Any, known: dict[Any, Any]) -> Any:
    if not isinstance(bound, fx.Node):
        return bound
    expression = fakes.expression_of(value(bound))
    if expression is None or not expression.could_extract_minus_sign():
        return bound
    total = expression + fakes.expression_of(size)
    return int(total) if total.is_integer and total.is_number else known.get(total, bound)


def _drop(graph: fx.Graph, stale: set[fx.Node]) -> None:
    """Erase the assertions about symbols that are gone, and the arithmetic that only they read."""
    for node in reversed(graph.nodes):
        is_assertion = node.op == "call_function" and "_assert_scalar" in str(node.target)
        if (is_assertion and node in stale) or (is_scalar(node) and node.op != "placeholder" and not node.users):
            graph.erase_node(node)


def undo_cuts(graph: fx.Graph, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Have what reads the parts of a tensor, cut and joined again as they were, read the tensor; changes no value.

    A block that takes its streams apart and hands them to an attention that joins them reads and writes them once more
    than it need. Nothing is done where something is written to, or where the tensor does not lie as the joined one.

    Args:
        graph: the nodes'.
        nodes: among which both the cuts and the join must be.

    Returns:
        Those of the nodes that are left, in their order.

    """
    gone: set[fx.Node] = set()
    written, inside = writers(graph), set(nodes)
    for node in nodes:
        source, parts = _cut_and_joined(node), node.all_input_nodes
        if source is None or not inside.issuperset(parts) or storage(source) in written or storage(node) in written:
            continue
        if layout_key(value(source)) != layout_key(value(node)) or not inside.issuperset(node.users):
            continue
        node.replace_all_uses_with(source)
        for item in (node, *parts):
            if not item.users:
                graph.erase_node(item)
                gone.add(item)
    return [node for node in nodes if node not in gone]


def _cut_and_joined(node: fx.Node) -> fx.Node | None:
    """The tensor whose consecutive slices, all of them, a node joins; None where it does something else."""
    if node.op != "call_function" or op_name(node) not in {"cat", "concat"} or not is_tensor(node):
        return None
    parts, dim = node.args[0] if node.args else None, argument(node, 1, "dim", 0)
    if not isinstance(parts, (list, tuple)) or len(parts) < 2 or not isinstance(dim, int):
        return None
    cuts = [_cut(part, dim % value(node).ndim) for part in parts]
    source = cuts[0].source if cuts[0] else None
    bounds = [(cut.start, cut.stop) for cut in cuts if cut is not None and cut.source is source]
    is_whole = len(bounds) == len(parts) and bounds[0][0] is None and bounds[-1][1] is None
    return source if is_whole and all(a[1] is not None and a[1] == b[0] for a, b in pairwise(bounds)) else None


@dataclasses.dataclass(frozen=True)
class _Cut:
    """A slice of a tensor along one dimension; a bound is None where the tensor ends."""

    source: fx.Node
    start: Any
    stop: Any


def _cut(part: Any, dim: int) -> _Cut | None:
    """What a node is a slice of along a dimension; None where it is no such slice."""
    source, index = part.args[:2] if isinstance(part, fx.Node) and part.target is operator.getitem else (None, None)
    bounds: Any = index if isinstance(index, tuple) else (index,)
    if not isinstance(source, fx.Node) or not is_tensor(source) or len(bounds) <= dim:
        return None
    if not all(isinstance(item, slice) for item in bounds) or bounds[dim].step not in {None, 1}:
        return None
    if any(item != slice(None) for place, item in enumerate(bounds) if place != dim):
        return None
    start = bounds[dim].start
    return _Cut(source, None if isinstance(start, int) and start == 0 else start, bounds[dim].stop)
