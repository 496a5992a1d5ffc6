"""Regrouping: the sample's tokens in the order of tiles, from where they enter the blocks to where they leave them.

Which values hold a token along which dimension is known from the rules by which a sequence is split over ranks
(``sharding.rules``). Here each value holds all tokens, in another order; what is a row a token comes in that order too.
What attends to all tokens gives the same in any order, so the blocks' results are the same, token by token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.attention import TOKENS, Tokens, arguments, is_attention, is_part
from hvcompile.graph.nodes import argument, descendants
from hvcompile.graph.tiles import Part, Sizes, grid_of, num_tiles, tile_order
from hvcompile.journal import Declined
from hvcompile.ranks.split import Layout, Layouts, Segment, Split
from hvcompile.rewriting.sharding.resharder import CannotShard, Resharder, Rule
from hvcompile.rewriting.sharding.rewrite import Around, Rewrite, main_stream
from hvcompile.rewriting.sharding.rules import RULES
from hvcompile.torch_private import fakes
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.grid import sample_tokens
from hvcompile.trunk.trunk import Derived, Trunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regrouped:
    """What was done.

    Attributes:
        grid: of the tokens.
        declined: attentions that can't skip keys, each with the reason.
        inside: ``order`` and ``back``, where the attentions have to put the tokens in the order of tiles themselves.

    """

    grid: Sizes
    declined: tuple[tuple[str, str], ...]
    inside: Derived | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tiled(Split):
    """A sequence that is whole, in another order."""

    @property
    def local(self) -> int:
        """All of its tokens."""
        return self.length


class _Regrouper(Resharder):
    """Copies a graph for tokens in the order of tiles.

    Args:
        args: as of ``Resharder``.
        orders: placeholders of the order, one in each graph.
        back: placeholder of its inverse, in the graph around the blocks.

    """

    def __init__(self, *args: Any, orders: Collection[fx.Node], back: fx.Node) -> None:
        super().__init__(*args)
        self._orders, self._back = orders, back

    may_split_again = False

    def take(self, node: fx.Node, layout: Layout) -> fx.Node:
        """Put a value that is in the model's order into that of tiles."""
        return self._reordered(node, layout, self._order())

    def join(self, node: fx.Node, layout: Layout) -> fx.Node:
        """Put a value back into the model's order."""
        return self._reordered(node, layout, self.env[self._back])

    def position(self, like: fx.Node) -> fx.Node:
        """The place of each token in the model's order."""
        del like
        return self._order()

    def _order(self) -> fx.Node:
        return next(self.env[node] for node in self._orders if node in self.env)

    def _reordered(self, node: fx.Node, layout: Layout, order: fx.Node) -> fx.Node:
        if not layout.is_complete(self.split):
            raise self.refuse(node, "it has a row for some of the tokens")
        offsets = layout.offsets(self.split)

        def put(held: Any, order: Any) -> dict[str, Any]:
            parts = []
            for offset, _, item in offsets:
                size = item.stop - item.start
                part = held if len(offsets) == 1 else held.narrow(layout.dim, offset, size)
                parts.append(part.index_select(layout.dim, order) if item.is_split else part)
            return {"out": parts[0] if len(parts) == 1 else torch.cat(parts, dim=layout.dim)}

        made: fx.Node = self.inline(put, {"held": self.env[node], "order": order}, node)["out"]
        return made


def _shortened(resharder: Resharder, node: fx.Node) -> tuple[fx.Node, Layouts]:
    """``narrow`` along the tokens, as keys are shortened: it may cut the end of what is not the sample's."""
    first = node.all_input_nodes[0]
    layout = resharder.layout(first)
    dim, start, length = (argument(node, place, name) for place, name in enumerate(("dim", "start", "length"), 1))
    if layout is None or not isinstance(dim, int) or dim % value(first).ndim != layout.dim:
        return RULES["narrow"](resharder, node)
    *others, last = layout.segments
    before = sum(item.stop - item.start for item in others)
    kept = value(length) if isinstance(length, fx.Node) else length
    is_known = isinstance(length, int) or (isinstance(length, fx.Node) and length.op == "placeholder")
    if start != 0 or last.is_split or not is_known or (isinstance(kept, int) and kept <= before):
        raise resharder.refuse(node, "it cuts the sample's tokens")
    return resharder.copy(node), Layout(layout.dim, (*others, Segment(0, kept - before, False)))


_RULES: Mapping[str, Rule] = {**RULES, "narrow": _shortened}


