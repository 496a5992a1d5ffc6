"""Attention in which a block of queries reads listed blocks of keys alone, and an operator that computes it.

The lists are tensors, so they may depend on data. FlexAttention takes such lists too, and is not what runs here: its
eager implementation ignores lists that come without a ``mask_mod`` and attends to all keys, so two lowerings of one
graph would differ; and on CPUs it gives no log-sum-exp, by which text is added (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from hvcompile.graph.attention_kernels import scaled_dot_product_attention_with_lse

GATHERED = 2**19
"""Elements of keys that are gathered at a time for each thread of a CPU, whose caches hold them."""
GATHERED_ELSEWHERE = 2**27
"""... and on another device, where that bounds the memory; no pass puts it there so far."""


def _rows(indices: torch.Tensor, counts: torch.Tensor, last: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The rows that read equally many tokens, and the blocks that each reads; one that is not full stands at its end.

    Args:
        indices: ``[rows, key blocks]``.
        counts: ``[rows]``.
        last: the block that is not full; -1 where all are.

    """
    is_listed = torch.arange(indices.shape[1], device=indices.device) < counts[:, None]
    has_last = ((indices == last) & is_listed).any(1)
    kinds = counts * 2 + has_last
    for kind in torch.unique(kinds[counts > 0]).tolist():
        rows = (kinds == kind).nonzero()[:, 0]
        blocks = indices[rows, : kind // 2]
        yield rows, blocks.sort(1).values if kind % 2 else blocks


def _most_gathered(device: torch.device) -> int:
    return GATHERED * torch.get_num_threads() if device.type == "cpu" else GATHERED_ELSEWHERE


def _blocks(tensor: torch.Tensor, block: int) -> torch.Tensor:
    """``[B, H, N, E]`` as ``[B * H, blocks, block, E]``, with zeros after the last token."""
    padded = torch.nn.functional.pad(tensor, (0, 0, 0, -tensor.shape[2] % block))
    return padded.reshape(-1, padded.shape[2] // block, block, padded.shape[3])


def _flat(lists: torch.Tensor, batch: int, heads: int) -> torch.Tensor:
    return lists.expand(batch, heads, *lists.shape[2:]).flatten(0, 2).long()


@torch.library.custom_op("hvcompile::block_sparse_attention", mutates_args=())
def attend_in_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    block: int,
    scale: float,
    reads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``softmax(query @ key.T * scale) @ value`` over the listed blocks of keys.

    Args:
        query: ``[B, H, N, E]``, any floating dtype.
        key: ``[B, H, K, E]``.
        value: ``[B, H, K, F]``.
        indices: for each block of queries the blocks of keys, those that it reads first and none of them twice:
            ``[1 or B, 1 or H, query blocks, key blocks]``, whole numbers.
        counts: how many it reads, ``[1 or B, 1 or H, query blocks]``.
        block: tokens a block; the last one may have fewer.
        scale: of the products.
        reads: pairs of a query and a key that a head of a sample computes at most; what operations are counted by.

    Returns:
        ``[B, H, N, F]`` in the query's dtype, and the log-sum-exp of the scores, ``[B, H, N]`` in fp32 (fp64 for fp64).
        For a block of queries that reads nothing they are 0 and minus infinity.

    """
    del reads
    (batch, heads, num_queries, _), num_keys = query.shape, key.shape[2]
    if bool((counts == indices.shape[-1]).all()):  # nothing is skipped, so nothing need be gathered
        whole = scaled_dot_product_attention_with_lse(query, key, value, scale=scale)
        return whole[0].contiguous(), whole[1].contiguous()
    queries, keys, values = (_blocks(item, block) for item in (query, key, value))
    num_blocks, short = queries.shape[1], num_keys % block
    out = query.new_zeros(batch * heads * num_blocks, block, value.shape[3])
    wide = torch.promote_types(query.dtype, torch.float32)
    lse = query.new_full((batch * heads * num_blocks, block), -torch.inf, dtype=wide)
    last = keys.shape[1] - 1 if short else -1
    for all_rows, all_blocks in _rows(_flat(indices, batch, heads), _flat(counts[..., None], batch, heads)[:, 0], last):
        length = all_blocks.shape[1] * block
        if short and bool(all_blocks[0, -1] == last):
            length += short - block
        size = max(1, _most_gathered(query.device) // (length * key.shape[3]))
        for rows, blocks in zip(torch.split(all_rows, size), torch.split(all_blocks, size), strict=True):
            head = rows // num_blocks
            places = (head[:, None] * keys.shape[1] + blocks).flatten()
            near = [
                item.flatten(0, 1).index_select(0, places).view(len(rows), 1, -1, item.shape[3])[:, :, :length]
                for item in (keys, values)
            ]
            part = queries[head, rows % num_blocks][:, None]
            attended, sums = scaled_dot_product_attention_with_lse(part, *near, scale=scale)
            out[rows], lse[rows] = attended[:, 0], sums[:, 0]
    out = out.view(batch, heads, -1, value.shape[3])[:, :, :num_queries].contiguous()
    return out, lse.view(batch, heads, -1)[:, :, :num_queries].contiguous()


@attend_in_blocks.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    block: int,
    scale: float,
    reads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    del key, indices, counts, block, scale, reads
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((*query.shape[:3], value.shape[3])), query.new_empty(query.shape[:3], dtype=wide)


def block_sparse_attention(query: Any, *others: Any, **options: Any) -> Any:
    """``attend_in_blocks`` as graphs call it: under a name that marks it as attention; graph code."""
    if isinstance(query, fx.Proxy):
        return query.tracer.create_proxy("call_function", block_sparse_attention, (query, *others), options)
    return attend_in_blocks(query, *others, **options)
