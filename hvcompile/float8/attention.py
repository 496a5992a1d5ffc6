"""Attention in float8: queries, keys, values and weights quantised, products summed in float32.

Queries get a scale for each token. Keys, less their mean over tokens (which does not change the softmax), get one for
each block of tokens. Values, less their mean (which is added to the result), get one for each channel. A NaN in a query
affects only its row; in a value, only its channel; in a key, only its head.

Softmax is in float32. Its weights are quantised relative to the largest so far, which float8 holds exactly, and are
kept down to 2**-17 of it. ``reference`` is that arithmetic in plain torch, and runs on a CPU; on a GPU Triton kernels
do.

Source: Zhang et al., SageAttention (arXiv:2410.02367) and SageAttention2 (arXiv:2411.10958); Shah et al.,
FlashAttention-3 (arXiv:2407.08608).
"""

from __future__ import annotations

import functools
import importlib.util
import math

import torch

from hvcompile.float8.format import DTYPE, KEY_BLOCK, LARGEST, SMALLEST_MAGNITUDE

WEIGHT_BITS = 8
"""Weights, which are 1 at most, are multiplied by 2**8 before they are quantised."""
MOST_HEAD_SIZE = 128
"""The sums of larger heads do not fit a GPU's registers."""
CHUNK = 1024
"""Queries that ``reference`` computes at a time, which bounds its memory."""


def _quantized(tensor: torch.Tensor, dim: int | tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor's values in float8, with one scale along these dimensions, and the scales; both as float32."""
    scale = tensor.abs().amax(dim, keepdim=True).clamp_min(SMALLEST_MAGNITUDE) / LARGEST
    return (tensor / scale).to(DTYPE).to(torch.float32), scale


def _quantized_keys(key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys less their mean, quantised with a scale for each block of tokens; and the scales, ``[..., keys, 1]``."""
    key = key.to(torch.float32)
    key = key - key.mean(2, keepdim=True)
    num_keys = key.shape[2]
    blocks = -(-num_keys // KEY_BLOCK)
    padded = torch.nn.functional.pad(key, (0, 0, 0, blocks * KEY_BLOCK - num_keys)).reshape(
        *key.shape[:2], blocks, KEY_BLOCK, -1
    )
    data, scale = _quantized(padded, (-2, -1))
    return data.flatten(2, 3)[:, :, :num_keys], scale.expand(-1, -1, -1, KEY_BLOCK, 1).flatten(2, 3)[:, :, :num_keys]


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, block: int = KEY_BLOCK
) -> torch.Tensor:
    """Attention in float8, in plain torch; see ``attend``.

    Args:
        query: as of ``attend``.
        key: as of ``attend``.
        value: as of ``attend``.
        scale: as of ``attend``.
        block: keys at a time; their weights are quantised relative to the largest of these and of all before them.

    Returns:
        As ``attend``.

    """
    wide = value.to(torch.float32)
    value_mean = wide.mean(2, keepdim=True)
    values, value_scale = _quantized(wide - value_mean, 2)
    keys, key_scale = _quantized_keys(key)
    chunks = []
    for chunk in torch.split(query, CHUNK, 2):
        queries, query_scale = _quantized(chunk.to(torch.float32), 3)
        query_scale = query_scale * (scale / math.log(2))
        peak = torch.full_like(query_scale, -math.inf)
        total, summed = torch.zeros_like(peak), torch.zeros_like(queries)
        for near, near_scale, near_values in zip(
            torch.split(keys, block, 2), torch.split(key_scale, block, 2), torch.split(values, block, 2), strict=True
        ):
            scores = (queries @ near.mT) * query_scale * near_scale.mT
            new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
            weights = torch.exp2(scores - (new_peak - WEIGHT_BITS))
            shrink = torch.exp2(peak - new_peak)
            total = total * shrink + weights.sum(-1, keepdim=True)
            summed = summed * shrink + weights.to(DTYPE).to(torch.float32) @ near_values
            peak = new_peak
        chunks.append((summed / total * value_scale + value_mean).to(query.dtype))
    return _like_output(query).copy_(torch.cat(chunks, 2))


def _like_output(query: torch.Tensor) -> torch.Tensor:
    """An empty result, a token's heads side by side in memory, which suits what follows an attention."""
    batch, heads, tokens, size = query.shape
    return query.new_empty((batch, tokens, heads, size)).transpose(1, 2)


@torch.library.custom_op("hvcompile::float8_attention", mutates_args=(), device_types="cpu")
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """``softmax(query @ key.T * scale) @ value`` in float8, summed in float32.

    Args:
        query: ``[batch, heads, queries, head size]``, any floating dtype.
        key: ``[batch, heads, keys, head size]``.
        value: as ``key``.
        scale: of the products.

    Returns:
        ``[batch, heads, queries, head size]`` in the query's dtype, laid out as ``[batch, queries, heads, head size]``.

    """
    return reference(query, key, value, scale)


@attend.register_kernel("cuda")
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    from hvcompile.float8 import attention_triton

    return attention_triton.attend(query, key, value, scale)


@attend.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    del key, value, scale
    return _like_output(query)


def scaled_dot_product_float8_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    """``attend`` as graphs call it: under a name that marks it as attention."""
    result: torch.Tensor = attend(query, key, value, scale)
    return result


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, which the kernels for GPUs need."""
    return importlib.util.find_spec("triton") is not None
