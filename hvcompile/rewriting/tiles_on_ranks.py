"""The order of tiles inside the attentions of ranks that share out the heads.

There a rank has all tokens, for its heads (Ulysses). Its attention alone puts them in the order of tiles, and its
result back. Everything around it keeps the model's order, in which the ranks hold their parts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from hvcompile.graph.attention import TOKENS, Tokens, arguments, is_attention, is_part, marked
from hvcompile.graph.tiles import Part, Sizes, grid_of
from hvcompile.journal import Declined
from hvcompile.ranks.split import Layout, Segment
from hvcompile.rewriting.regrouping import Regrouped, add_order, refusal, refusal_of_order
from hvcompile.rewriting.sparse import lengths_of
from hvcompile.torch_private import fakes
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.together import Sharding
from hvcompile.trunk.trunk import Trunk


def order_on_ranks(trunk: Trunk, sharding: Sharding, tile: Sizes, tag: str) -> Regrouped | Declined:
    """Find the attentions that may skip keys, and add the order of tiles to the trunk's inputs.

    Args:
        trunk: whose sequence is split; its marks (``TOKENS``) stay where an attention may skip keys.
        sharding: of the trunk.
        tile: frames, height and width of a tile, in tokens.
        tag: the pass's name.

    """
    split, parts = sharding.split, sharding.tokens
    if split.ring > 1:
        return Declined(
            f"keys travel between {split.ring} rows of ranks, and no rank has those of all tiles; allowed is "
            f"context_parallel.ulysses {split.ranks}, where the heads can be shared out, or no sparse_attention"
        )
    if isinstance(parts, Declined):
        return parts
    declined, count = [], 0
    for body in trunk.bodies:
        graph = body.module.graph
        for name, tokens in marked(graph).items():
            node = next(item for item in graph.nodes if item.name == name)
            whole = Tokens(queries=_in_parts(tokens.queries, parts), keys=_in_parts(tokens.keys, parts))
            reason = _refusal(node, whole)
            if reason is None:
                node.meta[TOKENS], count = whole, count + 1
            else:
                del node.meta[TOKENS]
                declined.append((f"{name} of {body.name}", reason.reason))
    if not count:
        reasons = "; ".join(f"{name}: {why}" for name, why in declined)
        return Declined(reasons or f"no attention of {trunk.lists} is one of the sample's tokens to themselves")
    return Regrouped(grid=grid_of(parts), declined=tuple(declined), inside=add_order(trunk, parts, tile, tag))


def _in_parts(segments: Sequence[Segment], parts: Sequence[Part]) -> tuple[Segment, ...]:
    """What lies along tokens, where the sequence that was split is made of parts: the sample's tokens, and others."""
    found: list[Segment] = []
    for item in segments:
        found += [Segment(0, part.size, part.grid is not None) for part in parts] if item.is_split else [item]
    return tuple(found)


def _refusal(node: fx.Node, tokens: Tokens) -> Declined | None:
    """Why an attention that was marked can't skip keys."""
    if not is_attention(node) or is_part(node):
        return Declined("it is one kernel's own operator, or attention to a part of the keys")
    given = arguments(node)
    declined = refusal_of_order(given)
    if declined is not None:
        return declined
    total = sum(item.stop - item.start for item in tokens.keys)
    is_shortened = bool(lengths_of(given["key"]))
    if is_shortened and tokens.keys[-1].is_split:
        return Declined("its keys end where padding begins, and the sample's tokens are the last of them")
    if not is_shortened and fakes.shape_key(value(given["key"]))[2] != str(total):
        return Declined(f"it has {value(given['key']).shape[2]} keys, of which {total} are known")
    return refusal(node, Layout(2, tokens.queries), Layout(2, tokens.keys))
