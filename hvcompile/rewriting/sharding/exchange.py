"""Around one attention of a sequence that is split over ranks: what they exchange, as graph code.

``Heads`` gives each rank the sequence, or its stretch of it, for a share of the heads (Ulysses). ``Ring`` lets the keys
and values of each stretch travel to the others, and merges what a rank's queries get from each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hvcompile.graph.attention_kernels import merge, scaled_dot_product_attention_with_lse
from hvcompile.journal import Declined
from hvcompile.ranks import collectives
from hvcompile.ranks.split import Layout, Split, localise


@dataclasses.dataclass(frozen=True)
class Heads:
    """Graph code around one attention: from a part of the sequence to a share of the heads, and back.

    Args:
        split: how the sequence lies on the ranks.
        layouts: of query, key and value (each ``[B, H, S, D]``), what lies along S.
        shapes: of each, how many heads it has, and their size.

    """

    split: Split
    layouts: Mapping[str, Layout | None]
    shapes: Mapping[str, tuple[int, int]]

    def ours(self, name: str) -> slice:
        """The heads of this rank."""
        share, place = self.shapes[name][0] // self.split.ulysses, self.split.rank % self.split.ulysses
        return slice(place * share, (place + 1) * share)

    def whole(self, name: str, held: Any, place: int, size: int) -> Any:
        """Take this rank's heads of tokens that every rank has."""
        return held[:, self.ours(name), place : place + size]

    def stretches(self, **held: Any) -> dict[str, Any]:
        """Of what is split, this stretch's tokens and this rank's heads, padding included: ``[B, H / U, stretch, D]``.

        One all-to-all for what is of one shape: as a rule query, key and value.
        """
        split, found = self.split, dict[str, Any]()
        places = {
            name: next(place for place, _, item in layout.offsets(split) if item.is_split)
            for name, layout in self.layouts.items()
            if layout is not None
        }
        for shape in dict.fromkeys(self.shapes[name] for name in places):
            alike = [name for name in places if self.shapes[name] == shape]
            ours = [held[name][:, :, places[name] : places[name] + split.local] for name in alike]
            if split.ulysses > 1:
                ours = self._reshard(torch.stack(ours), 3, 2)
            found |= {name: ours[number] for number, name in enumerate(alike)}
        return found

    def to_heads(self, **held: Any) -> dict[str, Any]:
        """Query, key and value over the whole sequence, where that is one stretch: ``[B, H / N, S, D]``."""
        parts = {name: part[:, :, : self.split.length] for name, part in self.stretches(**held).items()}
        return {name: self.joined(name, tokens, parts.get(name)) for name, tokens in held.items()}

    def joined(self, name: str, held: Any, part: Any) -> Any:
        """The tokens in order, with ``part`` where what is split stands; that is none where nothing is."""
        layout = self.layouts[name]
        if layout is None:
            return held[:, self.ours(name)]
        pieces = [
            part if item.is_split else self.whole(name, held, place, item.stop)
            for place, _, item in layout.offsets(self.split)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)

    def to_sequence(self, attended: Any) -> dict[str, Any]:
        """The result, laid out as the queries were, from ``[B, H / U, S, D]``."""
        split, layout, pieces = self.split, self.layouts["query"], []
        if split.ulysses == 1:
            return {"attended": attended}
        if layout is None and split.ring == 1:
            return {"attended": collectives.gather(attended, split.group, 1)}
        at = 0
        for item in layout.segments if layout is not None else (None,):
            size = None if item is None else item.stop - item.start
            if item is not None and item.is_split:
                size = split.length if split.ring == 1 else split.stretch
            piece = attended if size is None else attended[:, :, at : at + size]
            if item is not None and item.is_split:
                padding = split.stretch - split.length if split.ring == 1 else 0
                piece = torch.nn.functional.pad(piece, (0, 0, 0, padding)) if padding else piece
                piece = piece.unflatten(2, (split.ulysses, split.local))
            else:  # every rank needs these tokens of each: they travel in the same all-to-all
                piece = piece.unsqueeze(2).expand(-1, -1, split.ulysses, -1, -1)
            pieces.append(piece)
            at += size or 0
        packed = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=3)
        return {"attended": self._reshard(packed.flatten(2, 3), 1, 2)}

    def _reshard(self, local: Any, source: int, target: int) -> Any:
        rows = () if self.split.ring == 1 else (self.split.ring,)
        return collectives.reshard(local, self.split.group, source, target, *rows)