class _TiledAttention:
    """Copies each attention as it is, and marks those whose queries and keys are the sample's tokens.

    Args:
        split: of the sequence.

    """

    def __init__(self, split: Split) -> None:
        self.split, self.count = split, 0
        self.declined: dict[str, str] = {}

    def __call__(self, resharder: Resharder, node: fx.Node) -> Layout | None:
        """Copy an attention, and say where the tokens are in its result."""
        given = arguments(node)
        names = ("query", "key", "value")
        layouts = {name: resharder.layout(given[name]) for name in names}
        if not is_attention(node) or is_part(node):
            raise resharder.refuse(node, "it is one kernel's own operator, or attention to a part of the keys")
        if str(layouts["key"]) != str(layouts["value"]):
            raise resharder.refuse(node, f"its keys are {layouts['key']} and its values {layouts['value']}")
        for name, layout in layouts.items():
            if layout is not None and layout.dim != value(given[name]).ndim - 2:
                raise resharder.refuse(node, "the dimension that would be regrouped is not that of its tokens")
        if any(layout is not None and not layout.is_complete(self.split) for layout in layouts.values()):
            raise resharder.refuse(node, "it attends to some of the sample's tokens")
        declined = refusal_of_order(given)
        if declined is not None:
            raise resharder.refuse(node, declined.reason)
        made = resharder.env[node] = resharder.copy(node)
        query, key = layouts["query"], layouts["key"]
        if query is not None and key is not None:
            declined = _refusal_of_others(resharder, given) or refusal(node, query, key)
            if declined is None:
                self.count += 1
                made.meta[TOKENS] = Tokens(queries=query.segments, keys=key.segments)
            else:
                self.declined[f"{node.name} of {resharder.where}"] = declined.reason
        return query


def refusal_of_order(given: Mapping[str, Any]) -> Declined | None:
    """Why an attention's result may depend on the order of the tokens."""
    if given.get("attn_mask") is not None:
        return Declined(
            "it has a mask, which says what is attended to in the model's order; masks of padding go with "
            "options['attention']['unmask']"
        )
    if given.get("is_causal"):
        return Declined("it is causal, which depends on the order of the tokens")
    return None


def _refusal_of_others(resharder: Resharder, given: Mapping[str, Any]) -> Declined | None:
    """Why an attention is not one of the sample's tokens: others, as many, may have a row for each of them."""
    ours = descendants(resharder.streams)
    if not {given["query"], given["key"]} <= ours:
        return Declined("its queries or keys follow from no stream that holds the sample's tokens")
    return None


def refusal(node: fx.Node, query: Layout, key: Layout) -> Declined | None:
    """Why an attention can't skip blocks of keys."""
    given = arguments(node)
    queries, keys, values = (value(given[name]) for name in ("query", "key", "value"))
    if query.num_split != 1 or key.num_split != 1:
        return Declined("its queries or keys hold the sample's tokens more than once")
    if any(item.ndim != 4 for item in (queries, keys, values)):
        return Declined(f"its query has {queries.ndim} dimensions; looked for are [batch, heads, tokens, head size]")
    if len({item.dtype for item in (queries, keys, values, value(node))}) > 1:
        return Declined("its operands and its result differ in dtype, as autocast makes them")
    if given.get("dropout_p", 0.0):
        return Declined("it drops out weights")
    if isinstance(given.get("scale"), fx.Node):
        return Declined("its scale is computed")
    if fakes.shape_key(queries)[:2] != fakes.shape_key(keys)[:2]:
        return Declined("query and key differ in batch size or number of heads")
    if queries.shape[3] != values.shape[3]:
        return Declined(f"query and value differ in head size ({queries.shape[3]} and {values.shape[3]})")
    return None


