"""Sparse attention: the sample's tokens in tiles, and each tile reads some of the others."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch

from hvcompile.errors import OptionError
from hvcompile.graph import tiles
from hvcompile.graph.tiles import Sizes
from hvcompile.journal import Declined, PassReport
from hvcompile.pipeline import Context, Pass
from hvcompile.rewriting import regrouping, sparse
from hvcompile.rewriting.regrouping import Regrouped, add_of_numbers
from hvcompile.trunk.trunk import Derived, Trunk

RULES = ("window", "radial")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseAttention(Pass):
    """Let each tile of the sample's tokens read some tiles of keys, and all other tokens (text).

    The tokens are regrouped into tiles (frames x height x width) where they enter the blocks, and put back where they
    leave them. Rotary tables and all else that is a row a token follow. The grid is found from how the graph made the
    tokens. Where it can't be, or where something depends on the tokens' order, the pass declines.

    It is off by default, also with ``mode="max"``: what it leaves out is lost, and how much that matters differs from
    model to model. Text reads and is read by all. Attention between the sample and text alone is left as it is.

    Args:
        rule: which tiles a tile reads. "window" takes those in a window around it. "radial" takes bands that thin out
            with distance in time. None switches the pass off.
        tile: frames, height and width of a tile, in tokens, each 1 or more. Together they are a block of keys.
        window: frames, height and width of the window, in tiles, each odd.
        width: how much of a frame a tile reads of its own and the next frames with "radial"; above 0.
        keep_blocks: how many blocks at either end keep reading everything, 0 or more.

    Source: sliding tile attention (arXiv:2502.04507) and radial attention (arXiv:2506.19852).

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
    keep_blocks: int = 0

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
        if not self.width > 0:
            raise OptionError(f"sparse_attention.width is {self.width}; allowed is a number above 0")
        if self.keep_blocks < 0:
            raise OptionError(f"sparse_attention.keep_blocks is {self.keep_blocks}; allowed is 0 or more")

    def apply(self, trunk: Trunk, context: Context) -> PassReport:
        """Regroup the tokens and rewrite the attention of every body; see the class."""
        del context
        declined = self._check(trunk)
        if declined is not None:
            return declined.report(declined.what or trunk.lists)
        done = regrouping.regroup(trunk, self._sizes(self.tile), type(self).__name__)
        if isinstance(done, Declined):
            return done.report(trunk.lists)
        return self._rewrite(trunk, done)

    def _check(self, trunk: Trunk) -> Declined | None:
        if self.rule is None:
            return Declined("sparse_attention.rule is None: name a rule to switch it on", "switched off")
        if trunk.is_branched:
            return Declined("the blocks already stand in a branch")
        if trunk.sharding is not None:
            return Declined(
                "the blocks are split over ranks, whose parts can't be regrouped yet; drop sparse_attention, or "
                "context_parallel by options={'context_parallel': False}"
            )
        if 2 * self.keep_blocks >= len(trunk.blocks):
            return Declined(f"sparse_attention.keep_blocks is {self.keep_blocks}, which keeps all blocks")
        return None

    @staticmethod
    def _sizes(held: tuple[int, ...]) -> Sizes:
        frames, height, width = held
        return frames, height, width

    def _rewrite(self, trunk: Trunk, done: Regrouped) -> PassReport:
        tag, tile = type(self).__name__, self._sizes(self.tile)
        block, tokens = math.prod(tile), math.prod(done.grid)
        assert self.rule is not None
        numbers = (self.rule, done.grid, tile, self._sizes(self.window), self.width)
        mask = tiles.static_mask(*numbers)
        count = len(mask)
        derived = add_of_numbers(
            trunk,
            ["block_lists", "block_counts"],
            tiles.static_lists,
            numbers,
            [(1, 1, count, count), (1, 1, count)],
            torch.int32,
            tag,
        )
        sparse.require_tokens(trunk)
        matched = [regrouping.describe(done.grid, tile)]
        reads = tiles.num_reads(mask, block, tokens)
        matched += self._rewrite_bodies(trunk, derived, block, reads)
        matched.append(f"rule {self.rule!r}: {reads / tokens**2:.1%} of the sample's pairs are computed")
        return PassReport(matched=tuple(matched), declined=(*done.declined, *self._kept(trunk)))

    def _is_kept(self, trunk: Trunk, place: int) -> bool:
        return min(place, len(trunk.blocks) - 1 - place) < self.keep_blocks

    def _kept(self, trunk: Trunk) -> tuple[tuple[str, str], ...]:
        reason = f"sparse_attention.keep_blocks is {self.keep_blocks}"
        return tuple((block.path, reason) for place, block in enumerate(trunk.blocks) if self._is_kept(trunk, place))

    def _rewrite_bodies(self, trunk: Trunk, derived: Derived, block: int, reads: int) -> list[str]:
        tag, said = type(self).__name__, []
        chosen = [item for place, item in enumerate(trunk.blocks) if not self._is_kept(trunk, place)]
        for body in trunk.bodies:
            blocks = [item for item in chosen if item.body is body]
            tokens = sparse.marked(body)
            if not blocks or not tokens:
                continue
            own = trunk.split_body(body, blocks, "sparse_attention", tag)
            operands = sparse.derived_operands(trunk, own, derived, ["indices", "counts"])
            said.append(f"{', '.join(tokens)} of {own.name} in {len(blocks)} blocks")
            for node in sparse.named(own, tokens):
                sparse.skip_blocks(node, tokens[node.name], operands, _given_lists, block=block, reads=reads, tag=tag)
        sparse.unmark(trunk)
        return said


def _given_lists(query: Any, key: Any, scale: float, *, indices: Any, counts: Any) -> tuple[Any, Any]:
    del query, key, scale
    return indices, counts
