"""The pass: what it makes of a body, what it leaves alone, and what it computes."""

from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from oracle import hvfast
from torch import nn
from trunks import recovered
from wide import TEXT, TOKENS, WIDTH, Wide, wide_inputs

import hvcompile
from hvcompile import journal, pipeline
from hvcompile.dump import bisect
from hvcompile.dump import read as dump_read
from hvcompile.float8 import format as float8_format
from hvcompile.float8 import linear as float8_linear
from hvcompile.float8.weights import QuantizedWeight
from hvcompile.graph.costs import DEVICES
from hvcompile.graph.nodes import op_name
from hvcompile.journal import PassReport
from hvcompile.options import parse
from hvcompile.passes import PASSES
from hvcompile.passes.first_block_cache import FirstBlockCache
from hvcompile.passes.float8_linears import Float8Linears
from hvcompile.pipeline import Context
from hvcompile.torch_private import torchao
from hvcompile.torch_private.fakes import value
from hvcompile.trunk.trunk import Trunk

pytestmark = pytest.mark.skipif(not torchao.is_available(), reason="torchao is not installed")


def rewritten(model: nn.Module | None = None, **fields: Any) -> tuple[Trunk, PassReport]:
    trunk = recovered(model or Wide(), **wide_inputs())
    rows: list[journal.JournalRow] = []
    pipeline.run(trunk, [(Float8Linears(**{"keep_last_blocks": 0, **fields}), True)], lambda *_: None, rows)
    return trunk, rows[0].report


def counts(module: Any) -> collections.Counter[str]:
    return collections.Counter(op_name(node) for node in module.graph.nodes if node.op == "call_function")


# A sum taken in another order pushes a value over a rounding step of float8 here and there.
ROUNDING = 1e-3


def compiled(model: nn.Module, fields: Any = True, dynamic: bool | None = None, **options: Any) -> Any:
    if fields:  # of so few blocks, none is kept
        fields = {"keep_last_blocks": 0, **(fields if isinstance(fields, dict) else {})}
    given = {"lower": "eager", "first_block_cache": False, "fp8": fields, **options}
    return hvfast(model, fullgraph=True, dynamic=dynamic, options=given)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


class Reference(nn.Module):
    """A linear layer as the pass is to compute it, eagerly and by itself."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = float8_format.quantize(layer.weight), layer.bias

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        product = float8_linear.linear(*float8_format.quantize(given), *self.weight, self.bias, given.dtype)
        return float8_linear.shape_like(product, given)


def reference(model: Wide) -> Wide:
    """The model with the layers that qualify replaced, in eager mode."""
    for block in model.blocks:
        for name in ("to_q", "to_k", "to_v", "up", "down"):
            setattr(block, name, Reference(getattr(block, name)))
    return model


def test_golden_text() -> None:
    """What the class's docstring shows."""
    trunk = recovered(Wide(), **wide_inputs())
    before = golden.text_of(trunk)
    Float8Linears(keep_last_blocks=0).apply(trunk, Context(requested=True))
    golden.check(Float8Linears, before, golden.text_of(trunk))


def test_graph() -> None:
    """One quantisation for each distinct input; the four layers of one input are one product."""
    trunk, report = rewritten()
    assert len(trunk.bodies) == 1
    found = counts(trunk.bodies[0].module)
    assert found["quantize"] == 2  # the normed input; what the last layer takes
    assert sum(node.target is float8_linear.linear for node in trunk.bodies[0].module.graph.nodes) == 2
    assert found["split"] == 1
    assert sum(node.target is torch._C._nn.linear for node in trunk.bodies[0].module.graph.nodes) == 1  # modulation
    assert [len(stored.sources) for stored in trunk.stored] == [4, 1] * 3
    assert all(not node.users for stored in trunk.stored for node in stored.sources)
    assert "15 of 18 linear layers as 6 float8 products" in report.matched[0]
    assert "1 rows" in report.declined[0][1]
    assert "modulate" in report.declined[0][0]
    assert report.table[1] == {
        "linear": "blocks.0.up",
        "shape": f"{2 * WIDTH} x {WIDTH}",
        "done": "float8",
        "why": "",
        "bytes_before": 2 * WIDTH * WIDTH * 4,
        "bytes_after": 2 * WIDTH * WIDTH + 4 * 2 * WIDTH,
    }


