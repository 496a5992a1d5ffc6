"""Attention on float8 operands as Triton kernels: two that quantise, and one that attends with an online softmax.

The arithmetic is that of ``float8.attention.reference``; tests compare the two under Triton's interpreter
(``TRITON_INTERPRET=1``). Import this file where a kernel is about to run, since Triton need not be installed.

Source: Dao, FlashAttention-2 (arXiv:2307.08691), for the order of the loops; Zhang et al., SageAttention2
(arXiv:2411.10958), for scales a block and smoothed keys.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton
import triton.language as tl

from hvcompile.float8.format import DTYPE, KEY_BLOCK, LARGEST, SMALLEST_MAGNITUDE

# Triton reads a kernel's globals only if they are its own constants, and takes annotations of its arguments for code.
# Lengths are not specialised to multiples of 16, so that prompts of any length run one kernel.
_LARGEST: tl.constexpr = tl.constexpr(LARGEST)
_TINY: tl.constexpr = tl.constexpr(SMALLEST_MAGNITUDE)


@triton.jit  # type: ignore[untyped-decorator]
def _tile(  # type: ignore[no-untyped-def]
    source,
    place,
    head,
    tokens,
    heads,
    stride_batch,
    stride_head,
    stride_token,
    head_size: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """A block of a head's tokens in float32, zeros beyond them; its rows, its columns, and a mask of what is there."""
    rows, columns = place * block + tl.arange(0, block), tl.arange(0, width)
    is_there = (rows[:, None] < tokens) & (columns[None, :] < head_size)
    start = source + (head // heads) * stride_batch + (head % heads) * stride_head
    tile = tl.load(start + rows[:, None].to(tl.int64) * stride_token + columns[None, :], mask=is_there, other=0.0)
    return tile.to(tl.float32), rows, columns, is_there


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _quantize_rows(  # type: ignore[no-untyped-def]
    source,
    mean,
    data,
    scale,
    factor,
    tokens,
    heads,
    stride_batch,
    stride_head,
    stride_token,
    head_size: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
    is_key: tl.constexpr,
):
    """Quantise queries with a scale for each token, or keys less their mean with one for each block; pad with zeros."""
    place, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile, rows, columns, is_there = _tile(
        source, place, head, tokens, heads, stride_batch, stride_head, stride_token, head_size, width, block
    )
    if is_key:
        mean_row = tl.load(mean + head * head_size + columns, mask=columns < head_size, other=0.0)
        tile = tl.where(is_there, tile - mean_row[None, :], 0.0)
    blocks = tl.num_programs(0)
    row_peak = tl.max(tl.abs(tile), 1)
    if is_key:
        step = tl.maximum(tl.max(row_peak, 0), _TINY) / _LARGEST
        tl.store(scale + head * blocks + place, step)
        tile = tile / step
    else:
        step = tl.maximum(row_peak, _TINY) / _LARGEST
        tl.store(scale + head * blocks * block + rows, step * factor)
        tile = tile / step[:, None]
    end = data + (head * blocks * block + rows[:, None]) * width + columns[None, :]
    tl.store(end, tile.to(data.dtype.element_ty))


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _quantize_channels(  # type: ignore[no-untyped-def]
    source,
    mean,
    scale,
    data,
    tokens,
    heads,
    stride_batch,
    stride_head,
    stride_token,
    head_size: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """Quantise values less their mean with a scale for each channel, transposed, as the second product reads them."""
    place, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile, rows, columns, is_there = _tile(
        source, place, head, tokens, heads, stride_batch, stride_head, stride_token, head_size, width, block
    )
    step = tl.load(scale + head * head_size + columns, mask=columns < head_size, other=1.0)
    mean_row = tl.load(mean + head * head_size + columns, mask=columns < head_size, other=0.0)
    tile = tl.where(is_there, (tile - mean_row[None, :]) / step[None, :], 0.0)
    blocks = tl.num_programs(0)
    end = data + (head * width + columns[:, None]) * (blocks * block) + rows[None, :]
    tl.store(end, tl.trans(tile).to(data.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def _attend_block(  # type: ignore[no-untyped-def]
    query,
    query_scale,
    keys,
    key_scale,
    values,
    peak,
    total,
    summed,
    start,
    num_keys,
    padded,
    width: tl.constexpr,
    block: tl.constexpr,
    key_block: tl.constexpr,
    is_last: tl.constexpr,
):
    """Add a block of keys and values: returns the new maximum, sum of weights, and weighted sum of values."""
    columns, channels = start + tl.arange(0, block), tl.arange(0, width)
    tile = tl.load(keys + columns[None, :] * width + channels[:, None])
    scores = tl.dot(query, tile) * (query_scale * tl.load(key_scale + start // key_block))[:, None]
    if is_last:
        scores = tl.where(columns[None, :] < num_keys, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - (new_peak - 8.0)[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    near_values = tl.load(values + channels[None, :] * padded + columns[:, None])
    # Added to the sum in float32: Hopper's own float8 accumulation keeps fewer bits.
    summed = summed * shrink[:, None] + tl.dot(weights.to(near_values.dtype), near_values)
    return new_peak, total, summed


@triton.jit(do_not_specialize=["num_queries", "num_keys"])  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query,
    query_scale,
    key,
    key_scale,
    value,
    value_mean,
    value_scale,
    out,
    num_queries,
    num_keys,
    padded_queries,
    padded_keys,
    heads,
    stride_batch,
    stride_head,
    stride_token,
    head_size: tl.constexpr,
    width: tl.constexpr,
    query_block: tl.constexpr,
    block: tl.constexpr,
    key_block: tl.constexpr,
):
    """A block of queries of one head against all its keys."""
    place, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, channels = place * query_block + tl.arange(0, query_block), tl.arange(0, width)
    queries = tl.load(query + (head * padded_queries + rows[:, None]) * width + channels[None, :])
    scale = tl.load(query_scale + head * padded_queries + rows)
    keys, values = key + head * padded_keys * width, value + head * width * padded_keys
    key_scales = key_scale + head * (padded_keys // key_block)
    peak = tl.full([query_block], float("-inf"), tl.float32)
    total = tl.zeros([query_block], tl.float32)
    summed = tl.zeros([query_block, width], tl.float32)
    whole = num_keys // block * block
    for start in range(0, whole, block):
        peak, total, summed = _attend_block(
            queries, scale, keys, key_scales, values, peak, total, summed, start, num_keys, padded_keys,
            width, block, key_block, False,
        )  # fmt: skip
    if whole < num_keys:
        peak, total, summed = _attend_block(
            queries, scale, keys, key_scales, values, peak, total, summed, whole, num_keys, padded_keys,
            width, block, key_block, True,
        )  # fmt: skip
    steps = tl.load(value_scale + head * head_size + channels, mask=channels < head_size, other=0.0)
    means = tl.load(value_mean + head * head_size + channels, mask=channels < head_size, other=0.0)
    result = summed / total[:, None] * steps[None, :] + means[None, :]
    end = out + (head // heads) * stride_batch + (head % heads) * stride_head
    end += rows[:, None].to(tl.int64) * stride_token + channels[None, :]
    is_there = (rows[:, None] < num_queries) & (channels[None, :] < head_size)
    tl.store(end, result.to(out.dtype.element_ty), mask=is_there)


def launch(capability: tuple[int, int]) -> dict[str, int]:
    """How to launch the attention kernel: queries and keys in a block, warps, and stages of loads.

    With these no register is spilled; ``tests/test_float8_attention_kernels.py`` asks the compiler.

    Args:
        capability: the device's compute capability.

    """
    block = 128 if capability >= (9, 0) else 64
    return {"query_block": 128, "block": block, "num_warps": 8, "num_stages": 3}


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, how: dict[str, int] | None = None
) -> torch.Tensor:
    """Attention in float8; see ``float8.attention.attend``.

    Args:
        query: ``[batch, heads, queries, head size]``.
        key: ``[batch, heads, keys, head size]``.
        value: as ``key``.
        scale: of the products.
        how: replaces some of what ``launch`` returns.

    Returns:
        As ``float8.attention.attend``.

    """
    # Triton launches on the current device, whichever one the operands are on.
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        return _on_its_device(query, key, value, scale, how or {})


def _on_its_device(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, how: dict[str, int]
) -> torch.Tensor:
    query, key, value = (item if item.stride(-1) == 1 else item.contiguous() for item in (query, key, value))
    batch, heads, num_queries, size = query.shape
    num_keys, count = key.shape[2], batch * heads
    width = max(32, triton.next_power_of_2(size))  # the smallest size that float8 products take
    chosen = launch(torch.cuda.get_device_capability(query.device) if query.is_cuda else (9, 0)) | how
    blocks = [triton.cdiv(number, KEY_BLOCK) for number in (num_queries, num_keys)]
    padded_queries, padded_keys = (number * KEY_BLOCK for number in blocks)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=query.device)

    queries, query_scale = empty(count, padded_queries, width, dtype=DTYPE), empty(count, padded_queries)
    keys, key_scale = empty(count, padded_keys, width, dtype=DTYPE), empty(count, blocks[1])
    values = empty(count, width, padded_keys, dtype=DTYPE)
    out = empty(batch, num_queries, heads, size, dtype=query.dtype).transpose(1, 2)
    key_mean, value_mean = key.mean(2, dtype=torch.float32), value.mean(2, dtype=torch.float32)
    lowest, highest = value.aminmax(dim=2)
    value_scale = torch.maximum(highest - value_mean, value_mean - lowest).clamp_min(SMALLEST_MAGNITUDE) / LARGEST

    shape: dict[str, Any] = {"head_size": size, "width": width, "block": KEY_BLOCK}
    strides = [item.stride()[:3] for item in (query, key, value, out)]
    _quantize_rows[blocks[0], count](
        query,
        key_mean,
        queries,
        query_scale,
        scale / math.log(2),
        num_queries,
        heads,
        *strides[0],
        is_key=False,
        **shape,
    )
    _quantize_rows[blocks[1], count](
        key, key_mean, keys, key_scale, 1.0, num_keys, heads, *strides[1], is_key=True, **shape
    )
    _quantize_channels[blocks[1], count](value, value_mean, value_scale, values, num_keys, heads, *strides[2], **shape)
    _attend[triton.cdiv(num_queries, chosen["query_block"]), count](
        queries, query_scale, keys, key_scale, values, value_mean, value_scale, out,
        num_queries, num_keys, padded_queries, padded_keys, heads, *strides[3],
        head_size=size, width=width, key_block=KEY_BLOCK, **chosen,
    )  # fmt: skip
    return out
