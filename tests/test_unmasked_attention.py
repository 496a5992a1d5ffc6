"""The pass: which masks become shorter keys, that the result is the masked one's, and what runs where it can't be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import golden
import pytest
import torch
import zoo
from oracle import first, hvfast, relative_error
from slow import SLOW
from torch import nn
from torch._dynamo.utils import counters
from toy import TEXT, TOKENS, WIDTH, Toy, toy_inputs
from trunks import recovered

import hvcompile
from hvcompile import journal, pipeline
from hvcompile.errors import OptionError
from hvcompile.graph.attention import arguments, is_attention
from hvcompile.graph.attention_kernels import Attention, expected, refusal
from hvcompile.graph.nodes import op_name
from hvcompile.passes import unmasked_attention
from hvcompile.passes.first_block_cache import FirstBlockCache
from hvcompile.passes.unmasked_attention import UnmaskedAttention
from hvcompile.rewriting.key_padding import DROPPED, read_lengths
from hvcompile.torch_private import fakes, lowering
from hvcompile.torch_private.fakes import TAG, value
from hvcompile.trunk.trunk import Trunk

KEYS = TOKENS + TEXT
NO_CACHE = {"first_block_cache": False}


class MaskedBlock(nn.Module):
    """Two heads of queries; ``values`` is the width of all values, ``key_heads`` how many heads they have."""

    def __init__(self, values: int = WIDTH, key_heads: int = 2) -> None:
        super().__init__()
        self.key_heads = key_heads
        self.query, self.keys = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH // 2 * key_heads)
        self.values, self.out = nn.Linear(WIDTH, values // 2 * key_heads), nn.Linear(values, WIDTH)

    def forward(
        self, hidden: torch.Tensor, text: torch.Tensor, time: torch.Tensor, mask: torch.Tensor | None, **how: Any
    ) -> torch.Tensor:
        joint = torch.cat([hidden, text], dim=1) + time[:, None]
        query, key, held = (
            part(joint).unflatten(2, (heads, -1)).transpose(1, 2)
            for part, heads in ((self.query, 2), (self.keys, self.key_heads), (self.values, self.key_heads))
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, held, attn_mask=mask, **how)
        change: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))[:, : hidden.shape[1]]
        return hidden + change


class MaskedToy(Toy):
    """A ``Toy`` whose attention takes a mask: ``keep`` as it is given, or what ``prepare`` makes of it."""

    def __init__(
        self,
        prepare: Callable[..., Any] = lambda keep, _: keep,
        blocks: int = 3,
        sizes: Mapping[str, int] | None = None,
        **how: Any,
    ) -> None:
        super().__init__(blocks)
        self.masked_blocks = nn.ModuleList(MaskedBlock(**sizes or {}) for _ in range(blocks))
        self.blocks = nn.ModuleList()
        self.prepare, self.how = prepare, how

    def forward(  # type: ignore[override]
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        angles = timestep[:, None].float() * torch.ones(WIDTH, device=timestep.device)
        time = self.time(torch.sin(angles).to(sample.dtype))
        mask = self.prepare(keep, sample)
        hidden = self.embed(sample)
        for block in self.masked_blocks:
            hidden = block(hidden, text, time, mask, **self.how)
        result: torch.Tensor = self.head(hidden)
        return result


def keep_first(*valid: int, keys: int = KEYS) -> torch.Tensor:
    """A mask ``[batch, 1, 1, keys]`` of which the first so many are kept."""
    return (torch.arange(keys) < torch.tensor(valid)[:, None])[:, None, None]


def masked_inputs(*valid: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return toy_inputs(seed, batch=len(valid)) | {"keep": keep_first(*valid)}


def apply(trunk: Trunk) -> journal.JournalRow:
    rows: list[journal.JournalRow] = []
    pipeline.run(trunk, [(UnmaskedAttention(hoist=False), False)], lambda *_: None, rows)
    return rows[0]


def attentions(trunk: Trunk) -> list[Any]:
    return [node for body in trunk.bodies for node in body.module.graph.nodes if is_attention(node)]


def check(fast: Any, model: nn.Module, inputs: Mapping[str, Any], tolerance: float = 1e-5) -> None:
    """A computed step, and one that may be reused, are what the model itself computes."""
    with torch.no_grad():
        expected = first(model(**inputs))
        for _ in range(2):
            assert relative_error(first(fast(**inputs)), expected) < tolerance


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often masks are read on the host."""
    calls: list[int] = []

    def counted(masks: Any) -> Any:
        calls.append(len(masks))
        return read_lengths(masks)

    monkeypatch.setattr(unmasked_attention, "read_lengths", counted)
    return calls


