"""What float8 linear layers give: speed on a GPU against bfloat16 and torchao, and memory on any machine.

``python benchmarks/float8.py speed`` takes the full-size transformer where there is a GPU (under 10 minutes), and a
tiny one on a CPU, where it shows that all of it runs: float8 is emulated there, so its seconds mean nothing.
``python benchmarks/float8.py memory`` takes a transformer of a billion parameters, on a CPU or GPU.
Every contender has a process of its own; weights are random, drawn on the device.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import torchao
import typer
from diffusers import HunyuanVideoTransformer3DModel
from rich.console import Console
from rich.table import Table

from hvcompile.float8.weights import QuantizedWeight

CONTENDERS = ("hvfast bf16", "hvfast fp8", "torchao fp8")
SHAPES = {"960x544x61": (16, 68, 120), "1280x720x129": (33, 90, 160)}
"""Latent frames, height and width of a clip."""
TINY_SHAPES = {"tiny": (2, 6, 8)}
FULL = {"num_attention_heads": 24, "attention_head_dim": 128, "rope_axes_dim": (16, 56, 56), "text_embed_dim": 4096}
TINY = {
    **{"num_attention_heads": 2, "attention_head_dim": 32, "rope_axes_dim": (8, 12, 12), "text_embed_dim": 64},
    "num_refiner_layers": 1,
}
TEXT = 256
PRODUCTS = ("gemm", "mm_", "_mm", "matmul", "cutlass", "nvjet", "xmma", "cublas")
"""Parts of the names of kernels that are matrix products."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One contender at one model and shape."""

    contender: str
    blocks: tuple[int, int]
    shape: str
    device: str
    steps: int


@dataclasses.dataclass(kw_only=True)
class Measured:
    """What a case gave; ``failed`` says why it gave nothing.

    Attributes:
        seconds: of each step after the first two.
        compile_seconds: of the first step.
        tflops: matrix-product and attention TFLOP of a step, over its median seconds.
        peak_gib: most memory in use during steps, of the device, or resident in the process on a CPU.
        resident_gib: in use between steps.
        kernels: milliseconds of the longest kernels of a step, by name; empty on a CPU.

    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    compile_seconds: float = 0.0
    tflops: float = 0.0
    peak_gib: float = 0.0
    resident_gib: float = 0.0
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)
    failed: str = ""


def transformer(blocks: tuple[int, int], device: str, sizes: Mapping[str, Any]) -> Any:
    """Build a HunyuanVideo transformer in bfloat16 with random weights of ordinary scale, on the device."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = HunyuanVideoTransformer3DModel(num_layers=blocks[0], num_single_layers=blocks[1], **sizes)
    finally:
        torch.set_default_dtype(dtype)
    return model.eval().requires_grad_(False)


def step_inputs(model: Any, latent: tuple[int, int, int], device: str) -> dict[str, Any]:
    """One step's inputs, half of the text valid."""
    config, generator = model.config, torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)

    mask = torch.zeros(1, TEXT, device=device, dtype=torch.bfloat16)
    mask[:, : TEXT // 2] = 1
    return {
        "hidden_states": draw(1, config.in_channels, *latent),
        "timestep": torch.full((1,), 500, device=device),
        "encoder_hidden_states": draw(1, TEXT, config.text_embed_dim),
        "encoder_attention_mask": mask,
        "pooled_projections": draw(1, config.pooled_projection_dim),
        "guidance": torch.full((1,), 6000.0, device=device, dtype=torch.bfloat16),
    }


def flops(model: Any, latent: tuple[int, int, int]) -> float:
    """Operations of the blocks' products over tokens, and of attention: 2 for each multiplication and addition."""
    config = model.config
    width = config.num_attention_heads * config.attention_head_dim
    tokens = latent[0] * latent[1] * latent[2] // config.patch_size**2 // config.patch_size_t + TEXT
    per_token = (4 + 2 * config.mlp_ratio) * width**2  # q, k, v, out; both layers of the MLP
    blocks = config.num_layers + config.num_single_layers
    return float(2 * blocks * (tokens * per_token + 2 * tokens**2 * width))


def measure(case: Case) -> Measured:
    """Run one case in this process."""
    torch.manual_seed(0)
    is_gpu = case.device == "cuda"
    model = transformer(case.blocks, case.device, FULL if is_gpu else TINY)
    latent = (SHAPES | TINY_SHAPES)[case.shape]
    inputs = step_inputs(model, latent, case.device)
    if case.contender == "torchao fp8":
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

        def is_wide(module: torch.nn.Module, path: str) -> bool:
            return isinstance(module, torch.nn.Linear) and "blocks." in path and "norm" not in path

        quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=is_wide)
        model.compile()
    else:
        # The default keeps the last two blocks, which are all where so few stand for 60.
        wants = case.contender == "hvfast fp8" and {"keep_last_blocks": 2 if sum(case.blocks) > 4 else 0}
        model.compile(backend="hvfast", fullgraph=True, options={"fp8": wants, "first_block_cache": False})
    found = Measured()
    with torch.no_grad():
        for place in range(case.steps + 2):
            if place == 2:
                reset_peak(case.device)
            began = time.perf_counter()
            model(**inputs, return_dict=False)
            if is_gpu:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            if place == 0:
                found.compile_seconds = seconds
            if place >= 2:
                found.seconds.append(seconds)
        found.peak_gib = peak_gib(case.device)
        if is_gpu:
            found.kernels = kernels_of(lambda: model(**inputs, return_dict=False))
    found.resident_gib = resident_gib(case.device)
    found.tflops = flops(model, latent) / statistics.median(found.seconds) / 1e12
    return found


