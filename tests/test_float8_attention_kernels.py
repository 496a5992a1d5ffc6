"""The Triton kernels of float8 attention: interpreted on a CPU against the reference, and compiled for GPUs unseen."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton_interpreter

from hvcompile.float8.attention import reference
from hvcompile.float8.format import KEY_BLOCK

REASON = triton_interpreter.reason_unavailable()
interpreted = pytest.mark.skipif(bool(REASON), reason=REASON)


def drawn(
    batch: int, heads: int, queries: int, keys: int, size: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys with an offset a channel, of which the later ones match better, so that the running maximum rises."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(batch, heads, tokens, size, generator=generator) for tokens in (queries, keys, keys)
    )
    key = key * torch.linspace(0.1, 2, keys)[:, None] + 3 * torch.randn(size, generator=generator)
    return query, key, value


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    return triton_interpreter.kernels(monkeypatch)


@interpreted
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "size"),
    [
        (1, 2, 37, 53, 64),
        (2, 1, 130, 3 * KEY_BLOCK + 1, 128),
        (1, 1, KEY_BLOCK, 2 * KEY_BLOCK, 64),
        (1, 3, 5, KEY_BLOCK - 1, 40),
        (2, 2, 1, 2, 16),
    ],
)
def test_is_the_reference(kernels: Any, batch: int, heads: int, queries: int, keys: int, size: int) -> None:
    """Odd and even lengths, several blocks, head sizes that are padded: all but bit by bit."""
    operands = drawn(batch, heads, queries, keys, size)
    out = kernels.attend(*operands, scale=size**-0.5)
    assert relative(out, reference(*operands, scale=size**-0.5)) < 1e-6
    assert out.transpose(1, 2).is_contiguous()


@interpreted
@pytest.mark.parametrize("capability", [(8, 9), (9, 0)])
def test_blocks_of_every_launch(kernels: Any, capability: tuple[int, int]) -> None:
    """Weights are quantised beside the largest so far, so the reference takes as many keys at a time."""
    operands = drawn(1, 1, 70, 2 * KEY_BLOCK + 70, 64)
    how = kernels.launch(capability)
    out = kernels.attend(*operands, scale=0.125, how=how)
    assert relative(out, reference(*operands, scale=0.125, block=how["block"])) < 1e-6


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_and_strides(kernels: Any, dtype: torch.dtype) -> None:
    """Heads side by side, as models hand them in; keys cut short, as the mask's elimination does it."""
    query, key, value = (
        item.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for item in drawn(2, 2, 33, 90, 64)
    )
    key, value = key.narrow(2, 0, 77), value.narrow(2, 0, 77)
    out = kernels.attend(query, key, value, 0.125)
    assert out.dtype == dtype
    assert relative(out, reference(query, key, value, 0.125)) < (4e-3 if dtype == torch.bfloat16 else 5e-4)


@interpreted
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the very numbers that are looked for
def test_poison_keeps_to_its_place(kernels: Any, poison: float) -> None:
    """In a query to its row, in a value to its channel, in a key to its head."""
    clean = drawn(1, 2, 9, KEY_BLOCK + 5, 64)
    before = kernels.attend(*clean, scale=0.125)
    for place, spoiled in enumerate(((0, 1, 4), (0, 1), (0, 1, slice(None), 7))):
        operands: Any = [item.clone() for item in clean]
        operands[place][0, 1, 4, 7] = poison
        out = kernels.attend(*operands, scale=0.125)
        is_spoiled = torch.zeros_like(out, dtype=torch.bool)
        is_spoiled[spoiled] = True
        assert torch.equal(out[~is_spoiled], before[~is_spoiled])
        assert not out[is_spoiled].isfinite().any()


COMPILE = """
import re
import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hvcompile.float8 import attention_triton as kernels

kernel = kernels._attend
pointers = {"query": "*fp8e4nv", "key": "*fp8e4nv", "value": "*fp8e4nv", "out": "*bf16"}
floats = ("query_scale", "key_scale", "value_mean", "value_scale")
for capability in ((8, 9), (9, 0), (10, 0)):
    how = kernels.launch(capability)
    options = {name: how.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"head_size": 128, "width": 128, "key_block": kernels.KEY_BLOCK, **how}
    kinds = {
        name: "constexpr" if name in constants else pointers.get(name, "*fp32" if name in floats else "i32")
        for name in kernel.arg_names
    }
    aligned = [name.startswith(("stride", "padded")) or kind.startswith("*") for name, kind in kinds.items()]
    source = ASTSource(
        kernel,
        kinds,
        {(kernel.arg_names.index(name),): held for name, held in constants.items()},
        {(place,): [["tt.divisibility", 16]] for place, is_so in enumerate(aligned) if is_so},
    )
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    compiled = triton.compile(source, target=target, options=options)
    products = len(re.findall(r"(?:mma|tcgen05)[^;]*(?:e4m3|f8f6f4)", compiled.asm["ptx"]))
    Path("kernel.cubin").write_bytes(compiled.asm["cubin"])
    dump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([dump, "--dump-resource-usage", "kernel.cubin"], capture_output=True, text=True, check=True)
    (stack,) = re.findall(r"STACK:(\\d+)", usage.stdout)
    print(target.arch, products, stack, compiled.metadata.shared)
"""


@pytest.mark.skipif(REASON == "triton is not installed", reason=REASON)
def test_compiles_for_gpus(tmp_path: Any) -> None:
    """No GPU is needed to compile for one: products in float8, no register spilled, and shared memory that is there."""
    environment = {key: held for key, held in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}

    ran = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    rows = [tuple(map(int, line.split())) for line in ran.stdout.splitlines()]
    assert [arch for arch, *_ in rows] == [89, 90, 100]
    for arch, products, stack, shared in rows:
        assert products >= 4
        assert stack == 0
        assert shared <= (99 if arch == 89 else 227) * 1024


def test_the_module_of_the_operator_needs_no_triton() -> None:
    """The one with the kernels is imported where one is about to run."""
    script = "import sys; sys.modules['triton'] = None; import hvcompile.float8.attention, hvcompile.passes"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, capture_output=True)