def test_one_scale_in_all_joins_nothing() -> None:
    trunk, _ = rewritten(granularity="tensor")
    found = counts(trunk.bodies[0].module)
    assert found["quantize"] == 2
    assert sum(node.target is float8_linear.linear for node in trunk.bodies[0].module.graph.nodes) == 5
    assert [len(stored.sources) for stored in trunk.stored] == [1] * 15


def test_applied_twice_changes_nothing() -> None:
    trunk, _ = rewritten()
    code = trunk.bodies[0].module.code
    report = Float8Linears(keep_last_blocks=0).apply(trunk, Context(requested=True))
    assert not report.applied
    assert trunk.bodies[0].module.code == code


def test_blocks_that_are_kept_have_a_body_of_their_own() -> None:
    trunk, report = rewritten(Wide(4), keep_blocks=1)
    bodies = [block.body for block in trunk.blocks]
    assert bodies[0] is bodies[3]
    assert bodies[1] is bodies[2]
    assert bodies[0] is not bodies[1]
    assert counts(bodies[0].module)["quantize"] == 0
    assert counts(bodies[1].module)["quantize"] == 2
    assert any("keep_blocks is 1" in why for _, why in report.declined)
    FirstBlockCache().apply(trunk, Context())
    trunk.module.graph.lint()


def test_the_last_blocks_are_kept_unless_asked_for() -> None:
    trunk, report = rewritten(Wide(4), keep_last_blocks=Float8Linears().keep_last_blocks)
    bodies = [block.body for block in trunk.blocks]
    assert bodies[0] is bodies[1]
    assert bodies[2] is bodies[3]
    assert [counts(body.module)["quantize"] for body in (bodies[0], bodies[2])] == [2, 0]
    done = {row["linear"].split(".")[1] for row in report.table if row["done"] == "float8"}
    assert done == {"0", "1"}
    assert Float8Linears().keep_last_blocks == 2  # of benchmarks/float8_ablation.py


def test_layers_that_are_skipped() -> None:
    trunk, report = rewritten(skip=("down", "blocks.1.*", "nowhere"))
    done = [row["linear"] for row in report.table if row["done"] == "float8"]
    assert done == [f"blocks.{place}.{name}" for place in (0, 2) for name in ("up", "to_q", "to_k", "to_v")]
    assert len(trunk.bodies) == 2
    assert ("'nowhere'", "fp8.skip names it, and no linear layer of the blocks is called so") in report.declined


def test_what_is_left_alone_and_why() -> None:
    model = Wide()
    model.blocks[0].to_k.weight = model.blocks[1].to_q.weight  # shared, but by linear layers alone
    model.blocks[2].to_v.weight = model.head.weight  # read by a layer outside the blocks too
    model.blocks[1].to_v.weight = nn.Parameter(torch.randn(2 * WIDTH, WIDTH)[:WIDTH])  # of a larger tensor
    model.blocks[1].up = nn.Linear(WIDTH, 2 * WIDTH - 8)
    model.blocks[1].down = nn.Linear(3 * WIDTH - 8, WIDTH)
    inputs = wide_inputs()
    with torch.no_grad():
        expected = model(**inputs)
        run = compiled(model.requires_grad_(False))
        assert relative(run(**inputs), expected) < 4e-2
    (journal,) = hvcompile.stats(model).journal
    (report,) = [row.report for row in journal if row.name == "Float8Linears"]
    table = {row["linear"]: row for row in report.table}
    assert "blocks.1.to_q" not in table  # a shared weight is named by where it is read first
    assert [row["done"] for row in report.table if row["linear"] == "blocks.0.to_k"] == ["float8"] * 2
    why = {name: row["why"] for name, row in table.items()}
    assert "read elsewhere" in why.get("blocks.2.to_v", "") or "read elsewhere" in why.get("head", "")
    assert "part of a larger tensor" in why["blocks.1.to_v"]
    assert "multiples of 16" in why["blocks.1.up"]
    assert "multiples of 16" in why["blocks.1.down"]
    assert table["blocks.0.up"]["done"] == "float8"


def test_a_model_without_linear_layers_that_qualify() -> None:
    from toy import Toy, toy_inputs

    trunk = recovered(Toy(), **toy_inputs())
    report = Float8Linears(keep_last_blocks=0).apply(trunk, Context(requested=True))
    assert not report.applied
    assert any("too small" in why for _, why in report.declined)