def test_golden_text() -> None:
    """What the class's docstring shows."""
    trunk = recovered(MaskedToy(), **masked_inputs(14))
    before = golden.text_of(trunk)
    UnmaskedAttention().apply(trunk, pipeline.Context())
    golden.check(UnmaskedAttention, before, golden.text_of(trunk))


def test_graph() -> None:
    """No mask is left in the blocks nor before them; the number of valid keys is an input of graph and body."""
    family = zoo.FAMILIES["hunyuan_video"]
    trunk = recovered(family.build(), **family.inputs(), return_dict=False)
    assert all(isinstance(arguments(node)["attn_mask"], torch.fx.Node) for node in attentions(trunk))
    row = apply(trunk)
    assert not row.report.declined
    assert len(attentions(trunk)) == 2
    for node in attentions(trunk):
        given = arguments(node)
        assert "attn_mask" not in given
        assert [op_name(given[name]) for name in ("key", "value")] == ["narrow", "narrow"]
        assert "nn_module_stack" in node.meta
        assert node.meta[TAG] == "UnmaskedAttention"
    assert [node.name for node in trunk.added] == ["valid_keys_0_0"]
    # The mask was made by these; the text refiner's own mask is made by others and stays.
    gone = {"ones": -1, "masked_fill": -1, "ge": -1, "arange": -1, "sum": -1}
    assert gone.items() <= row.op_changes.items()
    assert row.op_changes["narrow"] == 4
    for block in trunk.blocks:
        placeholders = block.body.module.graph.find_nodes(op="placeholder")
        assert len(block.operands) == len(placeholders)
        for outer, inner in zip(block.operands, placeholders, strict=True):
            assert str(value(outer)) == str(value(inner)) or value(outer).shape == value(inner).shape
        assert not any(value(node).dtype == torch.bool for node in block.operands if hasattr(value(node), "dtype"))


def test_streams_of_the_bodies_stay_right() -> None:
    family = zoo.FAMILIES["hunyuan_video"]
    trunk = recovered(family.build(), **family.inputs(), return_dict=False)
    before = [{o: b.operands[p].name for o, p in b.body.streams.items()} for b in trunk.blocks]
    apply(trunk)
    assert [{o: b.operands[p].name for o, p in b.body.streams.items()} for b in trunk.blocks] == before


