"""Which kernel computes an attention: what each can run, which one torch picks by itself, and how to pin one.

``torch.nn.attention.sdpa_kernel`` sets flags of the whole process, which are read while a graph is traced. It would act
on other threads, and on attention that it is not meant for. So a kernel is pinned here by calling its operator in place
of ``scaled_dot_product_attention``: the graph says what runs, whatever lowers it. Which implementation stands behind
flash (FA2, FA3, FA4) stays torch's own switch, ``torch.nn.attention.activate_flash_attention_impl``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from hvcompile.torch_private import kernels

AUTO = "auto"
KERNELS = (AUTO, "cudnn", "flash", "efficient", "math")

_HALF = (torch.float16, torch.bfloat16)
_IS_ENABLED: dict[str, Callable[[], bool]] = {
    "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    "flash": torch.backends.cuda.flash_sdp_enabled,
    "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
    "math": torch.backends.cuda.math_sdp_enabled,
}
# Where torch 2.11 to 2.13 prefer cuDNN (``check_prefer_cudnn_attention``): Hopper and data center Blackwell alone.
_CUDNN_FIRST = ((9, 0), (10, 0))
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """The properties of an attention that the choice of a kernel depends on.

    Attributes:
        device: its type, such as "cuda".
        dtype: of query, key and value.
        head_sizes: of query and of value.
        has_mask: whether there is an ``attn_mask``.
        is_grouped: whether several heads of queries share one of keys.
        capability: the device's compute capability; (0, 0) where that is not known.

    """

    device: str
    dtype: torch.dtype
    head_sizes: tuple[int, int]
    has_mask: bool
    is_grouped: bool
    capability: tuple[int, int]

    def __str__(self) -> str:
        sizes = " and ".join(str(size) for size in dict.fromkeys(self.head_sizes))
        mask = "with a mask" if self.has_mask else "no mask"
        return f"{self.device}, {str(self.dtype).removeprefix('torch.')}, head size {sizes}, {mask}"


def describe(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, has_mask: bool) -> Attention:
    """Describe an attention by its operands, ``[batch, heads, tokens, head size]``; fake tensors will do."""
    has_gpu = query.device.type == "cuda" and torch.cuda.is_available()
    return Attention(
        device=query.device.type,
        dtype=query.dtype,
        head_sizes=(int(query.shape[-1]), int(value.shape[-1])),
        has_mask=has_mask,
        is_grouped=str(query.shape[1]) != str(key.shape[1]),
        capability=torch.cuda.get_device_capability(query.device) if has_gpu else (0, 0),
    )


def _has_cudnn() -> bool:
    return bool(torch.backends.cudnn.is_available())  # type: ignore[no-untyped-call]


def refusal(kernel: str, attention: Attention) -> str:
    """Why a kernel can't compute an attention; empty if it can."""
    capability, largest = {"cudnn": ((8, 0), 128), "flash": ((8, 0), 256), "efficient": ((5, 0), 2**16)}.get(
        kernel, ((0, 0), 0)
    )
    dtypes = {"cudnn": _HALF, "flash": _HALF, "efficient": (*_HALF, torch.float32)}.get(kernel, _FLOATS)
    device = attention.device
    if device not in {"cpu", "cuda", "meta"}:
        return f"kernels are pinned on cpu and cuda, not on {device}"
    if attention.is_grouped:
        return "query and key differ in their number of heads"
    if device == "cpu":
        if kernel not in {"flash", "math"}:
            return "on cpu there are flash and math"
        capability, largest, dtypes = (0, 0), 0, _FLOATS
    elif kernel != "math" and attention.has_mask:
        return "it has a mask, which is pinned to math alone; leave the choice to 'auto'"
    if attention.dtype not in dtypes:
        return f"it takes {', '.join(str(item).removeprefix('torch.') for item in dtypes)}, not {attention.dtype}"
    query, value = attention.head_sizes
    if kernel != "math" and query != value:
        return f"query and value differ in head size ({query} and {value})"
    if largest and (query > largest or query % 8):
        return f"it takes head sizes that are multiples of 8 up to {largest}, not {query}"
    if device == "cuda":
        if attention.capability < capability:
            return f"it takes a GPU of compute capability {capability[0]}.{capability[1]} or more"
        if kernel == "flash" and not torch.backends.cuda.is_flash_attention_available():
            return "this torch was built without flash attention"
        if kernel == "cudnn" and not _has_cudnn():
            return "this torch was built without cuDNN"
    return ""


def expected(attention: Attention) -> str:
    """The kernel that torch picks by itself, in its documented order; cuDNN comes first on Hopper and its like.

    Kernels are left out that ``torch.nn.attention.sdpa_kernel`` or ``torch.backends.cuda`` rule out at the time.
    """
    first = ["cudnn"] if attention.capability in _CUDNN_FIRST else []
    order = [kernel for kernel in (*first, "flash", "efficient", "math") if _IS_ENABLED[kernel]()]
    if attention.has_mask and attention.device != "cpu":
        takes_mask = "efficient" in order and attention.dtype in (*_HALF, torch.float32)
        return "efficient" if takes_mask else "math"
    return next((kernel for kernel in order if not refusal(kernel, attention)), "math")


