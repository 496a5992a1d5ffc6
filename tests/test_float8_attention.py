"""Attention in float8: its arithmetic against float64, and the pass that puts it into the blocks."""

from __future__ import annotations

import functools
import itertools
import logging
from typing import Any

import golden
import pytest
import torch
import zoo
from oracle import first, hvfast, relative_error
from test_unmasked_attention import MaskedToy, keep_first, masked_inputs, with_hole
from torch import nn
from toy import Toy, toy_inputs
from trunks import recovered
from wide import Wide, wide_inputs

import hvcompile
from hvcompile import backend, journal, pipeline
from hvcompile.errors import OptionError, RequestedPassError
from hvcompile.float8 import attention as float8_attention
from hvcompile.float8 import linear as float8_linear
from hvcompile.float8.attention import attend, reference
from hvcompile.float8.format import KEY_BLOCK
from hvcompile.graph.attention import is_attention
from hvcompile.graph.costs import DEVICES, costs
from hvcompile.graph.flops import ATTENTION
from hvcompile.graph.nodes import op_name
from hvcompile.journal import PassReport
from hvcompile.options import parse
from hvcompile.passes import PASSES
from hvcompile.passes.first_block_cache import FirstBlockCache
from hvcompile.passes.float8_attention import Float8Attention
from hvcompile.passes.float8_linears import Float8Linears
from hvcompile.passes.unmasked_attention import UnmaskedAttention
from hvcompile.pipeline import Context
from hvcompile.torch_private import lowering, torchao
from hvcompile.torch_private.fakes import TAG
from hvcompile.trunk.trunk import Trunk

FLOAT8 = {"attention": {"fp8": True}}
NO_CACHE = {"first_block_cache": False}


