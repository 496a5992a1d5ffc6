"""What attention costs: by kernel at the full model's shapes, and in a step of the whole transformer beside diffusers'.

``python benchmarks/attention.py --json FILE`` is to take under 10 minutes on an H200: it measures the peak of matrix
products, then attention as diffusers does it (with the mask of padding) and without the mask by each kernel, in float8
too, then steps of the 20+40-block transformer with random weights. What ``--budget`` leaves no time for is a row that
says so; cases stand in the order in which they matter. On a CPU all of it runs at tiny sizes, to show that it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from float8 import FULL, TEXT, TINY, TINY_SHAPES, environment, flops, in_own_process, step_inputs, transformer, write
from rich.console import Console
from rich.table import Table
from torch import nn

import hvcompile
from hvcompile.float8 import attention as float8_attention
from hvcompile.float8 import format as float8_format
from hvcompile.graph.attention_kernels import KERNELS, describe, pinned, refusal

SHAPES = {"1280x720x129": (33, 90, 160), "960x544x129": (33, 68, 120), "960x544x61": (16, 68, 120)}
"""Latent frames, height and width of a clip."""
VALID_TEXT = TEXT // 2
MASKED, FLOAT8, FA3 = "masked, as diffusers does it", "float8, Triton", "float8, FA3 (fa3-fwd)"
DIFFUSERS = "diffusers, torch.compile block by block"
STEPS: Mapping[str, Mapping[str, Any]] = {
    DIFFUSERS: {},
    "hvfast, exact": {"fp8": False},
    "hvfast, float8 attention": {"fp8": False, "attention": {"fp8": True}},
    "hvfast, float8 linears": {"fp8": True},
    "hvfast, float8 linears and attention": {"fp8": True, "attention": {"fp8": True}},
}
"""Who computes a step, with hvfast's options; every step computes all blocks."""
LAUNCHES = tuple(
    {"query_block": rows, "block": keys, "num_warps": warps, "num_stages": stages}
    for rows, keys, warps, stages in (
        (128, 128, 8, 3),
        (128, 128, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 4, 3),
        (64, 128, 4, 3),
    )
)
MATH_GIB = 40.0
"""Scores in float32 that the math kernel may make, which holds all of them at once, and twice."""


@dataclasses.dataclass(kw_only=True)
class Row:
    """One case: what ran, at which shape, the seconds of each call, its operations, and how far off it is.

    ``error`` is the norm of the difference to masked attention over its norm; ``failed`` says why there are no figures.
    """

    part: str
    contender: str
    shape: str
    seconds: list[float] = dataclasses.field(default_factory=list)
    flops: float = 0.0
    error: float | None = None
    peak_gib: float | None = None
    compile_seconds: float | None = None
    failed: str = ""

    @property
    def tflops(self) -> float:
        """TFLOP/s of the median call."""
        return self.flops / statistics.median(self.seconds) / 1e12


