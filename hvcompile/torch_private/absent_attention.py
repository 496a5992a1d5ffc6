"""The door to what torch decides by the device at hand, answered for one that is not there.

All names were checked on torch 2.13.0. Each has its reason beside it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from hvcompile.torch_private import kernels

Choose = Callable[..., str]
"""Takes query, key and value, ``[B, H, S, D]``, and ``has_mask``; gives the kernel that torch takes on the device."""


def _aligned(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask as torch gives it to the memory-efficient kernel: additive, its rows beginning at multiples of 16."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    length = key.shape[2]
    if length % 16:
        mask = torch.nn.functional.pad(mask, (0, -length % 16))[..., :length]
    return mask.expand(*query.shape[:3], length)


def _attend(choose: Choose) -> Callable[..., torch.Tensor]:
    """``scaled_dot_product_attention`` as it would be traced on the device."""

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
        has_mask = attn_mask is not None
        kernel = choose(query, key, value, has_mask=has_mask) if query.ndim == 4 else "math"
        if attn_mask is None or kernel != "efficient":
            return kernels.attention_by(kernel, "cuda", (query, key, value), attn_mask, is_causal, scale)  # type: ignore[no-any-return]
        # Private: of the kernels that ``kernels`` knows, the one that takes a mask (2.13.0).
        return torch.ops.aten._scaled_dot_product_efficient_attention(  # type: ignore[no-any-return]
            query, key, value, _aligned(attn_mask, query, key), False, dropout_p, is_causal, scale=scale
        )[0]

    return attend


@contextlib.contextmanager
def attention_on_cuda(choose: Choose) -> Iterator[None]:
    """Have attention of CUDA tensors trace into the kernel that the device would take.

    torch asks the device which one that is; where there is none it answers "math", which is decomposed.

    Args:
        choose: tells which kernel that is.

    """
    from torch._inductor import decomposition

    attend = _attend(choose)
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
