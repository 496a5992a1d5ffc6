"""The grid that a trunk's tokens lie on, found from how the graph made them: frames x height x width of the sample.

Walks back from the blocks' stream to where its tokens are more than one dimension: a patch embedding that is flattened,
or a reshape into patches. No name and no configuration is read. An operation that may move tokens in a way that is not
known ends the walk.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from hvcompile.graph.nodes import ancestors, argument, descendants, is_tensor, op_name
from hvcompile.graph.tiles import Part
from hvcompile.journal import Declined
from hvcompile.torch_private.fakes import shape_key, size_hint, value
from hvcompile.trunk.operands import is_activation
from hvcompile.trunk.roles import classify
from hvcompile.trunk.trunk import Trunk

# What neither moves tokens nor mixes them, if its result has their dimensions.
_KEEPING = {
    *("add", "iadd", "sub", "mul", "imul", "truediv", "div", "where", "silu", "gelu", "relu", "tanh", "sigmoid"),
    *("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone", "detach", "dropout"),
    *("pow", "rsqrt", "neg", "exp", "expand", "cat", "concat", "getitem"),
}
# As above, if the tokens are not the last dimension.
_BY_LAST = {"linear", "layer_norm", "rms_norm"}
_SPATIAL = {"conv2d": (2, 3), "conv3d": (2, 3, 4)}


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A factor of the tokens: a dimension, or a size alone where the dimension holds something else beside it."""

    size: int
    dim: int | None


class _UnknownGrid(Exception):  # noqa: N818  (a verdict, caught in this file)
    def __init__(self, node: fx.Node, why: str) -> None:
        super().__init__(f"the tokens' grid can't be found from the graph: {op_name(node)} ({node.name}) {why}")


def sample_tokens(trunk: Trunk, stream: fx.Node, dim: int) -> list[Part] | Declined:
    """What lies along a dimension of a stream of the blocks; see ``find_grid``."""
    sample = classify(trunk).sample
    if sample is None:
        return Declined("no input has the rank of the output, so the sample's tokens can't be told from others")
    parts = find_grid(stream, dim, sample)
    twin = _twin(sample, stream) if not isinstance(parts, Declined) and len(parts) > 1 else None
    if twin is not None:
        return Declined(f"{sample.name} and {twin.name} are alike: which is the sample is not known")
    return parts


def _twin(sample: fx.Node, stream: fx.Node) -> fx.Node | None:
    """Another input of the sample's shape, from which the stream's tokens follow too."""
    before = ancestors([stream])
    for node in sample.graph.find_nodes(op="placeholder"):
        is_input = node is not sample and node in before and is_tensor(node) and is_activation(node)
        if is_input and shape_key(value(node)) == shape_key(value(sample)):
            twin: fx.Node = node
            return twin
    return None


def find_grid(stream: fx.Node, dim: int, sample: fx.Node) -> list[Part] | Declined:
    """What lies along a dimension of a node: the sample's tokens, and others before or after them.

    Args:
        stream: what enters the blocks.
        dim: the dimension of its tokens.
        sample: the input that is denoised.

    """
    ours = {sample, *descendants([sample])}
    try:
        parts = _parts(stream, dim, (0, _sizes(stream)[dim]), ours)
    except _UnknownGrid as verdict:
        return Declined(str(verdict))
    if sum(part.grid is not None for part in parts) != 1:
        return Declined(f"{stream.name} does not hold the sample's tokens exactly once")
    joined: list[Part] = []
    for part in parts:
        if joined and joined[-1].grid is None and part.grid is None:
            joined[-1] = Part(joined[-1].size + part.size, None)
        else:
            joined.append(part)
    return joined


