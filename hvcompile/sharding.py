"""Splitting a sequence over ranks: which dimension of each value is the sequence, found op by op, and corrected.

``Resharder`` copies a graph node by node. Given which of the graph's inputs hold one rank's part of the sequence, it
says of every value computed from them along which dimension it is split, corrects literals that hold the full length,
and splits whole operands (rotary tables, per-token modulation) that meet split ones. An operation that is not in its
tables, or would mix tokens, ends it with the operation's name. Every node is run on fake tensors of one rank's shapes
as it is made, and must have the shape that was derived for it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile import collectives, inductor
from hvcompile.graph_code import inline, run_on_fakes
from hvcompile.inductor import TAG, provenance, shape_key, value
from hvcompile.nodes import contexts, is_tensor, op_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """How a sequence lies on the ranks of a group: each holds ``local`` tokens, the last ones perhaps padding.

    Attributes:
        group: name of the process group.
        rank: this process's place in it.
        ranks: its size.
        length: tokens of the whole sequence.
        ring: stretches of the sequence, one after the other, between which the keys travel. As many ranks as each has
            in a row (``ulysses``) share out its heads.

    """

    group: str
    rank: int
    ranks: int
    length: int
    ring: int = 1

    @property
    def local(self) -> int:
        """Tokens a rank, padding included."""
        return -(-self.length // self.ranks)

    @property
    def start(self) -> int:
        """Place of this rank's first token in the whole sequence."""
        return self.rank * self.local

    @property
    def ulysses(self) -> int:
        """Ranks that share out the heads of one stretch."""
        return self.ranks // self.ring

    @property
    def stretch(self) -> int:
        """Tokens of one stretch, padding included."""
        return self.local * self.ulysses

    @property
    def place(self) -> int:
        """Which stretch this rank has a part of."""
        return self.rank // self.ulysses

    def valid(self, stretch: int) -> int:
        """Tokens of a stretch that are no padding."""
        return min(max(self.length - stretch * self.stretch, 0), self.stretch)


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of a dimension: tokens ``start`` to ``stop`` of the split sequence, or as many that every rank has.

    A rank holds *all* its tokens of the split sequence even where a segment covers only some of them (a slice): those
    outside it hold nothing of meaning.
    """

    start: int
    stop: int
    is_split: bool


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the sequence is in a tensor: its dimension, and what lies along it in order."""

    dim: int
    segments: tuple[Segment, ...]

    def at(self, dim: int) -> Layout:
        """The same along another dimension."""
        return dataclasses.replace(self, dim=dim)

    def size(self, split: Split) -> int:
        """Length of the dimension on one rank."""
        return sum(split.local if item.is_split else item.stop - item.start for item in self.segments)

    @property
    def total(self) -> int:
        """Length of the dimension in the whole tensor."""
        return sum(item.stop - item.start for item in self.segments)

    @property
    def num_split(self) -> int:
        """Stretches that are split."""
        return sum(item.is_split for item in self.segments)

    def is_complete(self, split: Split) -> bool:
        """Whether every split segment covers the whole sequence."""
        return all(not item.is_split or (item.start, item.stop) == (0, split.length) for item in self.segments)

    def offsets(self, split: Split) -> list[tuple[int, int, Segment]]:
        """Each segment with its place on one rank and its place in the whole tensor."""
        found, local, whole = [], 0, 0
        for item in self.segments:
            found.append((local, whole, item))
            local += split.local if item.is_split else item.stop - item.start
            whole += item.stop - item.start
        return found

    def __str__(self) -> str:
        parts = (f"{item.stop - item.start} {'split' if item.is_split else 'whole'}" for item in self.segments)
        return f"dimension {self.dim} [{' | '.join(parts)}]"


class CannotShard(Exception):  # noqa: N818  (a verdict, caught by the pass, not an error of the user's)
    """An operation that can't be proven to work on one rank's part; says which and why."""


class WantsSplit(Exception):  # noqa: N818  (as above)
    """A graph's input turned out to be a per-token operand, so it should come split."""

    def __init__(self, placeholder: fx.Node, layout: Layout) -> None:
        super().__init__(placeholder.name)
        self.placeholder, self.layout = placeholder, layout


def take_local(whole: Any, *, split: Split, dim: int, ndim: int, start: int, stop: int) -> Any:
    """Take this rank's part of tokens ``start`` to ``stop``, zeros where it has none; graph code."""
    after = split.local * split.ranks - stop
    if start or after:
        whole = torch.nn.functional.pad(whole, (0, 0) * (ndim - 1 - dim) + (start, after))
    return whole.narrow(dim, split.start, split.local)