def kernels_of(call: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of the 25 kernels that take longest in a call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    totals = {event.key: event.self_device_time_total / 1e3 for event in profiler.key_averages()}
    return dict(sorted(totals.items(), key=lambda item: -item[1])[:25])


def reset_peak(device: str) -> None:
    """Begin to look for the peak anew; on a CPU it can't be, and is the process's."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float:
    """Most memory in use since ``reset_peak``."""
    if device == "cuda":
        return float(torch.cuda.max_memory_allocated() / 2**30)
    return _status("VmHWM")


def resident_gib(device: str) -> float:
    """Memory in use now."""
    gc.collect()
    return float(torch.cuda.memory_allocated() / 2**30) if device == "cuda" else _status("VmRSS")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**20


def in_own_process(function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
    """Call a function in a fresh process, which ends with it.

    Raises:
        TimeoutError: it took longer; the process is killed.

    """
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    try:
        return pool.submit(function, *arguments).result(timeout=seconds)
    finally:
        for process in (getattr(pool, "_processes", None) or {}).values():
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


@app.command()
def speed(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write all figures.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu; by itself the GPU where there is one.")] = "",
    steps: Annotated[int, typer.Option(help="Steps that are timed, after two that are not.", min=1)] = 3,
    timeout: Annotated[float, typer.Option(help="Seconds that one case may take.", min=1)] = 240,
) -> None:
    """Seconds a step, TFLOP/s, memory and kernels: dual and single blocks by themselves, then the whole transformer."""
    console = Console()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        console.print(
            "No GPU: this runs a transformer of width 64 to show that it runs. On a GPU of compute capability 8.9 or "
            "newer it would measure 2 dual, 2 single, and all 20 + 40 blocks of width 3072 at 960x544x61 and "
            "1280x720x129, and name the kernels."
        )
    depths = ((2, 0), (0, 2), (20, 40)) if device == "cuda" else ((0, 2),)  # one kind of block to compile
    shapes = SHAPES if device == "cuda" else TINY_SHAPES
    rows: list[dict[str, Any]] = []
    for blocks, shape, contender in _cases(depths, shapes):
        case = Case(contender=contender, blocks=blocks, shape=shape, device=device, steps=steps)
        try:
            found = in_own_process(measure, case, seconds=timeout)
        except TimeoutError:
            found = Measured(failed=f"took longer than {timeout:g} s")
        except Exception as error:  # whatever a contender fails with is its row
            found = Measured(
                failed=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            )
        rows.append(dataclasses.asdict(case) | dataclasses.asdict(found))
        console.print(f"{contender}, {blocks[0]}+{blocks[1]} blocks, {shape}: {_summary(found)}")
        if json_file is not None:
            write(json_file, {"command": "speed", **environment(device), "rows": rows})
    console.print(speed_table(rows))


def _cases(depths: Sequence[tuple[int, int]], shapes: Mapping[str, Any]) -> Iterator[tuple[tuple[int, int], str, str]]:
    for blocks in depths:
        for shape in shapes:
            for contender in CONTENDERS:
                yield blocks, shape, contender


def _summary(found: Measured) -> str:
    return found.failed or f"{statistics.median(found.seconds):.4g} s a step, {found.tflops:.4g} TFLOP/s"


def speed_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows as a table; ratios are against bfloat16 of the same run."""
    table = Table(
        "blocks", "shape", "contender", "s a step", "ratio", "TFLOP/s", "peak GiB", "resident GiB", "products"
    )
    for row in rows:
        name = f"{row['blocks'][0]}+{row['blocks'][1]}"
        if row["failed"]:
            table.add_row(name, row["shape"], row["contender"], row["failed"])
            continue
        base = [item for item in rows if (item["blocks"], item["shape"]) == (row["blocks"], row["shape"])]
        seconds = statistics.median(row["seconds"])
        other = next((item for item in base if item["contender"] == CONTENDERS[0] and not item["failed"]), None)
        ratio = f"{statistics.median(other['seconds']) / seconds:.3f}" if other else ""
        products = [kernel for kernel in row["kernels"] if any(part in kernel.lower() for part in PRODUCTS)]
        memory = (f"{row['peak_gib']:.2f}", f"{row['resident_gib']:.2f}")
        longest = products[0][:60] if products else ""
        table.add_row(
            name, row["shape"], row["contender"], f"{seconds:.4g}", ratio, f"{row['tflops']:.4g}", *memory, longest
        )
    return table


@app.command()
def memory(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write all figures.")] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu; by itself the GPU where there is one.")] = "",
    blocks: Annotated[tuple[int, int], typer.Option(help="Dual and single blocks of width 3072.")] = (3, 3),
) -> None:
    """Memory of a transformer of a billion parameters before and after, and after three further shapes."""
    console = Console()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    figures = in_own_process(measure_memory, blocks, device, seconds=1800)
    if json_file is not None:
        write(json_file, {"command": "memory", **environment(device), **figures})
    table = Table("when", "GiB in use", "GiB of the float8 layers' weights", "ratio")
    for row in figures["rows"]:
        held, before = row["weights_gib"], figures["rows"][0]["weights_gib"]
        table.add_row(row["when"], f"{row['resident_gib']:.3f}", f"{held:.3f}", f"{held / before:.4f}")
    console.print(f"{figures['parameters'] / 1e9:.2f} billion parameters, {device}; peak {figures['peak_gib']:.3f} GiB")
    console.print(table)