def _parts(node: fx.Node, dim: int, taken: tuple[int, int], ours: set[fx.Node]) -> list[Part]:
    """What the tokens ``taken[0]`` to ``taken[1]`` of a dimension are."""
    while node in ours:
        size = _sizes(node)[dim]
        if op_name(node) in {"cat", "concat"} and _number(node, 1, "dim", 0) % value(node).ndim == dim:
            return _pieces(node, dim, taken, ours)
        cut = _cut(node, dim)
        if cut is not None:
            node, dim, start = cut
            taken = (taken[0] + start, taken[1] + start)
            continue
        node, axes = _step(node, [_Axis(size, dim)], ours)
        if len(axes) == 1 and axes[0].dim is not None:
            dim = axes[0].dim
            continue
        if taken != (0, size):
            raise _UnknownGrid(node, f"makes {size} tokens, of which the blocks take {taken[0]} to {taken[1]}")
        grid = _grid(node, axes, ours)
        if math.prod(grid) != size:
            raise _UnknownGrid(node, f"gives a grid of {grid} for {size} tokens")
        return [Part(size, grid)]
    return [Part(taken[1] - taken[0], None)]


def _pieces(node: fx.Node, dim: int, taken: tuple[int, int], ours: set[fx.Node]) -> list[Part]:
    found: list[Part] = []
    start = 0
    pieces: Any = argument(node, 0, "tensors")
    for piece in pieces:
        size = _sizes(piece)[dim]
        low, high = max(taken[0] - start, 0), min(taken[1] - start, size)
        if low < high:
            found += _parts(piece, dim, (low, high), ours)
        start += size
    return found


def _cut(node: fx.Node, dim: int) -> tuple[fx.Node, int, int] | None:
    """For a slice along the tokens: what is sliced, the tokens' dimension there, and the first token; else None."""
    if node.target is not operator.getitem or not is_tensor(_first(node)):
        return None
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if not all(isinstance(item, slice) and item.step in {None, 1} for item in index) or dim >= len(index):
        return None
    start: Any = index[dim].start  # type: ignore[union-attr]
    start = 0 if start is None else size_hint(value(start)) if isinstance(start, fx.Node) else int(start)
    return _first(node), dim, start + _sizes(_first(node))[dim] if start < 0 else start


def _grid(node: fx.Node, axes: list[_Axis], ours: set[fx.Node]) -> tuple[int, int, int]:
    """Frames, height and width, given some factors of the tokens at a node."""
    while len(axes) < 3:
        spatial = _SPATIAL.get(op_name(node))
        if spatial is not None:
            dims = [axis.dim for axis in axes]
            if not set(dims) <= set(spatial) or dims != sorted(dims, key=str):
                raise _UnknownGrid(node, "makes tokens of other dimensions than those that it moves over")
            sizes = [_sizes(node)[dim] for dim in spatial]
            frames, height, width = [1] * (3 - len(sizes)) + sizes
            return frames, height, width
        if node not in ours or node.op == "placeholder":
            raise _UnknownGrid(node, f"gives tokens in {len(axes)} dimensions, not frames, height and width")
        node, axes = _step(node, axes, ours)
    if len(axes) > 3:
        raise _UnknownGrid(node, f"gives tokens in {len(axes)} dimensions, not frames, height and width")
    _check_order(node, axes, ours)
    frames, height, width = (axis.size for axis in axes)
    return frames, height, width


def _step(node: fx.Node, axes: list[_Axis], ours: set[fx.Node]) -> tuple[fx.Node, list[_Axis]]:
    """One operation back: its operand that holds the tokens, and their factors there."""
    name = op_name(node)
    dims = [axis.dim for axis in axes if axis.dim is not None]
    if name in {"reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze"}:
        return _first(node), _reshaped(node, axes)
    if name in {"transpose", "swapaxes", "permute"}:
        order = _order(node)
        return _first(node), [axis if axis.dim is None else _Axis(axis.size, order[axis.dim]) for axis in axes]
    is_kept = name in _KEEPING or (name in _BY_LAST and value(node).ndim - 1 not in dims)
    is_kept = is_kept or (name == "narrow" and _number(node, 1, "dim") % value(node).ndim not in dims)
    if not is_kept or node.op == "placeholder":
        raise _UnknownGrid(node, "may move or mix tokens, or makes them")
    if name == "getitem" and is_tensor(_first(node)) and _looks_up(node):
        raise _UnknownGrid(node, "looks tokens up by a tensor or list")
    wanted = _sizes(node)
    for item in node.all_input_nodes:
        is_like = item in ours and is_tensor(item) and value(item).ndim == len(wanted)
        if is_like and all(_sizes(item)[dim] == wanted[dim] for dim in dims):
            return item, axes
    raise _UnknownGrid(node, "has no operand that holds the sample's tokens as it does")


