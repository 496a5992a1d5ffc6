"""Sparse attention on ranks that share out the heads: as on one rank, and as dense attention where all is read."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import sharded_cases as cases
import torch
import zoo
from grids import GridToy, grid_inputs
from oracle import first, hvfast, relative_error
from slow import SLOW
from test_faults import second_of_two
from torch.distributed.device_mesh import init_device_mesh

import hvcompile

ALL = {"rule": "window", "window": (99, 99, 99)}
DENSE_FIRST = {"rule": "window", "window": (1, 3, 1), "dense_steps": 1}
WINDOW = {"rule": "window", "window": (1, 3, 1)}
RULES: list[dict[str, Any]] = [
    WINDOW,
    {"rule": "radial", "width": 0.5},
    {"rule": "mass", "share": 0.5, "window": (1, 1, 1), "keep_blocks": 1},
    {"rule": "profile", "window": (1, 1, 1)},
]
TOY = ("video|text", "text|video", "video")


def model_and_inputs(name: str, batch: int) -> tuple[Any, dict[str, Any]]:
    """The toy, of two heads, by the order of its tokens; or a family, of four, with masked text."""
    if name in TOY:
        return GridToy(name, blocks=3), grid_inputs((3, 3, 5), seed=3, batch=batch)
    inputs = cases.inputs_of(name, valid=(5, 3)[:batch], size=(3, 4, 10))
    return zoo.FAMILIES[name].build(**cases.DEPTH), inputs | {"return_dict": False}


def on_ranks(cases_of: list[tuple[str, dict[str, Any]]], batch: int, cfg: bool) -> list[tuple[float, float]]:
    """For each model and rule, the relative difference from one rank's sparse attention, and from dense attention."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cfg", "sequence")) if cfg else None
    found = []
    for name, rule in cases_of:
        model, inputs = model_and_inputs(name, batch)
        with torch.no_grad():
            made = [first(model(**inputs))]
        for parallel in ({"cfg": 2, "mesh": mesh} if cfg else True, False):
            torch._dynamo.reset()
            options = {"lower": "eager", "first_block_cache": False, "context_parallel": parallel}
            fast = hvfast(model, fullgraph=True, options={**options, "sparse_attention": {"tile": (1, 2, 2), **rule}})
            with torch.no_grad():
                made.append(first(fast(**inputs)))
            reports = {row.name: row.report for row in hvcompile.stats(fast).journal[-1]}
            assert reports["SparseAttention"].applied
            assert reports["ShardedAttention"].applied == bool(parallel)
        dense, sharded, alone = made
        found.append((relative_error(sharded, alone), relative_error(sharded, dense)))
    return found


@pytest.mark.parametrize(
    ("size", "cases_of", "cfg"),
    [
        (2, [*(("video|text", rule) for rule in (ALL, *RULES)), ("text|video", WINDOW), ("video", DENSE_FIRST)], False),
        (4, [("hunyuan_video", WINDOW)], False),
        pytest.param(4, [("hunyuan_video", rule) for rule in (ALL, *RULES)], False, marks=SLOW),
        pytest.param(4, [("video|text", rule) for rule in (ALL, *RULES)], True, marks=SLOW),
    ],
    ids=["two", "four", "four, all rules", "guidance halves"],
)
def test_as_on_one_rank(size: int, cases_of: list[tuple[str, dict[str, Any]]], cfg: bool) -> None:
    """Odd numbers of tokens: the last rank holds padding. Each rule is as on one rank; of all keys, dense."""
    for found in ranks.results(ranks.launch(on_ranks, size, cases_of, 2, cfg)):
        for (_, rule), (difference, from_dense) in zip(cases_of, found, strict=True):
            assert difference < 1e-5
            assert (from_dense < 1e-5) == (rule in (ALL, DENSE_FIRST))


def test_a_ring_is_a_reason() -> None:
    model, inputs = GridToy(), grid_inputs((3, 2, 4))
    options = {"lower": "eager", "sparse_attention": WINDOW | {"tile": (2, 2, 2)}, "context_parallel": {"ring": 2}}
    reason = r"keys travel between 2 rows of ranks.*ulysses 2"
    with second_of_two(), torch.no_grad(), pytest.raises(Exception, match=reason):
        hvfast(model, fullgraph=True, options=options)(**inputs)
