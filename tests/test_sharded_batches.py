"""Batches with masks on two ranks, by family: as one rank computes them, split or left whole for a true reason."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import zoo
from oracle import first, hvfast, relative_error

import hvcompile

ROTARY = {"image_rotary_emb", "img_ids", "txt_ids"}  # of a sequence, whatever the batch
UNEVEN = {"hunyuan_video": (3, 2, 10), "mochi": (3, 2, 10), "wan_t2v": (3, 2, 10)}
"""Frames and pixels that make fifteen tokens, of which one rank holds eight."""


def batch_of(family: str, size: int, is_uneven: bool) -> dict[str, Any]:
    """Inputs of so many samples; each has noise, a prompt and a number of valid text tokens of its own."""
    each = [zoo.FAMILIES[family].inputs(seed) for seed in range(size)]
    joined: dict[str, Any] = {}
    for name, held in each[0].items():
        if name == "img_shapes":
            joined[name] = held * size
        elif name in ROTARY or not isinstance(held, torch.Tensor):
            joined[name] = held
        elif "mask" in name:
            masks = [zoo.partial_mask(zoo.TEXT, 3 + 2 * place, dtype=held.dtype) for place in range(size)]
            joined[name] = torch.cat(masks)
        elif "timestep" in name:
            joined[name] = held.expand(size).clone()
        else:
            joined[name] = torch.cat([inputs[name] for inputs in each])
    if is_uneven:
        shape = joined["hidden_states"].shape
        joined["hidden_states"] = zoo.Draw(7).normal(*shape[:2], *UNEVEN[family])
    return joined


def batches(family: str, sizes: list[int], lower: str) -> list[tuple[float, str]]:
    """The error of each batch, and what the pass said of it; each at even and, where it can be, at uneven lengths."""
    found = []
    for size in sizes:
        for is_uneven in (False, True)[: 1 + (family in UNEVEN)]:
            torch._dynamo.reset()
            model = zoo.FAMILIES[family].build()
            options = {"lower": lower, "first_block_cache": False}
            fast = hvfast(model, fullgraph=True, dynamic=False, options=options)
            inputs = batch_of(family, size, is_uneven)
            with torch.no_grad():
                error = relative_error(
                    first(fast(**inputs, return_dict=False)), first(model(**inputs, return_dict=False))
                )
            rows = hvcompile.stats(fast).journal[0]
            found.append((error, next(row.line() for row in rows if row.name == "ShardedAttention")))
    return found


DECLINED = {"mochi": "depends on data"}
FAMILIES = ["hunyuan_video", "mochi", "cogvideox", "wan_t2v", "qwen_image", "flux"]


@pytest.mark.ranks
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_on_two_ranks(family: str) -> None:
    check(family, ranks.results(ranks.launch(batches, 2, family, [2, 3], "eager")))


@pytest.mark.ranks
def test_batches_on_two_ranks_by_inductor() -> None:
    """Mochi gathers each sample's valid text inside its blocks: lengths there are known at run time alone."""
    check("mochi", ranks.results(ranks.launch(batches, 2, "mochi", [2], "inductor")))


def check(family: str, results: list[list[tuple[float, str]]]) -> None:
    assert results[0]
    assert [told for _, told in results[0]] == [told for _, told in results[1]]
    for found in results:
        for error, told in found:
            assert error < 1e-5, told
            assert DECLINED.get(family, "2 ranks share ") in told
