"""Float8 attention: the blocks' attention on quantised queries, keys, values and weights."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from hvcompile.errors import OptionError
from hvcompile.float8 import attention as float8_attention
from hvcompile.float8.attention import MOST_HEAD_SIZE
from hvcompile.graph.attention import arguments, attentions, is_part
from hvcompile.graph.attention_kernels import describe
from hvcompile.graph.block_sparse import block_sparse_attention
from hvcompile.graph.inline import run_on_fakes
from hvcompile.journal import Declined, PassReport
from hvcompile.pipeline import Context, Pass
from hvcompile.rewriting.float8_device import check_device, device_of, runs_elsewhere
from hvcompile.torch_private.fakes import provenance, shape_key, value
from hvcompile.trunk.trunk import BlockCall, Body, Trunk

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Float8Attention(Pass):
    """Compute the blocks' attention in float8: both products on quantised operands, softmax and sums in float32.

    Queries have one scale a token. Keys, less their mean over tokens, have one a block of 128 tokens. Values, less
    their mean, have one a channel. See ``hvcompile.float8.attention``. The kernel takes no mask, so this pass follows
    the one that removes masks.

    It is off by default. ``options={"attention": {"fp8": True}}`` asks for it, and raises where it can't run.
    ``mode="max"`` turns it on where it can run, and the journal says why not elsewhere. It runs on NVIDIA GPUs of
    compute capability 8.9 or newer that have Triton. Asked for by name, it also runs on CPUs, emulated. The first block
    is left alone if the cache decides by it.

    Args:
        fp8: whether attention is computed in float8.
        fp8_keep_blocks: how many blocks at either end keep their own attention, 0 or more.

    Source: Zhang et al., SageAttention2 (arXiv:2411.10958).

    Given::

        block_0:
            ...
            scaled_dot_product_attention: f32[1, 2, 41, 32] = scaled_dot_product_attention(query, key, value)
            transpose: f32[1, 41, 2, 32] = scaled_dot_product_attention.transpose(1, 2)

    Result::

        block_0:
            ...
            scaled_dot_product_float8_attention: f32[1, 2, 41, 32] = scaled_dot_product_float8_attention(query, ...)
            transpose: f32[1, 41, 2, 32] = scaled_dot_product_float8_attention.transpose(1, 2)

    """

    section: ClassVar[str] = "attention"
    is_exact: ClassVar[bool] = False
    tolerance: ClassVar[float] = 0.1
    switch: ClassVar[str] = "fp8"
    needs: ClassVar[tuple[str, ...]] = ("UnmaskedAttention",)

    fp8: bool = False
    fp8_keep_blocks: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fp8_keep_blocks < 0:
            raise OptionError(
                f"attention.fp8_keep_blocks is {self.fp8_keep_blocks}; allowed is a whole number, 0 or more"
            )

    def apply(self, trunk: Trunk, context: Context) -> PassReport:
        """Rewrite the attention of every body; see the class."""
        declined = self._check(trunk)
        if declined is not None:
            return declined.report(trunk.lists)
        plan = self._match(trunk, context)
        if not plan.fit:
            why = "the blocks hold no attention, or options['attention']['kernel'] names another kernel for it"
            return PassReport(declined=plan.refused or ((trunk.lists, why),))
        declined = _check_device(trunk, context)
        if declined is not None:
            return PassReport(declined=(*plan.refused, ("graph", declined.reason)))
        return _rewrite(trunk, plan)

    def _check(self, trunk: Trunk) -> Declined | None:
        if not self.fp8:
            return Declined("attention.fp8 is False, or it is not set and mode is not 'max'", "switched off")
        if trunk.is_branched:
            return Declined("the blocks already stand in a branch")
        return None

    def _match(self, trunk: Trunk, context: Context) -> _Plan:
        """Find the attentions that can be computed in float8, and the blocks in which they are to be."""
        refused: list[tuple[str, str]] = []
        fit: dict[Body, list[fx.Node]] = {}
        for body in trunk.bodies:
            for node in attentions(body.module.graph):
                declined = check_attention(node)
                if declined is not None:
                    refused.append((f"{node.name} of {body.name}", declined.reason))
                else:
                    fit.setdefault(body, []).append(node)
            refused += [
                (f"{node.name} of {body.name}", "it reads listed blocks of keys, and the float8 kernel takes no lists")
                for node in body.module.graph.find_nodes(op="call_function", target=block_sparse_attention)
            ]
        reasons = {block: self._why_kept(trunk, place, context) for place, block in enumerate(trunk.blocks)}
        return _Plan(
            fit=fit,
            blocks=[block for block in trunk.blocks if not reasons[block] and block.body in fit],
            refused=tuple(refused),
            kept=tuple((block.path, reason) for block, reason in reasons.items() if reason),
        )

    def _why_kept(self, trunk: Trunk, place: int, context: Context) -> str:
        """Why a block's attention is left alone whatever it is; empty if it is not."""
        if min(place, len(trunk.blocks) - 1 - place) < self.fp8_keep_blocks:
            return f"attention.fp8_keep_blocks is {self.fp8_keep_blocks}"
        if place == 0 and context.is_first_block_compared:
            return "the first block is compared from step to step, and float8's noise would count as change"
        return ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
    """Which attentions of which bodies become float8 in which blocks; what is left alone, and why."""

    fit: dict[Body, list[fx.Node]]
    blocks: list[BlockCall]
    refused: tuple[tuple[str, str], ...]
    kept: tuple[tuple[str, str], ...]