def localise(whole: Any, *, split: Split, layout: Layout, ndim: int) -> Any:
    """One rank's part of a whole tensor; graph code."""
    parts = []
    for _, place, item in layout.offsets(split):
        part = whole if len(layout.segments) == 1 else whole.narrow(layout.dim, place, item.stop - item.start)
        if item.is_split:
            part = take_local(part, split=split, dim=layout.dim, ndim=ndim, start=item.start, stop=item.stop)
        parts.append(part)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=layout.dim)


def delocalise(local: Any, *, split: Split, layout: Layout) -> Any:
    """The whole tensor from one rank's part, with an all-gather for each split segment; graph code."""
    parts = []
    for place, _, item in layout.offsets(split):
        if item.is_split:
            part = collectives.gather(local.narrow(layout.dim, place, split.local), split.group, layout.dim)
            parts.append(part.narrow(layout.dim, 0, split.length))
        else:
            parts.append(local.narrow(layout.dim, place, item.stop - item.start))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=layout.dim)


# An operation's layouts: None for a value that is whole on every rank, a list for a tuple of values.
Layouts = Layout | None | list["Layout | None"]
Attention = Callable[["Resharder", fx.Node], Layout | None]


class Resharder:
    """Copies a graph so that it works on one rank's part of the sequence; see the module.

    Args:
        source: the graph to copy; not changed.
        split: how the sequence lies on the ranks.
        tag: the pass's name.
        where: what to call the graph in messages.
        attention: copies a scaled dot product attention one of whose operands is split.
        may_split: the inputs that can come split where they turn out to be per-token operands.
        around: the autocast regions that the graph is called in, outermost first.

    """

    def __init__(
        self,
        source: fx.Graph,
        split: Split,
        tag: str,
        where: str,
        attention: Attention,
        may_split: frozenset[fx.Node] = frozenset(),
        around: Sequence[fx.Node] = (),
    ) -> None:
        self.source, self.split, self.tag, self.where = source, split, tag, where
        self.attention, self.may_split = attention, may_split
        self._around, self._within = tuple(around), contexts(source)
        self.mode = inductor.fake_mode(source)
        self.graph = fx.Graph()
        self.end = self.graph.output(())
        self.env: dict[fx.Node, fx.Node] = {}
        self.layouts: dict[fx.Node, Layouts] = {}
        self._local: dict[tuple[fx.Node, Layout], fx.Node] = {}
        self._whole: dict[fx.Node, fx.Node] = {}
        self._position: fx.Node | None = None

    # What the rules build on

    def layout(self, node: Any) -> Layout | None:
        """Where the sequence is in a node of the source; None for what is whole, or no tensor."""
        found = self.layouts.get(node) if isinstance(node, fx.Node) else None
        return found if isinstance(found, Layout) else None

    def refuse(self, node: fx.Node, reason: str) -> CannotShard:
        """The verdict on an operation."""
        stack = node.meta.get("nn_module_stack")
        path = f" of {[*stack.values()][-1][0]}" if stack else ""
        return CannotShard(f"{op_name(node)} ({node.name}{path}, in {self.where}): {reason}")

    def make(self, target: Any, args: tuple[Any, ...], like: fx.Node, **kwargs: Any) -> fx.Node:
        """Add an operation of our own, with its fake value."""
        with self.graph.inserting_before(self.end):
            kind = self.graph.call_method if isinstance(target, str) else self.graph.call_function
            made = kind(target, args, kwargs)
        made.meta = provenance(like, self.tag, None)
        self.run(made, like)
        return made

    def inline(self, function: Callable[..., Mapping[str, Any]], operands: Mapping[str, fx.Node], like: fx.Node) -> Any:
        """Add graph code (see ``graph_code.inline``) that stands for a node of the source."""
        last = self.end.prev
        made = inline(self.graph, function, operands, before=self.end, tag=self.tag)
        while (last := last.next) is not self.end:
            last.meta = provenance(like, self.tag, value(last))
        return made

    def copy(self, node: fx.Node, replaced: Mapping[fx.Node, fx.Node] | None = None, **changed: Any) -> fx.Node:
        """Copy a node, with other operands for some of its own; ``changed`` may hold new ``args`` and ``kwargs``."""
        env = {**self.env, **(replaced or {})}
        with self.graph.inserting_before(self.end):
            made = self.graph.node_copy(node, env.__getitem__)
        made.meta = dict(node.meta)
        for name, held in changed.items():
            setattr(made, name, fx.map_arg(held, env.__getitem__))
        return made

    def run(self, node: fx.Node, source: fx.Node) -> None:
        """Run a node of the new graph on fake tensors, and keep what comes out as its value.

        ``source`` is the node that it stands for: in its autocast regions the copy runs as well.
        """
        if self.mode is None:
            raise CannotShard(f"{self.where} has no tensor")
        try:
            with self.mode, torch.no_grad(), contextlib.ExitStack() as regions:
                regions.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")  # of a region that the model itself enters, which has warned already
                for region in (*self._around, *self._within[source]):
                    regions.enter_context(inductor.autocast_of(region))
                node.meta["example_value"] = run_on_fakes(node)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise self.refuse(node, f"fails on one rank's shapes ({str(error).splitlines()[0]})") from error

    def length(self, size: Any, node: fx.Node) -> int:
        """A size as a number, on which the compiled graph then depends."""
        try:
            return inductor.fix_size(size, self.source)
        except ValueError as error:
            raise self.refuse(node, str(error)) from error

    def part_of(self, node: fx.Node, layout: Layout) -> fx.Node:
        """One rank's part of a source node that is whole on every rank.

        Raises:
            WantsSplit: it comes from an input of the graph by a chain of operations that could work on a part.

        """
        if (node, layout) not in self._local:
            if layout.is_complete(self.split):
                found = self._input_of(node, layout)
                if found is not None:
                    raise WantsSplit(*found)
            new, ndim = self.env[node], value(node).ndim

            def take(whole: Any) -> dict[str, Any]:
                return {"part": localise(whole, split=self.split, layout=layout, ndim=ndim)}

            self._local[node, layout] = self.inline(take, {"whole": new}, node)["part"]
        return self._local[node, layout]

    def _input_of(self, node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout] | None:
        """The input from which a per-token operand comes by views and casts alone, and its sequence dimension."""
        dim = layout.dim
        while node.op != "placeholder":
            if op_name(node) not in _FROM_INPUTS or len(node.all_input_nodes) != 1:
                return None
            (before,) = node.all_input_nodes
            if not is_tensor(before):
                return None
            found = same_dim(value(node).shape, value(before).shape, dim)
            if found is None:
                return None
            node, dim = before, found
        return (node, layout.at(dim)) if node in self.may_split else None

    def whole(self, node: fx.Node) -> fx.Node:
        """A source node's value gathered from all ranks, where it is split; in the new graph."""
        layout = self.layout(node)
        if layout is None:
            return self.env[node]
        if node not in self._whole:
            if not layout.is_complete(self.split):
                raise self.refuse(node, "only some tokens of it are wanted outside the trunk")

            def join(local: Any) -> dict[str, Any]:
                return {"whole": delocalise(local, split=self.split, layout=layout)}

            self._whole[node] = self.inline(join, {"local": self.env[node]}, node)["whole"]
        return self._whole[node]

    def position(self, like: fx.Node) -> fx.Node:
        """The place of each of this rank's tokens in the whole sequence."""
        if self._position is None:
            start, device = self.split.start, value(like).device
            self._position = self.make(torch.arange, (start, start + self.split.local), like, device=device)
        return self._position

    # The walk

    def placeholder(self, node: fx.Node, layout: Layout | None) -> None:
        """Copy an input, which comes as one rank's part where a layout is given."""
        with self.graph.inserting_before(self.end):
            made = inductor.copy_placeholder(self.graph, node)
        made.meta = dict(node.meta)
        if layout is not None and self.mode is not None:
            old = value(node)
            shape = list(old.shape)
            shape[layout.dim] = layout.size(self.split)
            made.meta["example_value"] = inductor.fake_like(self.mode, shape, old.dtype, old.device)
        self.env[node], self.layouts[node] = made, layout

    def visit(self, node: fx.Node) -> None:
        """Copy a node of the source."""
        if all(self.layouts.get(item) is None for item in node.all_input_nodes):
            self.env[node] = self.copy(node)
            return
        name = op_name(node)
        rule = RULES.get(name) or RULES.get(name.rstrip("_"))
        if "scaled_dot_product_attention" in name:
            self.layouts[node] = self.attention(self, node)
        elif rule is None:
            raise self.refuse(node, "is not known to work on a part of the tokens")
        else:
            self.env[node], self.layouts[node] = rule(self, node)
        self._prove(node)

    def _prove(self, node: fx.Node) -> None:
        """Run the copy on one rank's shapes; what comes out must have the shape that was derived."""
        new, layouts = self.env[node], self.layouts[node]
        if new.meta.get(TAG) != self.tag:  # what is made of our own operations has run already
            self.run(new, node)
        before, after = value(node), value(new)
        if before is None and after is None:
            return  # it writes into an operand
        items: Any = layouts
        if isinstance(before, torch.Tensor):
            before, after, items = [before], [after], [layouts]
        for old, made, layout in zip(before, after, items, strict=True):
            wanted = list(shape_key(old))
            if isinstance(layout, Layout):
                if str(layout.total) != wanted[layout.dim]:
                    raise self.refuse(node, f"{layout} was derived for a value of shape {tuple(old.shape)}")
                wanted[layout.dim] = str(layout.size(self.split))
            if list(shape_key(made)) != wanted or made.dtype != old.dtype:
                raise self.refuse(node, f"gives {tuple(made.shape)} on one rank, not ({', '.join(wanted)})")


