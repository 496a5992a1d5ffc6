"""What each operation makes of a tensor that holds one rank's part of the sequence: a rule for each that can do so.

A rule copies the operation into the new graph, with literals and whole operands made those of one rank, and says where
the sequence is in the result; or it refuses, where tokens would be mixed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from hvcompile.graph.nodes import argument, is_tensor, op_name
from hvcompile.ranks.split import Layout, Layouts, Segment
from hvcompile.rewriting.sharding.resharder import Resharder, Rule, same_dim
from hvcompile.torch_private import fakes
from hvcompile.torch_private.fakes import value


def _dims(held: Any, ndim: int) -> list[int] | None:
    """Dimensions given as one or several numbers, counted from the front; None where they aren't plain numbers."""
    items = list(held) if isinstance(held, (list, tuple)) else [held]
    if any(not isinstance(item, int) for item in items):
        return None
    return [item % ndim for item in items]


RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


def _first(resharder: Resharder, node: fx.Node, what: str = "its first operand") -> tuple[fx.Node, Layout]:
    """The one operand that may be split, and how it is."""
    first = node.all_input_nodes[0]
    layout = resharder.layout(first)
    others = [item for item in node.all_input_nodes[1:] if resharder.layouts.get(item) is not None]
    if layout is None or others:
        raise resharder.refuse(node, f"an operand other than {what} holds a part of the tokens")
    return first, layout