def timed(call: Callable[[], object], device: str, seconds: float = 0.5, most: int = 10) -> list[float]:
    """Seconds of some calls after one that is not timed: at least two, until they took so long together."""
    call()
    found: list[float] = []
    while len(found) < 2 or (sum(found) < seconds and len(found) < most):
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        found.append(time.perf_counter() - began)
    return found


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def message(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"[:300]


def peaks(device: str) -> Iterator[Row]:
    """The matrix products that the others are shares of: square, in bfloat16 and in float8 with one scale."""
    size = 8192 if device == "cuda" else 256
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    low, one = [item.to(float8_format.DTYPE) for item in (left, right)], torch.ones((), device=device)
    products: dict[str, Callable[[], object]] = {
        "bfloat16": lambda: left @ right,
        "float8": lambda: hvcompile.torch_private.kernels.scaled_mm(low[0], low[1].t(), one, one, None, torch.bfloat16),
    }
    for name, product in products.items():
        row = Row(part="product", contender=name, shape=f"{size} x {size} x {size}", flops=2.0 * size**3)
        try:
            row.seconds = timed(product, device)
        except Exception as error:  # whatever it is, it is this row's
            row.failed = message(error)
        yield row


def fa3(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """FlashAttention-3 on float8 operands with a scale a head, quantised as they come; keys less their mean."""
    from fa3_fwd_interface import flash_attn_func

    operands, scales = [], []
    for item in (query, key - key.mean(2, keepdim=True), value):
        step = item.abs().amax((2, 3)).float().clamp_min(float8_format.SMALLEST_MAGNITUDE) / float8_format.LARGEST
        operands.append((item / step[:, :, None, None]).to(float8_format.DTYPE).transpose(1, 2).contiguous())
        scales.append(step)
    out = flash_attn_func(*operands, softmax_scale=scale, q_descale=scales[0], k_descale=scales[1], v_descale=scales[2])
    result: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return result.transpose(1, 2)


def attentions(shape: str, latent: tuple[int, int, int], device: str, is_swept: bool) -> Iterator[Row]:
    """Attention of one block: masked, by each kernel, in float8."""
    config: Mapping[str, Any] = FULL if device == "cuda" else TINY
    heads, size = config["num_attention_heads"], config["attention_head_dim"]
    video = latent[0] * latent[1] * latent[2] // 4
    generator = torch.Generator(device).manual_seed(0)
    tokens, valid = video + TEXT, video + VALID_TEXT
    query, key, value = (
        torch.randn(1, tokens, heads, size, device=device, dtype=torch.bfloat16, generator=generator).transpose(1, 2)
        for _ in range(3)
    )
    mask = (torch.arange(tokens, device=device) < valid)[None, None, None]
    near, near_values = key.narrow(2, 0, valid), value.narrow(2, 0, valid)
    scale = size**-0.5
    kind = describe(query, key, value, has_mask=False)

    calls: dict[str, Callable[[], torch.Tensor] | str] = {
        MASKED: lambda: nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask),
        "no mask, torch's choice": lambda: nn.functional.scaled_dot_product_attention(query, near, near_values),
    }
    for kernel in KERNELS[1:]:
        reason = refusal(kernel, kind)
        scores = 4 * heads * tokens * valid / 2**30
        if kernel == "math" and scores > MATH_GIB:
            reason = f"its scores take {scores:.0f} GiB"
        run = pinned(kernel, device, torch.bfloat16)
        calls[f"no mask, {kernel}"] = reason or functools.partial(run, query, near, near_values, None, False, scale)
    calls[FLOAT8 if device == "cuda" else "float8, emulated"] = lambda: float8_attention.attend(
        query, near, near_values, scale
    )
    has_fa3 = device == "cuda" and importlib.util.find_spec("fa3_fwd_interface") is not None
    calls[FA3] = (lambda: fa3(query, near, near_values, scale)) if has_fa3 else "fa3-fwd is not installed, or no GPU"
    if is_swept and device == "cuda":
        from hvcompile.float8 import attention_triton

        for how in LAUNCHES:
            name = f"{FLOAT8}, {'/'.join(map(str, how.values()))}"
            calls[name] = functools.partial(attention_triton.attend, query, near, near_values, scale, how)

    exact: torch.Tensor | None = None
    for name, call in calls.items():
        row = Row(part="attention", contender=name, shape=shape, flops=4.0 * heads * size * tokens * valid)
        if isinstance(call, str):
            row.failed = call
        else:
            try:
                row.seconds = timed(call, device)
                out = call()[:, :, :video].float()
                exact = out if exact is None else exact
                row.error = ((out - exact).norm() / exact.norm()).item()
                del out
            except Exception as error:  # whatever it is, it is this row's
                row.failed = message(error)
        yield row


def measure_attention(shape: str, latent: tuple[int, int, int], device: str, is_swept: bool) -> list[Row]:
    """Attention at one shape, in a process of its own."""
    return list(attentions(shape, latent, device, is_swept))


def measure_step(contender: str, shape: str, latent: tuple[int, int, int], device: str, lower: str) -> Row:
    """Steps of the whole transformer, in a process of its own."""
    torch.manual_seed(0)
    is_gpu = device == "cuda"
    blocks = (20, 40) if is_gpu else (2, 2)
    model = transformer(blocks, device, FULL if is_gpu else TINY)
    inputs = step_inputs(model, latent, device)
    if contender == DIFFUSERS:
        model.compile_repeated_blocks(backend={"aot": "aot_eager"}.get(lower, lower), fullgraph=True)
    else:
        options = {**STEPS[contender], "first_block_cache": False, "lower": lower}
        model.compile(backend="hvfast", fullgraph=True, options=options)
    row = Row(part="step", contender=contender, shape=shape, flops=flops(model, latent))
    with torch.no_grad():
        began = time.perf_counter()
        model(**inputs, return_dict=False)
        synchronize(device)
        row.compile_seconds = time.perf_counter() - began
        row.seconds = timed(lambda: model(**inputs, return_dict=False), device, seconds=5, most=3)
    if is_gpu:
        row.peak_gib = torch.cuda.max_memory_allocated() / 2**30
    return row


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write all figures.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu; by itself the GPU where there is one.")] = "",
    budget: Annotated[float, typer.Option(help="Seconds after which no case begins.", min=1)] = 480,
    timeout: Annotated[float, typer.Option(help="Seconds that one case may take.", min=1)] = 200,
    lower: Annotated[str, typer.Option(help="What runs graphs: inductor, aot or eager; on a CPU eager.")] = "",
    steps: Annotated[bool, typer.Option(help="Whether the whole transformer is measured.")] = True,
) -> None:
    """Print and write peaks, attention by kernel, and steps of the whole transformer."""
    console = Console()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shapes = SHAPES if device == "cuda" else TINY_SHAPES
    lower = lower or ("inductor" if device == "cuda" else "eager")
    if device == "cpu":
        console.print(
            "No GPU: this runs tiny sizes to show that it runs, and its seconds mean nothing. On a GPU it would "
            f"measure 24 heads of 128 at {', '.join(SHAPES)}, masked, by cuDNN, flash, efficient and math, and in "
            "float8, and then steps of the 20+40-block transformer of width 3072 beside diffusers'."
        )
    began = time.monotonic()
    rows = list(peaks(device))

    def keep(found: Sequence[Row]) -> None:
        rows.extend(found)
        for row in found:
            told = row.failed or f"{statistics.median(row.seconds):.4g} s, {row.tflops:.4g} TFLOP/s"
            console.print(f"{row.part}, {row.contender}, {row.shape}: {told}")
        if json_file is not None:
            records = [dataclasses.asdict(row) for row in rows]
            write(json_file, {"command": "attention", "lower": lower, **environment(device), "rows": records})

    keep([])
    cases: list[tuple[str, str, Callable[..., Any], tuple[Any, ...]]] = []
    smallest = list(shapes)[-1]
    for shape, latent in shapes.items():
        cases.append(("attention", shape, measure_attention, (shape, latent, device, shape == smallest)))
    # The largest shape first, and there the plain contenders; each takes tens of seconds.
    order = itertools.product(shapes.items(), STEPS) if steps else ()
    wanted = sorted(order, key=lambda item: list(STEPS).index(item[1]) >= 3)
    for (shape, latent), contender in wanted:
        cases.append((contender, shape, measure_step, (contender, shape, latent, device, lower)))
    for name, shape, function, arguments in cases:
        part = "attention" if name == "attention" else "step"
        if time.monotonic() - began > budget:
            keep([Row(part=part, contender=name, shape=shape, failed=f"not run: {budget:g} s were over")])
            continue
        try:
            found = in_own_process(function, *arguments, seconds=timeout)
        except Exception as error:  # whatever it is, it is this row's
            found = Row(part=part, contender=name, shape=shape, failed=message(error))
        keep(found if isinstance(found, list) else [found])
    console.print(table(rows))


def table(rows: Sequence[Row]) -> Table:
    """The rows; ratios are of the first contender's seconds at that shape, shares of the bfloat16 product's rate."""
    made = Table("", "shape", "contender", "s", "faster by", "TFLOP/s", "of the peak", "error", "peak GiB")
    peak = next((row.tflops for row in rows if row.part == "product" and not row.failed), None)
    for row in rows:
        if row.failed:
            made.add_row(row.part, row.shape, row.contender, row.failed)
            continue
        first = next(item for item in rows if (item.part, item.shape) == (row.part, row.shape))
        ratio = statistics.median(first.seconds) / statistics.median(row.seconds) if first.seconds else None
        made.add_row(
            row.part,
            row.shape,
            row.contender,
            f"{statistics.median(row.seconds):.4g}",
            f"{ratio:.3f}" if ratio else "",
            f"{row.tflops:.4g}",
            f"{row.tflops / peak:.1%}" if peak else "",
            f"{row.error:.2g}" if row.error is not None else "",
            f"{row.peak_gib:.1f}" if row.peak_gib is not None else "",
        )
    return made


if __name__ == "__main__":
    typer.run(main)