def measure_memory(blocks: tuple[int, int], device: str) -> dict[str, Any]:
    """Compile with float8, without Inductor, and look at what is in use; in a process of its own."""
    model = transformer(blocks, device, {**FULL, "text_embed_dim": 64})
    trunk = [*model.transformer_blocks.named_parameters(), *model.single_transformer_blocks.named_parameters()]
    layers = [weight for name, weight in trunk if name.endswith("weight") and "norm" not in name and weight.ndim == 2]
    rows: list[dict[str, Any]] = []

    def look(when: str) -> None:
        joined = {id(item.joined): item.joined for item in layers if isinstance(item, QuantizedWeight)}
        held = sum(weight.untyped_storage().nbytes() for weight in layers)  # 0 of those that are in float8 alone
        held += sum(item.num_bytes for item in joined.values())
        rows.append({"when": when, "resident_gib": resident_gib(device), "weights_gib": held / 2**30})

    # The default keeps the last two of 60 blocks, which of these few would be a third.
    options = {"fp8": {"keep_last_blocks": 0}, "lower": "eager", "first_block_cache": False}
    look("before")
    reset_peak(device)
    model.compile(backend="hvfast", fullgraph=True, options=options)
    with torch.no_grad():
        for place, latent in enumerate(((1, 8, 12), (1, 8, 16), (2, 8, 12), (1, 12, 12))):
            model(**step_inputs(model, latent, device), return_dict=False)
            look("after the first step" if place == 0 else f"after {place} more shapes")
    count = sum(weight.numel() for weight in model.parameters())
    return {"parameters": count, "rows": rows, "peak_gib": peak_gib(device), "blocks": list(blocks)}


def environment(device: str) -> dict[str, Any]:
    """Versions, date and device of a run."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "torchao": torchao.__version__}
    return {"device": name, "date": time.strftime("%Y-%m-%d"), **versions}


def write(file: Path, figures: Mapping[str, Any]) -> None:
    """Write figures as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    app()
