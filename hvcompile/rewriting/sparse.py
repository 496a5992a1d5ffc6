"""Attention of the sample's tokens that skips blocks of keys, in place of attention that reads all of them.

The sample's tokens read listed blocks of each other, and all other tokens (text). Both parts have a log-sum-exp, by
which they are merged. The other tokens' own queries read everything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.graph.attention import Tokens, arguments, marked
from hvcompile.graph.attention_kernels import merge, scaled_dot_product_attention_with_lse
from hvcompile.graph.block_sparse import block_sparse_attention
from hvcompile.graph.inline import inline
from hvcompile.journal import Declined
from hvcompile.ranks.split import Segment
from hvcompile.rewriting.key_padding import LEAST_KEYS
from hvcompile.torch_private import fakes
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.trunk import Body, Derived, Trunk

Lists = Callable[..., tuple[Any, Any]]
"""Graph code that gives the lists, of the sample's query and key, the scale, and operands of the pass's own."""


def named(body: Body, names: Collection[str]) -> list[fx.Node]:
    """Nodes of a body by their names, which a copy of it keeps."""
    return [node for node in body.module.graph.nodes if node.name in names]


def skip_blocks(
    node: fx.Node,
    tokens: Tokens,
    operands: Mapping[str, fx.Node],
    lists: Lists,
    *,
    order: Mapping[str, fx.Node],
    early: Mapping[str, fx.Node],
    block: int,
    reads: int,
    tag: str,
) -> None:
    """Replace a marked attention by one that reads listed blocks.

    Args:
        node: the attention.
        tokens: what lies along its queries and keys.
        operands: what ``lists`` takes beside query, key and scale, in order.
        lists: see ``Lists``.
        order: ``order`` and ``back``, where the sample's tokens have to be put in the order of tiles here; else none.
        early: ``early``, a bool scalar of steps that read everything, where there are such; else none.
        block: tokens a block.
        reads: pairs of a query and a key that a head of a sample computes at most.
        tag: the pass's name.

    """
    given = arguments(node)
    names = ("query", "key", "value")
    scale = given.get("scale")
    scale = float(int(value(given["query"]).shape[-1]) ** -0.5 if scale is None else scale)
    whole: Any = node.target
    dense = functools.partial(whole, scale=scale)
    lengths = lengths_of(given["key"])
    dtype = value(node).dtype

    def attend(query: Any, key: Any, value: Any, **own: Any) -> dict[str, Any]:
        cut = {name: own.pop(name) for name in (*lengths, *order, *early)}
        put, back = cut.get("order"), cut.get("back")
        queries = _split(query, tokens.queries, None, put)
        keys, values = (_split(item, tokens.keys, cut.get("length"), put) for item in (key, value))
        (ours, our_values), others = _sides(tokens.keys, keys, values)
        results = []
        for item, part in zip(tokens.queries, queries, strict=True):
            if not item.is_split:
                results.append(dense(part, key, value))
                continue
            indices, counts = lists(part, ours, scale, *own.values())
            if early:
                indices, counts = _all_where(cut["early"], indices, counts)
            out = block_sparse_attention(part, ours, our_values, indices, counts, block=block, scale=scale, reads=reads)
            merged = merge([(out[0], out[1]), *_to_others(part, others, scale)], dtype)
            results.append(merged if back is None else merged.index_select(2, back))
        return {"out": torch.cat(results, 2) if len(results) > 1 else results[0]}

    nodes = {name: given[name] for name in names} | lengths | dict(order) | dict(early) | dict(operands)
    made = inline(node.graph, attend, nodes, before=node, tag=tag)["out"]
    assert fakes.shape_key(value(made)) == fakes.shape_key(value(node))
    made.meta = fakes.provenance(node, tag, value(made))
    node.replace_all_uses_with(made)
    node.graph.erase_node(node)


def lengths_of(key: fx.Node) -> dict[str, fx.Node]:
    """The node of how many keys there are, where they are fewer than the model's (``narrow``)."""
    length = key.args[3] if key.target == "narrow" and len(key.args) == 4 else None
    return {"length": length} if isinstance(length, fx.Node) else {}