@dataclasses.dataclass(frozen=True)
class Mask:
    """A mask of the whole sequence, in its parts for one stretch's queries and another's keys; graph code.

    Args:
        split: how the sequence lies on the ranks.
        query: what lies along the queries; None where every rank has all.
        key: what lies along the keys.
        shape: of the mask; 1 where it broadcasts.
        heads: this rank's heads of it.

    """

    split: Split
    query: Layout | None
    key: Layout
    shape: Sequence[int]
    heads: slice

    def of_this_rank(self, mask: Any) -> Any:
        """The mask for this rank's queries and heads."""
        split, ndim = self.split, len(self.shape)
        if ndim > 2 and self.shape[-3] != 1:
            mask = mask.narrow(ndim - 3, self.heads.start, self.heads.stop - self.heads.start)
        if self.query is not None and ndim > 1 and self.shape[-2] != 1:
            rows = dataclasses.replace(
                split, rank=split.place, ranks=split.ring, ring=1, length=split.ring * split.stretch
            )
            mask = localise(mask, split=rows, layout=self.query.at(ndim - 2), ndim=ndim)
        return mask

    def of_stretch(self, mask: Any, stretch: int) -> Any:
        """The mask of ``of_this_rank`` for the valid keys of a stretch, and with the first one's for all whole keys."""
        if self.shape[-1] == 1:
            return mask
        pieces = []
        for _, place, item in self.key.offsets(self.split):
            if item.is_split:
                pieces.append(mask.narrow(-1, place + stretch * self.split.stretch, self.split.valid(stretch)))
            elif stretch == 0:
                pieces.append(mask.narrow(-1, place, item.stop - item.start))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Attention of one stretch's queries to the keys of all: these travel from stretch to stretch.

    Keys that every rank has are taken with those of the first stretch, once. Parts are merged in the order of the
    stretches, whatever the order in which they came, so that all ranks get the same bits for tokens that all have.
    Padding is cut off. A stretch that is nothing but padding is passed on and not attended to.

    Args:
        heads: what ranks of one stretch exchange.
        mask: of the attention, or None.
        scale: of the scores, or None.
        dtype: that the attention is computed in.

    """

    heads: Heads
    mask: Mask | None
    scale: float | None
    dtype: torch.dtype

    def attend(self, **held: Any) -> dict[str, Any]:
        """The result, laid out as the queries are.

        Args:
            held: this rank's ``query``, ``key`` and ``value``, and the whole ``attn_mask`` where there is a mask.

        """
        split, mask = self.heads.split, held.pop("attn_mask", None)
        ours = self.heads.stretches(**held)
        query = self.heads.joined("query", held["query"], ours.get("query"))
        mask = self.mask.of_this_rank(mask) if self.mask is not None else None
        is_one_message = self.heads.shapes["key"] == self.heads.shapes["value"]
        here = [torch.stack([ours["key"], ours["value"]])] if is_one_message else [ours["key"], ours["value"]]
        parts: dict[int, Any] = {}
        for step in range(split.ring):
            stretch = (split.place - step) % split.ring
            coming = [collectives.pass_on(item, split.group, split.ring) for item in here if step < split.ring - 1]
            if split.valid(stretch):
                key, value = (here[0][0], here[0][1]) if is_one_message else here
                parts[stretch] = self._attend(stretch, query, key, value, held, mask)
            here = [collectives.arrived(item) for item in coming]
        merged = merge([parts[stretch] for stretch in sorted(parts)], self.dtype)
        return self.heads.to_sequence(merged)

    def _attend(self, stretch: int, query: Any, key: Any, value: Any, held: Mapping[str, Any], mask: Any) -> Any:
        valid = self.heads.split.valid(stretch)
        tokens = {"key": key[:, :, :valid], "value": value[:, :, :valid]}
        if stretch == 0:
            tokens = {name: self.heads.joined(name, held[name], part) for name, part in tokens.items()}
        mask = self.mask.of_stretch(mask, stretch) if self.mask is not None else None
        # Named by the stretch: on each rank they come in another order, and what is said of them must be the same.
        out = scaled_dot_product_attention_with_lse(
            query, tokens["key"], tokens["value"], mask, scale=self.scale, name=f"attended_{stretch}"
        )
        return out[0], out[1]


def refusal(shapes: Mapping[str, tuple[int, int]], given: Mapping[str, Any]) -> Declined | None:
    """Why keys can't travel for an attention."""
    if given.get("is_causal"):
        return Declined("it is causal, which a ring of parts does not keep: share out its heads alone (ulysses)")
    if shapes["query"][0] != shapes["key"][0] or shapes["key"][0] != shapes["value"][0]:
        return Declined("query and key differ in their number of heads, which a ring does not take: use ulysses alone")
    if given.get("dropout_p"):
        return Declined("it drops out weights, which no two parts of it would alike")
    if any(isinstance(given.get(name), torch.fx.Node) for name in ("scale", "dropout_p", "is_causal")):
        return Declined("its scale depends on data")
    return None
