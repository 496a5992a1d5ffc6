"""Linear layers as float8 products: torch's scaled matrix product of operands quantised by ``format``.

The functions stand in compiled graphs as they are; AOTAutograd traces through them.
"""

from __future__ import annotations

import torch

from hvcompile.float8.format import has_no_rows
from hvcompile.torch_private import kernels


def linear(
    data: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``input @ weight.T + bias`` on quantised operands, summed in float32 and rounded once.

    Args:
        data: float8 ``[rows, K]``.
        scale: float32 ``[rows, 1]``, or ``[]`` for one scale in all.
        weight: float8 ``[N, K]``.
        weight_scale: float32 ``[N, 1]``, or ``[]`` where ``scale`` is.
        bias: ``[N]``, or None.
        dtype: of the result.

    Returns:
        ``[rows, N]``.

    """
    if has_no_rows(data):  # which the product refuses
        return torch.empty((0, weight.shape[0]), dtype=dtype, device=data.device)
    if bias is not None:
        bias = bias.to(dtype)
    if scale.ndim == 0 or kernels.has_row_scales(data.device):
        return kernels.scaled_mm(data, weight.t(), scale, weight_scale.t(), bias, dtype)
    # Row scales are factors of the result's rows and columns, so they may as well follow the product.
    one = torch.ones([], device=data.device)
    product = kernels.scaled_mm(data, weight.t(), one, one, None, torch.float32) * weight_scale.t() * scale
    return (product if bias is None else product + bias).to(dtype)


def shape_like(rows: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Give a product's rows ``[rows, N]`` the leading dimensions of what the product was of."""
    return rows.reshape(*source.shape[:-1], rows.shape[-1])


def reason_unfit(device: torch.device) -> str:
    """Why float8 products do not run, or do not pay, on a device; empty where they do."""
    if device.type != "cuda":
        return f"the model is on {device.type}, where float8 products are emulated; they pay on GPUs"
    if torch.version.hip is not None:
        return "ROCm's float8 has another format on some GPUs and none was tried"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {capability[0]}.{capability[1]}; float8 products need 8.9 or newer"
    return ""
