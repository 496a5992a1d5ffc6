"""What all blocks apply to one embedding is computed once, before them; blocks do not join what they cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from oracle import first, hvfast, relative_error
from torch import fx, nn
from trunks import recovered

from hvcompile.graph.nodes import op_name
from hvcompile.graph.slices import undo_cuts
from hvcompile.rewriting.shared_work import share_activations
from hvcompile.torch_private import dynamo
from hvcompile.trunk.trunk import Trunk


def body_operations(trunk: Trunk) -> list[str]:
    return [op_name(node) for body in trunk.bodies for node in body.module.graph.nodes]


@pytest.mark.parametrize(
    ("family", "blocks", "bodies_left"),
    [("hunyuan_video", 7, 0), ("flux_guided", 7, 0), ("mochi", 6, 3), ("wan_t2v", 0, 0)],
)
def test_blocks_share_an_activation(family: str, blocks: int, bodies_left: int) -> None:
    known = zoo.FAMILIES[family]
    trunk = recovered(known.build(), **known.inputs(), return_dict=False)
    before = [op_name(node) for node in trunk.graph.nodes].count("silu")
    told = share_activations(trunk, "test")
    trunk.graph.lint()
    for body in trunk.bodies:
        body.module.graph.lint()
    assert [line.split()[0] for line in told] == ([str(blocks)] if blocks else [])
    assert body_operations(trunk).count("silu") == bodies_left
    assert [op_name(node) for node in trunk.graph.nodes].count("silu") == before + bool(blocks)
    assert not share_activations(trunk, "test")


def test_numerics_and_the_next_call() -> None:
    """Another timestep gives another embedding: nothing is kept."""
    family = zoo.FAMILIES["flux_guided"]
    model = family.build()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager", "first_block_cache": False})
    with torch.no_grad():
        for seed in (0, 1):
            inputs = {**family.inputs(seed), "return_dict": False}
            assert relative_error(first(fast(**inputs)), first(model(**inputs))) < 1e-6


class Sum(nn.Module):
    def __init__(self, join: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.join = join

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(x * 2) + 1


def cats(join: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[int, bool]:
    """How many joins are left of a captured graph, and whether it computes what it did."""
    left: list[int] = []

    def backend(module: fx.GraphModule, _: Any) -> Any:
        module = dynamo.clone_graph_module(module)
        nodes = [node for node in module.graph.nodes if node.op == "call_function"]
        assert set(undo_cuts(module.graph, nodes)) <= set(module.graph.nodes)
        module.graph.lint()
        module.recompile()
        left.append([op_name(node) for node in module.graph.nodes].count("cat"))
        return module.forward

    torch._dynamo.reset()
    found = torch.compile(Sum(join), backend=backend, fullgraph=True)(x)
    return left[0], torch.equal(found, Sum(join)(x))


def write_after(x: torch.Tensor) -> torch.Tensor:
    joined = torch.cat([x[:, :3], x[:, 3:]], 1)
    x.zero_()
    return joined


@pytest.mark.parametrize(
    ("join", "is_undone"),
    [
        (lambda x: torch.cat([x[:, :3], x[:, 3:]], 1), True),
        (lambda x: torch.cat([x[:, :-2, :], x[:, -2:, :]], dim=1), True),
        (lambda x: torch.cat((x[:, 0:1], x[:, 1:4], x[:, 4:]), dim=-2), True),
        (lambda x: torch.cat([x[:, 3:], x[:, :3]], 1), False),
        (lambda x: torch.cat([x[:, :3], x[:, 4:]], 1), False),
        (lambda x: torch.cat([x[:, :3], x[:, 3:5]], 1), False),
        (lambda x: torch.cat([x[:, :3], x[:, 3:], x[:, 3:]], 1), False),
        (lambda x: torch.cat([x[:, :3, :2], x[:, 3:, :2]], 1), False),
        (lambda x: torch.cat([x[:, :3], x[:, 3:]], 2 - 2) if x.shape[1] == 6 else x, False),
        (lambda x: torch.cat([x.transpose(1, 2)[:, :3], x.transpose(1, 2)[:, 3:]], 1), False),
        (write_after, False),
    ],
)
def test_what_is_joined_as_it_was_cut(join: Callable[[torch.Tensor], torch.Tensor], is_undone: bool) -> None:
    left, is_equal = cats(join, torch.randn(1, 6, 6))
    assert is_equal
    assert left == (0 if is_undone else 1)


def test_parts_that_overlap_are_left() -> None:
    """``x[:5]``, ``x[5:3]`` and ``x[3:]`` are as many as ``x`` and two more."""
    left, is_equal = cats(lambda x: torch.cat([x[:, :5], x[:, 5:3], x[:, 3:]], 1), torch.randn(1, 6, 6))
    assert (left, is_equal) == (1, True)


def test_single_stream_blocks_read_what_they_normalised() -> None:
    """HunyuanVideo's single blocks cut the joint stream for an attention that joins it, before it and after it."""
    family = zoo.FAMILIES["hunyuan_video"]
    trunk = recovered(family.build(), **family.inputs(), return_dict=False)
    single = trunk.bodies[1].module.graph
    assert [op_name(node) for node in single.nodes].count("cat") == 4  # streams; q and k with text; attention with MLP
