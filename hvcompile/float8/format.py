"""The float8 format: its dtype and limits, and tensors quantised to it and back.

``float8_e4m3fn`` (4 exponent and 3 mantissa bits, largest value 448, no infinity), scales in float32. Scaled row by
row, a row's scale is its largest magnitude over 448, so that a row's outliers, and its NaN or infinity, are its own.

Source: Micikevicius et al., FP8 Formats for Deep Learning (arXiv:2209.05433); scales as in torchao's dynamic float8
quantisation.
"""

from __future__ import annotations

from typing import Literal

import torch

from hvcompile.torch_private import torchao

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_MAGNITUDE = 1e-30
"""What is all zeros gets the scale of this magnitude: its own would be 0, and zero over zero is no number."""
KEY_BLOCK = 128
"""Keys of an attention that share a scale, and whose weights are computed together."""

Granularity = Literal["row", "tensor"]
GRANULARITIES: tuple[Granularity, ...] = ("row", "tensor")


def quantize(tensor: torch.Tensor, granularity: Granularity = "row") -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise the rows of a tensor, or all of it with one scale.

    Args:
        tensor: ``[..., K]``, any floating dtype; leading dimensions are taken as rows.
        granularity: "row" for a scale a row, "tensor" for one in all.

    Returns:
        Data ``[rows, K]`` in float8, and scales in float32, ``[rows, 1]`` or ``[]``: data times scale is the tensor.

    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    if has_no_rows(rows):  # of nothing there is no largest
        return rows.to(DTYPE), torch.ones([0, 1] if granularity == "row" else [], device=rows.device)
    # As torchao has it, but for the order: there the largest is taken in float32, and a compiler then writes
    # all of the tensor in float32 to read it again. In its own dtype the largest is the same, of half the bytes.
    magnitudes = rows.abs()
    largest = magnitudes.amax(-1, keepdim=True) if granularity == "row" else magnitudes.amax()
    scale = largest.to(torch.float32).clamp(min=SMALLEST_MAGNITUDE) / LARGEST
    return torchao.quantize(rows.to(torch.float32), scale, DTYPE), scale


def dequantize(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Give back what ``quantize`` was given, to within half a step of float8.

    That is a relative error of 2**-4 at most, except of values below 2**-15 of the largest that shares their scale,
    which lose more, down to 0.
    """
    return torchao.dequantize(data, scale, dtype)


def has_no_rows(rows: torch.Tensor) -> bool:
    """Whether there are none; asked of a plain number alone, as a symbolic one would be guarded on."""
    return isinstance(rows.shape[0], int) and rows.shape[0] == 0