def test_graph_on_meta() -> None:
    """What torch takes there, its math kernel, is not what it takes where the graph will run."""
    with torch.device("meta"):
        model = MaskedToy()
    trunk = recovered(model, **{name: held.to("meta") for name, held in masked_inputs(14).items()})
    row = apply(trunk)
    assert row.report.applied
    (node,) = attentions(trunk)
    assert "attn_mask" not in arguments(node)
    assert value(node).shape == (1, 2, KEYS, WIDTH // 2)
    assert not any("written out" in told for told in row.report.noted)


def test_applied_twice_changes_nothing() -> None:
    trunk = recovered(MaskedToy(), **masked_inputs(14))
    apply(trunk)
    before = [str(trunk.graph), *(str(body.module.graph) for body in trunk.bodies)]
    row = apply(trunk)
    assert row.report.declined == ((trunk.lists, "no attention in the blocks has a mask"),)
    assert [str(trunk.graph), *(str(body.module.graph) for body in trunk.bodies)] == before


def test_blocks_in_a_branch_are_left_alone() -> None:
    trunk = recovered(MaskedToy(), **masked_inputs(14))
    FirstBlockCache().apply(trunk, pipeline.Context())
    assert "already stand in a branch" in UnmaskedAttention().apply(trunk, pipeline.Context()).declined[0][1]


@pytest.mark.parametrize(
    ("model", "keep", "reason"),
    [
        (Toy(), None, "no attention in the blocks has a mask"),
        (MaskedToy(), torch.ones(1, 1, KEYS, KEYS, dtype=torch.bool), "differs from query to query"),
        (MaskedToy(lambda keep, sample: keep & (sample[:, None, None, :1, 0] < 9)), keep_first(14), "step to step"),
        (MaskedToy(lambda keep, sample: keep & torch.rand(1).gt(-1)), keep_first(14), "step to step"),
    ],
)
def test_says_why_it_declines(model: nn.Module, keep: torch.Tensor | None, reason: str) -> None:
    inputs = toy_inputs() if keep is None else toy_inputs() | {"keep": keep}
    trunk = recovered(model, **inputs)
    before = [str(trunk.graph), *(str(body.module.graph) for body in trunk.bodies)]
    row = apply(trunk)
    assert not row.report.applied
    assert reason in row.report.declined[0][1]
    assert [str(trunk.graph), *(str(body.module.graph) for body in trunk.bodies)] == before


def test_large_batches_are_not_unrolled() -> None:
    assert "unrolled up to" in apply(recovered(MaskedToy(), **masked_inputs(*[14] * 9))).report.declined[0][1]


def test_a_symbolic_batch_is_declined() -> None:
    model = MaskedToy()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"})
    for batch in (2, 3, 4):
        check(fast, model, masked_inputs(*range(13, 13 + batch)))
    stats = hvcompile.stats(fast)
    assert stats.recompiles == 1
    rows = [row for journal in stats.journal for row in journal if row.name == "UnmaskedAttention"]
    first_row, second_row = rows
    assert first_row.report.applied
    assert "symbolic" in second_row.report.declined[0][1]


def test_asked_for_by_name_it_must_apply() -> None:
    """What is switched off asks for nothing, so a model without masks is no error then; the journal says why."""
    given: dict[str, Any] = {"hoist": False}
    model = Toy()
    with torch.no_grad():
        hvfast(model, fullgraph=True, options={"lower": "eager", "attention": given})(**toy_inputs())
    (row,) = [row for row in hvcompile.stats(model).journal[0] if row.name == "UnmaskedAttention"]
    assert "no attention in the blocks has a mask" in row.line()
    torch._dynamo.reset()
    told = "RequestedPassError: .*kernel 'cudnn' for "
    with pytest.raises(Exception, match=told), torch.no_grad():
        hvfast(Toy(), options={"lower": "eager", "attention": given | {"kernel": "cudnn"}})(**toy_inputs())


@pytest.mark.parametrize(
    "name",
    [
        *("hunyuan_video", "hunyuan_video_i2v_concat", "hunyuan_video_i2v_replace", "motif_video", "ltx", "ltx2"),
        *("allegro", "sana_video", "sana", "pixart", "longcat_audio"),
    ],
)
def test_families(name: str) -> None:
    """From two valid text tokens on, the first graph runs, with no mask, and equals eager; with the cache on."""
    family = zoo.FAMILIES[name]
    model, inputs = family.build(), family.inputs(3)
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"})
    masks = [key for key, held in inputs.items() if "mask" in key and held.shape[-1] == zoo.TEXT]
    assert masks
    for valid in range(2, zoo.TEXT + 1):
        for key in masks:
            inputs[key] = zoo.partial_mask(zoo.TEXT, valid, len(inputs[key]), inputs[key].dtype)
        check(fast, model, inputs | {"return_dict": False})
    stats = hvcompile.stats(fast)
    assert (stats.graphs, stats.recompiles, stats.unfit) == (1, 0, 0)
    (row,) = [row for row in stats.journal[0] if row.name == "UnmaskedAttention"]
    assert row.report.applied
    assert not row.report.declined


@pytest.mark.parametrize("name", ["qwen_image", "qwen_image_edit"])
def test_padding_before_other_keys_is_masked(name: str) -> None:
    """[text | image] keys: the padding stands in their middle, unless there is none."""
    family = zoo.FAMILIES[name]
    model, inputs = family.build(), family.inputs(3)
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"})
    for valid in (5, zoo.TEXT):
        inputs["encoder_hidden_states_mask"] = zoo.partial_mask(zoo.TEXT, valid, dtype=torch.bool)
        check(fast, model, inputs | {"return_dict": False})
    assert hvcompile.stats(fast).unfit == 2


def batch_of(family: zoo.Family, *valid: int) -> dict[str, Any]:
    rows = [family.inputs(seed) for seed in range(len(valid))]
    inputs = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    inputs["encoder_attention_mask"] = torch.cat([zoo.partial_mask(zoo.TEXT, number) for number in valid])
    return inputs


def test_samples_of_a_batch_have_their_own_lengths() -> None:
    family = zoo.FAMILIES["hunyuan_video"]
    model = family.build()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"})
    for valid in ((7, 7, 7), (1, 7, 3), (1, 1, 1), (5, 2, 7)):
        check(fast, model, batch_of(family, *valid) | {"return_dict": False})
    stats = hvcompile.stats(fast)
    assert (stats.recompiles, stats.unfit) == (0, 0)


def test_one_mask_for_a_whole_batch() -> None:
    model = MaskedToy()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"})
    check(fast, model, masked_inputs(14, 14) | {"keep": keep_first(14)})
    assert hvcompile.stats(fast).unfit == 0
    trunk = recovered(model, **masked_inputs(14, 14) | {"keep": keep_first(14)})
    apply(trunk)
    assert len(trunk.added) == len(attentions(trunk)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    """Additive masks too, as models write them: -10000 rounds to -9984 in bfloat16."""
    model = MaskedToy(lambda keep, _: (1 - keep.to(dtype)) * -10000.0).to(dtype)
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"} | NO_CACHE)
    for valid in (13, 16):
        inputs = {
            key: held.to(dtype) if held.is_floating_point() else held for key, held in masked_inputs(valid).items()
        }
        check(fast, model, inputs, tolerance=1e-12 if dtype == torch.float64 else 1e-2)
    assert hvcompile.stats(fast).unfit == 0


def with_hole(*batch: int) -> torch.Tensor:
    keep = keep_first(*batch)
    keep[..., 3] = False
    return keep


@pytest.mark.parametrize("cache", [True, False])
def test_a_hole_is_masked(cache: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Computed by a graph with the mask; the log and the journal say why. Other masks run the first one again."""
    model = MaskedToy()
    options: dict[str, Any] = {"lower": "eager"} | ({} if cache else NO_CACHE)
    fast = hvfast(model, fullgraph=True, options=options)
    with caplog.at_level(logging.WARNING, "hvcompile"):
        check(fast, model, masked_inputs(15) | {"keep": with_hole(15)})
    assert "the valid keys (14 of 17) are not the first ones" in caplog.text
    check(fast, model, masked_inputs(15, seed=2))
    check(fast, model, masked_inputs(15, seed=3) | {"keep": with_hole(16)})
    stats = hvcompile.stats(fast)
    assert stats.unfit == 4
    # One more compilation, whatever the number of masks with a hole.
    rows = [[row for row in journal if row.name == "UnmaskedAttention"] for journal in stats.journal]
    assert [len(row) for row in rows] == [1, 2]
    told = ("compiled again at run time", "the valid keys (14 of 17) are not the first ones")
    assert rows[1][0].report.declined == (told,)
    if cache:
        assert [step.reused for step in stats.steps] == [False, True] * 3


def test_a_hole_in_one_sample_of_a_batch() -> None:
    model = MaskedToy()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"})
    keep = keep_first(15, 17, 14)
    keep[1, ..., 2] = False
    check(fast, model, masked_inputs(1, 1, 1) | {"keep": keep})
    assert hvcompile.stats(fast).unfit == 2


def test_a_hole_with_symbolic_sizes() -> None:
    """What is compiled at run time is compiled for the sizes at hand, and for each anew."""
    model = MaskedToy()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"} | NO_CACHE)
    for tokens in (12, 20, 28, 20):
        for hole in (False, True):
            keep = keep_first(tokens + 2, keys=tokens + TEXT)
            keep[..., 3] = not hole
            check(fast, model, toy_inputs(tokens, tokens) | {"keep": keep})
    stats = hvcompile.stats(fast)
    assert stats.unfit == 8
    assert len(stats.journal) == 2 + 3  # two by Dynamo, and one with the mask for each size


@pytest.mark.parametrize("valid", [0, 1])
def test_fewer_than_two_valid_keys_are_masked(valid: int) -> None:
    """What softmax makes of nothing is the kernel's business: the very mask is computed."""
    model = MaskedToy(lambda keep, _: keep.float() * 20000.0 - 20000.0)
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"} | NO_CACHE)
    check(fast, model, masked_inputs(valid))
    assert hvcompile.stats(fast).unfit == 2


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are treated as those are that lie in a GPU's memory."""
    monkeypatch.setattr(unmasked_attention, "is_read_in_every_call", lambda _: False)


def test_a_mask_in_the_hosts_memory_is_read_in_every_call(reads: list[int]) -> None:
    """Written to in whatever way, it is what it is."""
    model = MaskedToy()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"} | NO_CACHE)
    inputs = masked_inputs(14)
    for valid in (14, 16, 12):
        inputs["keep"].data.copy_(keep_first(valid))
        check(fast, model, inputs)
    assert reads == [1] * 6


@pytest.mark.usefixtures("elsewhere")
def test_the_mask_is_read_once_a_generation(reads: list[int]) -> None:
    model = MaskedToy()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"})
    inputs, other = masked_inputs(14), masked_inputs(16, seed=1)
    with torch.no_grad():
        for time in (900.0, 800.0, 700.0):
            for prompt in (inputs, other):
                fast(**prompt | {"timestep": torch.tensor([time])})
    assert reads == [1, 1]


@pytest.mark.usefixtures("elsewhere")
def test_a_mask_written_to_between_steps_is_read_again(reads: list[int]) -> None:
    model = MaskedToy()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"} | NO_CACHE)
    inputs = masked_inputs(14)
    check(fast, model, inputs)
    inputs["keep"][..., 14] = True
    check(fast, model, inputs)
    inputs["keep"][..., 2] = False
    check(fast, model, inputs)
    assert reads == [1, 1, 1]
    assert hvcompile.stats(fast).unfit == 2


WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "copy": lambda keep, new: keep.copy_(new),
    "data_copy": lambda keep, new: keep.data.copy_(new),
    "data": lambda keep, new: setattr(keep, "data", new),
    "set": lambda keep, new: keep.set_(new),  # type: ignore[call-overload]
    "numpy": lambda keep, new: keep.numpy().__setitem__(..., new.numpy()),
}
"""Ways of writing to a mask that PyTorch tracks, or that move its memory, and those that do neither."""
UNSEEN = {"data_copy", "numpy"}


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("lower", ["eager", "aot", "inductor"])
@pytest.mark.parametrize("cache", [True, False])
def test_a_mask_that_is_written_to_takes_effect_or_raises(lower: str, cache: bool) -> None:
    """Of ways that can't be seen on the host each step's own check tells; a new tensor and a reset help."""
    model = MaskedToy()
    fast = hvfast(model, fullgraph=True, options={"lower": lower} | ({} if cache else NO_CACHE))
    for how, write in WRITES.items():
        if lower == "inductor" and how not in {"data", "data_copy"}:
            continue
        inputs, changed = masked_inputs(14, 9), keep_first(11, 16)
        check(fast, model, inputs)
        write(inputs["keep"], changed.clone())
        if how in UNSEEN:
            with torch.no_grad(), pytest.raises(RuntimeError, match=r"hvcompile\.reset\(model\) after such a write"):
                fast(**inputs)
            check(fast, model, inputs | {"keep": inputs["keep"].clone()})
            hvcompile.reset(fast)
        check(fast, model, inputs)
    assert hvcompile.stats(fast).unfit == 0


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("changed", [with_hole(14), keep_first(17), keep_first(13), keep_first(14).roll(1, -1)])
def test_every_change_of_a_mask_is_told(changed: torch.Tensor) -> None:
    model = MaskedToy()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"} | NO_CACHE)
    inputs = masked_inputs(14)
    check(fast, model, inputs)
    inputs["keep"].data.copy_(changed)
    with torch.no_grad(), pytest.raises(RuntimeError, match="a mask is not what it was"):
        fast(**inputs)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("name", ["hunyuan_video", "hunyuan_video_i2v_replace", "qwen_image", "ltx", "pixart"])
def test_families_with_the_check_in_the_graph(name: str) -> None:
    """Masks are made of conditions in each model's own way, from integers, bools and numbers."""
    family = zoo.FAMILIES[name]
    model = family.build()
    fast = hvfast(model, fullgraph=True, options={"lower": "aot"} | NO_CACHE)
    for seed in (0, 1, 0):
        check(fast, model, family.inputs(seed) | {"return_dict": False})


@pytest.mark.usefixtures("elsewhere")
def test_the_check_with_a_symbolic_number_of_keys() -> None:
    model = MaskedToy()
    fast = hvfast(model, fullgraph=True, dynamic=True, options={"lower": "aot"} | NO_CACHE)
    check(fast, model, masked_inputs(14))


def test_inference_tensors_are_read_at_every_call(reads: list[int]) -> None:
    """They carry no version counter, so that a write into one would not be seen."""
    model = MaskedToy()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"} | NO_CACHE)
    with torch.inference_mode():
        inputs = {key: held.clone() for key, held in masked_inputs(14).items()}
        for valid in (14, 16):
            inputs["keep"].copy_(keep_first(valid))
            for _ in range(2):
                assert relative_error(fast(**inputs), model(**inputs)) < 1e-5
    assert len(reads) == 4


def test_two_models_and_reset() -> None:
    one, other = MaskedToy(), MaskedToy()
    fast = [hvfast(model, fullgraph=True, options={"lower": "eager"}) for model in (one, other)]
    for model, run in zip((one, other), fast, strict=True):
        check(run, model, masked_inputs(15) | {"keep": with_hole(15)})
    hvcompile.reset(fast[0])
    assert [hvcompile.stats(run).unfit for run in fast] == [0, 2]
    check(fast[0], one, masked_inputs(15))
    assert hvcompile.stats(fast[0]).unfit == 0


def test_lengths_of_masks() -> None:
    """Several masks at once, of fewer dimensions, for one or all heads."""
    keep = keep_first(3, 5, keys=6)
    additive = torch.zeros(6).masked_fill(~keep, DROPPED)
    infinite = torch.zeros(6).masked_fill(~keep, float("-inf"))
    assert read_lengths([keep]) == read_lengths([additive]) == read_lengths([infinite]) == [3, 5]
    assert read_lengths([keep[0, 0], keep.expand(2, 4, 1, 6), keep[:1]]) == [3, 3, 5, 3]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.tensor([True, False, True])[None, None, None], "(2 of 3) are not the first ones"),
        (torch.tensor([[True, True], [False, False]])[:, None, None], "0 valid keys"),
        (torch.tensor([[True, True], [True, False]])[None, :, None], "head to head"),
        (torch.tensor([0.0, -3.0])[None, None, None], "adds something"),
        (torch.tensor([0.0, float("nan")])[None, None, None], "adds something"),
    ],
)
def test_why_a_mask_is_no_length(mask: torch.Tensor, reason: str) -> None:
    assert reason in str(read_lengths([keep_first(2), mask]))


