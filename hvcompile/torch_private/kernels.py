"""The door to operators that torch keeps to itself: scaled products, and each kernel of attention by its own name.

All names were checked on torch 2.11.0 and 2.13.0; where they differ, that is said beside the name.

- ``torch.ops.aten._scaled_dot_product_*_attention``: what ``scaled_dot_product_attention`` chooses from. Called by name
  each computes what the graph says, whatever lowers it, and gives the log-sum-exp by which parts of an attention are
  merged; ``scaled_dot_product_attention`` keeps that to itself. Schemas are the same in both versions.
- ``torch._scaled_mm``: the public ``torch.nn.functional.scaled_mm`` has no CPU kernel in 2.11, and no Inductor lowering
  before 2.13. On CPUs 2.11 and 2.12 take one scale a tensor only.
- ``torch._foreach_copy_``: nothing public copies many tensors at once.
- ``torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode``: see ``fakes``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

# Private: the operator that a CPU's flash attention is in a graph of ATen (2.11.0, 2.13.0).
FLASH_ATTENTION_FOR_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``scaled_dot_product_attention``; on meta, where nothing will run, also where that can't be traced.

    There torch takes the math kernel, whatever it takes on the device that is planned for.
    """
    try:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    except GuardOnDataDependentSymNode:  # private: see ``fakes``
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
    # Private, all four: nothing public gives the log-sum-exp (2.11.0, 2.13.0).
    aten, operands = torch.ops.aten, (query, key, value)
    if query.device.type == "cpu":
        out, lse = FLASH_ATTENTION_FOR_CPU.default(*operands, 0.0, False, attn_mask=bias, scale=scale)
    elif kernel == "flash":
        out, lse = aten._scaled_dot_product_flash_attention.default(*operands, 0.0, False, False, scale=scale)[:2]
    elif kernel == "cudnn":
        results = aten._scaled_dot_product_cudnn_attention.default(
            *operands, None, True, 0.0, False, False, scale=scale
        )
        out, lse = results[:2]
    else:
        if bias is not None:
            # The kernel reads rows of the bias that begin at multiples of 16 bytes.
            length = key.shape[2]
            bias = torch.nn.functional.pad(bias, (0, -length % 16))[..., :length]
            bias = bias.expand(*query.shape[:3], length)
        results = aten._scaled_dot_product_efficient_attention.default(*operands, bias, True, 0.0, False, scale=scale)
        out, lse = results[:2]
        lse = lse[..., : query.shape[2]]  # the kernel pads it to a multiple of 32
    return out, lse.squeeze(-1) if lse.ndim == 4 else lse


def attention_by(
    kernel: str,
    device: str,
    operands: tuple[Any, Any, Any],
    attn_mask: Any,
    is_causal: bool,
    scale: float | None,
) -> Any:
    """Attention by one of torch's kernels; graph code.

    Args:
        kernel: "math", "flash", "cudnn" or "efficient"; on a CPU "math" or "flash".
        device: "cpu", "cuda" or "meta".
        operands: query ``[B, H, Q, E]``, key and value ``[B, H, K, E]``.
        attn_mask: additive, in the query's dtype, or None; only "math", and "flash" on a CPU, take one.
        is_causal: whether a query sees the keys up to its own place alone.
        scale: of the scores; None for ``E ** -0.5``.

    Returns:
        ``[B, H, Q, E]``.

    """
    # Private, all five: the public sdpa_kernel sets flags of the whole process (2.11.0, 2.13.0).
    aten = torch.ops.aten
    if kernel == "math":
        return aten._scaled_dot_product_attention_math.default(*operands, attn_mask, 0.0, is_causal, None, scale=scale)[
            0
        ]
    if device == "cpu":
        return FLASH_ATTENTION_FOR_CPU.default(*operands, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    if kernel == "flash":
        return aten._scaled_dot_product_flash_attention.default(*operands, 0.0, is_causal, False, scale=scale)[0]
    if kernel == "cudnn":
        return aten._scaled_dot_product_cudnn_attention.default(
            *operands, None, False, 0.0, is_causal, False, scale=scale
        )[0]
    return aten._scaled_dot_product_efficient_attention.default(*operands, None, False, 0.0, is_causal, scale=scale)[0]


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
    # Private: the public function runs on fewer devices and versions, see above (2.11.0, 2.13.0).
    return torch._scaled_mm(first, second, first_scale, second_scale, bias=bias, out_dtype=dtype, use_fast_accum=True)


def join_each(groups: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Concatenate the vectors of each group, into memory of its own.

    On a GPU that is a few launches for all groups of a dtype, where ``torch.cat`` is one a group.
    """
    with torch.no_grad():
        results = [vectors[0].new_empty(sum(vector.shape[0] for vector in vectors)) for vectors in groups]
        kinds = [result.dtype for result in results]
        for kind in dict.fromkeys(kinds):
            pairs = [pair for pair in zip(results, groups, strict=True) if pair[0].dtype == kind]
            parts = [
                part for result, vectors in pairs for part in torch.split(result, [len(vector) for vector in vectors])
            ]
            # Private: nothing public copies many tensors at once (2.11.0, 2.13.0).
            torch._foreach_copy_(parts, [vector for _, vectors in pairs for vector in vectors])
        return results


def stack_each(groups: Sequence[Sequence[torch.Tensor]], devices: Sequence[torch.device]) -> list[torch.Tensor]:
    """The numbers of each group, tensors of no dimensions on the CPU, as one vector on a device; one transfer each."""
    sizes = [len(group) for group in groups]
    # Each begins at whole 16 bytes: what does not, Inductor copies in every call.
    flat = torch.stack([number for group in groups for number in (*group, *group[: len(group) % 2])])
    on_device = {device: torch.split(flat.to(device), [size + size % 2 for size in sizes]) for device in {*devices}}
    return [on_device[device][place][: sizes[place]] for place, device in enumerate(devices)]
