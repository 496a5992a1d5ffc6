"""Models whose linear layers a library has quantised: torchao's kinds of weights, and GGUF's as diffusers has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hvcompile


def linears_in(module: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Each linear layer with the module that holds it, and its name there."""
    return [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear
    ]


def _by_config(config: Callable[[], Any]) -> Callable[[nn.Module], None]:
    def quantise(module: nn.Module) -> None:
        from torchao.quantization import quantize_

        quantize_(module, config())

    return quantise


def _int8_weights() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int8_dynamic() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


def _float8_weights() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


def _float8_dynamic(per_row: bool) -> Callable[[nn.Module], None]:
    """What ``Float8DynamicActivationFloat8WeightConfig`` makes, which refuses to be made where there is no GPU."""

    def quantise(module: nn.Module) -> None:
        from torchao.float8.inference import Float8MMConfig
        from torchao.quantization import PerRow, PerTensor
        from torchao.quantization.quantize_.common import KernelPreference
        from torchao.quantization.quantize_.workflows import Float8Tensor
        from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs

        granularity, products = PerRow() if per_row else PerTensor(), Float8MMConfig(use_fast_accum=True)
        for _, _, linear in linears_in(module):
            made = Float8Tensor.from_hp(
                linear.weight.detach(),
                granularity=granularity,
                kernel_preference=KernelPreference.TORCH,
                act_quant_kwargs=QuantizeTensorToFloat8Kwargs(
                    granularity=granularity, mm_config=products, kernel_preference=KernelPreference.TORCH
                ),
                mm_config=products,
            )
            linear.weight = nn.Parameter(made, requires_grad=False)

    return quantise


def _gguf(kind: str) -> Callable[[nn.Module], None]:
    """What ``GGUFQuantizationConfig`` makes of a checkpoint."""

    def quantise(module: nn.Module) -> None:
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        quant_type = gguf.GGMLQuantizationType[kind]
        for parent, name, linear in linears_in(module):
            rows = gguf.quants.quantize(linear.weight.detach().float().numpy(), quant_type)
            made = GGUFLinear(
                linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=linear.weight.dtype
            )
            made.weight = GGUFParameter(torch.from_numpy(rows.copy()), quant_type=quant_type)
            made.bias = linear.bias
            setattr(parent, name, made)

    return quantise


KINDS: dict[str, Callable[[nn.Module], None]] = {
    "int8 weights": _by_config(_int8_weights),
    "int8 dynamic": _by_config(_int8_dynamic),
    "float8 weights": _by_config(_float8_weights),
    "float8 dynamic, a scale a row": _float8_dynamic(per_row=True),
    "float8 dynamic, one scale": _float8_dynamic(per_row=False),
    "GGUF Q8_0": _gguf("Q8_0"),
    "GGUF Q4_0": _gguf("Q4_0"),
}
"""What quantises the linear layers of a module in place, by what it makes of them."""


def skip_where_torch_lacks(kind: str) -> None:
    """On CPUs, products with a scale a row came with torch 2.13, and GGUF is a package of its own."""
    if kind.startswith("GGUF"):
        pytest.importorskip("gguf")
    if "a scale a row" in kind and torch.torch_version.TorchVersion(torch.__version__) < "2.13":
        pytest.skip("torch before 2.13 has no product with a scale a row on CPUs")


def rows_of(model: Any) -> dict[str, str]:
    """The journal of the graph of a model that was compiled last: for each of its rows, all that it says."""
    return {
        row.name: "; ".join(
            [*row.report.matched, *(f"{what}: {why}" for what, why in row.report.declined), *row.report.noted]
        )
        for row in hvcompile.stats(model).journal[-1]
    }
