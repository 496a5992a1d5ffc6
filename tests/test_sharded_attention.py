"""The pass: what it makes of a graph, that ranks together give what one gives, and that no fault hangs them."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import golden
import pytest
import ranks
import sharded_cases as cases
import torch
import torch.distributed as dist
from oracle import hvfast
from slow import SLOW
from torch import fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from trunks import recovered

from hvcompile import journal, pipeline
from hvcompile.errors import OptionError
from hvcompile.graph.attention import arguments, is_part
from hvcompile.graph.nodes import op_name
from hvcompile.passes.sharded_attention import ShardedAttention
from hvcompile.passes.unmasked_attention import UnmaskedAttention
from hvcompile.torch_private import lowering
from hvcompile.torch_private.fakes import TAG, value

RING: dict[str, Any] = {"ring": 2}
BOTH: dict[str, Any] = {"ulysses": 2, "ring": 2}


@pytest.fixture
def fake_group() -> Iterator[Callable[[int, int], None]]:
    """Makes this process one rank of a group whose other ranks don't exist: collectives return at once."""

    def start(rank: int, size: int) -> None:
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def counts(graph: fx.Graph) -> collections.Counter[str]:
    return collections.Counter(op_name(node) for node in graph.nodes if node.op in {"call_function", "call_method"})


def text_of(graph: fx.Graph) -> list[str]:
    """The nodes that the pass made, and the attentions, as text."""
    lines = []
    for node in graph.nodes:
        if node.meta.get(TAG) == "ShardedAttention" or "scaled_dot_product" in op_name(node):
            args = ", ".join(map(str, node.args)).replace("slice(None, None, None)", ":")
            held = value(node) if isinstance(value(node), tuple) else [value(node)]
            held = [item for item in held if isinstance(item, torch.Tensor)]  # a hash asks for a number of elements
            lines.append(f"{op_name(node)}({args}) -> {', '.join(str(list(item.shape)) for item in held)}")
    return lines


@pytest.mark.parametrize(("ring", "layout"), [(1, "Ulysses"), (2, "a ring")])
def test_golden_text(fake_group: Callable[[int, int], None], ring: int, layout: str) -> None:
    """What the class's docstring shows."""
    fake_group(1, 2)
    trunk = recovered(cases.Joint(), **cases.joint_inputs())
    before = golden.text_of(trunk)
    ShardedAttention(ring=ring).apply(trunk, pipeline.Context())
    golden.check(ShardedAttention, before, golden.text_of(trunk), f"Result, with {layout} on rank 1 of 2")


def test_graph(fake_group: Callable[[int, int], None]) -> None:
    """Rank 1 of 2, 13 tokens: 7 each with one of padding; around the attention two redistributions, no more."""
    fake_group(1, 2)
    trunk = recovered(cases.Joint(), **cases.joint_inputs())
    rows: list[journal.JournalRow] = []
    pipeline.run(trunk, [(ShardedAttention(), True)], lambda *_: None, rows)
    lines = text_of(trunk.graph)
    entry = lines.index("pad(contiguous_1, (0, 0, 0, 1)) -> [1, 14, 64]")
    assert lines[entry : entry + 3] + lines[-3:] == [
        "pad(contiguous_1, (0, 0, 0, 1)) -> [1, 14, 64]",
        "narrow(pad, 1, 7, 7) -> [1, 7, 64]",
        "clone(narrow) -> [1, 7, 64]",
        "narrow(getitem_7, 1, 0, 7) -> [1, 7, 64]",
        "gather(narrow_3, 0, 1) -> [1, 14, 64]",
        "narrow(gather, 1, 0, 13) -> [1, 13, 64]",
    ]
    (body,) = trunk.bodies
    assert text_of(body.module.graph) == [
        "getitem(transpose, (:, :, slice(0, 7, None))) -> [1, 4, 7, 16]",
        "getitem(transpose_1, (:, :, slice(0, 7, None))) -> [1, 4, 7, 16]",
        "getitem(transpose_2, (:, :, slice(0, 7, None))) -> [1, 4, 7, 16]",
        "stack([getitem, getitem_1, getitem_2]) -> [3, 1, 4, 7, 16]",
        "reshard(stack, 0, 3, 2) -> [3, 1, 2, 14, 16]",
        "getitem(reshard, 0) -> [1, 2, 14, 16]",
        "getitem(reshard, 1) -> [1, 2, 14, 16]",
        "getitem(reshard, 2) -> [1, 2, 14, 16]",
        "getitem(getitem_3, (:, :, slice(None, 13, None))) -> [1, 2, 13, 16]",
        "getitem(getitem_4, (:, :, slice(None, 13, None))) -> [1, 2, 13, 16]",
        "getitem(getitem_5, (:, :, slice(None, 13, None))) -> [1, 2, 13, 16]",
        "getitem(transpose_1, (:, slice(2, 4, None), slice(7, 12, None))) -> [1, 2, 5, 16]",
        "cat([getitem_7, getitem_9]) -> [1, 2, 18, 16]",
        "getitem(transpose_2, (:, slice(2, 4, None), slice(7, 12, None))) -> [1, 2, 5, 16]",
        "cat([getitem_8, getitem_10]) -> [1, 2, 18, 16]",
        "scaled_dot_product_attention(getitem_6, cat, cat_1, None) -> [1, 2, 13, 16]",
        "getitem(mixed, (:, :, slice(0, 13, None))) -> [1, 2, 13, 16]",
        "pad(getitem_11, (0, 0, 0, 1)) -> [1, 2, 14, 16]",
        "unflatten(pad, 2, (2, 7)) -> [1, 2, 2, 7, 16]",
        "flatten(unflatten_3, 2, 3) -> [1, 2, 14, 16]",
        "reshard(flatten, 0, 1, 2) -> [1, 4, 7, 16]",
    ]
    assert rows[0].op_changes["reshard"] == 2
    assert rows[0].op_changes["gather"] == 1 + 1  # after the blocks, and how far the ranks' inputs are apart
    assert "2 ranks share 13 tokens (7 each, 1 of them padding)" in rows[0].report.matched[0]
    assert all("nn_module_stack" in block.call.meta for block in trunk.blocks)