def test_on_a_cpu_only_where_asked_for() -> None:
    trunk = recovered(Wide(), **wide_inputs())
    report = Float8Linears().apply(trunk, Context())
    assert not report.applied
    assert "emulated" in report.declined[0][1]
    assert Float8Linears().apply(trunk, Context(requested=True)).applied


def test_without_torchao(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torchao, "is_available", lambda: False)
    trunk = recovered(Wide(), **wide_inputs())
    report = Float8Linears().apply(trunk, Context(requested=True))
    assert report.declined == (("graph", "torchao can't be imported: pip install 'hvcompile[fp8]'"),)
    assert "pip install 'hvcompile[fp8]'" in caplog.text


def test_planned_for_a_gpu() -> None:
    """Explained on the meta device, it says what it would do on the GPU that is named."""
    model = Wide(4).to("meta")
    inputs: dict[str, Any] = {name: item.to("meta") for name, item in wide_inputs().items()}
    reports = {}
    for gpu in (None, "a100", "h100"):
        explanation = hvcompile.explain(model, **inputs, device=DEVICES[gpu] if gpu else None)
        (reports[gpu],) = [row.report for row in explanation.journal if row.name == "Float8Linears"]
    assert "not known to run on a GPU" in reports[None].declined[0][1]
    assert not reports["a100"].applied
    assert "5 of 24 linear layers as 2 float8 products" in reports["h100"].matched[0]
    assert any("keep_last_blocks is 2" in why for _, why in reports["h100"].declined)
    assert any("compared from step to step" in why for _, why in reports["h100"].declined)


