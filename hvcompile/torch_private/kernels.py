"""Operators that torch keeps to itself: scaled products, attention with its log-sum-exp, storages without memory."""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

PYTREE_LOG = logging.getLogger("torch.utils._pytree")


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``scaled_dot_product_attention``; on meta, where nothing will run, also where that can't be traced.

    There torch takes the math kernel, whatever it takes on the device that is planned for.
    """
    try:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    except GuardOnDataDependentSymNode:
        if query.device.type != "meta":
            raise
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


def attention_with_lse(
    kernel: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by one of torch's kernels, with its log-sum-exp.

    Args:
        kernel: "flash", "cudnn" or "efficient"; on a CPU "flash". "flash" takes a bias on a CPU only, "cudnn" none.
        query: ``[B, H, Q, E]``; key and value ``[B, H, K, E]``.
        key: see ``query``.
        value: see ``query``.
        bias: is added to the scores; in the query's dtype, broadcasts to ``[B, H, Q, K]``.
        scale: of the scores.

    Returns:
        ``[B, H, Q, E]`` in the query's dtype, and the natural logarithm of the sum of exponentials, ``[B, H, Q]`` in
        fp32 (fp64 for fp64). What they are for a query that a bias keeps from all keys, kernels don't agree on.

    """
    aten, given = torch.ops.aten, (query, key, value)
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
            *given, 0.0, False, attn_mask=bias, scale=scale
        )
    elif kernel == "flash":
        out, lse = aten._scaled_dot_product_flash_attention.default(*given, 0.0, False, False, scale=scale)[:2]
    elif kernel == "cudnn":
        found = aten._scaled_dot_product_cudnn_attention.default(*given, None, True, 0.0, False, False, scale=scale)
        out, lse = found[:2]
    else:
        if bias is not None:
            # The kernel reads rows of the bias that begin at multiples of 16 bytes.
            length = key.shape[2]
            bias = torch.nn.functional.pad(bias, (0, -length % 16))[..., :length]
            bias = bias.expand(*query.shape[:3], length)
        out, lse = aten._scaled_dot_product_efficient_attention.default(*given, bias, True, 0.0, False, scale=scale)[:2]
        lse = lse[..., : query.shape[2]]  # the kernel pads it to a multiple of 32
    return out, lse.squeeze(-1) if lse.ndim == 4 else lse


def has_row_scales(device: torch.device) -> bool:
    """Whether ``scaled_mm`` takes a scale a row on this device."""
    return device.type != "cpu" or torch.torch_version.TorchVersion(torch.__version__) >= "2.13"


def scaled_mm(
    first: torch.Tensor,
    second: torch.Tensor,
    first_scale: torch.Tensor,
    second_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``(first * first_scale) @ (second * second_scale) + bias`` of float8 matrices; ``second`` is column-major."""
    # On Hopper the fast accumulation sums in 14 bits between additions to float32, as torchao and vLLM have it.
    return torch._scaled_mm(first, second, first_scale, second_scale, bias=bias, out_dtype=dtype, use_fast_accum=True)


def forbid_address(tensor: torch.Tensor, message: str) -> None:
    """Make whoever asks for a tensor's address, to read or to write, get an error; also through its aliases and views.

    Args:
        tensor: its storage is its own; what the storage holds is lost to all.
        message: of the error; torch's own says so too, without the reason, where it was built without CUDA.

    """
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    address = tensor.untyped_storage()._cdata
    set_message = getattr(torch._C, "_set_storage_data_ptr_access_error_msg", None)
    if set_message is not None:
        set_message(address, message)
    elif (offset := _offset_of_read_flag()) is not None:
        ctypes.memset(address + offset, 1, 1)


@functools.cache
def _offset_of_read_flag() -> int | None:
    """Where in a storage lies the flag that forbids to read its address; None where it does not lie as in 2.11 to 2.13.

    Found by what another flag, the one before it, changes in a storage made for this, and tried out on that.
    """
    length = 80  # bytes; the least that a storage takes in these versions is more
    tensor = torch.zeros(1)
    address = tensor.untyped_storage()._cdata
    before = ctypes.string_at(address, length)
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    after = ctypes.string_at(address, length)
    changed = [place for place in range(length) if before[place] != after[place]]
    if len(changed) != 2 or changed[1] != changed[0] + 1 or changed[1] + 1 >= length or after[changed[1] + 1]:
        return None
    ctypes.memset(address + changed[1] + 1, 1, 1)
    try:
        tensor.clone()
    except RuntimeError:
        return changed[1] + 1
    return None
