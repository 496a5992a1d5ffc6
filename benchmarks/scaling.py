"""What sharing one video over 1, 2, 4, 8, 16 GPUs would give: counted, modelled, and a little of it measured.

``python benchmarks/scaling.py`` prints, for each number of ranks:

- *counted* from the rewritten graph of one rank, at the full size of HunyuanVideo and 1280x720x129: operations,
  collectives, and bytes that the rank sends. Nothing is computed for this: the model has no storage, and the other
  ranks don't exist (a fake process group).
- *modelled*: seconds a step and efficiency, as operations over the rates of --linear-tflops and --attention-tflops,
  plus, for every collective, a latency and bytes over the bandwidth of a link. Nothing overlaps: an all-to-all of
  DTensor's is waited for where it stands. Keys that are passed on (--ring) are on their way while others are attended
  to; how much of it that hides was not measured, so the model hides none: what it says of a ring is the most it takes.
  What is neither product nor attention counts as nothing.
- *measured* on this machine: seconds of one rank's own program at a small size, collectives returning at once, so that
  it shows how well the work of one rank shrinks, and nothing of a network.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import DeviceMesh

from hvcompile import outputs, pipeline
from hvcompile.explanation.explain import capture
from hvcompile.graph.flops import FlopCounter
from hvcompile.graph.nodes import is_tensor
from hvcompile.journal import Declined
from hvcompile.passes.sharded_attention import ShardedAttention
from hvcompile.ranks import collectives
from hvcompile.torch_private.fakes import numel_hint, value
from hvcompile.trunk.outline import recover
from hvcompile.trunk.trunk import Trunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """How ranks are joined: what one of them sends a second, and what a collective costs before the first byte."""

    name: str
    bytes_a_second: float
    latency_seconds: float


LINKS = (
    # Of each vendor's one-way bandwidth a GPU, four fifths, which is what large all-to-alls reach at best.
    Link(name="NVLink 4 (H100, 450 GB/s)", bytes_a_second=0.8 * 450e9, latency_seconds=20e-6),
    Link(name="PCIe 5 x16 (64 GB/s)", bytes_a_second=0.8 * 64e9, latency_seconds=30e-6),
    Link(name="InfiniBand NDR (50 GB/s a GPU)", bytes_a_second=0.8 * 50e9, latency_seconds=40e-6),
)
ATTENTION = "scaled_dot_product_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """What one of so many ranks does in a computed step, as counted; ``reason`` where the work can't be shared so."""

    ranks: int
    reason: str = ""
    linear_flops: int = 0
    attention_flops: int = 0
    collectives: int = 0
    bytes_sent: int = 0

    def seconds(self, link: Link, linear_tflops: float, attention_tflops: float) -> float:
        """The modelled time of a step."""
        computing = self.linear_flops / (linear_tflops * 1e12) + self.attention_flops / (attention_tflops * 1e12)
        return computing + self.collectives * link.latency_seconds + self.bytes_sent / link.bytes_a_second


def count(trunk: Trunk, ranks: int) -> Share:
    """Count one rank's program: each body as often as it is called, and the graph around."""
    graphs = [trunk.graph, *(block.body.module.graph for block in trunk.blocks)]
    products = [node for graph in graphs for node in graph.nodes if node.op in {"call_function", "call_method"}]
    exchanged = [sent(node, ranks) for node in products]
    attention = [node for node in products if ATTENTION in str(node.target)]
    counter = FlopCounter()
    return Share(
        ranks=ranks,
        linear_flops=sum(counter.arithmetic(node) for node in products if "linear" in str(node.target)),
        attention_flops=sum(map(counter.arithmetic, attention)),
        collectives=sum(size > 0 for size in exchanged),
        bytes_sent=sum(exchanged),
    )


def sent(node: fx.Node, ranks: int) -> int:
    """Bytes that a rank sends for one operation."""
    operand = node.all_input_nodes[0] if node.all_input_nodes else None
    if operand is None or not is_tensor(operand):
        return 0
    size: int = numel_hint(value(operand)) * value(operand).element_size()
    if node.target in {collectives.pass_on, collectives.broadcast}:
        return size
    if node.target is collectives.reshard:
        columns: int = ranks // (node.args[4] if len(node.args) > 4 else 1)  # type: ignore[operator, assignment]
        return size * (columns - 1) // columns
    return size * (ranks - 1) if node.target is collectives.gather else 0


def share(captured: fx.GraphModule, ranks: int, device_type: str, ring: int | None = None) -> Share:
    """Rewrite a captured graph for the first of so many ranks, and count; they are laid out in so many rows."""
    trunk = recover(captured)
    if isinstance(trunk, Declined):
        raise SystemExit(trunk.reason)
    if ranks > 1:
        mesh = DeviceMesh.from_group(dist.new_group(list(range(ranks))), device_type)
        report = ShardedAttention(mesh=mesh, ring=ring).apply(trunk, pipeline.Context())
        if not report.applied:
            return Share(ranks=ranks, reason=report.declined[0][1])
    return count(trunk, ranks)


def transformer(config: dict[str, Any], device: str, dtype: torch.dtype) -> torch.nn.Module:
    """A HunyuanVideo transformer with random weights, or none on the meta device."""
    from diffusers import HunyuanVideoTransformer3DModel

    with torch.device(device):
        model: torch.nn.Module = HunyuanVideoTransformer3DModel(**config)
    return model.to(dtype).eval().requires_grad_(False)