@pytest.mark.parametrize("batch", [pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW)])
def test_compiled_with_the_cache(batch: int) -> None:
    """By Inductor: 1e-5 from eager from one to all text tokens valid, computed or reused; one graph for all lengths."""
    family = zoo.FAMILIES["hunyuan_video"]
    model = family.build()
    fast = hvfast(model, fullgraph=True)
    counters.clear()
    for number in range(10):
        valid = [1 + (number + 3 * sample) % zoo.TEXT for sample in range(batch)]
        inputs = batch_of(family, *valid)
        # Small angles: Inductor's sine of 8000 in float32 alone is 1.4e-5 away, with the mask as without it.
        inputs |= {"timestep": torch.full((batch,), 9.0), "guidance": torch.full((batch,), 6.0)}
        if number >= zoo.TEXT:  # another prompt of the same length
            inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"] + number
        check(fast, model, inputs | {"return_dict": False})
    stats = hvcompile.stats(fast)
    assert (stats.graphs, stats.recompiles, stats.unfit) == (1, 0, 0)
    assert [step.reused for step in stats.steps] == [False, True] * 10
    assert counters["stats"]["unique_graphs"] == 1
    assert any(row.name == "UnmaskedAttention" and row.report.applied for row in stats.journal[0])


def test_a_hole_compiled() -> None:
    """By Inductor, after Dynamo is done: the second graph, with symbolic sizes in the first, and the cache in both."""
    model = MaskedToy()
    fast = hvfast(model, fullgraph=True)
    for tokens in (12, 20):
        for hole in (False, True):
            keep = keep_first(tokens + 2, keys=tokens + TEXT)
            keep[..., 3] = not hole
            check(fast, model, toy_inputs(tokens, tokens) | {"keep": keep})
    stats = hvcompile.stats(fast)
    assert stats.unfit == 4
    assert [step.reused for step in stats.steps] == [False, True] * 4