def regroup(trunk: Trunk, tile: Sizes, tag: str) -> Regrouped | Declined:
    """Put the sample's tokens into the order of tiles for all blocks; the attentions keep reading all keys.

    Args:
        trunk: rewritten in place, or left as it was.
        tile: frames, height and width of a tile, in tokens.
        tag: the pass's name.

    Returns:
        What was done; ``TOKENS`` marks the attentions that may skip keys. Or why nothing was.

    """
    try:
        place = main_stream(trunk)
    except CannotShard as verdict:
        return Declined(str(verdict))
    stream = trunk.blocks[0].operands[place]
    failures: list[tuple[int, str]] = []
    sizes = [fakes.size_hint(size) for size in value(stream).shape[:-1]]
    for dim in sorted(range(len(sizes)), key=lambda dim: -sizes[dim]):
        parts = sample_tokens(trunk, stream, dim)
        if isinstance(parts, Declined):
            failures.append((0, parts.reason))
            continue
        added = add_order(trunk, parts, tile, tag)
        split = _Tiled(group="", rank=0, ranks=1, length=math.prod(grid_of(parts)))
        order, back = added.placeholders
        inside = {body: trunk.add_operand(body, order) for body in trunk.bodies}
        kind = functools.partial(_Regrouper, orders=(order, *inside.values()), back=back)
        rewrite = Rewrite(trunk, split, _TiledAttention(split), tag, kind, _RULES)
        try:
            done = _commit(rewrite, place, dim, parts)
        except CannotShard as verdict:
            for body, node in inside.items():
                trunk.drop_operand(body, node)
            _drop(trunk, added)
            failures.append((rewrite.num_nodes, f"the tokens can't be put into another order: {verdict}"))
            continue
        for body, node in inside.items():
            own = rewrite.bodies[body][1].env[node]
            if not own.users:
                trunk.drop_operand(body, own)
        return done
    return Declined(max(failures, key=lambda item: item[0], default=(0, "the stream has one dimension"))[1])


def _commit(rewrite: Rewrite, place: int, dim: int, parts: Sequence[Part]) -> Regrouped:
    trunk, first = rewrite.trunk, rewrite.trunk.blocks[0]
    for size in value(first.operands[place]).shape[dim : dim + 1]:
        fakes.fix_size(size, trunk.graph)  # the grid is one of numbers, on which the compiled graph depends
    entry = Layout(dim, tuple(Segment(0, part.size, part.grid is not None) for part in parts))
    rewrite.rewrite_body(first, {place: entry})
    around = Around(rewrite, place, entry)
    around.copy()
    attention: Any = rewrite.attention
    if not attention.count:
        reasons = "; ".join(f"{name}: {why}" for name, why in attention.declined.items())
        raise CannotShard(reasons or f"no attention of {trunk.lists} is one of the sample's tokens to themselves")
    rewrite.replace(around)
    return Regrouped(grid=grid_of(parts), declined=tuple(attention.declined.items()))


def orders(grid: Sizes, tile: Sizes, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``tile_order`` and its inverse."""
    order = tile_order(grid, tile, device)
    return order, order.argsort()


def add_order(trunk: Trunk, parts: Sequence[Part], tile: Sizes, tag: str) -> Derived:
    """Add the order of tiles and its inverse to the trunk's inputs."""
    grid = grid_of(parts)
    shape = (math.prod(grid),)
    return add_of_numbers(trunk, {"order": shape, "back": shape}, (orders, (grid, tile)), torch.int64, tag)


def add_of_numbers(
    trunk: Trunk,
    shapes: Mapping[str, tuple[int, ...]],
    made_by: tuple[Callable[..., Any], tuple[Any, ...]],
    dtype: torch.dtype,
    tag: str,
) -> Derived:
    """Add inputs that a function makes of numbers, which the runtime does once.

    Args:
        trunk: gains the inputs.
        shapes: of each, by the name of its placeholder.
        made_by: a function, which returns a tuple, and the numbers that it takes before the device of the blocks.
        dtype: of all.
        tag: the pass's name.

    """
    device = next(value(node).device for node in trunk.blocks[0].outputs.values())
    graph, mode = fx.Graph(), fakes.fake_mode(trunk.graph)
    assert mode is not None  # the blocks take tensors
    function, numbers = made_by
    made = graph.call_function(function, (*numbers, device))
    made.meta = {fakes.TAG: tag}
    graph.output(tuple(graph.call_function(operator.getitem, (made, place)) for place in range(len(shapes))))
    examples = [fakes.fake_like(mode, shape, dtype, device) for shape in shapes.values()]
    module = fx.GraphModule(trunk.module, graph)
    return trunk.add_derived(list(shapes), examples, made_by=tag, module=module, sources=[])


def _drop(trunk: Trunk, added: Derived) -> None:
    """Take back inputs that nothing reads."""
    trunk.derived.remove(added)
    for node in reversed(added.placeholders):
        trunk.graph.erase_node(node)


def describe(grid: Sizes, tile: Sizes) -> str:
    """The grid and its tiles, in words."""
    tiles = num_tiles(grid, tile)
    shown = ["x".join(map(str, sizes)) for sizes in (grid, tile, tiles)]
    return f"{math.prod(grid)} tokens, {shown[0]} (frames x height x width), in {shown[2]} tiles of {shown[1]}"
