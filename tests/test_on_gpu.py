"""What only a GPU can show: all of it is skipped where there is none. ``benchmarks/gpu.py`` times as well."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import first, relative_error
from toy import Toy, toy_inputs

from hvcompile.backend import hvfast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.xdist_group("gpu"),  # one after the other: they count the memory of the device
]
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
RIGHT = ("exact_float32", "exact_bfloat16", "cache", "float8_linears", "everything", "moved", "waits")
"""The checks of ``benchmarks/gpu.py`` that ask whether results are right, but for that of a whole pipeline."""


def script() -> Any:
    if str(BENCHMARKS) not in sys.path:
        sys.path.append(str(BENCHMARKS))
    return importlib.import_module("gpu")


@pytest.mark.parametrize("name", RIGHT)
def test_results_are_right(name: str) -> None:
    gpu = script()
    with torch.no_grad():
        row = gpu.CHECKS[name](gpu.How(device="cuda", scale="full", lower="inductor"))
    assert row["good"], row


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    """Events, streams and kernels are those of the model's device; two devices serve in turn."""
    outputs = {}
    for name in ("cuda:1", "cuda:0", "cuda:1"):
        torch._dynamo.reset()
        model = Toy(3).to(name)
        fast = torch.compile(model, backend=functools.partial(hvfast, options={"fp8": False}), fullgraph=True)
        with torch.no_grad():
            for step in range(3):
                inputs = {key: item.to(name) for key, item in toy_inputs(timestep=900.0 - step).items()}
                outputs[name] = first(fast(**inputs)).cpu()
        assert torch.cuda.current_device() == 0
    assert relative_error(outputs["cuda:1"], outputs["cuda:0"]) < 1e-5


@pytest.mark.parametrize("mode", ["exact", "default"])
def test_autocast(mode: str) -> None:
    """Under autocast to bfloat16 a model in float32 gives what it gives eagerly, within bfloat16's rounding."""
    model, inputs = Toy(3).cuda(), {key: item.cuda() for key, item in toy_inputs().items()}
    backend = functools.partial(hvfast, mode=mode, options={"fp8": False})
    fast = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert relative_error(first(fast(**inputs)).float(), first(model(**inputs)).float()) < 2e-2