def test_graph_of_a_ring(fake_group: Callable[[int, int], None]) -> None:
    """Rank 3 of 2 x 2, 13 tokens: its own stretch's keys first, then those of the first stretch, with the text."""
    fake_group(3, 4)
    trunk = recovered(cases.Joint(), **cases.joint_inputs())
    rows: list[journal.JournalRow] = []
    pipeline.run(trunk, [(ShardedAttention(ulysses=2), True)], lambda *_: None, rows)
    assert "4 ranks share 13 tokens (4 each, 3 of them padding), and ulysses x ring is 2 x 2" in rows[0].line()
    lines = text_of(trunk.bodies[0].module.graph)
    attended = [place for place, line in enumerate(lines) if line.startswith("scaled_dot")]
    assert lines[3 : attended[0]] == [
        "stack([getitem, getitem_1, getitem_2]) -> [3, 1, 4, 4, 16]",
        "reshard(stack, 0, 3, 2, 2) -> [3, 1, 2, 8, 16]",
        "getitem(reshard, 0) -> [1, 2, 8, 16]",
        "getitem(reshard, 1) -> [1, 2, 8, 16]",
        "getitem(reshard, 2) -> [1, 2, 8, 16]",
        "stack([getitem_4, getitem_5]) -> [2, 1, 2, 8, 16]",
        "pass_on(stack_1, 0, 2) -> [2, 1, 2, 8, 16]",
        "getitem(stack_1, 0) -> [1, 2, 8, 16]",
        "getitem(stack_1, 1) -> [1, 2, 8, 16]",
        "getitem(getitem_6, (:, :, slice(None, 5, None))) -> [1, 2, 5, 16]",
        "getitem(getitem_7, (:, :, slice(None, 5, None))) -> [1, 2, 5, 16]",
    ]
    assert [lines[place] for place in attended] == [
        "scaled_dot_product_attention_with_lse(getitem_3, getitem_8, getitem_9) -> [1, 2, 8, 16], [1, 2, 8]",
        "scaled_dot_product_attention_with_lse(getitem_3, cat, cat_1) -> [1, 2, 8, 16], [1, 2, 8]",
    ]
    assert "arrived(pass_on) -> [2, 1, 2, 8, 16]" in lines[attended[0] : attended[1]]
    assert lines[-1] == "reshard(flatten, 0, 1, 2, 2) -> [1, 4, 4, 16]"
    assert {name: rows[0].op_changes[name] for name in ("reshard", "pass_on", "gather")} == {
        "reshard": 2,
        "pass_on": 1,
        "gather": 1 + 1,
    }


