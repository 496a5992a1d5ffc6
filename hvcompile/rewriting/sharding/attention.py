"""One attention of a sequence that is split over ranks, copied with the exchanges that make it whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from hvcompile.graph.attention import TOKENS, Tokens, arguments, is_attention
from hvcompile.graph.nodes import descendants
from hvcompile.journal import Declined
from hvcompile.ranks.split import Layout, Split
from hvcompile.rewriting.sharding.exchange import Heads, Mask, Ring, refusal
from hvcompile.rewriting.sharding.resharder import Resharder
from hvcompile.torch_private import fakes
from hvcompile.torch_private.fakes import value


class SequenceAttention:
    """Copies each attention so that a rank computes a share of the heads, for the whole sequence or its stretch of it.

    Args:
        split: how the sequence lies on the ranks.

    """

    def __init__(self, split: Split) -> None:
        self.split = split
        self.count = 0
        """Attentions that were surrounded by exchanges so far."""

    def __call__(self, resharder: Resharder, node: fx.Node) -> Layout | None:
        """Copy an attention, and say how its result is split."""
        args = arguments(node)
        operands: dict[str, fx.Node] = {name: args[name] for name in ("query", "key", "value")}
        mask, layouts = args.get("attn_mask"), {name: resharder.layout(item) for name, item in operands.items()}
        if layouts["key"] is None and layouts["value"] is None and layouts["query"] is not None:
            if args.get("is_causal"):
                raise resharder.refuse(node, "it is causal, and its queries would be counted from each rank's first")
            return self._attend_to_whole(resharder, node, operands["query"], mask)
        declined = self._check(operands, layouts)
        if mask is not None and resharder.layouts.get(mask) is not None:
            declined = Declined("its mask depends on the tokens that are split")
        if declined is not None:
            raise resharder.refuse(node, declined.reason)
        shapes = {name: (int(value(item).shape[1]), int(value(item).shape[3])) for name, item in operands.items()}
        heads = Heads(self.split, layouts, shapes)
        self.count += 1
        if self.split.ring > 1:
            self._ring(resharder, node, heads, operands, args)
        else:
            self._share_heads(resharder, node, heads, operands, mask)
        return layouts["query"]

    def _check(self, operands: Mapping[str, fx.Node], layouts: Mapping[str, Layout | None]) -> Declined | None:
        """Why an attention can't run over the heads."""
        if len(set(operands.values())) < 3:
            return Declined("two of query, key and value are one tensor")
        if layouts["key"] != layouts["value"]:
            return Declined(f"its keys are {layouts['key'] or 'whole'} and its values {layouts['value'] or 'whole'}")
        for name, item in operands.items():
            layout, fake = layouts[name], value(item)
            if layout is not None and (fake.ndim != 4 or layout.dim != 2):
                return Declined(
                    f"its sequence is dimension {fake.ndim - 2} of {fake.ndim}, and the stream's is {layout.dim}"
                )
            if layout is not None and not (layout.is_complete(self.split) and layout.num_split == 1):
                return Declined(f"it attends to parts of the sequence ({layout})")
            heads = fake.shape[1]
            if not isinstance(heads, int) or heads % self.split.ulysses:
                legal = legal_degrees(self.split.ranks, [heads] if isinstance(heads, int) else [])
                return Declined(
                    f"{self.split.ulysses} ranks can't share its {heads} heads: allowed for ulysses is one of "
                    f"{', '.join(map(str, legal))}, and the rest of the {self.split.ranks} ranks for ring"
                )
        return None

    def _share_heads(
        self, resharder: Resharder, node: fx.Node, heads: Heads, operands: Mapping[str, fx.Node], mask: Any
    ) -> None:
        """Put the whole sequence of a share of the heads in place of a part of it of all heads."""
        local = resharder.inline(heads.to_heads, {name: resharder.env[item] for name, item in operands.items()}, node)
        replaced = {item: local[name] for name, item in operands.items()}
        if isinstance(mask, fx.Node) and value(mask).ndim > 2 and fakes.size_hint(value(mask).shape[-3]) != 1:
            ours = heads.ours("query")
            cut = (resharder.env[mask], value(mask).ndim - 3, ours.start, ours.stop - ours.start)
            replaced[mask] = resharder.make(torch.narrow, cut, node)
        attention = resharder.copy(node, replaced)
        resharder.run(attention, node)
        query, key = heads.layouts["query"], heads.layouts["key"]
        if query is not None and key is not None and _is_of_streams(resharder, operands):
            attention.meta[TOKENS] = Tokens(queries=query.segments, keys=key.segments)
        resharder.env[node] = resharder.inline(heads.to_sequence, {"attended": attention}, node)["attended"]

    def _ring(
        self,
        resharder: Resharder,
        node: fx.Node,
        heads: Heads,
        operands: Mapping[str, fx.Node],
        args: Mapping[str, Any],
    ) -> None:
        """Put parts that travel, and are merged, in place of an attention."""
        layouts, mask = heads.layouts, args.get("attn_mask")
        declined = refusal(heads.shapes, args)
        if declined is None and not is_attention(node):
            declined = Declined("it is one kernel's own operator, whose parts are not known to merge")
        if declined is not None:
            raise resharder.refuse(node, declined.reason)
        assert layouts["key"] is not None
        dtype = value(node).dtype  # in an autocast region not that of its operands, and kernels' own operators want it
        env, parts = {name: resharder.env[item] for name, item in operands.items()}, None
        for name, item in operands.items():
            if value(item).dtype != dtype:
                env[name] = resharder.make("to", (env[name], dtype), node)
        if isinstance(mask, fx.Node):
            shape = [fakes.size_hint(size) for size in value(mask).shape]
            env["attn_mask"] = resharder.env[mask]
            parts = Mask(self.split, layouts["query"], layouts["key"], shape, heads.ours("query"))
        ring = Ring(heads, parts, args.get("scale"), dtype)
        resharder.env[node] = resharder.inline(ring.attend, env, node)["attended"]

    def _attend_to_whole(self, resharder: Resharder, node: fx.Node, query: fx.Node, mask: Any) -> Layout:
        """Attention to tokens that every rank has: each token's result is its own."""
        layout = resharder.layout(query)
        assert layout is not None
        if layout.dim != value(query).ndim - 2:
            raise resharder.refuse(node, "the dimension that would be split is not that of its queries")
        replaced = {}
        if isinstance(mask, fx.Node) and value(mask).ndim > 1 and fakes.size_hint(value(mask).shape[-2]) != 1:
            replaced[mask] = resharder.part_of(mask, layout.at(value(mask).ndim - 2))
        resharder.env[node] = resharder.copy(node, replaced)
        return layout