def inputs(model: torch.nn.Module, latent: tuple[int, int, int], text: int, device: str) -> dict[str, Any]:
    """A call's arguments: latent frames, rows and columns, and tokens of text."""
    config: Any = model.config
    dtype = next(model.parameters()).dtype
    generator = None if device == "meta" else torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return {
        "hidden_states": normal(1, config.in_channels, *latent),
        "timestep": torch.full((1,), 900.0, device=device),
        "encoder_hidden_states": normal(1, text, config.text_embed_dim),
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.int64, device=device),
        "pooled_projections": normal(1, config.pooled_projection_dim),
        "guidance": torch.full((1,), 6000.0, device=device),
        "return_dict": False,
    }


def hvfast(model: torch.nn.Module, options: Any) -> Any:
    """``torch.compile``, whose annotations don't know nested options."""
    return torch.compile(model, backend="hvfast", fullgraph=True, options=options)


def full_size(ranks: list[int], ring: int | None) -> list[Share]:
    """Count at 20 dual and 40 single blocks, 1280x720x129."""
    model = transformer({}, "meta", torch.bfloat16)
    captured = capture(model, **inputs(model, (33, 90, 160), 256, "meta"))
    return [share(captured, number, "meta", ring) for number in ranks]


def measured(
    ranks: list[int], hidden: int, tokens: int, repeats: int, lower: str, ring: int | None = None
) -> dict[int, float]:
    """Median seconds of a step of one rank's program, at one dual and two single blocks in fp32, taken in turn."""
    heads = 16
    config: dict[str, Any] = {"num_attention_heads": heads, "attention_head_dim": hidden // heads, "num_layers": 1}
    config |= {"num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 64, "pooled_projection_dim": 64}
    half = hidden // heads // 8 * 2
    config |= {"rope_axes_dim": (hidden // heads - 2 * half, half, half)}
    model = transformer(config, "cpu", torch.float32)
    side = max(2, round((tokens / 4) ** 0.5)) * 2
    arguments = inputs(model, (4, side, side), 64, "cpu")
    runs: dict[int, Any] = {}
    for number in ranks:
        section: Any = False
        if number > 1:
            section = {"mesh": DeviceMesh.from_group(dist.new_group(list(range(number))), "cpu")}
            section |= {"ring": ring} if ring is not None else {}
        options: dict[str, Any] = {"lower": lower, "first_block_cache": False, "context_parallel": section}
        runs[number] = hvfast(copy.deepcopy(model), options)
        with torch.no_grad():
            runs[number](**arguments)
    taken: dict[int, list[float]] = {number: [] for number in ranks}
    for _ in range(repeats):
        for number, run in runs.items():
            begin = time.perf_counter()
            with torch.no_grad():
                run(**arguments)
            taken[number].append(time.perf_counter() - begin)
    return {number: statistics.median(seconds) for number, seconds in taken.items()}


def main() -> None:
    """Print the forecast; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--linear-tflops", type=float, default=600.0, help="reached by matrix products (default: 600)")
    parser.add_argument(
        "--attention-tflops",
        type=float,
        default=595.0,
        help="reached by attention (default: 595, published for cuDNN at 16k tokens on an H100)",
    )
    parser.add_argument(
        "--ring",
        type=int,
        default=None,
        help="rows between which keys are passed on (default: as few as the heads allow)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="0 measures nothing")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=1024, help="of the measured video")
    parser.add_argument("--lower", default="eager", help="eager, aot or inductor, for what is measured")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    if 1 not in given.ranks or min(given.ranks) < 1:
        raise SystemExit("--ranks must hold 1, which the others are compared with, and no number below")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=max(given.ranks), store=FakeStore())
    shares = full_size(given.ranks, given.ring)
    record: dict[str, Any] = {
        "what": "HunyuanVideo 20+40 blocks, 1280x720x129, 256 text tokens, bf16, a computed step",
        "ring": given.ring,
        "modelled_with": {
            "linear_tflops": given.linear_tflops,
            "attention_tflops": given.attention_tflops,
            "links": [dataclasses.asdict(link) for link in LINKS],
        },
        "counted": [dataclasses.asdict(item) for item in shares],
        "modelled": [],
    }
    rows = "" if given.ring is None else f", a ring of {given.ring}"
    print(f"counted for one rank, and modelled: {record['what']}{rows}")
    for item in shares:
        if item.reason:
            print(f"{item.ranks:3} ranks: not shared: {item.reason}")
            continue
        flops = item.linear_flops + item.attention_flops
        print(
            f"{item.ranks:3} ranks: {flops / 1e12:9.1f} TFLOP, {item.collectives:4} collectives, "
            f"{item.bytes_sent / 1e9:6.2f} GB sent"
        )
        for link in LINKS if item.ranks > 1 else LINKS[:1]:
            times = [one.seconds(link, given.linear_tflops, given.attention_tflops) for one in (shares[0], item)]
            efficiency = times[0] / times[1] / item.ranks
            name = link.name if item.ranks > 1 else "alone"
            print(f"           {times[1]:7.3f} s a step, efficiency {efficiency:6.1%}  {name}")
            record["modelled"].append(
                {"ranks": item.ranks, "link": name, "seconds": times[1], "efficiency": efficiency}
            )
    if given.repeats:
        taken = measured(given.ranks, given.hidden, given.tokens, given.repeats, given.lower, given.ring)
        threads = torch.get_num_threads()
        print(f"measured here, {threads} threads, width {given.hidden}, about {given.tokens} tokens, {given.lower}:")
        for number, seconds in taken.items():
            print(f"{number:3} ranks: {seconds:8.4f} s of one rank's program, {taken[1] / seconds:5.2f} times as fast")
        record["measured"] = {
            "hidden": given.hidden,
            "tokens": given.tokens,
            "lower": given.lower,
            "threads": threads,
            "seconds": {str(number): seconds for number, seconds in taken.items()},
        }
    if given.json is not None:
        outputs.write_json(json.loads(json.dumps(record)), given.json)


if __name__ == "__main__":
    main()
