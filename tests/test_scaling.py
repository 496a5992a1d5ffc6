"""The forecast: what it counts, against the numbers worked out by hand."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from hvcompile.explanation.explain import capture

FILE = Path(__file__).resolve().parent.parent / "benchmarks" / "scaling.py"
HEADS, SIZE, TEXT = 4, 8, 7
WIDTH = HEADS * SIZE
CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": HEADS,
    "attention_head_dim": SIZE,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": (4, 2, 2),
}


@pytest.fixture
def scaling() -> Iterator[Any]:
    """The benchmark as a module, in a fake group of four."""
    spec = importlib.util.spec_from_file_location("scaling", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield module
    dist.destroy_process_group()


def test_collectives_and_bytes_are_those_of_ulysses(scaling: Any) -> None:
    """18 video tokens over 1, 2 and 4 ranks, in bf16; 3 can't share four heads and pass on keys, 4 can do both."""
    model = scaling.transformer(CONFIG, "meta", torch.bfloat16)
    captured = capture(model, **scaling.inputs(model, (3, 4, 6), TEXT, "meta"))
    shares = [scaling.share(captured, ranks, "meta") for ranks in (1, 2, 3, 4)]
    one, *others = [shares[0], shares[1], shares[3]]
    token, blocks, refiner = 2 * WIDTH, 3, 4 * TEXT * TEXT * WIDTH  # the refiner's, before the blocks, on every rank
    # What the first rank sends, sample, timestep and guidance, and then each rank to the others: how far it was off,
    # and a hash in three numbers of each of the text, its pooled form and its mask.
    shared, sample, apart = 3 + 1, 2 * 4 * (3 * 4 * 6) + 4 + 4, (3 + 3 * 3) * 4
    local, keys = 6, 18 + TEXT
    assert shares[2].collectives == 2 * blocks + 1 + shared
    assert shares[2].bytes_sent == blocks * 2 * 2 * local * token + local * token * 2 + sample + apart * 2
    assert shares[2].attention_flops == blocks * 4 * (local + TEXT) * keys * WIDTH + refiner
    both, local, stretch = scaling.share(captured, 4, "meta", 2), 5, 10
    exchanged = (3 * local + local + TEXT) * token // 2  # with one other rank
    assert both.collectives == 3 * blocks + 1 + shared
    sent = blocks * (exchanged + 2 * stretch * token // 2) + local * token * 3
    assert both.bytes_sent == sent + sample + apart * 3
    assert both.attention_flops == blocks * 4 * (stretch + TEXT) * keys * WIDTH // 2 + refiner
    assert (one.collectives, one.bytes_sent) == (0, 0)
    for item in others:
        local = -(-18 // item.ranks)
        # query, key and value of the local tokens; the result of everyone's tokens and text, of a share of the heads
        an_attention = (3 * local + local + TEXT) * token * (item.ranks - 1) // item.ranks
        assert item.collectives == 2 * blocks + 1 + shared
        gathered = (local * token + apart) * (item.ranks - 1)
        assert item.bytes_sent == blocks * an_attention + gathered + sample
        queries = 18 + TEXT
        assert item.attention_flops == blocks * 4 * queries * queries * WIDTH // item.ranks + refiner
        assert one.linear_flops / item.ranks < item.linear_flops < one.linear_flops


def test_more_link_is_less_time(scaling: Any) -> None:
    share = scaling.Share(ranks=8, linear_flops=10**15, attention_flops=10**15, collectives=121, bytes_sent=19 * 10**9)
    times = [share.seconds(link, 500.0, 500.0) for link in scaling.LINKS]
    assert times == sorted(times)
    assert times[0] == pytest.approx(4.0 + 121 * 20e-6 + 19 / 360)