# Finding a dimension again


def same_dim(before: Sequence[Any], after: Sequence[Any], dim: int) -> int | None:
    """Where a dimension of more than one element is after its tensor was reshaped; None where it was merged or cut."""
    size, leading = str(before[dim]), _product(before[:dim])
    for place, other in enumerate(after):
        if str(other) == size and _product(after[:place]) == leading:
            return place
    return None


def _product(sizes: Iterable[Any]) -> Any:
    return math.prod(inductor.expression_of(size) for size in sizes)


def _argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _dims(held: Any, ndim: int) -> list[int] | None:
    """Dimensions given as one or several numbers, counted from the front; None where they aren't plain numbers."""
    items = list(held) if isinstance(held, (list, tuple)) else [held]
    if any(not isinstance(item, int) for item in items):
        return None
    return [item % ndim for item in items]


Rule = Callable[[Resharder, fx.Node], tuple[fx.Node, Layouts]]
RULES: dict[str, Rule] = {}

# Views and casts by which a per-token table comes from an input.
_FROM_INPUTS = {"getitem", "to", "float", "double", "half", "bfloat16", "type", "contiguous", "unsqueeze", "view"}


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
        if found[item] is None and dim >= 0 and inductor.size_hint(value(item).shape[dim]) != 1:
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
    shape = _argument(node, 1, "normalized_shape")
    taken = len(shape) if isinstance(shape, (list, tuple)) else 1
    if layout.dim >= value(first).ndim - taken:
        raise resharder.refuse(node, "it normalises over the dimension that would be split")
    return resharder.copy(node), layout


