"""What the tests of sharded attention run on every rank."""

from __future__ import annotations

from typing import Any

import torch
import zoo
from oracle import denoise, first, hvfast, relative_error

import hvcompile

WIDTH = 64  # four heads
DEPTH = {"num_layers": 2, "num_single_layers": 2, "width": WIDTH}


def inputs_of(family: str, valid: int | tuple[int, ...] = 5, size: tuple[int, int, int] = (3, 4, 6)) -> dict[str, Any]:
    """Inputs of a family with so many valid text tokens (one number a sample) and so many latent frames and pixels."""
    inputs = zoo.FAMILIES[family].inputs(3)
    counts = valid if isinstance(valid, tuple) else (valid,)
    draw = zoo.Draw(11)
    inputs = {
        name: torch.cat([held + 0.1 * place if held.is_floating_point() else held for place in range(len(counts))])
        for name, held in inputs.items()
    }
    shape = inputs["hidden_states"].shape
    inputs["hidden_states"] = draw.normal(*shape[:2], *size)
    inputs["timestep"] = inputs["timestep"][:1].expand(len(counts)).clone()
    inputs["encoder_attention_mask"] = torch.cat([zoo.partial_mask(zoo.TEXT, count) for count in counts])
    return inputs


def equality(lower: str, cases: list[tuple[str, list[dict[str, Any]]]], cache: Any = False) -> list[float]:
    """The relative difference from one rank, in the order of the cases; families in turn, each one model."""
    found = []
    for family, calls in cases:
        model = zoo.FAMILIES[family].build(**DEPTH)
        options = {"lower": lower, "first_block_cache": cache, "context_parallel": True}
        fast = hvfast(model, fullgraph=True, options=options)
        for call in calls:
            inputs = inputs_of(family, **call)
            with torch.no_grad():
                expected = first(model(**inputs, return_dict=False))
                actual = first(fast(**inputs, return_dict=False))
            assert bool(expected.isfinite().all())
            found.append(relative_error(actual, expected))
        torch._dynamo.reset()
    return found


def decisions(lower: str, thresholds: list[float], **fields: Any) -> list[tuple[list[bool], list[bool], float]]:
    """Thirty steps at each threshold: decisions of all ranks together, those of one rank, and how the samples differ."""
    found = []
    for threshold in thresholds:
        runs = []
        for parallel in (True, False):
            torch._dynamo.reset()
            cache = {"threshold": threshold, **fields}
            options = {"lower": lower, "first_block_cache": cache, "context_parallel": parallel}
            fast = hvfast(zoo.FAMILIES["hunyuan_video"].build(**DEPTH), fullgraph=True, options=options)
            last = [False]

            def was_reused(fast: Any = fast) -> bool:
                return hvcompile.stats(fast).steps[-1].reused

            inputs = inputs_of("hunyuan_video", size=(3, 4, 10))
            runs.append(denoise(fast, inputs, was_reused=was_reused))
            del last
        found.append((runs[0].reused, runs[1].reused, relative_error(runs[0].sample, runs[1].sample)))
    return found
