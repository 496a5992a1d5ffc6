"""Float8 quantisation and products against float64."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hvcompile
from hvcompile.float8 import format as float8_format
from hvcompile.float8 import linear as float8_linear
from hvcompile.torch_private import kernels, torchao

ROOT = Path(hvcompile.__file__).parents[1]
pytestmark = pytest.mark.skipif(not torchao.is_available(), reason="torchao is not installed")


def rows(kind: str, num: int = 96, width: int = 256, seed: int = 0) -> torch.Tensor:
    """Activations: Gaussian, or with one channel in 64 a hundred times as large, as transformers have them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(num, width, generator=generator)
    if kind == "outliers":
        drawn[:, ::64] *= 100
        drawn *= torch.logspace(-3, 3, num)[:, None]
    return drawn


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["gaussian", "outliers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_right_to_four_hundredths(kind: str, dtype: torch.dtype, seed: int) -> None:
    """Per-layer relative error against fp32, row scale."""
    given, weight, bias = rows(kind, seed=seed), rows("gaussian", 128, seed=seed + 9) / 16, torch.randn(128)
    given = given.to(dtype)
    computed = float8_linear.linear(*float8_format.quantize(given), *float8_format.quantize(weight), bias, dtype)
    exact = given.double() @ weight.double().T + bias.double()
    error = ((computed.double() - exact).norm(dim=1) / exact.norm(dim=1)).max().item()
    assert error <= (4e-2 if kind == "gaussian" else 5.5e-2), error
    assert ((computed.double() - exact).norm() / exact.norm()).item() <= 4e-2
    assert computed.dtype == dtype


@pytest.mark.parametrize("granularity", float8_format.GRANULARITIES)
@pytest.mark.parametrize("has_bias", [True, False])
def test_product_of_quantised_operands(granularity: float8_format.Granularity, has_bias: bool) -> None:
    """What is summed are the quantised values: exact but for the order of sums."""
    given, weight = rows("gaussian", 33), rows("gaussian", 48, seed=1)
    bias = torch.randn(48) if has_bias else None
    left, right = float8_format.quantize(given, granularity), float8_format.quantize(weight, granularity)
    computed = float8_linear.linear(*left, *right, bias, torch.float32)
    exact = (left[0].double() * left[1]) @ (right[0].double() * right[1]).T + (0 if bias is None else bias)
    assert ((computed - exact).abs().max() / exact.abs().max()).item() < 1e-5


def test_row_scales_where_the_product_takes_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CPUs have it before torch 2.13: the scales are factors of the result."""
    left, right = float8_format.quantize(rows("outliers", 33)), float8_format.quantize(rows("gaussian", 48, seed=1))
    bias = torch.randn(48)
    usual = float8_linear.linear(*left, *right, bias, torch.float32)
    monkeypatch.setattr(kernels, "has_row_scales", lambda _: False)
    other = float8_linear.linear(*left, *right, bias, torch.float32)
    assert ((usual - other).norm() / usual.norm()).item() < 1e-6


def test_a_poisoned_row_poisons_itself_alone() -> None:
    given, weight = rows("gaussian", 8), float8_format.quantize(rows("gaussian", 48, seed=1))
    clean = float8_linear.linear(*float8_format.quantize(given), *weight, None, torch.float32)
    given[2, 5], given[4, 7] = torch.nan, torch.inf
    computed = float8_linear.linear(*float8_format.quantize(given), *weight, None, torch.float32)
    others = [0, 1, 3, 5, 6, 7]
    assert torch.equal(computed[others], clean[others])
    assert not computed[[2, 4]].isfinite().any()


def test_rows_of_zeros() -> None:
    given = rows("gaussian", 4)
    given[1] = 0
    data, scale = float8_format.quantize(given)
    assert (data[1].float() == 0).all()
    assert scale.isfinite().all()
    assert float8_format.quantize(torch.zeros(3, 64), "tensor")[1].isfinite()


@pytest.mark.parametrize("granularity", float8_format.GRANULARITIES)
def test_dequantised(granularity: float8_format.Granularity) -> None:
    """Half a step of three mantissa bits at most, for values that float8 does not round to zero."""
    given = rows("gaussian")
    back = float8_format.dequantize(*float8_format.quantize(given, granularity), torch.float32)
    relative = ((back - given).abs() / given.abs())[given.abs() > 1e-2 * given.abs().max()]
    assert relative.max().item() <= 2**-4


@pytest.mark.parametrize("granularity", float8_format.GRANULARITIES)
def test_no_rows(granularity: float8_format.Granularity) -> None:
    data, scale = float8_format.quantize(torch.zeros(2, 0, 64), granularity)
    assert scale.shape == float8_format.quantize(torch.zeros(0, 64), granularity)[1].shape
    weight = float8_format.quantize(torch.randn(32, 64), granularity)
    product = float8_linear.linear(data, scale, *weight, torch.randn(32), torch.bfloat16)
    assert float8_linear.shape_like(product, torch.zeros(2, 0, 64)).shape == (2, 0, 32)
    assert product.dtype == torch.bfloat16


def test_leading_dimensions() -> None:
    given = torch.randn(2, 3, 5, 64)
    data, scale = float8_format.quantize(given)
    assert data.shape == (30, 64)
    assert scale.shape == (30, 1)
    weight = float8_format.quantize(torch.randn(32, 64))
    product = float8_linear.shape_like(float8_linear.linear(data, scale, *weight, None, torch.float32), given)
    assert product.shape == (2, 3, 5, 32)


def test_reason_on_a_cpu() -> None:
    assert "emulated" in float8_linear.reason_unfit(torch.device("cpu"))


def test_of_torchaos_import_warnings_alone_are_lowered(caplog: pytest.LogCaptureFixture) -> None:
    from torchao.quantization import Float8WeightOnlyConfig

    caplog.set_level(logging.DEBUG, "hvcompile")
    pytree, theirs = torchao.PYTREE_LOG, logging.getLogger("torchao")
    pytree.addHandler(caplog.handler)
    try:
        with torchao.quiet_import():
            theirs.getChild("kernel").warning("Failed to load it")
            theirs.error("broken")
            pytree.warning("%s is an Enum", Float8WeightOnlyConfig)
            pytree.warning("%s is an Enum", pytest.Item)
        theirs.warning("afterwards")
        pytree.warning("%s afterwards", Float8WeightOnlyConfig)
    finally:
        pytree.removeHandler(caplog.handler)
    told = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    ours, about = "hvcompile.torch_private.torchao", str(Float8WeightOnlyConfig)
    assert list(dict.fromkeys(told)) == [  # torch's logger may hand a record on as well
        (ours, "DEBUG", "torchao.kernel: Failed to load it"),
        (ours, "ERROR", "torchao: broken"),
        (ours, "DEBUG", f"{pytree.name}: {about} is an Enum"),
        (pytree.name, "WARNING", f"{pytest.Item} is an Enum"),
        ("torchao", "WARNING", "afterwards"),
        (pytree.name, "WARNING", f"{about} afterwards"),
    ]


def test_importing_torchao_says_nothing() -> None:
    """In a process of its own, as this one has it already."""
    command = [sys.executable, "-c", "from hvcompile.torch_private import torchao; assert torchao.is_available()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