@_rule(
    *("add", "iadd", "sub", "isub", "rsub", "mul", "imul", "truediv", "itruediv", "div", "pow", "neg", "rsqrt", "sqrt"),
    *("square", "reciprocal", "exp", "log", "log1p", "expm1", "sin", "cos", "tanh", "sigmoid", "abs", "sign", "erf"),
    *(
        "silu",
        "gelu",
        "relu",
        "relu6",
        "elu",
        "mish",
        "softplus",
        "hardswish",
        "hardsigmoid",
        "leaky_relu",
        "logsigmoid",
    ),
    *("maximum", "minimum", "clamp", "clip", "lerp", "addcmul", "addcdiv", "where", "eq", "ne", "lt", "le", "gt", "ge"),
    *("logical_and", "logical_or", "logical_not", "and_", "or_", "isfinite", "isnan", "nan_to_num", "masked_fill"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "conj", "polar", "ceil", "floor", "round"),
)
def _elementwise(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    """Broadcasting: a whole operand with a number for each token is split as well."""
    ndim = value(node).ndim
    operands = [item for item in dict.fromkeys(node.all_input_nodes) if is_tensor(item)]
    found = {item: resharder.layout(item) for item in operands}
    # Dimensions are counted from the back, as broadcasting does.
    places = {layout.dim - value(item).ndim for item, layout in found.items() if layout}
    kinds = {layout.segments for layout in found.values() if layout}
    if len(places) > 1 or len(kinds) > 1:
        ways = ", ".join(f"{item.name} along {layout}" for item, layout in found.items() if layout)
        raise resharder.refuse(node, f"its operands are split in different ways: {ways}")
    layout = Layout(places.pop() + ndim, kinds.pop())
    replaced = {}
    for item in operands:
        dim = layout.dim - ndim + value(item).ndim
        if found[item] is None and dim >= 0 and fakes.size_hint(value(item).shape[dim]) != 1:
            replaced[item] = resharder.part_of(item, layout.at(dim))
    return resharder.copy(node, replaced), layout


@_rule("to", "type_as", "type", "float", "double", "half", "bfloat16", "bool", "contiguous", "clone", "detach")
def _cast(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    layout = resharder.layout(node.all_input_nodes[0])
    if layout is None:  # cast to the dtype of something that is split
        return resharder.copy(node), None
    return resharder.copy(node), layout


@_rule("dropout")
def _dropout(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    return resharder.copy(node), _first(resharder, node)[1]  # in evaluation: outlining declines it in training


@_rule("linear")
def _linear(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    first, layout = _first(resharder, node)
    if layout.dim == value(first).ndim - 1:
        raise resharder.refuse(node, "it sums over the dimension that would be split")
    return resharder.copy(node), layout


@_rule("matmul")
def _matmul(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    first, layout = _first(resharder, node)
    if layout.dim != value(first).ndim - 2 or value(node).ndim != value(first).ndim:
        raise resharder.refuse(node, "it sums over the dimension that would be split, or stacks it")
    return resharder.copy(node), layout


@_rule("layer_norm", "rms_norm")
def _norm(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    first, layout = _first(resharder, node)
    shape = argument(node, 1, "normalized_shape")
    taken = len(shape) if isinstance(shape, (list, tuple)) else 1
    if layout.dim >= value(first).ndim - taken:
        raise resharder.refuse(node, "it normalises over the dimension that would be split")
    return resharder.copy(node), layout


@_rule("mean", "sum", "var", "std", "amax", "amin", "norm", "vector_norm", "logsumexp")
def _reduction(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    first, layout = _first(resharder, node)
    place = 2 if op_name(node) in {"norm", "vector_norm"} else 1
    dims = _dims(argument(node, place, "dim"), value(first).ndim)
    if not dims or layout.dim in dims:
        raise resharder.refuse(node, "it sums over the dimension that would be split")
    removed = sum(dim < layout.dim for dim in dims) if value(node).ndim < value(first).ndim else 0
    return resharder.copy(node), layout.at(layout.dim - removed)


@_rule("softmax", "log_softmax", "normalize", "cumsum", "flip", "roll", "glu")
def _along(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    """Operations along a dimension, which must be another one."""
    first, layout = _first(resharder, node)
    place = 2 if op_name(node) in {"normalize", "roll"} else 1
    default = {"normalize": 1, "glu": -1}.get(op_name(node))
    name = {"flip": "dims", "roll": "dims"}.get(op_name(node), "dim")
    held = argument(node, place, name, default)
    if op_name(node) == "flip" and isinstance(held, int):
        held = node.args[1:]  # x.flip(1, 2)
    dims = _dims(held, value(first).ndim)
    if not dims or layout.dim in dims:
        raise resharder.refuse(node, "it mixes along the dimension that would be split")
    return resharder.copy(node), layout


@_rule("permute")
def _permute(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    first, layout = _first(resharder, node)
    order = node.args[1:] if isinstance(argument(node, 1, "dims"), int) else argument(node, 1, "dims")
    dims = _dims(order, value(first).ndim)
    if dims is None:
        raise resharder.refuse(node, "its order is no list of numbers")
    return resharder.copy(node), layout.at(dims.index(layout.dim))


@_rule("transpose", "swapaxes", "swapdims")
def _transpose(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    first, layout = _first(resharder, node)
    names = ("dim0", "dim1") if op_name(node) == "transpose" else ("axis0", "axis1")
    dims = _dims([argument(node, 1, names[0]), argument(node, 2, names[1])], value(first).ndim)
    if dims is None:
        raise resharder.refuse(node, "its dimensions are no numbers")
    other = {dims[0]: dims[1], dims[1]: dims[0]}
    return resharder.copy(node), layout.at(other.get(layout.dim, layout.dim))


@_rule("reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as_complex", "view_as_real", "expand")
def _reshape(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    """Where other dimensions are merged or cut; a literal that holds the full length becomes the local one."""
    first, layout = _first(resharder, node)
    if op_name(node) == "expand":
        dim: int | None = value(node).ndim - value(first).ndim + layout.dim
    else:
        dim = same_dim(value(first).shape, value(node).shape, layout.dim)
    if dim is None:
        before, after = tuple(value(first).shape), tuple(value(node).shape)
        raise resharder.refuse(node, f"it merges or cuts the sequence, dimension {layout.dim} of {before}, to {after}")
    if op_name(node) not in {"reshape", "view", "expand"}:
        return resharder.copy(node), layout.at(dim)
    if node.kwargs or (len(node.args) == 2 and isinstance(node.args[1], torch.dtype)):
        raise resharder.refuse(node, "its arguments are not a list of sizes")
    listed = len(node.args) == 2 and isinstance(node.args[1], (list, tuple))
    sizes: list[Any] = list(node.args[1] if listed else node.args[1:])  # type: ignore[arg-type]
    if not (isinstance(sizes[dim], int) and sizes[dim] == -1):
        sizes[dim] = layout.size(resharder.split)
    args = (first, tuple(sizes)) if listed else (first, *sizes)
    return resharder.copy(node, args=args), layout.at(dim)


@_rule("cat", "concat", "concatenate")
def _cat(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    """Along the sequence the segments follow each other; parts of one sequence that fit together are joined."""
    pieces: Any = argument(node, 0, "tensors")
    ndim = value(node).ndim
    dims = _dims(argument(node, 1, "dim", 0), ndim)
    known = [layout for piece in pieces if (layout := resharder.layout(piece)) is not None]
    if dims is None or len({layout.dim for layout in known}) > 1:
        raise resharder.refuse(node, "its operands are split along different dimensions")
    if dims[0] != known[0].dim:
        if len(set(known)) > 1:
            raise resharder.refuse(node, "its operands are split in different ways")
        wholes = [piece for piece in dict.fromkeys(pieces) if resharder.layout(piece) is None]
        return resharder.copy(node, {piece: resharder.part_of(piece, known[0]) for piece in wholes}), known[0]

    segments: list[tuple[int, int, Segment]] = []  # which operand, where on this rank, what
    for number, piece in enumerate(pieces):
        layout = resharder.layout(piece)
        if layout is None:
            size = resharder.length(value(piece).shape[dims[0]], node)
            segments.append((number, 0, Segment(0, size, False)))
        else:
            segments += [(number, place, item) for place, _, item in layout.offsets(resharder.split)]
    joined: list[list[tuple[int, int, Segment]]] = []
    for entry in segments:
        last = joined[-1][-1][2] if joined else None
        if last is not None and last.is_split and entry[2].is_split and last.stop == entry[2].start:
            joined[-1].append(entry)
        else:
            joined.append([entry])
    result = Layout(
        dims[0],
        tuple(Segment(group[0][2].start, group[-1][2].stop, group[0][2].is_split) for group in joined),
    )
    if all(len(group) == 1 for group in joined):
        return resharder.copy(node), result
    local, dim = resharder.split.local, dims[0]

    def join(position: Any, **operands: Any) -> dict[str, Any]:
        position = position.view(local, *[1] * (ndim - 1 - dim))
        parts: list[Any] = []
        for group in joined:
            part: Any = None
            for number, place, item in group:
                size = local if item.is_split else item.stop - item.start
                piece = operands[f"piece_{number}"].narrow(dim, place, size)
                part = piece if part is None else torch.where(position < item.start, part, piece)
            parts.append(part)
        return {"joined": parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)}

    operands = {f"piece_{number}": resharder.env[piece] for number, piece in enumerate(pieces)}
    made = resharder.inline(join, {"position": resharder.position(node), **operands}, node)
    return made["joined"], result


@_rule("stack")
def _stack(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    pieces: Any = argument(node, 0, "tensors")
    dims = _dims(argument(node, 1, "dim", 0), value(node).ndim)
    layouts = {layout for piece in pieces if (layout := resharder.layout(piece)) is not None}
    if dims is None or len(layouts) > 1:
        raise resharder.refuse(node, "its operands are split in different ways")
    layout = layouts.pop()
    wholes = [piece for piece in dict.fromkeys(pieces) if resharder.layout(piece) is None]
    replaced = {piece: resharder.part_of(piece, layout) for piece in wholes}
    return resharder.copy(node, replaced), layout.at(layout.dim + (dims[0] <= layout.dim))


_SIZES = ("split_size_or_sections", "split_size", "split_sizes")


@_rule("chunk", "split", "split_with_sizes", "tensor_split", "unbind")
def _split(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    first, layout = _first(resharder, node)
    is_unbind = op_name(node) == "unbind"
    dims = _dims(argument(node, 1 if is_unbind else 2, "dim", 0), value(first).ndim)
    if dims is None:
        raise resharder.refuse(node, "its dimension is no number")
    if dims[0] != layout.dim:
        removed = int(is_unbind and dims[0] < layout.dim)
        return resharder.copy(node), [layout.at(layout.dim - removed) for _ in value(node)]
    given = [*node.args[1:2], *(node.kwargs[name] for name in _SIZES if name in node.kwargs)]
    sizes: Any = given[0] if given else ()
    is_list = op_name(node) in {"split", "split_with_sizes"} and isinstance(sizes, (list, tuple))
    if not is_list or [item.stop - item.start for item in layout.segments] != list(sizes):
        raise resharder.refuse(node, "it cuts the sequence elsewhere than between its streams")
    local = [resharder.split.local if item.is_split else item.stop - item.start for item in layout.segments]
    copied = resharder.copy(node, args=(first, local, dims[0]), kwargs={})
    return copied, [Layout(dims[0], (item,)) if item.is_split else None for item in layout.segments]


@_rule("getitem")
def _getitem(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    """A part of a tuple; or slices, of which one along the sequence is moved to where its bounds are on this rank."""
    first: Any = node.args[0]
    held = resharder.layouts.get(first)
    if isinstance(held, list):
        return resharder.copy(node), held[node.args[1]]  # type: ignore[index]
    first, layout = _first(resharder, node)
    index, result = _index(resharder, node, first, layout)
    copied = resharder.copy(node, args=(first, index))
    return copied, result if result.num_split else None


@_rule("setitem")
def _setitem(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    """Writing into slices of a split tensor, along the sequence into whole segments of it."""
    first: Any = node.args[0]
    written: Any = node.args[2]
    layout = resharder.layout(first)
    if layout is None:
        raise resharder.refuse(node, "it writes a part of the tokens into a tensor that every rank has")
    index, result = _index(resharder, node, first, layout)
    if not set(result.segments) <= set(layout.segments):
        raise resharder.refuse(node, "it writes into a part of the sequence")
    if isinstance(written, fx.Node) and is_tensor(written):
        target = value(first)[node.args[1]] if not _has_nodes(node.args[1]) else None
        if target is None or value(written).ndim != target.ndim:
            raise resharder.refuse(node, "what it writes is of another shape than what is written")
        wanted = result if result.num_split else None
        replaced = {}
        if resharder.layout(written) is None and wanted and value(written).shape[wanted.dim] != 1:
            replaced[written] = resharder.part_of(written, wanted)
        elif resharder.layout(written) not in {wanted, None}:
            raise resharder.refuse(node, "what it writes is split in another way than what is written")
        written = replaced.get(written, resharder.env[written])
    with resharder.graph.inserting_before(resharder.end):
        made = resharder.graph.call_function(operator.setitem, (resharder.env[first], index, written))
    made.meta = dict(node.meta)
    return made, None


def _has_nodes(index: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(index, found.append)
    return bool(found)


def _index(resharder: Resharder, node: fx.Node, first: fx.Node, layout: Layout) -> tuple[tuple[Any, ...], Layout]:
    """An index into a split tensor as one into this rank's part, and where the sequence then is."""
    index: Any = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    for item in index:
        is_number = isinstance(item, int) or (isinstance(item, fx.Node) and not is_tensor(item))
        if isinstance(item, bool) or not (item is None or item is Ellipsis or isinstance(item, slice) or is_number):
            raise resharder.refuse(node, "it looks tokens up by a tensor or list")
    taken = sum(item is not None and item is not Ellipsis for item in index)
    if Ellipsis in index:
        place = index.index(Ellipsis)
        index = (*index[:place], *[slice(None)] * (value(first).ndim - taken), *index[place + 1 :])
    fresh: list[Any] = []
    source, target, result = 0, 0, layout
    for item in index:
        if item is None:
            fresh.append(item)
            target += 1
            continue
        if source == layout.dim:
            if not isinstance(item, slice) or item.step not in {None, 1}:
                raise resharder.refuse(node, "it takes single tokens of the sequence")
            item, segments = _move(resharder, node, item, layout)  # noqa: PLW2901
            result = Layout(target, segments)
        fresh.append(item)
        source += 1
        target += isinstance(item, slice)
    if source <= layout.dim:
        result = layout.at(target + layout.dim - source)
    return tuple(fresh), result


def _move(resharder: Resharder, node: fx.Node, item: slice, layout: Layout) -> tuple[slice, tuple[Segment, ...]]:
    """A slice of the whole sequence as a slice of this rank's part, and what it then covers."""
    total, split = layout.total, resharder.split
    bounds = []
    for bound, default in ((item.start, 0), (item.stop, total)):
        number = value(bound) if isinstance(bound, fx.Node) else bound
        number = default if number is None else resharder.length(number, node)
        bounds.append(min(max(number + total if number < 0 else number, 0), total))
    begin, end = bounds
    found: list[Segment] = []
    first = last = 0
    for local, whole, segment in layout.offsets(split):
        low, high = max(begin, whole), min(end, whole + segment.stop - segment.start)
        if low >= high:
            continue
        shift = segment.start - whole
        start, stop = (0, split.local) if segment.is_split else (low - whole, high - whole)
        first = local + start if not found else first
        last = local + stop
        covered = Segment(low + shift, high + shift, True) if segment.is_split else Segment(0, high - low, False)
        found.append(covered)
    if not found:
        raise resharder.refuse(node, "it takes no token of the sequence")
    if (begin, end) == (0, total):
        return item, layout.segments
    return slice(first, last, None), tuple(found)


@_rule("narrow")
def _narrow(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    first, layout = _first(resharder, node)
    dims = _dims(argument(node, 1, "dim"), value(first).ndim)
    if dims is None or dims[0] == layout.dim:
        raise resharder.refuse(node, "it cuts the sequence")
    return resharder.copy(node), layout
