"""Triton's kernels on a CPU: its interpreter, switched on by ``conftest.py``, with casts to float8 that are right.

The interpreter of Triton 3.6 to 3.9 loses the carry where a mantissa rounds up to the next power of two, does not
round subnormal numbers, reads float8's NaN as 480, and cuts bfloat16 off. A GPU casts as ``torch.Tensor.to`` does.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import numpy as np
import pytest
import torch


def reason_unavailable() -> str:
    """Why no kernel can be interpreted here; empty where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "triton compiles for the GPU that is here"
    from importlib.metadata import version

    old = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
    if old and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        return "the interpreter of Triton before 3.7 makes numbers of arrays as numpy 2.4 no longer does"
    return ""


def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module with the kernels, interpreted."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    narrow = {tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8), tl.bfloat16: (torch.bfloat16, torch.uint16)}

    def converted(given: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.float32 and target in narrow:
            dtype, bits = narrow[target]
            return torch.from_numpy(np.ascontiguousarray(given)).to(dtype).view(bits).numpy()
        if source == tl.float8e4nv and target == tl.float16:
            held = torch.from_numpy(np.ascontiguousarray(given).view(np.uint8))
            return held.view(torch.float8_e4m3fn).to(torch.float16).numpy().view(np.uint16)
        return convert(given, source, target, rounding)

    monkeypatch.setattr(interpreter, "_convert_float", converted)

    from hvcompile.float8 import attention_triton

    return attention_triton
