"""Linear layers as float8 products: torchao's primitives for scales and casts, torch's scaled matrix product.

``float8_e4m3fn`` (4 exponent and 3 mantissa bits, largest value 448, no infinity) on both sides, scales in float32.
Scaled row by row, a row's scale is its largest magnitude over 448, so that a row's outliers, and its NaN or infinity,
are its own. The functions stand in compiled graphs as they are; AOTAutograd traces through them.

Source: Micikevicius et al., FP8 Formats for Deep Learning (arXiv:2209.05433); scales as in torchao's dynamic float8
quantisation.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Literal

import torch

from hvcompile import inductor

log = logging.getLogger(__name__)

DTYPE = torch.float8_e4m3fn
SMALLEST_MAGNITUDE = 1e-30
"""Rows of zeros get the scale of this magnitude: theirs would be 0, and zero over zero is no number."""

Granularity = Literal["row", "tensor"]
GRANULARITIES: tuple[Granularity, ...] = ("row", "tensor")


def is_available() -> bool:
    """Whether torchao, whose primitives are used, can be imported; imports it, quietly."""
    try:
        with quiet_import():
            import torchao.quantization.quant_primitives  # noqa: F401
    except ImportError:
        return False
    return True


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Within, warnings that torchao's import logs go to the log of this module, for debugging; errors stay errors.

    They are about kernels of its own that it could not load, of which none is used here, and, from torch, about how it
    registers its types. diffusers imports torchao too, wherever that is installed.
    """
    torchao, propagates = logging.getLogger("torchao"), logging.getLogger("torchao").propagate
    lowered = _Lowered()
    torchao.addHandler(lowered)
    torchao.propagate = False
    inductor.PYTREE_LOG.addFilter(_is_not_about_torchao)
    try:
        yield
    finally:
        inductor.PYTREE_LOG.removeFilter(_is_not_about_torchao)
        torchao.propagate = propagates
        torchao.removeHandler(lowered)


class _Lowered(logging.Handler):
    """Says again, and warnings for debugging alone, what another logger was told."""

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelno if record.levelno > logging.WARNING else logging.DEBUG
        log.log(level, "%s: %s", record.name, record.getMessage())


def _is_not_about_torchao(record: logging.LogRecord) -> bool:
    named = record.args if isinstance(record.args, tuple) else ()
    if not any(str(getattr(item, "__module__", "")).startswith("torchao.") for item in named):
        return True
    log.debug("%s: %s", record.name, record.getMessage())
    return False


def quantize(tensor: torch.Tensor, granularity: Granularity = "row") -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise the rows of a tensor, or all of it with one scale.

    Args:
        tensor: ``[..., K]``, any floating dtype; leading dimensions are taken as rows.
        granularity: "row" for a scale a row, "tensor" for one in all.

    Returns:
        Data ``[rows, K]`` in float8, and scales in float32, ``[rows, 1]`` or ``[]``: data times scale is the tensor.

    """
    from torchao.quantization.quant_primitives import _choose_scale_float8, _quantize_affine_float8

    rows = tensor.reshape(-1, tensor.shape[-1]).to(torch.float32)
    if _has_no_rows(rows):  # of nothing there is no largest
        return rows.to(DTYPE), rows.new_ones([0, 1] if granularity == "row" else [])
    block = [1, rows.shape[1]] if granularity == "row" else list(rows.shape)
    scale = _choose_scale_float8(rows, block, DTYPE, hp_value_lb=SMALLEST_MAGNITUDE)
    if granularity == "tensor":
        scale = scale.reshape([])
    return _quantize_affine_float8(rows, scale, DTYPE), scale


def dequantize(data: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Give back what ``quantize`` was given, to within half a step of float8.

    That is a relative error of 2**-4 at most, except of values below 2**-15 of the largest that shares their scale,
    which lose more, down to 0.
    """
    from torchao.quantization.quant_primitives import _dequantize_affine_float8

    return _dequantize_affine_float8(data, scale, dtype)  # type: ignore[no-any-return]


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
    if _has_no_rows(data):  # which the product refuses
        return torch.empty((0, weight.shape[0]), dtype=dtype, device=data.device)
    if bias is not None:
        bias = bias.to(dtype)
    if scale.ndim == 0 or inductor.has_row_scales(data.device):
        return inductor.scaled_mm(data, weight.t(), scale, weight_scale.t(), bias, dtype)
    # Row scales are factors of the result's rows and columns, so they may as well follow the product.
    one = torch.ones([], device=data.device)
    product = inductor.scaled_mm(data, weight.t(), one, one, None, torch.float32) * weight_scale.t() * scale
    return (product if bias is None else product + bias).to(dtype)


def _has_no_rows(rows: torch.Tensor) -> bool:
    """Whether there are none; asked of a plain number alone, as a symbolic one would be guarded on."""
    return isinstance(rows.shape[0], int) and rows.shape[0] == 0


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