def _looks_up(node: fx.Node) -> bool:
    """Whether an index is something else than numbers, slices, None and an ellipsis."""
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    plain = [isinstance(item, (slice, int)) or item is None or item is Ellipsis for item in index]
    scalars = [isinstance(item, fx.Node) and not is_tensor(item) for item in index]
    return not all(is_plain or is_scalar for is_plain, is_scalar in zip(plain, scalars, strict=True))


def _check_order(node: fx.Node, axes: list[_Axis], ours: set[fx.Node]) -> None:
    """Raise where three axes are known not to follow each other as frames, height and width do.

    They are followed on towards the sample, as far as each is a dimension of its own.
    """
    while op_name(node) not in _SPATIAL and node.op != "placeholder" and node in ours:
        before, found = _step(node, axes, ours)
        if len(found) != len(axes) or any(axis.dim is None for axis in found):
            break
        node, axes = before, found
    dims = [axis.dim for axis in axes if axis.dim is not None]
    if dims != sorted(dims):
        raise _UnknownGrid(node, "has frames, height and width in another order than the tokens")


def _reshaped(node: fx.Node, axes: list[_Axis]) -> list[_Axis]:
    """The factors before a reshape: of each group of dimensions that became another group."""
    before, after = _sizes(_first(node)), _sizes(node)
    found: list[_Axis] = []
    groups = list(_groups(before, after))
    for key, members in itertools.groupby(axes, lambda axis: _group_of(groups, axis.dim)):
        held = list(members)
        if key is None:
            found += held
            continue
        old, new = groups[key]
        covered = {axis.dim for axis in held}
        if all(dim in covered or after[dim] == 1 for dim in new):
            kept = [dim for dim in old if before[dim] > 1] or list(old[:1])
            found += [_Axis(before[dim], dim) for dim in kept]
        else:
            found += [_Axis(axis.size, None) for axis in held]
    return found


def _group_of(groups: Sequence[tuple[Sequence[int], Sequence[int]]], dim: int | None) -> int | None:
    return next((place for place, (_, new) in enumerate(groups) if dim in new), None)


def _groups(before: Sequence[int], after: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """The least groups of consecutive dimensions that have as many elements before a reshape as after it."""
    old = new = 0
    while old < len(before) or new < len(after):
        first, second = [old], [new]
        sizes = [before[old] if old < len(before) else 1, after[new] if new < len(after) else 1]
        old, new = old + 1, new + 1
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1]:
                first.append(old)
                sizes[0] *= before[old]
                old += 1
            else:
                second.append(new)
                sizes[1] *= after[new]
                new += 1
        yield [dim for dim in first if dim < len(before)], [dim for dim in second if dim < len(after)]


def _order(node: fx.Node) -> list[int]:
    """For each dimension of a transposed tensor, the one that it was."""
    ndim = value(node).ndim
    if op_name(node) == "permute":
        held: Any = node.args[1:] if isinstance(argument(node, 1, "dims"), int) else argument(node, 1, "dims")
        return [int(dim) % ndim for dim in held]
    names = ("dim0", "dim1") if op_name(node) == "transpose" else ("axis0", "axis1")
    first, second = (_number(node, place, name) % ndim for place, name in enumerate(names, 1))
    order = list(range(ndim))
    order[first], order[second] = second, first
    return order


def _first(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _number(node: fx.Node, place: int, name: str, default: Any = None) -> int:
    held = argument(node, place, name, default)
    if not isinstance(held, int):
        raise _UnknownGrid(node, f"has an argument {name} that is no number")
    return held


def _sizes(node: fx.Node) -> list[int]:
    return [size_hint(size) for size in value(node).shape]