@_rule("mean", "sum", "var", "std", "amax", "amin", "norm", "vector_norm", "logsumexp")
def _reduction(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    first, layout = _first(resharder, node)
    place = 2 if op_name(node) in {"norm", "vector_norm"} else 1
    dims = _dims(_argument(node, place, "dim"), value(first).ndim)
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
    dims = _dims(_argument(node, place, name, default), value(first).ndim)
    if not dims or layout.dim in dims:
        raise resharder.refuse(node, "it mixes along the dimension that would be split")
    return resharder.copy(node), layout


@_rule("permute")
def _permute(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    first, layout = _first(resharder, node)
    order = node.args[1:] if isinstance(_argument(node, 1, "dims"), int) else _argument(node, 1, "dims")
    dims = _dims(order, value(first).ndim)
    if dims is None:
        raise resharder.refuse(node, "its order is no list of numbers")
    return resharder.copy(node), layout.at(dims.index(layout.dim))


@_rule("transpose", "swapaxes", "swapdims")
def _transpose(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    first, layout = _first(resharder, node)
    names = ("dim0", "dim1") if op_name(node) == "transpose" else ("axis0", "axis1")
    dims = _dims([_argument(node, 1, names[0]), _argument(node, 2, names[1])], value(first).ndim)
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
    pieces: Any = _argument(node, 0, "tensors")
    ndim = value(node).ndim
    dims = _dims(_argument(node, 1, "dim", 0), ndim)
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
    pieces: Any = _argument(node, 0, "tensors")
    dims = _dims(_argument(node, 1, "dim", 0), value(node).ndim)
    layouts = {layout for piece in pieces if (layout := resharder.layout(piece)) is not None}
    if dims is None or len(layouts) > 1:
        raise resharder.refuse(node, "its operands are split in different ways")
    layout = layouts.pop()
    wholes = [piece for piece in dict.fromkeys(pieces) if resharder.layout(piece) is None]
    replaced = {piece: resharder.part_of(piece, layout) for piece in wholes}
    return resharder.copy(node, replaced), layout.at(layout.dim + (dims[0] <= layout.dim))


@_rule("chunk", "split", "tensor_split", "unbind")
def _split(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    first, layout = _first(resharder, node)
    is_unbind = op_name(node) == "unbind"
    dims = _dims(_argument(node, 1 if is_unbind else 2, "dim", 0), value(first).ndim)
    if dims is None:
        raise resharder.refuse(node, "its dimension is no number")
    if dims[0] != layout.dim:
        removed = int(is_unbind and dims[0] < layout.dim)
        return resharder.copy(node), [layout.at(layout.dim - removed) for _ in value(node)]
    sizes = _argument(node, 1, "split_size_or_sections", _argument(node, 1, "split_size"))
    if op_name(node) != "split" or [item.stop - item.start for item in layout.segments] != sizes:
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
    dims = _dims(_argument(node, 1, "dim"), value(first).ndim)
    if dims is None or dims[0] == layout.dim:
        raise resharder.refuse(node, "it cuts the sequence")
    return resharder.copy(node), layout