def kernels_run(call: Callable[[], Any]) -> set[str]:
    """The attention operators that a call runs, from torch's profiler."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key for event in profile.key_averages() if "scaled_dot_product" in event.key}


FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("lower", ["eager", "aot", "inductor"])
def test_the_kernel_is_the_one_asked_for(lower: str) -> None:
    """Torch takes flash by itself; "math" runs none of it, and is what the graph computes, to rounding."""
    ran = {}
    for kernel in ("auto", "math"):
        model = MaskedToy()
        fast = hvfast(model, fullgraph=True, options={"lower": lower, "attention": {"kernel": kernel}})
        check(fast, model, masked_inputs(15))
        hvcompile.reset(fast)
        ran[kernel] = kernels_run(lambda fast=fast: fast(**masked_inputs(15)))  # type: ignore[misc]
    assert FLASH in ran["auto"]
    assert FLASH not in ran["math"]


def test_a_kernel_overrides_what_torch_would_take() -> None:
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        model = MaskedToy()
        for kernel, takes_flash in (("auto", False), ("flash", True)):
            torch._dynamo.reset()
            options = {"lower": "aot", "attention": {"kernel": kernel}}
            fast = hvfast(model, fullgraph=True, options=options)
            assert (FLASH in kernels_run(lambda fast=fast: fast(**masked_inputs(15)))) is takes_flash  # type: ignore[misc]


@pytest.mark.parametrize("is_traceable", [True, False])
@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        ({}, {"scale": 0.3}),
        ({"values": WIDTH // 2}, {}),
        ({"key_heads": 1}, {"enable_gqa": True}),
    ],
    ids=["scale", "values", "grouped"],
)
def test_what_torch_cannot_trace_is_written_out(
    sizes: Mapping[str, int], how: dict[str, Any], is_traceable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 2.13 torch's math kernel, taken for values of another head size, asks how many keys there are.

    Where torch can trace all, as newer versions, it is made to look as if it could not.
    """
    traces = fakes.is_traceable
    seen: list[bool] = []

    def looked_at(*given: Any, **kwargs: Any) -> bool:
        seen.append(is_traceable and traces(*given, **kwargs))
        return seen[-1]

    monkeypatch.setattr(fakes, "is_traceable", looked_at)
    model = MaskedToy(sizes=sizes, **how)
    fast = hvfast(model, fullgraph=True, options={"lower": "aot"})
    for valid in ((15, 14), (13, 17)):
        check(fast, model, masked_inputs(*valid))
    stats = hvcompile.stats(fast)
    assert (stats.graphs, stats.recompiles, stats.unfit) == (1, 0, 0)
    (row,) = [row for row in stats.journal[0] if row.name == "UnmaskedAttention"]
    assert len(seen) == 1
    assert any("written out" in told for told in row.report.noted) is not seen[0]


