"""Attention in float8: queries, keys, values and weights quantised, products summed in float32.

Queries get a scale a token; keys, less their mean over tokens (which softmax can't tell), one a block of tokens;
values, less their mean (which is added to the result), one a channel. So what is not finite in a query stays in its
row, in a value in its channel, in a key in its head. Softmax is in float32. Its weights are quantised beside the
largest so far, which float8 holds exactly, and kept down to 2**-17 of it. ``reference`` is that arithmetic in plain
torch, and what runs on a CPU; on a GPU Triton kernels do it.

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
"""Weights are quantised as 2**8 times what they are, of 1 at most."""
MOST_HEAD_SIZE = 128
"""Of larger heads the kernel's sums do not fit a GPU's registers."""
CHUNK = 1024
"""Queries that ``reference`` computes at a time, which bounds its memory."""


def _quantized(tensor: torch.Tensor, dim: int | tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The values that float8 gives a tensor, with one scale along these dimensions, and the scales; both float32."""
    scale = tensor.abs().amax(dim, keepdim=True).clamp_min(SMALLEST_MAGNITUDE) / LARGEST
    return (tensor / scale).to(DTYPE).to(torch.float32), scale


def _quantized_keys(key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys less their mean, a scale a block of tokens, ``[..., keys, 1]``."""
    held = key.to(torch.float32)
    held = held - held.mean(2, keepdim=True)
    num_keys = held.shape[2]
    blocks = -(-num_keys // KEY_BLOCK)
    padded = torch.nn.functional.pad(held, (0, 0, 0, blocks * KEY_BLOCK - num_keys)).reshape(
        *held.shape[:2], blocks, KEY_BLOCK, -1
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
        block: keys that the weights are quantised beside the largest of, together with all before them.

    """
    held = value.to(torch.float32)
    value_mean = held.mean(2, keepdim=True)
    values, value_scale = _quantized(held - value_mean, 2)
    keys, key_scale = _quantized_keys(key)
    chunks = []
    for chunk in torch.split(query, CHUNK, 2):
        queries, query_scale = _quantized(chunk.to(torch.float32), 3)
        query_scale = query_scale * (scale / math.log(2))
        most = torch.full_like(query_scale, -math.inf)
        total, summed = torch.zeros_like(most), torch.zeros_like(queries)
        for near, near_scale, near_values in zip(
            torch.split(keys, block, 2), torch.split(key_scale, block, 2), torch.split(values, block, 2), strict=True
        ):
            scores = (queries @ near.mT) * query_scale * near_scale.mT
            now = torch.maximum(most, scores.amax(-1, keepdim=True))
            weights = torch.exp2(scores - (now - WEIGHT_BITS))
            shrink = torch.exp2(most - now)
            total = total * shrink + weights.sum(-1, keepdim=True)
            summed = summed * shrink + weights.to(DTYPE).to(torch.float32) @ near_values
            most = now
        chunks.append((summed / total * value_scale + value_mean).to(query.dtype))
    return _like_output(query).copy_(torch.cat(chunks, 2))


def _like_output(query: torch.Tensor) -> torch.Tensor:
    """An empty result, its heads side by side in memory, as what follows an attention wants them."""
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
    """What stands in graphs: ``attend``, under a name by which attention is known."""
    result: torch.Tensor = attend(query, key, value, scale)
    return result


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, of which the kernel for GPUs is made."""
    return importlib.util.find_spec("triton") is not None