def test_default_layout(fake_group: Callable[[int, int], None]) -> None:
    """Heads that the ranks can't share: as many of them as can do, and the journal says so."""
    fake_group(1, 6)
    trunk = recovered(cases.Joint(), **cases.joint_inputs())
    report = ShardedAttention().apply(trunk, pipeline.Context())
    assert "ulysses x ring is 2 x 3" in report.matched[0]
    assert report.noted == ("6 ranks can't share 4 heads: so 2 do, and 3 such rows pass on keys",)


def test_parts_lose_their_masks_alike_on_all_ranks(fake_group: Callable[[int, int], None]) -> None:
    """The next pass finds the parts' masks; what it says is the same on each rank, which compare it."""
    told = []
    for rank in range(3):
        fake_group(rank, 3)
        trunk = recovered(cases.Joint(), **cases.masked_inputs((3, 5)))
        rows: list[journal.JournalRow] = []
        passes: list[tuple[pipeline.Pass, bool]] = [(ShardedAttention(), True), (UnmaskedAttention(), True)]
        pipeline.run(trunk, passes, lambda *_: None, rows)
        parts = [node for node in trunk.bodies[0].module.graph.nodes if is_part(node)]
        assert len(parts) == 6  # three stretches of each of two samples
        assert not any("attn_mask" in arguments(node) for node in parts)
        told.append([row.line() for row in rows])
        UnmaskedAttention(unmask=False, kernel="math").apply(trunk, pipeline.Context())
        assert {node.kwargs["kernel"] for node in parts} == {"math"}
        dist.destroy_process_group()
    assert "attended_0 of block_0, attended_1 of block_0, attended_2 of block_0: keys end" in told[0][1]
    assert told[0] == told[1] == told[2]


def test_parts_lose_their_masks_and_get_a_kernel(fake_group: Callable[[int, int], None]) -> None:
    fake_group(0, 3)
    trunk = recovered(cases.Joint(), **cases.masked_inputs((3, 5)))
    for item in (ShardedAttention(), UnmaskedAttention(kernel="math")):
        assert item.apply(trunk, pipeline.Context()).applied
    parts = [node for node in trunk.bodies[0].module.graph.nodes if is_part(node)]
    assert len(parts) == 6
    assert not any("attn_mask" in arguments(node) for node in parts)
    assert {node.kwargs["kernel"] for node in parts} == {"math"}


def test_a_mask_for_each_head_stays_on_all_ranks(fake_group: Callable[[int, int], None]) -> None:
    """One rank's heads may all keep the first keys where another's do not, so none may go by what it sees."""

    class Heads(cases.Joint):
        def forward(self, sample: Any, timestep: Any, text: Any, valid: Any = None) -> Any:
            hidden, time = self.embed(sample), self.time(timestep[:, None].expand(1, cases.WIDTH))
            for block in self.blocks:
                hidden = block(hidden, text, time, torch.zeros_like(hidden), valid)
            return self.head(hidden)

    inputs = cases.joint_inputs() | {"valid": torch.ones(1, 4, 1, 18, dtype=torch.bool)}
    for size in (2, 4):
        fake_group(0, size)
        trunk = recovered(Heads(), **inputs)
        assert ShardedAttention(ring=1).apply(trunk, pipeline.Context()).applied
        report = UnmaskedAttention(hoist=False).apply(trunk, pipeline.Context())
        assert "its mask may differ from head to head" in report.declined[0][1]
        dist.destroy_process_group()


def test_applied_twice_changes_nothing(fake_group: Callable[[int, int], None]) -> None:
    fake_group(0, 2)
    trunk = recovered(cases.Joint(), **cases.joint_inputs())
    assert ShardedAttention().apply(trunk, pipeline.Context()).applied
    before = [str(trunk.graph), *(str(body.module.graph) for body in trunk.bodies)]
    report = ShardedAttention().apply(trunk, pipeline.Context())
    assert not report.applied
    assert "already" in report.declined[0][1]
    assert [str(trunk.graph), *(str(body.module.graph) for body in trunk.bodies)] == before


class Mixing(cases.Joint):
    """A convolution over neighbouring tokens, inside the blocks."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.add_module("mix", nn.Conv1d(cases.WIDTH, cases.WIDTH, 3, padding=1))
            block.register_forward_hook(lambda block, _, out: out + block.mix(out.transpose(1, 2)).transpose(1, 2))


class TokenBlock(nn.Sequential):
    def forward(self, hidden: Any, text: Any, time: Any, place: Any, mask: Any) -> Any:  # type: ignore[override]
        return hidden + self[0](hidden + place) * (text.mean() + time[:, None])


class Causal(cases.Joint):
    """As language models have it, of the sample's tokens alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CausalBlock(nn.Linear(cases.WIDTH, cases.WIDTH)) for _ in range(3))