def written_out(query: Any, key: Any, value: Any, *, dtype: torch.dtype, scale: Any, repeats: int = 1) -> Any:
    """What the math kernel computes with no mask, in plain operations that don't ask for the number of keys.

    That number may be known at run time alone. Before 2.13, torch can then trace neither the kernel's operator nor
    matmul.

    Args:
        query: ``[B, H, Q, E]``; in graph code all three may be proxies.
        key: ``[B, H / repeats, K, E]``.
        value: ``[B, H / repeats, K, F]``.
        dtype: theirs, and that of the result.
        scale: of the scores.
        repeats: how many heads of queries share one of keys.

    Returns:
        ``[B, H, Q, F]``, in ``dtype``.

    """
    query, key, value = (item.to(torch.promote_types(dtype, torch.float32)) for item in (query, key, value))
    if repeats > 1:
        key, value = (item.repeat_interleave(repeats, 1) for item in (key, value))
    weights = torch.einsum("bhqd,bhkd->bhqk", query * scale, key).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, value).to(dtype)


def pinned(kernel: str, device: str, dtype: torch.dtype) -> Callable[..., Any]:
    """A function ``(query, key, value, attn_mask, is_causal, scale) -> output`` that runs one kernel.

    ``attn_mask`` is additive, in the query's dtype, or None; only "math", and "flash" on cpu, are given one.
    """

    def attend(query: Any, key: Any, value: Any, attn_mask: Any, is_causal: bool, scale: float | None) -> Any:
        if kernel == "math" and attn_mask is None and not is_causal and scale is not None:
            return written_out(query, key, value, dtype=dtype, scale=scale)
        return kernels.attention_by(kernel, device, (query, key, value), attn_mask, is_causal, scale)

    return attend


def scaled_dot_product_attention_with_lse(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    *,
    scale: float | None = None,
    kernel: str = AUTO,
    name: str | None = None,
) -> Any:
    """Attention to some of the keys, with the log-sum-exp that ``merge`` weighs it by; graph code.

    Args:
        query: ``[B, H, Q, E]``, floating point.
        key: ``[B, H, K, E]``, same dtype.
        value: ``[B, H, K, F]``, same dtype.
        attn_mask: bool (True keeps) or additive; broadcasts to ``[B, H, Q, K]``; or None.
        scale: of the scores; None for ``E ** -0.5``.
        kernel: one of ``KERNELS``; "auto" is the one that ``scaled_dot_product_attention`` picks by itself.
        name: of the node, where this is written into a graph.

    Returns:
        The attention ``[B, H, Q, F]`` in the query's dtype, and the log-sum-exp of its scores, ``[B, H, Q]`` in fp32
        (fp64 for fp64). For a query that the mask keeps from all keys they are 0 and minus infinity.

    """
    if isinstance(query, fx.Proxy):
        options = {"attn_mask": attn_mask, "scale": scale, "kernel": None if kernel == AUTO else kernel}
        kwargs = {key: option for key, option in options.items() if option is not None}
        return query.tracer.create_proxy(
            "call_function", scaled_dot_product_attention_with_lse, (query, key, value), kwargs, name
        )
    if kernel == AUTO:
        kernel = expected(describe(query, key, value, has_mask=attn_mask is not None))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bias, sees = None, None
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        bias = attn_mask.to(query.dtype)
        if is_bool:
            bias = torch.zeros_like(bias).masked_fill(attn_mask.logical_not(), -math.inf)
        sees = (bias != -math.inf).any(-1)  # of the cast: fp32's least finite value is minus infinity in bf16
    if kernel == "math":
        wide = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            # Not matmul: see ``written_out``.
            scores = torch.einsum("bhqd,bhkd->bhqk", query.to(wide) * scale, key.to(wide))
            scores = scores if bias is None else scores + bias
            lse = scores.logsumexp(-1)
            weights = (scores - lse.unsqueeze(-1)).exp()
            out = torch.einsum("bhqk,bhkd->bhqd", weights, value.to(wide)).to(query.dtype)
    else:
        out, lse = kernels.attention_with_lse(kernel, query, key, value, bias, scale)
    if sees is not None:
        out = torch.where(sees.unsqueeze(-1), out, torch.zeros_like(out))
        lse = torch.where(sees, lse, torch.full_like(lse, -math.inf))
    return out, lse


def merge(parts: Sequence[tuple[Any, Any]], dtype: torch.dtype) -> Any:
    """Attention to all keys, from attention to parts of them; graph code.

    Args:
        parts: of each part the attention ``[B, H, Q, F]`` and the log-sum-exp ``[B, H, Q]``, as
            ``scaled_dot_product_attention_with_lse`` returns them.
        dtype: of the result; the sums are in the dtype of the log-sum-exp.

    Returns:
        ``[B, H, Q, F]``; 0 for a query that sees no key of any part.

    Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867.

    """
    if len(parts) == 1:
        return parts[0][0]
    peak = parts[0][1]
    for _, lse in parts[1:]:
        peak = torch.maximum(peak, lse)
    peak = torch.where(peak == -math.inf, torch.zeros_like(peak), peak)
    total: Any = None
    out: Any = None
    for attended, lse in parts:
        weight = (lse - peak).exp()
        weighted = attended * weight.unsqueeze(-1)  # promoted to the dtype of the weight
        total, out = (weight, weighted) if out is None else (total + weight, out + weighted)
    total = torch.where(total == 0, torch.ones_like(total), total)
    return (out / total.unsqueeze(-1)).to(dtype)