@pytest.mark.parametrize(("sizes", "kernel"), [({}, "flash"), ({"values": WIDTH // 2}, "")], ids=["flash", "none"])
def test_large_scores_are_never_written_out(
    sizes: Mapping[str, int], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that can replaces the math kernel; where none can, the mask stays, and the reason is told."""
    monkeypatch.setattr(fakes, "is_traceable", lambda *given, **kwargs: False)
    monkeypatch.setattr("hvcompile.passes.unmasked_attention.MOST_SCORES", 0)
    model = MaskedToy(sizes=sizes)
    fast = hvfast(model, fullgraph=True, options={"lower": "aot"})
    check(fast, model, masked_inputs(15, 14))
    (row,) = [row for row in hvcompile.stats(fast).journal[0] if row.name == "UnmaskedAttention"]
    if kernel:
        assert any(f"kernel {kernel!r}, for torch takes its math kernel" in told for told in row.report.noted)
    else:
        ((_, why),) = [item for item in row.report.declined if "GiB of scores" in item[1]]
        assert "query and value differ in head size" in why
        assert not any("keys end where" in told for told in row.report.matched)


@pytest.mark.parametrize("kernel", ["flash", "math"])
@pytest.mark.parametrize("unmask", [True, False])
def test_kernels_with_and_without_masks(kernel: str, unmask: bool) -> None:
    """On cpu both take a mask; a hole leaves the choice to torch."""
    model = MaskedToy()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager", "attention": {"kernel": kernel, "unmask": unmask}})
    check(fast, model, masked_inputs(15))
    check(fast, model, masked_inputs(15, seed=1) | {"keep": with_hole(15)})
    assert hvcompile.stats(fast).unfit == (2 if unmask else 0)


def test_the_journal_says_which_kernel_and_why() -> None:
    trunk = recovered(MaskedToy(), **masked_inputs(15))
    told = "kernel left to torch, which takes flash by itself for cpu, float32, head size 8, no mask"
    assert apply(trunk).report.noted == (told,)
    trunk = recovered(Toy(), **toy_inputs())
    with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
        assert apply(trunk).report.noted == (told.replace("flash", "math").replace("size 8", "size 16"),)
    trunk = recovered(MaskedToy(), **masked_inputs(15))
    assert (
        "run kernel 'math', asked for by options"
        in UnmaskedAttention(kernel="math").apply(trunk, pipeline.Context()).matched[1]
    )


@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_a_kernel_that_cannot_run_is_an_error_up_front(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("compile time was spent")

    monkeypatch.setitem(lowering.LOWERINGS, "inductor", never)
    fast = hvfast(MaskedToy(), fullgraph=True, options={"attention": {"kernel": kernel}})
    told = f"RequestedPassError: .*kernel '{kernel}' for .* of block_0: on cpu there are flash and math"
    with pytest.raises(Exception, match=told), torch.no_grad():
        fast(**masked_inputs(15))


def test_an_unknown_kernel_is_an_error() -> None:
    with pytest.raises(OptionError, match="allowed is one of 'auto', 'cudnn', 'flash', 'efficient', 'math'"):
        UnmaskedAttention(kernel="fa9")


@pytest.mark.parametrize(
    ("kernel", "how", "reason"),
    [
        ("flash", {}, ""),
        ("cudnn", {}, ""),
        ("efficient", {"dtype": torch.float32}, ""),
        ("math", {"dtype": torch.float64, "has_mask": True}, ""),
        ("flash", {"has_mask": True}, "it has a mask"),
        ("flash", {"dtype": torch.float32}, "not torch.float32"),
        ("flash", {"head_sizes": (100, 100)}, "multiples of 8"),
        ("cudnn", {"head_sizes": (256, 256)}, "up to 128"),
        ("flash", {"head_sizes": (64, 128)}, "differ in head size"),
        ("math", {"is_grouped": True}, "number of heads"),
        ("math", {"device": "xpu"}, "not on xpu"),
    ],
)
def test_what_kernels_can_run(kernel: str, how: dict[str, Any], reason: str) -> None:
    """On a device that is not here, so that nothing is asked of it."""
    usual: dict[str, Any] = {
        "device": "meta",
        "dtype": torch.bfloat16,
        "head_sizes": (128, 128),
        "has_mask": False,
        "is_grouped": False,
        "capability": (9, 0),
    }
    told = refusal(kernel, Attention(**usual | how))
    assert (reason in told) if reason else not told


def test_the_kernel_that_torch_takes() -> None:
    def on(capability: tuple[int, int], dtype: torch.dtype, has_mask: bool = False) -> str:
        attention = Attention(
            device="meta",
            dtype=dtype,
            head_sizes=(128, 128),
            has_mask=has_mask,
            is_grouped=False,
            capability=capability,
        )
        return expected(attention)

    assert [on((9, 0), dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)] == [
        *("cudnn", "efficient", "math"),
    ]
    assert on((8, 9), torch.bfloat16) == "flash"
    assert on((9, 0), torch.bfloat16, has_mask=True) == "efficient"