class CausalBlock(nn.Sequential):
    def forward(self, hidden: Any, text: Any, time: Any, place: Any, mask: Any) -> Any:  # type: ignore[override]
        heads = self[0](hidden + place).unflatten(-1, (4, -1)).transpose(1, 2)
        mixed = torch.nn.functional.scaled_dot_product_attention(heads, heads + 1, heads * 2, is_causal=True)
        return hidden + mixed.transpose(1, 2).flatten(2) * (text.mean() + time[:, None])


class CrossCausal(cases.Joint):
    """The sample's tokens attend to text that every rank has, each to as many of it as its own place says."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CrossCausalBlock(nn.Linear(cases.WIDTH, cases.WIDTH)) for _ in range(3))


class CrossCausalBlock(nn.Sequential):
    def forward(self, hidden: Any, text: Any, time: Any, place: Any, mask: Any) -> Any:  # type: ignore[override]
        heads, keys = (item.unflatten(-1, (4, -1)).transpose(1, 2) for item in (self[0](hidden + place), text))
        mixed = torch.nn.functional.scaled_dot_product_attention(heads, keys, keys * 2, is_causal=True)
        return hidden + mixed.transpose(1, 2).flatten(2) * time[:, None]


class NoAttention(cases.Joint):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TokenBlock(nn.Linear(cases.WIDTH, cases.WIDTH)) for _ in range(3))


@pytest.mark.parametrize(
    ("build", "size", "fields", "reason"),
    [
        (cases.Joint, 1, {}, "the process group has a single rank"),
        (cases.Joint, 0, {}, "no process group is initialised"),
        (
            cases.Joint,
            3,
            {"ulysses": 3},
            "3 ranks can't share its 4 heads: allowed for ulysses is one of 1, and the rest of the 3 ranks for ring",
        ),
        (
            cases.Joint,
            4,
            {"ulysses": 3},
            "ulysses is 3, but 4 ranks share the sequence; allowed for ulysses x ring is one of 1 x 4, 2 x 2, 4 x 1",
        ),
        (
            cases.Joint,
            6,
            {"ulysses": 2, "ring": 2},
            "ulysses is 2, ring is 2, but 6 ranks share the sequence; allowed for ulysses x ring is one of 1 x 6, 2 x",
        ),
        (Mixing, 2, {}, "conv1d (conv1d of L['self'].blocks.0"),
        (NoAttention, 2, {}, "no attention"),
        (Causal, 2, {"ring": 2}, "it is causal, which a ring of parts does not keep"),
        (CrossCausal, 2, {}, "it is causal, and its queries would be counted from each rank's first"),
    ],
)
def test_declines(
    build: Callable[[], nn.Module],
    size: int,
    fields: dict[str, Any],
    reason: str,
    fake_group: Callable[[int, int], None],
) -> None:
    """The graph stays as it was, and the reason names the operation and where it stands."""
    if size:
        fake_group(0, size)
    trunk = recovered(build(), **cases.joint_inputs())
    before = [str(trunk.graph), *(str(body.module.graph) for body in trunk.bodies)]
    report = ShardedAttention(**fields).apply(trunk, pipeline.Context())
    assert not report.applied
    assert reason in report.declined[0][1].replace(".__dict__['_modules']['blocks']", ".blocks")
    assert [str(trunk.graph), *(str(body.module.graph) for body in trunk.bodies)] == before


def test_degrees_are_checked_where_only_the_batch_is_shared_out(fake_group: Callable[[int, int], None]) -> None:
    fake_group(0, 2)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("cfg", "sequence"))
    trunk = recovered(cases.Joint(), **cases.masked_inputs((3, 5)))
    report = ShardedAttention(mesh=mesh, cfg=2, ring=2).apply(trunk, pipeline.Context())
    assert (
        "ring is 2, but 1 ranks share the sequence; allowed for ulysses x ring is one of 1 x 1" in report.declined[0][1]
    )


def test_options(fake_group: Callable[[int, int], None]) -> None:
    fake_group(0, 4)
    with pytest.raises(OptionError, match=r"context_parallel.mesh has 2 dimensions; allowed is one"):
        ShardedAttention(mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("cfg", "ulysses")))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cfg", "ulysses"))["ulysses"]
    trunk = recovered(cases.Joint(), **cases.joint_inputs())
    assert "2 ranks share 13 tokens" in ShardedAttention(mesh=mesh).apply(trunk, pipeline.Context()).matched[0]
    whole = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cfg", "sequence"))
    trunk = recovered(cases.Joint(), **cases.joint_inputs())
    report = ShardedAttention(mesh=whole, cfg=2).apply(trunk, pipeline.Context())
    assert (
        "cfg is 2, and a call has 1 sample: where a pipeline calls the model once for each half"
        in report.declined[0][1]
    )
    with pytest.raises(OptionError, match=r"cfg is 2 and there is no mesh; allowed is a mesh of two dimensions"):
        ShardedAttention(cfg=2)
    with pytest.raises(OptionError, match=r"context_parallel.cfg is 3; allowed is 1 or 2"):
        ShardedAttention(cfg=3)
    with pytest.raises(OptionError, match=r"context_parallel.ulysses is 0"):
        ShardedAttention(ulysses=0)
    with pytest.raises(OptionError, match=r"context_parallel.timeout_seconds is 0"):
        ShardedAttention(timeout_seconds=0)


def test_switched_off_or_alone_changes_nothing() -> None:
    """With no process group, asked for by name, it is an error before compile time is spent."""
    with pytest.raises(Exception, match="no process group is initialised"), torch.no_grad():
        cases.joint()(**cases.joint_inputs())


COLLECTIVES = ("all_gather", "all_to_all", "alltoall", "all_reduce", "reduce_scatter", "_c10d_functional.broadcast")


@pytest.mark.parametrize("ring", [1, 2])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool, ring: int, fake_group: Callable[[int, int], None]) -> None:
    """Blocks in an autocast region, or with one of their own, are proven in it."""
    fake_group(0, 2)

    class Lower(cases.JointBlock):
        def forward(self, hidden: Any, text: Any, time: Any, place: Any, mask: Any = None) -> Any:
            with torch.autocast("cpu", torch.bfloat16) if inside else contextlib.nullcontext():
                return super().forward(hidden, text, time, place, mask)

    model = cases.Joint()
    model.blocks = nn.ModuleList(Lower(0.2) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        trunk = recovered(model, **cases.joint_inputs())
        assert ShardedAttention(ring=ring).apply(trunk, pipeline.Context()).applied


@pytest.mark.parametrize(
    ("device", "size", "fields", "exchanges"),
    [
        ("cpu", 2, {}, {"all_to_all": 2, "all_gather": 1 + 1}),
        ("meta", 2, {}, {"all_to_all": 2, "all_gather": 1 + 1}),
        ("cpu", 2, {"ring": 2}, {"all_to_all": 1, "all_gather": 1 + 1}),
        ("meta", 4, {"ring": 4}, {"all_to_all": 3, "all_gather": 1 + 1}),
        ("meta", 4, BOTH, {"all_to_all": 2 + 1, "all_gather": 1 + 1}),
    ],
)
def test_collectives_of_the_compiled_graph(
    device: str,
    size: int,
    fields: dict[str, Any],
    exchanges: dict[str, int],
    fake_group: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After AOTAutograd: those of a body, one gather, one sum for the cache's decision, and nothing hidden.

    A sample and a timestep are sent by the first rank, and one more gather says how far those of the others were off.

    Two for the heads of an attention, and one less than its stretches for a ring; on every device alike.
    """
    fake_group(0, size)
    found: collections.Counter[str] = collections.Counter()

    def capture(module: Any, inputs: Any) -> Any:
        from functorch.compile import aot_module_simplified, nop

        def count(traced: Any, _: object) -> Any:
            for part in traced.modules():
                if isinstance(part, fx.GraphModule):
                    targets = [str(node.target) for node in part.graph.nodes]
                    found.update(name.rpartition(".")[2] for at in targets for name in COLLECTIVES if name in at)
            return nop(traced, _)

        aot_module_simplified(module, list(inputs), fw_compiler=count)
        return module.forward

    monkeypatch.setitem(lowering.LOWERINGS, "aot", capture)
    with torch.device(device):
        model = cases.Joint()
    inputs = {name: held.to(device) for name, held in cases.joint_inputs().items()}
    options = {"lower": "aot", "context_parallel": fields, "first_block_cache": {"threshold": 0.5}}
    with torch.no_grad():
        if device == "meta":
            with pytest.raises(Exception, match="meta"):  # it is compiled, and can't be run
                hvfast(model, fullgraph=True, options=options)(**inputs)
        else:
            hvfast(model, fullgraph=True, options=options)(**inputs)
    assert found == exchanges | {"all_reduce": 1, "broadcast": 2}


