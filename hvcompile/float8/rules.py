"""What a GPU's scaled matrix product refuses: torch's own checks of its arguments, and those of the kernels behind.

Fake tensors pass some of these checks alone. The others are made where a kernel is chosen, on the device.

Source: ``_scaled_mm_out_cuda`` in ATen's ``native/cuda/Blas.cpp`` and ``ScaledBlas.cpp``, torch 2.9 and later. Scales a
row go to cuBLAS on compute capability 9.0 (from CUDA 12.9 on), and to kernels of CUTLASS everywhere else, which write
bfloat16 alone. Both load 16 bytes at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

LEAST_CAPABILITY = (8, 9)
CUBLAS_ROWS = (9, 0)
"""The compute capability on which cuBLAS takes a scale a row."""
MULTIPLE = 16
"""Of both sizes of the second matrix; elements of a byte, so bytes as well."""


def refusals(
    first: torch.Tensor,
    second: torch.Tensor,
    first_scale: torch.Tensor,
    second_scale: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype,
    capability: tuple[int, int],
) -> list[str]:
    """Why a GPU would refuse ``(first * first_scale) @ (second * second_scale) + bias``; empty where it would not.

    Args:
        first: ``[M, K]``.
        second: ``[K, N]``.
        first_scale: ``[M, 1]``, or of one element.
        second_scale: ``[1, N]``, or of one element.
        bias: ``[N]``.
        dtype: of the result.
        capability: compute capability of the GPU.

    """
    if capability < LEAST_CAPABILITY:
        return [f"compute capability {capability[0]}.{capability[1]} has no float8 products; they need 8.9 or newer"]
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[0]:
        return [f"{tuple(first.shape)} and {tuple(second.shape)} are no matrices that can be multiplied"]
    return [
        *_matrix_refusals(first, second),
        *_scale_refusals(first, second, first_scale, second_scale, dtype, capability),
        *([] if bias is None else _bias_refusals(bias, int(second.shape[1]), dtype)),
    ]


def _matrix_refusals(first: torch.Tensor, second: torch.Tensor) -> Iterator[str]:
    kinds = {torch.float8_e4m3fn, torch.float8_e5m2}
    if not {first.dtype, second.dtype} <= kinds or first.dtype == second.dtype == torch.float8_e5m2:
        yield f"{first.dtype} times {second.dtype}: both must be float8, and one of them e4m3"
    if second.shape[0] % MULTIPLE or second.shape[1] % MULTIPLE:
        yield f"the second matrix is {tuple(second.shape)}: both sizes must be multiples of {MULTIPLE}"
        return
    for which, layout, rows in (("first", "row", first), ("second", "column", second.t())):
        if not rows.numel():
            continue
        if rows.stride(1) != 1 or rows.stride(0) < rows.shape[1]:
            yield f"the {which} matrix must be {layout}-major; its {layout}s lie {rows.stride(0)} elements apart"
        elif rows.stride(0) % MULTIPLE or rows.storage_offset() % MULTIPLE:
            yield (
                f"the {which} matrix is not aligned to {MULTIPLE} bytes: its {layout}s lie {rows.stride(0)} apart, the "
                f"first at {rows.storage_offset()}"
            )


def _scale_refusals(
    first: torch.Tensor,
    second: torch.Tensor,
    first_scale: torch.Tensor,
    second_scale: torch.Tensor,
    dtype: torch.dtype,
    capability: tuple[int, int],
) -> Iterator[str]:
    if not first_scale.dtype == second_scale.dtype == torch.float32:
        yield f"the scales are {first_scale.dtype} and {second_scale.dtype}: both must be float32"
    if first_scale.numel() == second_scale.numel() == 1:
        return
    shapes, wanted = (tuple(first_scale.shape), tuple(second_scale.shape)), ((first.shape[0], 1), (1, second.shape[1]))
    if shapes != wanted:
        yield f"the scales are {shapes[0]} and {shapes[1]}: allowed is {wanted[0]} and {wanted[1]}, or one number each"
    elif not (first_scale.is_contiguous() and second_scale.is_contiguous()):
        yield f"scales a row must be contiguous, their strides are {first_scale.stride()} and {second_scale.stride()}"
    if capability != CUBLAS_ROWS and dtype != torch.bfloat16:
        yield (
            f"the result is {dtype}: with scales a row, compute capability {capability[0]}.{capability[1]} writes "
            "bfloat16 alone"
        )


def _bias_refusals(bias: torch.Tensor, columns: int, dtype: torch.dtype) -> Iterator[str]:
    if bias.numel() != columns:
        yield f"the bias has {bias.numel()} elements, the result {columns} columns"
    if dtype == torch.float32:
        yield "a result in float32 takes no bias"
    elif bias.dtype != dtype:
        yield f"the bias is {bias.dtype}: for a result in {dtype} it must be that too"
