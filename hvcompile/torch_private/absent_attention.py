"""The door to what torch decides by the device at hand, answered for one that is not there.

All names were checked on torch 2.13.0. Each has its reason beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

_HALF = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = {"cudnn": 128, "flash": 256}


def _takes(kernel: str, query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a kernel that takes no mask takes these operands."""
    size = query.shape[-1]
    return (
        query.dtype in _HALF
        and query.ndim == 4
        and size == value.shape[-1]
        and size % 8 == 0
        and size <= _LARGEST_HEAD[kernel]
    )


def _aligned(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask as torch gives it to the memory-efficient kernel: additive, its rows beginning at multiples of 16."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    length = key.shape[2]
    if length % 16:
        mask = torch.nn.functional.pad(mask, (0, -length % 16))[..., :length]
    return mask.expand(*query.shape[:3], length)


def _attend(order: Sequence[str]) -> Callable[..., torch.Tensor]:
    """``scaled_dot_product_attention`` as it would be traced on the device, which takes the kernels in this order."""
    aten = torch.ops.aten

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if enable_gqa and query.shape[1] != key.shape[1]:
            key, value = (item.repeat_interleave(query.shape[1] // item.shape[1], 1) for item in (key, value))
        kernel = next((item for item in order if attn_mask is None and _takes(item, query, value)), "efficient")
        if kernel == "cudnn":
            result: Any = aten._scaled_dot_product_cudnn_attention(
                query, key, value, None, False, dropout_p, is_causal, False, scale=scale
            )
        elif kernel == "flash":
            result = aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, False, scale=scale
            )
        elif query.dtype == torch.float64 or query.ndim != 4:
            result = aten._scaled_dot_product_attention_math(
                query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale
            )
        else:
            bias = None if attn_mask is None else _aligned(attn_mask, query, key)
            result = aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, False, dropout_p, is_causal, scale=scale
            )
        return result[0]  # type: ignore[no-any-return]

    return attend


@contextlib.contextmanager
def attention_on_cuda(order: Sequence[str]) -> Iterator[None]:
    """Have attention of CUDA tensors trace into the kernel that the device would take.

    torch asks the device which one that is; where there is none it answers "math", which is decomposed.

    Args:
        order: of "cudnn" and "flash", those that the device has, the first first; with a mask, and where none of them
            takes the operands, it is the memory-efficient kernel.

    """
    from torch._inductor import decomposition

    attend = _attend(order)
    operator: Any = torch.ops.aten.scaled_dot_product_attention.default
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for key in ("AutogradCUDA", "CUDA"):
        library.impl("scaled_dot_product_attention", attend, key)  # type: ignore[no-untyped-call]
    # AOTAutograd asks the operator's Python kernels. A body that is traced again asks Inductor's decompositions, which
    # hold torch's own. Both remember what they found.
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    try:
        operator._dispatch_cache.clear()
        decomposition.fast_random_decomps.cache_clear()
        with (
            mock.patch.dict(operator.py_kernels, {composite: attend}),
            mock.patch.dict(decomposition.decompositions, {operator: attend}),
        ):
            yield
    finally:
        operator._dispatch_cache.clear()
        decomposition.fast_random_decomps.cache_clear()
        library._destroy()  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def forgetting() -> Iterator[None]:
    """Have torch forget what it found out about devices, before and after."""
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    # Private: nothing public clears them. What is remembered is whether Triton works, the largest block, the number of
    # multiprocessors and the like.
    import torch.utils._triton as found_of_triton
    from torch._inductor import utils
    from torch._inductor.runtime.hints import DeviceProperties

    create = DeviceProperties.create
    for item in (*vars(found_of_triton).values(), *vars(utils).values(), getattr(create, "__func__", create)):
        if hasattr(item, "cache_clear"):
            item.cache_clear()