UNEVEN = {"size": (3, 6, 6), "valid": 3}
BATCH = {"valid": (2, 6), "size": (3, 6, 6)}
SHARED: list[tuple[int, list[tuple[str, Any, list[dict[str, Any]]]]]] = [
    (
        2,
        [
            ("hunyuan_video", True, [{"valid": 1}, {"valid": 5}, {"valid": 7}, UNEVEN, BATCH]),
            ("hunyuan_video", RING, [{"valid": 1}, {"valid": 5}, {"valid": 7}, BATCH]),
            ("hunyuan_video_i2v_replace", True, [{}]),
            ("hunyuan_video_i2v_replace", RING, [{}]),
            ("hunyuan_video_i2v_concat", True, [{"size": (5, 2, 6)}]),
            ("hunyuan_video_i2v_concat", RING, [{"size": (5, 2, 6)}]),
        ],
    ),
    (
        4,
        [
            ("hunyuan_video", True, [UNEVEN]),
            ("hunyuan_video", BOTH, [{"valid": (1, 7), "size": (3, 6, 6)}]),
            ("hunyuan_video", {"ring": 4}, [UNEVEN]),
            ("hunyuan_video_i2v_replace", True, [{}]),
            ("hunyuan_video_i2v_replace", BOTH, [{}]),
            ("hunyuan_video_i2v_concat", BOTH, [{"size": (5, 2, 6)}]),
        ],
    ),
]


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "shared"), SHARED, ids=["two", "four"])
def test_equal_to_one_rank(size: int, shared: Any) -> None:
    """Text-to-video and both kinds of image-to-video, one, some and all of the text valid, uneven lengths, a batch.

    To 1e-5 relative, fp32; a second shape of one model is compiled again, with Dynamo's symbolic sizes. No text at all
    is not a number with these models themselves; see the next test.
    """
    for errors in ranks.results(ranks.launch(cases.equality, size, "eager", shared)):
        assert max(errors) < 1e-5, errors