def _split(tensor: Any, segments: Sequence[Segment], total: Any, order: Any) -> list[Any]:
    """What lies along a tensor's tokens, part by part, the sample's in this order.

    ``total`` is how many there are, where that is no number.
    """
    parts, start = [], 0
    for item in segments:
        size = total - start if item is segments[-1] and total is not None else item.stop - item.start
        part = tensor if len(segments) == 1 else tensor.narrow(2, start, size)
        parts.append(part.index_select(2, order) if item.is_split and order is not None else part)
        start = start + size
    return parts


def _all_where(early: Any, indices: Any, counts: Any) -> tuple[Any, Any]:
    """The lists of all blocks in an early step, else these."""
    size = indices.shape[-1]
    places = torch.arange(size, dtype=indices.dtype, device=indices.device).expand(indices.shape)
    return torch.where(early, places, indices), torch.where(early, torch.full_like(counts, size), counts)


def _to_others(query: Any, others: Sequence[Any], scale: float) -> list[tuple[Any, Any]]:
    """Attention to tokens that are not the sample's, and its log-sum-exp; none where there are none."""
    if not others:
        return []
    keys, values = (torch.cat(held, 2) if len(held) > 1 else held[0] for held in zip(*others, strict=True))
    out = scaled_dot_product_attention_with_lse(query, keys, values, scale=scale)
    return [(out[0], out[1])]


def _sides(segments: Sequence[Segment], keys: Sequence[Any], values: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The sample's keys and values, and those of others."""
    pairs = list(zip(keys, values, strict=True))
    ours = next(pair for pair, item in zip(pairs, segments, strict=True) if item.is_split)
    return ours, [pair for pair, item in zip(pairs, segments, strict=True) if not item.is_split]


def require_tokens(trunk: Trunk) -> None:
    """Have calls run with their mask in which a mask hides tokens of the sample, or all others.

    Shorter keys (``UnmaskedAttention``) end where padding begins, which is known at run time alone.
    """
    least: dict[fx.Node, int] = {}
    for body in trunk.bodies:
        placeholders = list(body.module.graph.find_nodes(op="placeholder"))
        found = marked(body.module.graph)
        for node in named(body, found):
            for length in lengths_of(arguments(node)["key"]).values():
                position = placeholders.index(length)
                *others, _ = found[node.name].keys
                wanted = sum(item.stop - item.start for item in others) + LEAST_KEYS
                for block in trunk.blocks:
                    if block.body is body:
                        operand = block.operands[position]
                        least[operand] = max(least.get(operand, 0), wanted)
    for operand, wanted in least.items():
        fakes.at_least(value(operand), wanted)
        owner = next((item for item in trunk.derived if operand in item.placeholders), None)
        if owner is not None:  # else it is a size of an input, on which Dynamo guards
            assert owner.read is not None
            owner.read = functools.partial(_read_enough, owner.read, owner.placeholders.index(operand), wanted)


def _read_enough(
    read: Callable[[Sequence[torch.Tensor]], Sequence[Any] | Declined],
    place: int,
    least: int,
    masks: Sequence[torch.Tensor],
) -> Sequence[Any] | Declined:
    """What ``read`` gives, unless one of the numbers is less than it must be."""
    lengths = read(masks)
    if isinstance(lengths, Declined) or lengths[place] >= least:
        return lengths
    return Declined(
        f"a sample has {lengths[place]} valid keys, and attention that skips blocks takes {least} or more: "
        f"all tokens of the sample and {LEAST_KEYS} others"
    )


def derived_operands(trunk: Trunk, body: Body, derived: Derived, names: Sequence[str] = ()) -> dict[str, fx.Node]:
    """Pass derived inputs to every call of a body; their placeholders inside, by these names or ``own_0``, in order."""
    names = names or [f"own_{place}" for place in range(len(derived.placeholders))]
    return {name: trunk.add_operand(body, node) for name, node in zip(names, derived.placeholders, strict=True)}