def drawn(
    kind: str, seed: int = 0, size: int = 128, keys: int = 389, queries: int = 150
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values ``[2, 3, tokens, size]``.

    Gaussian; with an offset a channel, as keys have them; correlated, so that softmax has something to find; or with
    channels and tokens far larger than others.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(2, 3, *shape, generator=generator)

    query, key, value = normal(queries, size), normal(keys, size), normal(keys, size)
    if kind == "offset":
        key, value = key + 5 * normal(1, size), value + normal(1, size)
    if kind == "correlated":
        shared = normal(keys, 8)
        key, value = 0.3 * key + shared @ normal(8, size) + 3 * normal(1, size), value + shared @ normal(8, size)
        query = 0.3 * query + normal(queries, 8) @ normal(8, size) / 3
    if kind == "outliers":
        key[..., ::32] *= 20
        key[:, :, ::100] *= 30
        query[..., ::32] /= 20
        value[..., ::32] *= 50
    return query, key, value


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    weights = (query.double() @ key.double().mT * scale).softmax(-1)
    return weights @ value.double()


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


BOUNDS = {"gaussian": 5.5e-2, "offset": 5e-3, "correlated": 5e-2, "outliers": 1.3e-1}
"""Relative error against float64 on the same operands, at head size 128; of the dtypes' own rounding little shows."""


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_float64(kind: str, dtype: torch.dtype) -> None:
    for seed in range(2):
        query, key, value = (item.to(dtype) for item in drawn(kind, seed))
        computed = reference(query, key, value, 128**-0.5)
        assert computed.dtype == dtype
        error = relative(computed, exact(query, key, value, 128**-0.5))
        assert error <= BOUNDS[kind], error


def test_smoothing_pays() -> None:
    """Keys and values with an offset: without subtracting their means the error would be 2.5 times as large."""
    query, key, value = drawn("offset")
    expected = exact(query, key, value, 128**-0.5)

    def plain(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        keys, key_scale = float8_attention._quantized(key, (2, 3))
        values, value_scale = float8_attention._quantized(value, 2)
        return exact(query, keys * key_scale, values * value_scale, 128**-0.5)  # its other roundings not even counted

    assert relative(plain(key, value), expected) > 2.5 * relative(reference(query, key, value, 128**-0.5), expected)


def test_what_float8_holds_is_exact() -> None:
    """Small whole numbers of mean zero: queries of zeros give the mean, and one that picks a key gives its value."""
    value = torch.arange(-7.0, 8.0)[:, None].expand(1, 1, 15, 32).clone()
    key = torch.cat([torch.eye(7), -torch.eye(7), torch.zeros(1, 7)])[None, None]
    key = torch.nn.functional.pad(key, (0, 25))
    query = torch.zeros(1, 1, 2, 32)
    query[0, 0, 1, 3] = 448.0
    out = reference(query, key, value, 1.0)
    assert torch.equal(out[0, 0, 0], torch.zeros(32))
    assert torch.equal(out[0, 0, 1], value[0, 0, 3])


def test_chunks_of_queries_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    operands = drawn("correlated")
    whole = reference(*operands, scale=0.1)
    monkeypatch.setattr(float8_attention, "CHUNK", 77)
    assert relative(reference(*operands, scale=0.1), whole) < 1e-6


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_poison_keeps_to_its_place(poison: float) -> None:
    """In a query to its row, in a value to its channel, in a key to its head; all else is bit by bit what it was."""
    clean = drawn("gaussian", keys=KEY_BLOCK + 5, queries=9)
    before = reference(*clean, scale=0.1)
    for place, spoiled in enumerate(((1, 2, 4), (1, 2), (1, 2, slice(None), 7))):
        query, key, value = operands = tuple(item.clone() for item in clean)
        operands[place][1, 2, 4, 7] = poison
        out = reference(query, key, value, 0.1)
        is_spoiled = torch.zeros_like(out, dtype=torch.bool)
        is_spoiled[spoiled] = True
        assert torch.equal(out[~is_spoiled], before[~is_spoiled])
        assert not out[is_spoiled].isfinite().any()


def test_zeros() -> None:
    zeros = torch.zeros(1, 2, 5, 16)
    assert torch.equal(reference(zeros, zeros, zeros, 1.0), zeros)


def test_the_operator() -> None:
    """Schema, fake implementation and tracing, as torch checks them; and strided operands."""
    operands: list[Any] = [item[..., :40, :16] for item in drawn("gaussian")]
    torch.library.opcheck(attend, (*operands, 0.25))
    turned: Any = [item.transpose(1, 2).contiguous().transpose(1, 2) for item in operands]
    assert relative(attend(*turned, scale=0.25), attend(*operands, scale=0.25)) < 1e-3
    assert attend(*operands, scale=0.25).transpose(1, 2).is_contiguous()


def rewritten(model: nn.Module | None = None, inputs: Any = None, **fields: Any) -> tuple[Trunk, PassReport]:
    trunk = recovered(model or Wide(), **(inputs or wide_inputs()))
    rows: list[journal.JournalRow] = []
    passes = [(UnmaskedAttention(hoist=False), False), (Float8Attention(fp8=True, **fields), True)]
    pipeline.run(trunk, passes, lambda *_: None, rows)
    return trunk, rows[-1].report


def made(trunk: Trunk) -> list[Any]:
    return [
        node for body in trunk.bodies for node in body.module.graph.nodes if node.meta.get(TAG) == "Float8Attention"
    ]


def compiled(model: nn.Module, **options: Any) -> Any:
    return hvfast(model, fullgraph=True, options={"lower": "eager", **NO_CACHE, **FLOAT8, **options})


def quantised(model: nn.Module, inputs: Any, monkeypatch: pytest.MonkeyPatch, blocks: Any = None) -> torch.Tensor:
    """The model run eagerly, the attention of these blocks (of all) computed by the reference."""
    attention, places = nn.functional.scaled_dot_product_attention, itertools.count()

    def other(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if blocks is not None and next(places) not in blocks:
            return attention(query, key, value)
        return reference(query, key, value, query.shape[-1] ** -0.5)

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(nn.functional, "scaled_dot_product_attention", other)
        result: torch.Tensor = model(**inputs)
    return result


def test_golden_text() -> None:
    """What the class's docstring shows."""
    trunk = recovered(Wide(), **wide_inputs())
    before = golden.text_of(trunk)
    Float8Attention(fp8=True).apply(trunk, Context(requested=True))
    golden.check(Float8Attention, before, golden.text_of(trunk))


def test_graph() -> None:
    trunk, report = rewritten()
    (body,) = trunk.bodies
    (node,) = made(trunk)
    assert node.format_node() == (
        "%scaled_dot_product_float8_attention : [num_users=1] = call_function[target=hvcompile.float8.attention."
        f"scaled_dot_product_float8_attention](args = (%query, %key, %value, {32**-0.5!r}), kwargs = {{}})"
    )
    assert "nn_module_stack" in node.meta
    assert not any(map(is_attention, body.module.graph.nodes))
    assert report.matched == ("attention in float8: scaled_dot_product_attention of block_0 in 3 blocks",)
    assert not report.declined


def test_graph_without_a_mask() -> None:
    """Of HunyuanVideo: the keys that the mask leaves go in, and no mask is left."""
    family = zoo.FAMILIES["hunyuan_video"]
    trunk, report = rewritten(family.build(), family.inputs() | {"return_dict": False})
    assert len(made(trunk)) == len(trunk.bodies) == 2
    for node in made(trunk):
        assert [op_name(item) for item in node.args[1:3]] == ["narrow", "narrow"]
    assert not any(is_attention(node) for body in trunk.bodies for node in body.module.graph.nodes)
    assert not report.declined


def test_applied_twice_changes_nothing() -> None:
    trunk, _ = rewritten()
    code = trunk.bodies[0].module.code
    report = Float8Attention(fp8=True).apply(trunk, Context(requested=True))
    assert not report.applied
    assert "hold no attention" in report.declined[0][1]
    assert trunk.bodies[0].module.code == code


def test_blocks_that_are_kept_have_a_body_of_their_own() -> None:
    trunk, report = rewritten(Wide(4), fp8_keep_blocks=1)
    bodies = [block.body for block in trunk.blocks]
    assert bodies[0] is bodies[3]
    assert bodies[1] is bodies[2]
    assert [sum(map(is_attention, body.module.graph.nodes)) for body in bodies] == [1, 0, 0, 1]
    assert report.declined == tuple((f"blocks.{place}", "attention.fp8_keep_blocks is 1") for place in (0, 3))
    FirstBlockCache().apply(trunk, Context())
    trunk.module.graph.lint()
    with pytest.raises(RequestedPassError, match="fp8_keep_blocks is 2"):
        rewritten(Wide(4), fp8_keep_blocks=2)


class Attending(Toy):
    """A ``Toy`` whose blocks attend as they are told to."""

    def __init__(self, width: int = 16, dtype: torch.dtype = torch.float32, **how: Any) -> None:
        super().__init__(2)
        self.width, self.kind, self.how = width, dtype, how
        for block in self.blocks:
            block.forward = functools.partial(self.attend, block)

    def attend(self, block: Any, hidden: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([hidden, text], 1).repeat(1, 1, self.width // hidden.shape[-1])[:, None].to(self.kind)
        mixed = nn.functional.scaled_dot_product_attention(wide[:, :, :12], wide, wide, **self.how)
        change: torch.Tensor = block.out(mixed[:, 0, :, : hidden.shape[-1]].to(hidden.dtype) + time[:, None])
        return hidden + change


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Attending(is_causal=True), "it is causal"),
        (Attending(width=144), "its head size is 144; the kernel's registers hold 128"),
        (Attending(dtype=torch.float64), "it computes in torch.float64"),
        (Attending(attn_mask=torch.ones(12, 17, dtype=torch.bool).tril(5)), "it has a mask"),
    ],
)
def test_says_why_it_declines(model: nn.Module, reason: str) -> None:
    trunk = recovered(model, **toy_inputs())
    before = [str(body.module.graph) for body in trunk.bodies]
    report = Float8Attention(fp8=True).apply(trunk, Context(requested=True))
    assert not report.applied
    assert reason in report.declined[0][1]
    assert [str(body.module.graph) for body in trunk.bodies] == before


def test_a_mask_that_stays_is_a_reason() -> None:
    trunk = recovered(MaskedToy(), **masked_inputs(14))
    report = Float8Attention(fp8=True).apply(trunk, Context(requested=True))
    assert "options['attention']['unmask']" in report.declined[0][1]
    with pytest.raises(RequestedPassError, match=r"Float8Attention can't apply to this graph .*it has a mask"):
        pipeline.run(trunk, [(Float8Attention(fp8=True), True)], lambda *_: None, [])


def test_a_kernel_that_is_named_leaves_nothing_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("compile time was spent")

    monkeypatch.setitem(lowering.LOWERINGS, "eager", never)
    told = r"RequestedPassError.*Float8Attention.*options\['attention'\]\['kernel'\] names another kernel"
    with pytest.raises(Exception, match=told), torch.no_grad():
        compiled(Wide(), attention={"fp8": True, "kernel": "math"})(**wide_inputs())


def test_off_by_itself_and_on_a_cpu_only_where_asked_for() -> None:
    trunk = recovered(Wide(), **wide_inputs())
    assert "mode is not 'max'" in Float8Attention().apply(trunk, Context()).declined[0][1]
    report = Float8Attention(fp8=True).apply(trunk, Context())
    assert not report.applied
    assert "emulated" in report.declined[0][1]
    assert Float8Attention(fp8=True).apply(trunk, Context(requested=True)).applied


def test_the_most_mode_says_why_and_does_not_fail() -> None:
    """On a CPU: nothing is in float8, and the journal says so."""
    model = Wide()
    run = torch.compile(model, backend=functools.partial(backend.hvfast, mode="max", options={"lower": "eager"}))
    with torch.no_grad():
        assert relative(run(**wide_inputs()), Wide()(**wide_inputs())) < 1e-5
    (row,) = [row for row in hvcompile.stats(model).journal[0] if row.name == "Float8Attention"]
    assert row.options["fp8"] is True
    assert "emulated; they pay on GPUs" in row.report.declined[0][1]


def test_modes_and_options() -> None:
    def parsed(options: Any, mode: str | None = None) -> tuple[Any, bool]:
        found = {type(item): (item, asked) for item, asked in parse(PASSES, options, mode).passes}
        assert UnmaskedAttention in found
        return found.get(Float8Attention, (None, False))

    assert parsed(None) == (Float8Attention(fp8=False), False)
    assert parsed({"attention": True}) == (Float8Attention(fp8=False), False)
    assert parsed(None, "max") == (Float8Attention(fp8=True), False)
    assert parsed({"attention": {"fp8": False}}, "max") == (Float8Attention(fp8=False), False)
    assert parsed({"attention": {"fp8_keep_blocks": 2}}, "max") == (Float8Attention(fp8=True, fp8_keep_blocks=2), False)
    assert parsed({"attention": {"fp8": True}}) == (Float8Attention(fp8=True), True)
    assert parsed({"attention": {"kernel": "math"}}, "exact") == (None, False)
    assert "Float8Attention" in dict(parse(PASSES, None, "exact").switched_off)
    with pytest.raises(OptionError, match=r"attention\.fp8., which mode='exact' rules out"):
        parsed({"attention": {"fp8": True}}, "exact")
    with pytest.raises(OptionError, match=r"attention\.fp8 is 1, a int; allowed is bool"):
        parsed({"attention": {"fp8": 1}})
    with pytest.raises(
        OptionError, match=r"fp8_keep_blocks is given, which does nothing unless .attention\.fp8. is True"
    ):
        parsed({"attention": {"fp8_keep_blocks": 1}})
    with pytest.raises(OptionError, match="fp8_keep_blocks is -1; allowed is a whole number, 0 or more"):
        parsed({"attention": {"fp8": True, "fp8_keep_blocks": -1}})


def test_to_ask_for_float8_is_not_to_ask_for_a_mask() -> None:
    """Passes that share a section are asked for by their own fields."""
    asked = {type(item): asked for item, asked in parse(PASSES, FLOAT8, None).passes}
    assert not asked[UnmaskedAttention]
    for setting in (True, {}, {"unmask": True}):
        asked = {type(item): asked for item, asked in parse(PASSES, {"attention": setting}, None).passes}
        assert asked[UnmaskedAttention]


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that could."""
    monkeypatch.setattr(float8_linear, "reason_unfit", lambda _: "")
    trunk = recovered(Wide(), **wide_inputs())
    monkeypatch.setattr(float8_attention, "has_triton", lambda: False)
    assert "pip install triton" in Float8Attention(fp8=True).apply(trunk, Context()).declined[0][1]
    monkeypatch.setattr(float8_attention, "has_triton", lambda: True)
    assert Float8Attention(fp8=True).apply(trunk, Context()).applied


def test_planned_for_a_gpu() -> None:
    """Explained on the meta device; its operations still count as attention's."""
    inputs: dict[str, Any] = {name: item.to("meta") for name, item in wide_inputs().items()}
    reports = {}
    for gpu in ("a100", "h100"):
        explanation = hvcompile.explain(Wide(4).to("meta"), **inputs, device=DEVICES[gpu], options=None, mode="max")
        (reports[gpu],) = [row.report for row in explanation.journal if row.name == "Float8Attention"]
    assert "not known to run on a GPU" in reports["a100"].declined[0][1]
    assert "of block_0 in 3 blocks" in reports["h100"].matched[0]
    assert any("compared from step to step" in why for _, why in reports["h100"].declined)
    trunk = recovered(Wide(), **wide_inputs())
    before = [cost.flops for cost in costs(trunk.bodies[0].module.graph) if cost.part == ATTENTION]
    Float8Attention(fp8=True).apply(trunk, Context(requested=True))
    assert [cost.flops for cost in costs(trunk.bodies[0].module.graph) if cost.part == ATTENTION] == before


@pytest.mark.parametrize("lower", ["eager", "aot", "inductor"])
def test_equals_the_reference_run_eagerly(lower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = wide_inputs(seed=3, tokens=31, batch=2)
    expected = quantised(Wide(), inputs, monkeypatch)
    with torch.no_grad():
        plain = Wide()(**inputs)
        computed = compiled(Wide(), lower=lower)(**inputs)
    # A sum taken in another order pushes a value over a rounding step of float8 here and there.
    assert relative(computed, expected) <= (1e-6 if lower == "eager" else 1e-3)
    assert 1e-4 < relative(computed, plain) < 2e-2


def test_dtypes() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        inputs = wide_inputs(dtype=dtype)
        with torch.no_grad():
            assert relative(compiled(Wide().to(dtype))(**inputs), Wide().to(dtype)(**inputs)) < 2e-2


def test_with_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block is as it was, because the cache decides by it; a step is computed and one reused."""
    model, inputs = Wide(), wide_inputs()
    run = compiled(model, first_block_cache={"threshold": 0.5})
    later = inputs | {"timestep": inputs["timestep"] - 10}
    with torch.no_grad():
        computed, reused = run(**inputs), run(**later)
    assert [step.reused for step in hvcompile.stats(model).steps] == [False, True]
    assert relative(computed, quantised(Wide(), inputs, monkeypatch, blocks={1, 2})) < 1e-6
    assert relative(reused, quantised(Wide(), later, monkeypatch, blocks={1, 2})) < 2e-2


@pytest.mark.skipif(not torchao.is_available(), reason="torchao is not installed")
def test_with_float8_linears() -> None:
    """Both rewrite the same bodies; with the cache, and compiled by Inductor."""
    model, inputs = Wide(), wide_inputs()
    with torch.no_grad():
        expected = Wide()(**inputs)
        run = compiled(model, fp8={"keep_last_blocks": 0}, lower="inductor", first_block_cache=True)
        assert relative(run(**inputs), expected) < 4e-2
        assert relative(run(**inputs), expected) < 4e-2
    journal = {row.name: row.report for row in hvcompile.stats(model).journal[0]}
    assert "block_0 in 2 blocks" in journal["Float8Attention"].matched[0]
    assert "10 of 18 linear layers" in journal["Float8Linears"].matched[0]
    assert [step.reused for step in hvcompile.stats(model).steps] == [False, True]


def test_kept_blocks_of_both_float8_passes() -> None:
    trunk = recovered(Wide(5), **wide_inputs())
    Float8Attention(fp8=True, fp8_keep_blocks=2).apply(trunk, Context(requested=True))
    Float8Linears(keep_blocks=1, keep_last_blocks=0).apply(trunk, Context(requested=True))
    trunk.module.graph.lint()
    assert [any(map(is_attention, block.body.module.graph.nodes)) for block in trunk.blocks] == [1, 1, 0, 1, 1]
    assert [any(op_name(n) == "quantize" for n in b.body.module.graph.nodes) for b in trunk.blocks] == [0, 1, 1, 1, 0]


def test_masks_of_all_lengths() -> None:
    """With the mask's elimination: from two valid text tokens on one graph; within 2e-2 of eager."""
    family = zoo.FAMILIES["hunyuan_video"]
    model, inputs = family.build(), family.inputs() | {"return_dict": False}
    run = hvfast(model, fullgraph=True, options={"lower": "eager", **FLOAT8})
    for valid in (1, 4, zoo.TEXT):
        inputs["encoder_attention_mask"] = zoo.partial_mask(zoo.TEXT, valid, 1, inputs["encoder_attention_mask"].dtype)
        with torch.no_grad():
            expected = first(model(**inputs))
            assert all(relative_error(first(run(**inputs)), expected) < 2e-2 for _ in range(2))
    stats = hvcompile.stats(run)
    assert (stats.graphs, stats.recompiles, stats.unfit) == (1, 0, 0)


def test_a_hole_is_computed_with_its_mask(caplog: pytest.LogCaptureFixture) -> None:
    """Exactly, by a graph without float8, though it was asked for by name; the journal says why."""
    model = MaskedToy()
    run = compiled(model)
    hole = masked_inputs(15) | {"keep": with_hole(15)}
    with torch.no_grad(), caplog.at_level(logging.INFO, "hvcompile"):
        assert 1e-5 < relative(run(**masked_inputs(15)), model(**masked_inputs(15))) < 2e-2
        assert relative(run(**hole), model(**hole)) < 1e-6
        assert relative(run(**hole | {"keep": keep_first(15)}), model(**hole | {"keep": keep_first(15)})) > 1e-5
    rows = [row for row in hvcompile.stats(run).journal[1] if row.name == "Float8Attention"]
    assert not any(row.report.applied for row in rows)
    assert "it has a mask" in rows[0].report.declined[0][1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("size", [64, 128, 80])
def test_the_kernel_on_a_gpu(size: int) -> None:
    if float8_linear.reason_unfit(torch.device("cuda")) or not float8_attention.has_triton():
        pytest.skip("float8 attention does not run on this GPU")
    given = drawn("correlated", size=size, keys=1111, queries=777)
    query, key, value = (item.to("cuda", torch.bfloat16) for item in given)
    out = attend(query, key, value, size**-0.5)
    # What the hardware's exponential and sums round otherwise moves a weight or two over a rounding step.
    assert relative(out, reference(query, key, value, size**-0.5)) < 5e-3