@pytest.mark.ranks
@SLOW
@pytest.mark.parametrize(("size", "shared"), SHARED, ids=["two", "four"])
def test_equal_to_one_rank_by_inductor(size: int, shared: Any) -> None:
    """The same, compiled by Inductor on every rank."""
    for errors in ranks.results(ranks.launch(cases.equality, size, "inductor", shared, group_timeout=900, limit=1800)):
        assert max(errors) < 1e-5, errors


@pytest.mark.ranks
def test_masks() -> None:
    """No, one, some and all of the text valid, two prompts of one batch: with the mask, and with shorter keys."""
    valid = [(0,), (1,), (3,), (5,), (0, 4), (5, 1)]
    for size, tokens, fields in ((4, 13, BOTH), (3, 7, {})):
        for errors in ranks.results(ranks.launch(cases.toy_masks, size, valid, tokens, fields)):
            assert max(errors) < 1e-5, errors


@pytest.mark.ranks
def test_lengths() -> None:
    """Padding on several ranks, ranks that hold nothing but padding, as many tokens as ranks."""
    for fields, lengths in (({}, [13, 9, 5, 4, 3, 2]), (BOTH, [9, 5]), ({"ring": 4}, [5, 2])):
        for errors in ranks.results(ranks.launch(cases.toy_lengths, 4, lengths, fields)):
            assert max(errors) < 1e-5, errors


@pytest.mark.ranks
def test_compiled_by_inductor() -> None:
    """Token-replace image-to-video with uneven parts and the cache, a computed and a reused step."""
    errors, _ = ranks.results(ranks.launch(cases.inductor_steps, 2))
    assert max(errors) < 1e-5, errors


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "fields"), [(2, RING), pytest.param(4, BOTH, marks=SLOW)], ids=["ring", "both"])
def test_ring_compiled_by_inductor(size: int, fields: dict[str, Any]) -> None:
    """Batches of two prompts with a mask, uneven parts, and the cache; other prompts run the same code."""
    for errors in ranks.results(ranks.launch(cases.toy_inductor, size, fields)):
        assert max(errors) < 1e-5, errors