def _is_of_streams(resharder: Resharder, operands: Mapping[str, fx.Node]) -> bool:
    """Whether an attention is one of the blocks' streams: something else, as long, may have a row for each token."""
    return {operands["query"], operands["key"]} <= descendants(resharder.streams)


class BatchAttention:
    """Copies each attention of a batch that is split over ranks: samples have nothing to do with each other."""

    count = 0

    def __call__(self, resharder: Resharder, node: fx.Node) -> Layout | None:
        """Copy an attention, and say how its result is split."""
        args = arguments(node)
        names = ("query", "key", "value", "attn_mask")
        tensors = [item for name in names if isinstance(item := args.get(name), fx.Node)]
        layouts = {layout for item in tensors if (layout := resharder.layout(item)) is not None}
        if len(layouts) > 1 or {layout.dim for layout in layouts} != {0}:
            raise resharder.refuse(node, "its operands are split in different ways")
        (layout,) = layouts
        wholes = [item for item in tensors if resharder.layout(item) is None]
        batched = [item for item in wholes if value(item).ndim == value(node).ndim and value(item).shape[0] != 1]
        resharder.env[node] = resharder.copy(node, {item: resharder.part_of(item, layout) for item in batched})
        return layout


def legal_degrees(ranks: int, heads: Iterable[int]) -> list[int]:
    """Over how many ranks so many heads can be shared out, where that must divide the ranks as well."""
    return [degree for degree in range(1, ranks + 1) if not any(count % degree for count in (ranks, *heads))]
