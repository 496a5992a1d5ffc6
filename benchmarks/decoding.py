"""A VAE's tiled decoding: eager, with its decoder compiled by Inductor, and shared by two ranks; on the CPU.

python benchmarks/decoding.py [--output decoding_cpu.json]

The VAE is HunyuanVideo's layout, narrow, with untrained weights. Rounds alternate between the ways, so that what else
the machine does falls on all; the fastest round of each counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKLHunyuanVideo

import hvcompile

ROUNDS = 4


def vae(width: int) -> AutoencoderKLHunyuanVideo:
    """Tiles of 8 x 8 latents, stride 6; ``width`` channels at full size."""
    torch.manual_seed(0)
    made = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )
    made.enable_tiling(64, 64, 16, 48, 48, 12)
    return made.eval()


def timed(call: Any) -> tuple[float, Any]:
    """Seconds, and what it gave."""
    start = time.perf_counter()
    made = call()
    return time.perf_counter() - start, made


@torch.no_grad()
def compiled(width: int, latents: torch.Tensor) -> dict[str, Any]:
    """Eager and compiled decoders of the same weights, in turns."""
    eager, fast = vae(width), vae(width)
    fast.decoder.compile(dynamic=False)
    first, made = timed(lambda: fast.decode(latents).sample)
    own = eager.decode(latents).sample
    seconds: dict[str, list[float]] = {"eager": [], "compiled": []}
    for _ in range(ROUNDS):
        seconds["eager"].append(timed(lambda: eager.decode(latents))[0])
        seconds["compiled"].append(timed(lambda: fast.decode(latents))[0])
    best = {name: min(each) for name, each in seconds.items()}
    return {
        "seconds": seconds,
        "first_call_seconds": first,
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "speedup": best["eager"] / best["compiled"],
        "relative_error": float((made - own).norm() / own.norm()),
        "largest_error": float((made - own).abs().max()),
    }


@torch.no_grad()
def shared(rank: int, place: str, width: int, latents: torch.Tensor, pipe: Any) -> None:
    """Alone and shared by two ranks, in turns; alone, the other rank waits."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    one = vae(width)
    seconds: dict[str, list[float]] = {"alone": [], "shared": []}
    own_seconds: dict[str, list[float]] = {"alone": [], "shared": []}
    own = latents
    for _ in range(ROUNDS):
        if rank == 0:
            begin = time.process_time()
            spent, own = timed(lambda: one.decode(latents).sample)
            seconds["alone"].append(spent)
            own_seconds["alone"].append(time.process_time() - begin)
        dist.barrier()
        begin = time.process_time()
        with hvcompile.share_decoding(one) as state:
            spent, made = timed(lambda: one.decode(latents).sample)
        seconds["shared"].append(spent)
        own_seconds["shared"].append(time.process_time() - begin)
        dist.barrier()
    if rank == 0:
        pipe.send(
            {
                "seconds": seconds,
                "first_ranks_processor_seconds": own_seconds,
                "speedup": min(seconds["alone"]) / min(seconds["shared"]),
                "less_processor_time": min(own_seconds["alone"]) / min(own_seconds["shared"]),
                "tiles": [state.num_tiles, state.num_own],
                "equal_bits": torch.equal(made, own),
            }
        )
    dist.destroy_process_group()


def two_ranks(width: int, latents: torch.Tensor) -> Any:
    """What the first of two processes measured."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    place = Path(f"/tmp/hvcompile_decoding_{time.time_ns()}")
    ranks = [context.Process(target=shared, args=(rank, str(place), width, latents, theirs)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = ours.recv()
    for process in ranks:
        process.join()
    place.unlink(missing_ok=True)
    return found


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    latents = torch.randn(1, 4, 3, 14, 20, generator=torch.Generator().manual_seed(0))
    found = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "width": given.width,
        "latents": list(latents.shape),
        "two_ranks": two_ranks(given.width, latents),
        "compiled": compiled(given.width, latents),
    }
    text = json.dumps(found, indent=1)
    print(text)
    if given.output is not None:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