@pytest.mark.ranks
@pytest.mark.parametrize("lower", ["eager", pytest.param("inductor", marks=SLOW)])
@pytest.mark.parametrize(("size", "layouts"), [(2, [True, RING]), (4, [BOTH])], ids=["two", "four"])
def test_with_float8_as_one_rank_with_float8(size: int, layouts: list[Any], lower: str) -> None:
    launched = ranks.launch(cases.float8, size, lower, layouts, group_timeout=900, limit=1800)
    for errors in ranks.results(launched):
        assert max(errors) < 1e-2, errors


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("size", "thresholds", "layouts"),
    [
        (2, [0.75, 0.85], [True, RING]),
        (4, [0.8], [True, BOTH]),
        pytest.param(4, [0.75, 0.8, 0.85], [True, {"ring": 4}, BOTH], marks=SLOW),
    ],
    ids=["two", "four", "four-all"],
)
def test_decides_as_one_rank_does(size: int, thresholds: list[float], layouts: list[Any]) -> None:
    """Thirty steps at several thresholds: the same steps reused, outputs to 1e-3."""
    for found in ranks.results(ranks.launch(cases.decisions, size, "eager", thresholds, layouts)):
        check_decisions(found, len(thresholds))


@pytest.mark.ranks
@SLOW
@pytest.mark.parametrize(("size", "layouts"), [(2, [True, RING]), (4, [BOTH])], ids=["two", "four"])
def test_decides_as_one_rank_does_by_inductor(size: int, layouts: list[Any]) -> None:
    """The same, compiled by Inductor on every rank, and the one rank too."""
    launched = ranks.launch(cases.decisions, size, "inductor", [0.75, 0.85], layouts, group_timeout=900, limit=1800)
    for found in ranks.results(launched):
        check_decisions(found, 2)


def check_decisions(found: list[tuple[list[bool], list[bool], float]], num_thresholds: int) -> None:
    for together, alone, error in found:
        assert together == alone
        assert 0 < sum(together) < 30
        assert error < 1e-3
    # What the thresholds are there for: they decide in different ways.
    assert len({tuple(alone) for _, alone, _ in found}) == num_thresholds


@pytest.mark.ranks
def test_ranks_with_skewed_residuals_and_lost_state_decide_alike() -> None:
    first, second = ranks.results(ranks.launch(cases.skewed, 2))
    assert [reused for reused, _ in first] == [reused for reused, _ in second]
    assert [reused for reused, _ in first] == [False, True, True, True, True, False, True, True]


