"""What memory it takes to load a model with float8 weights, beside one in bfloat16, each in a process of its own.

    python benchmarks/saved_float8.py [--folder DIR]

makes a HunyuanVideo of 0.98 billion random weights, quantises it on the CPU, saves it both ways, and loads each. The
folder takes 3.1 GB; it is a temporary one unless it is named.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE = {"num_attention_heads": 16, "attention_head_dim": 128, "num_layers": 4, "num_single_layers": 6}
GIB = 2**30


def make(folder: Path) -> None:
    """Build, save in bfloat16, quantise, save in float8."""
    import torch
    from diffusers import HunyuanVideoTransformer3DModel

    import hvcompile

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model: Any = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, text_embed_dim=64, pooled_projection_dim=64, num_refiner_layers=1, **SHAPE
    )
    model.requires_grad_(False).eval().save_pretrained(folder / "bf16", max_shard_size="100GB")
    options = {"lower": "eager", "fp8": True, "first_block_cache": False}
    model.compile(backend="hvfast", options=options)
    with torch.no_grad():
        model(
            hidden_states=torch.randn(1, 4, 2, 8, 8),
            timestep=torch.tensor([900]),
            encoder_hidden_states=torch.randn(1, 16, 64),
            encoder_attention_mask=torch.ones(1, 16, dtype=torch.int64),
            pooled_projections=torch.randn(1, 64),
            guidance=torch.tensor([6000.0]),
            return_dict=False,
        )
    hvcompile.save_float8(model, folder / "float8")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def load(kind: str, folder: Path) -> None:
    """Load one of them, read every weight once, and print what that took."""
    import torch
    from diffusers import HunyuanVideoTransformer3DModel

    import hvcompile
    from hvcompile.float8.weights import QuantizedWeight

    before, begin = _peak(), time.perf_counter()
    if kind == "bf16":
        model: Any = HunyuanVideoTransformer3DModel.from_pretrained(folder / "bf16", torch_dtype=torch.bfloat16)
    else:
        model = hvcompile.load_float8(folder / "float8")
    seconds = time.perf_counter() - begin
    held = 0
    seen = set()
    for weight in model.parameters():
        parts = [weight.joined.data, weight.joined.scale] if isinstance(weight, QuantizedWeight) else [weight]
        for part in parts:
            if part.data_ptr() not in seen:
                seen.add(part.data_ptr())
                held += part.numel() * part.element_size()
                part.detach().view(torch.uint8).sum()  # so that all of it is in memory
    count = sum(weight.numel() for weight in model.parameters())
    print(json.dumps({"parameters": count, "held": held, "before": before, "peak": _peak(), "seconds": seconds}))


def main() -> None:
    """Make both, load both, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--step", choices=("make", "bf16", "float8"))
    given = parser.parse_args()
    if given.step is not None:
        make(given.folder) if given.step == "make" else load(given.step, given.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)

        def run(step: str) -> str:
            command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
            return subprocess.run(command, check=True, env=os.environ, stdout=subprocess.PIPE, text=True).stdout

        run("make")
        print("| weights | parameters | bytes held, GiB | peak resident beyond the imports, GiB | seconds |")
        print("|---|---|---|---|---|")
        for kind in ("bf16", "float8"):
            found = json.loads(run(kind).splitlines()[-1])
            peak = (found["peak"] - found["before"]) / GIB
            count, held = found["parameters"] / 1e9, found["held"] / GIB
            print(f"| {kind} | {count:.2f} billion | {held:.2f} | {peak:.2f} | {found['seconds']:.1f} |")


if __name__ == "__main__":
    main()
