"""Sparse attention: the sample's tokens in tiles, and each tile reads some of the others."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import torch
from torch import fx

from hvcompile.errors import OptionError
from hvcompile.graph import block_lists, tiles
from hvcompile.graph.attention import marked, unmark
from hvcompile.graph.inline import inline
from hvcompile.graph.tiles import Sizes
from hvcompile.journal import Declined, PassReport
from hvcompile.pipeline import Context, Pass
from hvcompile.rewriting import regrouping, sparse, sparse_audit
from hvcompile.rewriting.float8_device import device_of
from hvcompile.rewriting.regrouping import Regrouped, add_of_numbers
from hvcompile.rewriting.step_number import add_step_number, why_not_counted
from hvcompile.rewriting.tiles_on_ranks import order_on_ranks
from hvcompile.trunk.trunk import Derived, Trunk

DEVICE_TYPES = ("cpu", "meta")
"""On meta nothing runs, and operations are counted."""
MOST_TOKENS = 2**14
"""Of a tile; no sample that fits in memory needs larger ones."""
RULES = ("window", "radial", "mass", "profile")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseAttention(Pass):
    """Let each tile of the sample's tokens read some tiles of keys, and all other tokens (text).

    The tokens are regrouped into tiles (frames x height x width) where they enter the blocks, and put back where they
    leave them. Rotary tables and all else that is a row a token follow. On ranks that share out the heads (Ulysses), a
    rank has a part of the tokens between the attentions, in the model's order. There, each attention regroups them for
    itself. The grid is found from how the graph made the tokens. Where it can't be, or where something depends on the
    tokens' order, the pass declines.

    It runs on CPUs alone so far. It is off by default, also with ``mode="max"``: what it leaves out is lost, and how
    much that matters differs from model to model. Text reads and is read by all. Attention between the sample and text
    alone is left as it is.

    Args:
        rule: which tiles a tile reads. "window" takes those in a window around it. "radial" takes bands that thin out
            with distance in time. "mass" takes the heaviest by the mean query and key of each, in every step. "profile"
            takes for each head, in every step, frames near in time or places near in space, by sampled queries. None
            switches the pass off.
        tile: frames, height and width of a tile, in tokens, each 1 or more. Together they are a block of keys.
        window: frames, height and width of the window, in tiles, each odd. "mass" reads it in any case; "profile" takes
            its frames, or its height and width.
        width: how much of a frame a tile reads of its own and the next frames with "radial"; above 0.
        share: of the weight that "mass" takes tiles up to, above 0; 1 reads everything.
        floor: of the tiles that "mass" takes at least, from 0 to 1.
        rows: how many queries "profile" samples, 1 or more.
        audit: whether what each layer and head leaves out, on the inputs of the call that is compiled, is put into the
            journal. This runs one step uncompiled, with dense attention beside the sparse.
        keep_blocks: how many blocks at either end keep reading everything, 0 or more.
        dense_steps: how many steps at the start of a generation read everything, 0 or more.

    Source: sliding tile attention (arXiv:2502.04507), radial attention (arXiv:2506.19852), Sparse VideoGen
    (arXiv:2502.01776); the mean of a block for its tokens as in MInference (arXiv:2407.02490).

    Given::

        root:
            ...
            contiguous: f32[1, 16, 32] = hidden_1.contiguous()
            ...
            invoke_subgraph = block_0(contiguous, contiguous_1, contiguous_2, contiguous_3, 8 weights of blocks.0)
            ...
        block_0:
            ...
            mixed: f32[1, 2, 21, 16] = scaled_dot_product_attention(cat_1, cat_2, value, attn_mask=None)
            ...

    Result::

        root:
            ...
            contiguous: f32[1, 16, 32] = hidden_1.contiguous()
            ...
            index_select: f32[1, 16, 32] = contiguous.index_select(1, order)
            ...
            invoke_subgraph = block_0(clone, ..., block_lists, block_counts, 8 weights of blocks.0)
            ...
            getitem_6: f32[1, 16, 32] = invoke_subgraph_1[0]
            index_select_3: f32[1, 16, 32] = getitem_6.index_select(1, back)
            ...
        block_0:
            ...
            block_sparse_attention = block_sparse_attention(narrow, narrow_2, narrow_4, block_lists, block_counts, ...)
            ...
            scaled_dot_product_attention_with_lse = scaled_dot_product_attention_with_lse(narrow, narrow_3, ...)
            ...
            scaled_dot_product_attention: f32[1, 2, 5, 16] = scaled_dot_product_attention(narrow_1, cat_2, value, ...)
            cat_3: f32[1, 2, 21, 16] = cat([to, scaled_dot_product_attention], 2)
            ...

    """

    section: ClassVar[str] = "sparse_attention"
    is_exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1.0
    needs: ClassVar[tuple[str, ...]] = ("UnmaskedAttention",)

    rule: str | None = None
    tile: tuple[int, ...] = (4, 4, 8)
    window: tuple[int, ...] = (3, 3, 3)
    width: float = 1.0
    share: float = 0.9
    floor: float = 0.05
    rows: int = 64
    audit: bool = False
    keep_blocks: int = 0
    dense_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule is not None and self.rule not in RULES:
            allowed = ", ".join(map(repr, RULES))
            raise OptionError(f"sparse_attention.rule is {self.rule!r}; allowed is None or one of {allowed}")
        for name in ("tile", "window"):
            held = getattr(self, name)
            is_odd = name == "tile" or all(size % 2 for size in held)
            if len(held) != 3 or min(held) < 1 or not is_odd or any(isinstance(size, bool) for size in held):
                kind = "" if name == "tile" else "odd "
                raise OptionError(
                    f"sparse_attention.{name} is {held!r}; allowed are three {kind}whole numbers, 1 or more: frames, "
                    "height and width"
                )
        if math.prod(self.tile) > MOST_TOKENS:
            raise OptionError(
                f"sparse_attention.tile is {self.tile!r}, of {math.prod(self.tile)} tokens; allowed are {MOST_TOKENS}"
            )
        if not self.width > 0:
            raise OptionError(f"sparse_attention.width is {self.width}; allowed is a number above 0")
        if not 0 < self.share <= 1:
            raise OptionError(f"sparse_attention.share is {self.share}; allowed is a number above 0, up to 1")
        if not 0 <= self.floor <= 1:
            raise OptionError(f"sparse_attention.floor is {self.floor}; allowed is a number from 0 to 1")
        if self.rows < 1:
            raise OptionError(f"sparse_attention.rows is {self.rows}; allowed is a whole number, 1 or more")
        for name in ("keep_blocks", "dense_steps"):
            if getattr(self, name) < 0:
                raise OptionError(f"sparse_attention.{name} is {getattr(self, name)}; allowed is 0 or more")

    def apply(self, trunk: Trunk, context: Context) -> PassReport:
        """Regroup the tokens and rewrite the attention of every body; see the class."""
        declined = self._check(trunk)
        if declined is not None:
            return declined.report(declined.what or trunk.lists)
        declined = why_not_counted(trunk) if self.dense_steps else None
        if declined is not None:
            return Declined(f"sparse_attention.dense_steps is {self.dense_steps}: {declined.reason}").report(
                trunk.lists
            )
        inputs = trunk.inputs
        done = self._regroup(trunk)
        if isinstance(done, Declined):
            return done.report(trunk.lists)
        return self._rewrite(trunk, done, context.moved(inputs, trunk.inputs))

    def _regroup(self, trunk: Trunk) -> Regrouped | Declined:
        tile, tag = self._sizes(self.tile), type(self).__name__
        if trunk.sharding is not None:
            return order_on_ranks(trunk, trunk.sharding, tile, tag)
        return regrouping.regroup(trunk, tile, tag)

    def _check(self, trunk: Trunk) -> Declined | None:
        if self.rule is None:
            return Declined("sparse_attention.rule is None: name a rule to switch it on", "switched off")
        if trunk.is_branched:
            return Declined("the blocks already stand in a branch")
        device = device_of(trunk)
        if isinstance(device, Declined) or device.type not in DEVICE_TYPES:
            return Declined(
                f"the blocks are on {device}, and what computes listed blocks is made for CPUs: elsewhere it would "
                "wait for the device in every attention"
            )
        if 2 * self.keep_blocks >= len(trunk.blocks):
            return Declined(f"sparse_attention.keep_blocks is {self.keep_blocks}, which keeps all blocks")
        return None

    @staticmethod
    def _sizes(held: tuple[int, ...]) -> Sizes:
        frames, height, width = held
        return frames, height, width

    def _rewrite(self, trunk: Trunk, done: Regrouped, context: Context) -> PassReport:
        plan = self._plan(trunk, done.grid)
        sparse.require_tokens(trunk)
        early = self._add_early(trunk) if self.dense_steps else None
        tokens = math.prod(done.grid)
        share = f"{plan.reads / tokens**2:.1%} of the video's pairs of tokens are computed"
        matched = (
            regrouping.describe(done.grid, self._sizes(self.tile)),
            *self._rewrite_bodies(trunk, plan, done.inside, early),
            f"rule {self.rule!r}: " + (f"at most {share}; how many is known at run time" if plan.is_bound else share),
        )
        table = sparse_audit.measure(trunk, context) if self.audit else ()
        noted = (sparse_audit.summary(table),) if table else ()
        if self.dense_steps:
            noted = (f"the first {self.dense_steps} steps of a generation read everything", *noted)
        return PassReport(matched=matched, declined=(*done.declined, *self._kept(trunk)), noted=noted, table=table)

    def _plan(self, trunk: Trunk, grid: Sizes) -> _Plan:
        """Add what the lists are made of to the trunk's inputs, and say how they are made."""
        assert self.rule is not None
        tile, window, block, tokens = *map(self._sizes, (self.tile, self.window)), math.prod(self.tile), math.prod(grid)
        size, tag = -(-tokens // block), type(self).__name__
        if self.rule in {"window", "radial"}:
            numbers = (self.rule, grid, tile, window, self.width)
            mask = tiles.static_mask(*numbers)
            added = add_of_numbers(
                trunk,
                {"block_lists": (1, 1, size, size), "block_counts": (1, 1, size)},
                (tiles.static_lists, numbers),
                torch.int32,
                tag,
            )
            return _Plan(added, _given_lists, block, tiles.num_reads(mask, block, tokens))
        shape, where = (size, size), (grid, tile, window)
        if self.rule == "mass":
            added = add_of_numbers(trunk, {"neighbours": shape}, (block_lists.neighbours, where), torch.bool, tag)
            return _Plan(added, functools.partial(_mass, block, self.share, self.floor), block, tokens**2, True)
        added = add_of_numbers(
            trunk, {"spatial": shape, "temporal": shape}, (block_lists.profiles, where), torch.bool, tag
        )
        reads = max(tiles.num_reads(mask, block, tokens) for mask in tiles.profile_masks(*where))
        return _Plan(added, functools.partial(_profile, block, self.rows), block, reads, True)

    def _is_kept(self, trunk: Trunk, place: int) -> bool:
        return min(place, len(trunk.blocks) - 1 - place) < self.keep_blocks

    def _kept(self, trunk: Trunk) -> tuple[tuple[str, str], ...]:
        reason = f"sparse_attention.keep_blocks is {self.keep_blocks}"
        return tuple((block.path, reason) for place, block in enumerate(trunk.blocks) if self._is_kept(trunk, place))

    def _add_early(self, trunk: Trunk) -> fx.Node:
        """Add whether a step is one of those that read everything, a bool scalar, before the first block."""
        tag = type(self).__name__
        number = add_step_number(trunk, tag)
        made: fx.Node = inline(
            trunk.graph,
            lambda number: {"early": number < self.dense_steps},
            {"number": number},
            before=trunk.blocks[0].call,
            tag=tag,
        )["early"]
        return made

    def _rewrite_bodies(self, trunk: Trunk, plan: _Plan, inside: Derived | None, early: fx.Node | None) -> list[str]:
        tag, said = type(self).__name__, []
        chosen = [item for place, item in enumerate(trunk.blocks) if not self._is_kept(trunk, place)]
        for body in trunk.bodies:
            blocks = [item for item in chosen if item.body is body]
            tokens = marked(body.module.graph)
            if not blocks or not tokens:
                continue
            own = trunk.split_body(body, blocks, "sparse_attention", tag)
            operands = sparse.derived_operands(trunk, own, plan.derived)
            is_early = {"early": trunk.add_operand(own, early)} if early is not None else {}
            order = sparse.derived_operands(trunk, own, inside, ("order", "back")) if inside is not None else {}
            said.append(f"{', '.join(tokens)} of {own.name} in {len(blocks)} blocks")
            for node in sparse.named(own, tokens):
                sparse.skip_blocks(
                    node,
                    tokens[node.name],
                    operands,
                    plan.lists,
                    order=order,
                    early=is_early,
                    block=plan.block,
                    reads=plan.reads,
                    tag=tag,
                )
        unmark([body.module.graph for body in trunk.bodies])
        return said


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How lists are made, and of what; tokens a block; and the pairs that are computed, or a bound of them."""

    derived: Derived
    lists: sparse.Lists
    block: int
    reads: int
    is_bound: bool = False


def _given_lists(query: Any, key: Any, scale: float, indices: Any, counts: Any) -> tuple[Any, Any]:
    del query, key, scale
    return indices, counts


def _mass(block: int, share: float, floor: float, query: Any, key: Any, scale: float, always: Any) -> tuple[Any, Any]:
    lists = block_lists.mass_lists(query, key, always, block, scale, share, floor)
    return lists[0], lists[1]


def _profile(block: int, rows: int, query: Any, key: Any, scale: float, spatial: Any, temporal: Any) -> tuple[Any, Any]:
    lists = block_lists.profile_lists(query, key, spatial, temporal, block, scale, rows)
    return lists[0], lists[1]