@pytest.mark.ranks
def test_rows_of_a_mesh_decide_apart() -> None:
    """The predicate is reduced over the ranks that share the sequence, and only those."""
    found = ranks.results(ranks.launch(cases.rows_apart, 4))
    assert max(error for _, error in found) < 1e-5
    decisions = [reused for reused, _ in found]
    assert decisions[0] == decisions[1] == [False, True, True, True, True]
    assert decisions[2] == decisions[3] != decisions[0]


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "fields"), [(2, {}), (4, {"ring": 2})])
def test_halves_of_a_batch(size: int, fields: dict[str, Any]) -> None:
    """Two samples with prompts of their own: each as one rank has it alone, decisions too, which differ."""
    found = ranks.results(ranks.launch(cases.halves, size, {**fields, "guidance": "apart"}, 5))
    for steps in found:
        assert all(together == alone for together, alone, _ in steps)
        assert max(error for _, _, error in steps) < 1e-5, steps
    decisions = [[together for together, _, _ in steps] for steps in found]
    assert decisions[0] == decisions[size // 2 - 1] != decisions[size // 2] == decisions[-1]


@pytest.mark.ranks
def test_halves_of_a_batch_decide_together() -> None:
    """By both samples, as one rank that has both does; so no row of ranks waits for one that computes."""
    found = ranks.results(ranks.launch(cases.halves, 2, {}, 9))
    assert all(together == alone for steps in found for together, alone, _ in steps)
    assert max(error for steps in found for *_, error in steps) < 1e-5
    decisions = [[together for together, *_ in steps] for steps in found]
    assert decisions[0] == decisions[1]
    assert 1 < sum(decisions[0]) < 8


@pytest.mark.ranks
@SLOW
def test_halves_of_a_batch_by_inductor() -> None:
    for steps in ranks.results(ranks.launch(cases.halves, 2, {}, 3, "inductor")):
        assert all(together == alone for together, alone, _ in steps)
        assert max(error for _, _, error in steps) < 1e-5, steps


@pytest.mark.ranks
def test_halves_of_a_batch_with_float8() -> None:
    for error in ranks.results(ranks.launch(cases.float8_halves, 2)):
        assert error < 1e-2


@pytest.mark.ranks
def test_a_ring_keeps_float8_attention_away_on_all_ranks() -> None:
    """``mode="max"`` switches on what can be; the ranks compare what was done, and what was not."""
    (first, told), (second, same) = ranks.results(ranks.launch(cases.most, 2, RING))
    assert told == same
    (row,) = [line for line in told if line.startswith("Float8Attention")]
    assert "it attends to a part of the keys, as ring attention does" in row
    assert max(first, second) < 1e-5, (first, second)


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong on rank 1, and what each rank must say (None: it ends without a word)."""

    kind: str
    zero: str
    one: str | None


DIFFER = "DisagreementError: ranks that share a sequence differ: "
FAULTS = [
    Fault("threshold", *[DIFFER + "first_block_cache.threshold is 0.1 on rank 1, 0.5 on rank 0"] * 2),
    Fault(
        "shape", *[DIFFER + "the input L['sample'] is torch.float32 [1, 14, 64] on cpu on rank 1, torch.float32"] * 2
    ),
    Fault("blocks", *[DIFFER + "the trunk is blocks x 4 on rank 1, blocks x 3 on rank 0"] * 2),
    Fault("seed", *[DIFFER + "the content of L['text'] is "] * 2),
    Fault("failure", DIFFER + "context_parallel.ulysses is 3 on rank 1", "RequestedPassError: options ask for"),
    Fault("off", "rank 0 was compiling, and rank 1 did not come within 6 s", "nothing"),
    Fault("later shape", *[DIFFER + "what it does now is compiling on rank 1, calling the model on rank 0"] * 2),
    Fault("later prompt", *[DIFFER + "the content of L['text'] is "] * 2),
    Fault("another known prompt", *[DIFFER + "the content of L['text'] is "] * 2),
    Fault("one new prompt", *[DIFFER + "the content of L['text'] is "] * 2),
    Fault("another known shape", *[DIFFER + "the shape of L['sample'] is [1, 14, 64] on rank 1, [1, 13, 64] on"] * 2),
    Fault("number", *[DIFFER + "L['times'] is 6 on rank 1, 5 on rank 0"] * 2),
    Fault("compiling again", *[DIFFER + "what it does now is compiling on rank 1, calling the model on rank 0"] * 2),
    Fault("weights", *[DIFFER + "the content of L['self']"] * 2),
    Fault("version", *[DIFFER + "torch is 2.99 on rank 1, "] * 2),
    Fault("later seed", *["differ from rank 0, 2 calls ago: L['sample'] on rank 1 is off by 1."] * 2),
    Fault("death", "rank 0 was calling the model, and rank 1 did not come within 6 s", None),
    Fault("death in a step", "another rank has ended or hangs: look at what that one printed", None),
    Fault("death in a ring", "another rank has ended or hangs: look at what that one printed", None),
    Fault(
        "cfg",
        DIFFER + "context_parallel.ring is 2 on rank 1, 1 on rank 0",
        "ring is 2, but 1 ranks share the sequence; allowed for ulysses x ring is one of 1 x 1",
    ),
    Fault("ring", *[DIFFER + "context_parallel.ring is 2 on rank 1, 1 on rank 0"] * 2),
]


@pytest.mark.ranks
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.kind)
def test_every_fault_ends_every_rank_with_an_error_that_says_which_and_what(fault: Fault) -> None:
    """Within the time that was set for it: 6 s to wait for another rank, 8 s for a collective, beside compiling."""
    zero, one = ranks.launch(cases.fault, 2, fault.kind, group_timeout=8, limit=120)
    assert fault.zero in zero.result
    assert one.result is None if fault.one is None else fault.one in one.result


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["threshold", "shape", "another known shape", "death in a step"])
def test_every_fault_ends_four_ranks(kind: str) -> None:
    fault = next(fault for fault in FAULTS if fault.kind == kind)
    zero, one, *others = ranks.launch(cases.fault, 4, kind, group_timeout=8, limit=120)
    for held in (zero, *others):
        assert fault.zero in held.result
    assert one.result is None if fault.one is None else fault.one in one.result
