"""What attention that skips blocks of keys costs beside dense attention: alone, in a whole step, and making its lists.

``python benchmarks/sparse.py --json FILE`` measures all of it in one run, on the CPU, in turn, and takes the least of
some repeats. Results are compared with a dense computation under the same mask first, and a wrong one ends the run.
``--tokens 1024 --repeats 1`` tries it out. Seconds are wall clock: run it on a machine that does nothing else.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import HunyuanVideoTransformer3DModel
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from hvcompile.graph import block_lists, tiles
from hvcompile.graph.block_sparse import attend_in_blocks

GRIDS = {1024: (4, 16, 16), 4096: (8, 16, 32), 8192: (16, 16, 32), 16384: (16, 32, 32)}
"""Frames, height and width in tokens, by how many they are."""
TILE, BLOCK = (4, 4, 8), 128
HEADS, SIZE, TEXT = 2, 64, 256
DENSITY = 0.25
WINDOWS = {1024: (1, 1, 1), 4096: (1, 3, 3), 8192: (1, 5, 5), 16384: (3, 3, 3)}
MODEL: Mapping[str, Any] = {
    **{"num_attention_heads": HEADS, "attention_head_dim": SIZE, "rope_axes_dim": (16, 24, 24)},
    **{"num_layers": 1, "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 64},
}
BOUND = 1e-5
app, out = typer.Typer(add_completion=False, pretty_exceptions_enable=False), Console(highlight=False)


def least(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least seconds of each call, which take turns; each has run once before."""
    best = dict.fromkeys(calls, float("inf"))
    for number in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if number:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def require(what: str, error: float, bound: float = BOUND) -> None:
    """End the run where a result is wrong."""
    if not error <= bound:
        raise SystemExit(f"{what} is wrong: off by {error:g}, {bound:g} is allowed")


def check(query: Any, key: Any, value: Any, mask: torch.Tensor, found: torch.Tensor) -> None:
    """Hold some rows against a plain softmax in float64 under the mask."""
    rows = torch.arange(64) * query.shape[2] // 64
    fine = mask[0, 0][rows // BLOCK].repeat_interleave(BLOCK, 1)
    scores = (query[:, :, rows].double() @ key.double().mT * SIZE**-0.5).masked_fill(~fine, -torch.inf)
    expected = scores.softmax(-1) @ value.double()
    require("attention", float((found[:, :, rows] - expected).abs().max() / expected.abs().max()))


def attention(tokens: int, repeats: int, dtype: torch.dtype) -> dict[str, float]:
    """Dense attention, attention to a quarter of the blocks, and what the lists of each rule cost."""
    torch.manual_seed(tokens)
    query, key, value = (torch.randn(1, HEADS, tokens, SIZE) for _ in range(3))
    count, grid = tokens // BLOCK, GRIDS[tokens]
    scores = torch.rand(1, 1, count, count)
    mask = scores.argsort(-1).argsort(-1) < DENSITY * count
    lists = tiles.lists_of(mask)
    check(query, key, value, mask, attend_in_blocks(query, key, value, *lists, BLOCK, SIZE**-0.5, 0)[0])
    operands = [item.to(dtype) for item in (query, key, value)]
    near, (spatial, temporal) = (
        block_lists.neighbours(grid, TILE, (1, 1, 1), "cpu")[0],
        tiles.profile_masks(grid, TILE, (1, 3, 3)),
    )
    given = operands[0], operands[1]
    return least(
        {
            "dense": lambda: scaled_dot_product_attention(*given, operands[2]),
            "sparse": lambda: attend_in_blocks(*operands, *lists, BLOCK, SIZE**-0.5, 0),
            "lists by mass": lambda: block_lists.mass_lists(*given, near, BLOCK, SIZE**-0.5, 0.9, 0.05),
            "lists by profile": lambda: block_lists.profile_lists(*given, spatial, temporal, BLOCK, SIZE**-0.5, 64),
        },
        repeats,
    )


def step_inputs(tokens: int) -> dict[str, Any]:
    """One step's inputs; half of the text is valid."""
    frames, height, width = GRIDS[tokens]
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width),
        "timestep": torch.full((1,), 500),
        "encoder_hidden_states": torch.randn(1, TEXT, 64),
        "encoder_attention_mask": (torch.arange(TEXT) < TEXT // 2)[None].float(),
        "pooled_projections": torch.randn(1, 768),
        "guidance": torch.full((1,), 6000.0),
        "return_dict": False,
    }


def step(tokens: int, repeats: int, lower: str) -> dict[str, float]:
    """A whole step of a small HunyuanVideo, dense and with the window rule; the share of pairs that are computed."""
    torch.manual_seed(0)
    model: Any = HunyuanVideoTransformer3DModel(**MODEL).eval().requires_grad_(False)
    given, contenders = step_inputs(tokens), dict[str, Any]()
    for name, options in (("dense", None), ("sparse", WINDOWS[tokens]), ("all", (99, 99, 99))):
        plain: dict[str, Any] = {"lower": lower, "first_block_cache": False}
        sparse: dict[str, Any] = (
            {} if options is None else {"sparse_attention": {"rule": "window", "tile": TILE, "window": options}}
        )
        torch._dynamo.reset()
        contenders[name] = torch.compile(model, backend="hvfast", options=plain | sparse)
        contenders[name](**given)
    dense, every = (contenders[name](**given)[0] for name in ("dense", "all"))
    require("a step at density 1", float((dense - every).abs().max() / dense.abs().max()), 1e-4)
    del contenders["all"]
    mask = tiles.window_mask(GRIDS[tokens], TILE, WINDOWS[tokens])
    times = least({name: functools.partial(run, **given) for name, run in contenders.items()}, repeats)
    return {**times, "pairs computed": tiles.num_reads(mask, BLOCK, tokens) / tokens**2}


@app.command()
def main(
    tokens: Annotated[list[int] | None, typer.Option(help="1024, 4096, 8192 or 16384; may be repeated.")] = None,
    repeats: Annotated[int, typer.Option(help="Of each measurement; the least counts.")] = 3,
    lower: Annotated[str, typer.Option(help="What takes the graph of a step: inductor, aot or eager.")] = "eager",
    steps: Annotated[bool, typer.Option(help="Whether whole steps are measured.")] = True,
    file: Annotated[Path | None, typer.Option("--json", help="Where figures go.")] = None,
) -> None:
    """Measure, print a table and write the figures."""
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = []
    for number in tokens or [4096, 8192, 16384]:
        for dtype in (torch.float32, torch.bfloat16):
            kind = f"attention, {str(dtype).removeprefix('torch.')}, {DENSITY:.0%} of the blocks"
            rows.append({"tokens": number, "what": kind, **attention(number, repeats, dtype)})
        if steps:
            rows.append({"tokens": number, "what": f"step, float32, {lower}", **step(number, repeats, lower)})
    table = Table("tokens", "what", "dense s", "sparse s", "faster", "mass", "profile", "pairs")
    for row in rows:
        made = [
            f"{row[name] / row['dense']:.1%}" if name in row else "" for name in ("lists by mass", "lists by profile")
        ]
        pairs = f"{row['pairs computed']:.1%}" if "pairs computed" in row else ""
        times = [f"{row['dense']:.3f}", f"{row['sparse']:.3f}", f"{row['dense'] / row['sparse']:.2f}"]
        table.add_row(str(row["tokens"]), row["what"], *times, *made, pairs)
    out.print(table)
    if file is not None:
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg()}
        file.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    app()
