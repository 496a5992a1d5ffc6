"""The first rank's sample and timestep on all: the graph, what it computes, and what is said where they differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ranks
import sharded_cases as cases
import torch.distributed as dist
from slow import SLOW
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from trunks import recovered

from hvcompile import journal, pipeline
from hvcompile.graph.nodes import op_name
from hvcompile.passes.first_block_cache import FirstBlockCache
from hvcompile.passes.sharded_attention import ShardedAttention


@pytest.fixture
def second_of_two() -> Iterator[None]:
    """Makes this process rank 1 of a group whose other rank doesn't exist."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("second_of_two")
def test_graph() -> None:
    """The sample and the timestep are sent at once; whatever read the rank's own reads those, the cache too."""
    trunk = recovered(cases.Joint(), **cases.joint_inputs())
    rows: list[journal.JournalRow] = []
    pipeline.run(trunk, [(ShardedAttention(), True), (FirstBlockCache(), True)], lambda *_: None, rows)
    work = [node for node in trunk.graph.nodes if node.op not in {"placeholder", "get_attr", "output"}]
    assert trunk.group is not None
    name = trunk.group.name  # a number, which counts the groups that the process has had
    assert [f"{op_name(node)}({', '.join(map(str, node.args))})" for node in work[:2]] == [
        f"broadcast(l_sample_, {name})",
        f"broadcast(l_timestep_, {name})",
    ]
    assert trunk.shared is not None
    (gathered,) = [node for node in work if op_name(node) == "gather" and node in _before(trunk.shared.apart)][-1:]
    assert f"{op_name(gathered)}{gathered.args[1:]}" == f"gather('{name}', 0)"
    for own, first in trunk.shared.nodes.items():
        assert all(user in _before(gathered) for user in own.users)
        assert first in work[:2]
    last_sample = next(state for state in trunk.states if state.name == "last_sample")
    (sample, _) = trunk.shared.nodes.values()
    assert last_sample.next_value is not None
    assert last_sample.next_value.args[0] is sample


def _before(node: Any) -> set[Any]:
    return set(list(node.graph.nodes)[: list(node.graph.nodes).index(node)])


class Writing(cases.Joint):
    def forward(self, sample: Any, timestep: Any, text: Any, valid: Any = None) -> Any:
        return super().forward(sample.mul_(2), timestep, text, valid)


@pytest.mark.usefixtures("second_of_two")
def test_declines_where_the_sample_is_written_to() -> None:
    """The caller would not see it: the ranks compute with copies."""
    trunk = recovered(Writing(), **cases.joint_inputs())
    report = ShardedAttention().apply(trunk, pipeline.Context())
    assert "writes into L['sample'], of which the ranks get copies" in report.declined[0][1]


class Strided(cases.Joint):
    """Joins dimensions that only the caller's memory layout allows to be joined without a copy."""

    def forward(self, sample: Any, timestep: Any, text: Any, valid: Any = None) -> Any:
        tokens = sample.permute(0, 2, 3, 1).view(sample.shape[0], -1, cases.WIDTH)
        return super().forward(tokens, timestep, text, valid).unflatten(1, sample.shape[2:]).permute(0, 3, 1, 2)


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize("build", [Strided, cases.Joint])
def test_memory_layout(build: Callable[[], nn.Module]) -> None:
    """A sample in another layout than the usual one keeps it."""
    inputs = cases.joint_inputs(tokens=12)
    if build is Strided:
        inputs["sample"] = inputs["sample"].unflatten(1, (3, 4)).permute(0, 3, 1, 2)
    else:
        inputs["sample"] = inputs["sample"].transpose(1, 2).contiguous().transpose(1, 2)
    trunk = recovered(build(), **inputs)
    assert ShardedAttention().apply(trunk, pipeline.Context()).applied


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["same", "rounding", "bf16", "nan on all"])
def test_all_compute_with_the_first_ranks(kind: str) -> None:
    """A difference as of rounding leaves no trace in the result, and is named once."""
    for errors, raised, logged in ranks.results(ranks.launch(cases.given_apart, 2, kind)):
        assert raised == ""
        assert len(errors) == 4
        if kind == "nan on all":
            assert all(math.isnan(error) for error in errors)
        else:
            assert max(errors) < 1e-5, errors
        told = [line for line in logged if "no more than rounding does" in line]
        assert len(told) == (kind in {"rounding", "bf16"})
        assert all("L['sample'] on rank 1 is off by 0.00" in line for line in told)


@pytest.mark.ranks
def test_inductor() -> None:
    for errors, raised, _ in ranks.results(ranks.launch(cases.given_apart, 2, "inductor", "inductor")):
        assert raised == ""
        assert max(errors) < 1e-5, errors


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("kind", "calls", "said"),
    [
        ("sample", 3, "2 calls ago: L['sample'] on rank 1 is off by 0.1"),
        ("cached", 3, "2 calls ago: L['sample'] on rank 1 is off by 0.1"),
        ("nan on one", 3, "2 calls ago: L['sample'] on rank 1 is off by nan (relative), allowed is 0.02"),
        ("clock", 3, "2 calls ago: L['timestep'] on rank 1 is off by 0.00118 (relative), allowed is 0"),
        ("whole clock", 3, "2 calls ago: L['timestep'] on rank 1 is off by 0.00118"),
        ("last sample", 4, "1 call ago: L['sample'] on rank 1 is off by 0.1"),
    ],
)
def test_all_stop_at_the_same_call(kind: str, calls: int, said: str) -> None:
    """Two calls after the one that differed, or when statistics are asked for; until then all have the first's."""
    for errors, raised, _ in ranks.results(ranks.launch(cases.given_apart, 2, kind)):
        assert len(errors) == calls
        assert said in raised
        assert "All have computed with what rank 0 was given. Give all of them the same" in raised
        if kind != "cached":
            assert max(errors) < 1e-5, errors


@pytest.mark.ranks
@pytest.mark.parametrize("lower", ["eager", pytest.param("inductor", marks=SLOW)])
def test_a_condition_that_one_rank_has_written_to_unseen(lower: str) -> None:
    """Its identity and version are what they were; its content is compared in every step."""
    for errors, raised, _ in ranks.results(ranks.launch(cases.given_apart, 2, "condition", lower)):
        assert len(errors) == 3
        assert "2 calls ago: L['text'] on rank 1 had other content than when the ranks compared it" in raised


@pytest.mark.ranks
def test_another_process_group() -> None:
    """Statistics are there without one; a call says what is wrong."""
    for said in ranks.results(ranks.launch(cases.group_gone, 2, ranks.free_port())):
        assert said[0] == "1"
        assert "talks to the others of process group '0', which is gone" in said[1]
        assert "compiled for rank" in said[2]
        assert "call torch.compiler.reset(), and compile again" in said[2]
        assert len(said) == 3