def check_attention(node: fx.Node) -> Declined | None:
    """Why an attention can't be computed in float8."""
    if is_part(node):
        return Declined(
            "it attends to a part of the keys, as ring attention does, and the float8 kernel gives no log-sum-exp"
        )
    given = arguments(node)
    query, key, held = (value(given[name]) for name in ("query", "key", "value"))
    if given.get("attn_mask") is not None:
        return Declined(
            "it has a mask, and the float8 kernel takes none; masks of padding go with options['attention']['unmask']"
        )
    if given.get("is_causal"):
        return Declined("it is causal, and the float8 kernel attends to all keys")
    if given.get("dropout_p", 0.0):
        return Declined("it drops out weights")
    if query.ndim != 4 or key.ndim != 4 or held.ndim != 4:
        return Declined(f"its query has {query.ndim} dimensions; looked for are [batch, heads, tokens, head size]")
    if isinstance(given.get("scale"), fx.Node):
        return Declined("its scale is computed")
    kind = describe(query, key, held, has_mask=False)
    if kind.is_grouped:
        return Declined("query and key differ in their number of heads")
    if kind.dtype not in DTYPES:
        return Declined(f"it computes in {kind.dtype}; float8 stands in for {', '.join(map(str, DTYPES))}")
    size, value_size = kind.head_sizes
    if size != value_size:
        return Declined(f"query and value differ in head size ({size} and {value_size})")
    if size > MOST_HEAD_SIZE:
        return Declined(f"its head size is {size}; the kernel's registers hold {MOST_HEAD_SIZE}")
    if shape_key(query)[0] != shape_key(key)[0]:
        return Declined("query and key differ in batch size")
    return None


def _check_device(trunk: Trunk, context: Context) -> Declined | None:
    """Why this device or installation can't."""
    device = device_of(trunk)
    if isinstance(device, Declined):
        return device
    declined = check_device(device, context)
    if declined is not None or runs_elsewhere(device, context) or float8_attention.has_triton():
        return declined
    return Declined("triton, of which the float8 kernel is made, can't be imported: pip install triton")


def _rewrite(trunk: Trunk, plan: _Plan) -> PassReport:
    declined = (*plan.refused, *plan.kept)
    matched = []
    for body, nodes in plan.fit.items():
        blocks = [block for block in plan.blocks if block.body is body]
        if blocks:
            matched.append(f"{', '.join(node.name for node in nodes)} of {body.name} in {len(blocks)} blocks")
            _rewrite_body(trunk, body, nodes, blocks)
    if not matched:
        return PassReport(declined=declined)
    return PassReport(matched=(f"attention in float8: {'; '.join(matched)}",), declined=declined)


def _rewrite_body(trunk: Trunk, body: Body, nodes: list[fx.Node], blocks: list[BlockCall]) -> None:
    """Give these blocks of a body one in which these attentions are in float8."""
    tag = Float8Attention.__name__
    names = {node.name for node in nodes}
    made = trunk.split_body(body, blocks, "float8_attention", tag)
    for node in [node for node in made.module.graph.nodes if node.name in names]:
        given = arguments(node)
        scale = given.get("scale")
        scale = float(int(value(given["query"]).shape[-1]) ** -0.5 if scale is None else scale)
        operands = (given["query"], given["key"], given["value"], scale)
        with node.graph.inserting_before(node):
            other = node.graph.call_function(float8_attention.scaled_dot_product_float8_attention, operands)
        other.meta = provenance(node, tag, run_on_fakes(other))
        node.replace_all_uses_with(other)
        node.graph.erase_node(node)