@pytest.mark.parametrize("lower", ["eager", "aot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_quantised_layers_run_eagerly(lower: str, dtype: torch.dtype) -> None:
    inputs = wide_inputs(seed=3, tokens=31, batch=2, dtype=dtype)
    with torch.no_grad():
        expected = reference(Wide().to(dtype))(**inputs)
        plain = Wide().to(dtype)(**inputs)
        computed = compiled(Wide().to(dtype), lower=lower)(**inputs)
    assert relative(computed, expected) <= (ROUNDING if dtype == torch.float32 else 1e-2)
    assert 1e-4 < relative(computed, plain) < 4e-2


def test_shapes_share_the_weights() -> None:
    """Three further captures; the weights are quantised once, and take a little over half of bf16's memory."""
    model = Wide().to(torch.bfloat16)
    layers = [getattr(block, name) for block in model.blocks for name in ("to_q", "to_k", "to_v", "up", "down")]
    before = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    run = compiled(model)
    with torch.no_grad():
        first = run(**wide_inputs(dtype=torch.bfloat16))
        held = {id(layer.weight.joined) for layer in layers}
        for tokens, text, batch in ((30, TEXT, 1), (TOKENS, 21, 2), (9, 3, 1)):  # the last with few rows
            run(**wide_inputs(tokens=tokens, text=text, batch=batch, dtype=torch.bfloat16))
        again = run(**wide_inputs(dtype=torch.bfloat16))
    assert hvcompile.stats(model).recompiles >= 2
    assert {id(layer.weight.joined) for layer in layers} == held
    joined = {id(layer.weight.joined): layer.weight.joined for layer in layers}
    after = sum(item.num_bytes for item in joined.values())
    assert sum(layer.weight.untyped_storage().nbytes() for layer in layers) == 0
    assert after <= 0.56 * before, after / before
    assert relative(again, first) < 1e-2


@pytest.mark.parametrize("how", ["dynamic", "marked"])
def test_dynamic_shapes(how: str) -> None:
    """One graph for every length, its products on as many rows as come; the weights quantised once."""
    model = Wide()
    run = compiled(model, lower="aot", dynamic=True if how == "dynamic" else None)
    expected = reference(Wide())
    with torch.no_grad():
        for tokens, text in ((31, 19), (37, 23), (64, 18), (23, 40)):
            inputs = wide_inputs(tokens=tokens, text=text)
            if how == "marked":
                for name in ("sample", "text"):
                    torch._dynamo.mark_dynamic(inputs[name], 1)
            assert relative(run(**inputs), expected(**inputs)) < ROUNDING
    stats = hvcompile.stats(model)
    assert (stats.graphs, stats.recompiles) == (1, 0)


def test_biases_are_joined_once_a_step_for_all_blocks() -> None:
    """Outside of the graph, of what they are now: also after a write that leaves no trace."""
    trunk = recovered(Wide(), **wide_inputs())
    Float8Linears(keep_last_blocks=0).apply(trunk, Context(requested=True))
    for body in trunk.bodies:
        assert all(value(node).ndim > 1 for node in body.module.graph.nodes if op_name(node) == "cat")
    (joined,) = trunk.derived
    assert len(joined.placeholders) == len(trunk.blocks)
    assert not joined.is_kept
    biases = [torch.randn(value(node).shape) for node in joined.sources]
    results = joined.module(*biases)
    assert torch.equal(torch.cat(results), torch.cat(biases))
    assert len({item.untyped_storage().data_ptr() for item in results}) == len(results)  # a branch takes no others

    model, expected = Wide(), reference(Wide())
    run, inputs = compiled(model), wide_inputs()
    with torch.no_grad():
        run(**inputs)
        for item in (model, expected):
            for place, block in enumerate(item.blocks):
                block.to_k.bias.data += place + 1.0
            item.blocks[1].up.bias.data = torch.full_like(item.blocks[1].up.bias, 0.5)
        assert relative(run(**inputs), expected(**inputs)) < ROUNDING


def test_with_the_cache() -> None:
    """A computed step as by the quantised layers run eagerly, those of the first block excepted, and a reused one."""
    model = Wide()
    run = compiled(model, first_block_cache={"threshold": 0.5})
    inputs = wide_inputs()
    with torch.no_grad():
        first = run(**inputs)
        second = run(**inputs | {"timestep": inputs["timestep"] - 10})
    assert [step.reused for step in hvcompile.stats(model).steps] == [False, True]
    expected, untouched = reference(Wide()), Wide()
    expected.blocks[0] = untouched.blocks[0]  # the cache decides by it
    assert not isinstance(model.blocks[0].to_q.weight, QuantizedWeight)
    assert isinstance(model.blocks[1].to_q.weight, QuantizedWeight)
    with torch.no_grad():
        assert relative(first, expected(**inputs)) < ROUNDING
        assert relative(second, expected(**inputs | {"timestep": inputs["timestep"] - 10})) < 2e-2


def test_two_models_of_a_class() -> None:
    """Each has its own weights, though Dynamo may share the graph."""
    one, other = Wide(), Wide(seed=1)
    inputs = wide_inputs()
    with torch.no_grad():
        expected = reference(Wide())(**inputs), reference(Wide(seed=1))(**inputs)
        for _ in range(2):
            assert relative(compiled(one)(**inputs), expected[0]) < ROUNDING
            assert relative(compiled(other)(**inputs), expected[1]) < ROUNDING


def test_exact_mode_leaves_it_out() -> None:
    settings = parse(PASSES, None, "exact")
    assert "Float8Linears" in dict(settings.switched_off)


def test_audit() -> None:
    """A figure for each layer, which is what its operands give, taken by themselves."""
    model, inputs = Wide(), wide_inputs(tokens=31)
    taken: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _, given, __, name=name: taken.update({name: given[0]}))
    expected = {}
    with torch.no_grad():
        model(**inputs)
        for name, given in taken.items():
            layer: Any = model.get_submodule(name)
            expected[name] = relative(Reference(layer)(given), layer(given))
        fresh = Wide()
        run = compiled(fresh, {"audit": True})
        run(**inputs)
        run(**wide_inputs(tokens=37))
    first, *_ = hvcompile.stats(fresh).journal
    (report,) = [row.report for row in first if row.name == "Float8Linears"]
    measured = {row["linear"]: row["relative_error"] for row in report.table if row["done"] == "float8"}
    assert len(measured) == 15
    assert measured == pytest.approx({name: expected[name] for name in measured}, rel=1e-2)
    assert all(error < 4e-2 for error in measured.values())


def test_dump(tmp_path: Path) -> None:
    """Every file runs on the first call's inputs, the weights as they were; and bisection finds nothing wrong."""
    model = Wide()
    with torch.no_grad():
        compiled(model, lower="aot", dump=tmp_path, first_block_cache=True)(**wide_inputs())
    (folder,) = dump_read.folders(tmp_path)
    assert [file.stem for file in sorted(folder.glob("0*.py"))] == [
        *("00_captured", "01_outlined", "02_unmasked_attention", "03_float8_linears", "04_first_block_cache"),
        "05_sealed",
    ]
    found = bisect.bisect(folder)
    assert found.finding is None, found
    figures = {stage.name: max(figure.relative for figure in stage.figures) for stage in found.stages}
    assert 1e-4 < figures["Float8Linears"] < 0.1
    assert figures["outlined"] == figures["FirstBlockCache"] == 0
    with torch.no_grad():
        compiled(model, lower="aot", dump=tmp_path / "more", first_block_cache=True)(**wide_inputs(tokens=37))
    (folder,) = dump_read.folders(tmp_path / "more")  # of weights that were in float8 alone before
    assert bisect.bisect(folder).finding is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"granularity": "column"}, "allowed is 'row' or 'tensor'"),
        ({"keep_original": "disk"}, "allowed is 'free' or 'cpu'"),
        ({"keep_blocks": -1}, "0 or more"),
        ({"keep_last_blocks": -1}, "0 or more"),
        ({"skip": "proj_out"}, "allowed is a list of str"),
        ({"skips": []}, "did you mean 'skip'"),
    ],
)
def test_options(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(hvcompile.OptionError, match=said):
        parse(PASSES, {"fp8": fields}, None)


class OddBlock(nn.Module):
    """Does to a layer's input or result what a careless rewrite gets wrong."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        first, second = self.first, self.second
        given = torch.tanh(hidden)
        if self.kind == "result written to":
            query, key = first(given), second(given)
            query.mul_(2.0)
            key.addcmul_(given, given)
        elif self.kind == "input written to":
            query = first(given)
            given.mul_(3.0).add_(0.5)
            key = second(given)
        elif self.kind == "part of the input written to":
            query = first(given)
            given[:, :3] = 7.0
            key = second(given)
        elif self.kind == "result viewed":
            query, key = (layer(given).view(hidden.shape[0], -1).view(hidden.shape) for layer in (first, second))
        else:
            query = first(given)
            bias = query.mean(dim=(0, 1)) + second.bias
            key = nn.functional.linear(given, second.weight, bias)
        changed: torch.Tensor = self.third(query * key.sigmoid())
        return hidden + 0.3 * changed


class Odd(nn.Module):
    """``(sample [B, N, C], timestep [B]) -> [B, N, C]`` through such blocks."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(OddBlock(kind) for _ in range(2))
        self.requires_grad_(False)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden = sample * timestep[:, None, None].cos()
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


@pytest.mark.parametrize("lower", ["eager", "aot"])
@pytest.mark.parametrize(
    "kind",
    ["result written to", "input written to", "part of the input written to", "result viewed", "computed bias"],
)
def test_blocks_that_write_in_place_or_view(kind: str, lower: str) -> None:
    inputs = {name: wide_inputs()[name] for name in ("sample", "timestep")}
    with torch.no_grad():
        expected, run = Odd(kind)(**inputs), compiled(Odd(kind), lower=lower)
        assert 0 < relative(run(**inputs), expected) < 2e-2


def test_first_called_under_autocast() -> None:
    model, inputs = Wide(), wide_inputs()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = Wide()(**inputs)
        assert relative(compiled(model)(**inputs), expected) < 4e-2
    assert isinstance(model.blocks[0].to_q.weight, QuantizedWeight)


def test_compiled_by_inductor() -> None:
    """A body's code quantises each of its two distinct inputs once, and has a product for each."""
    from torch._inductor.utils import run_and_get_code

    model, inputs = Wide(), wide_inputs(tokens=31)
    with torch.no_grad():
        expected = reference(Wide())(**inputs)
        run = hvfast(model, fullgraph=True, options={"fp8": {"keep_last_blocks": 0}, "first_block_cache": False})
        computed, codes = run_and_get_code(run, **inputs)
        assert relative(computed, expected) < ROUNDING
        assert relative(run(**wide_inputs(tokens=37)), reference(Wide())(**wide_inputs(tokens=37))) < ROUNDING
    code = "\n".join(codes)
    assert len(re.findall(r"empty_strided\w*\(.*torch\.float8_e4m3fn\)", code)) == 2
    assert len(re.findall(r"[\w.]*_scaled_mm(?:\.default|\.out)?\(", code)) == 2
