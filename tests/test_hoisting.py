"""Hoisting: what is taken out of the step, and that it follows from numbers alone, so that nothing stale is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from oracle import first, hvfast, relative_error
from slow import SLOW
from test_unmasked_attention import NO_CACHE, check
from torch import nn
from toy import WIDTH, Toy, toy_inputs
from trunks import recovered

import hvcompile
from hvcompile import journal, pipeline
from hvcompile.graph.nodes import op_name
from hvcompile.passes.unmasked_attention import UnmaskedAttention
from hvcompile.trunk.trunk import Trunk

FAMILIES = (
    *("hunyuan_video", "hunyuan_video_i2v_replace", "cogvideox", "mochi", "wan_t2v", "wan_i2v", "ltx", "qwen_image"),
    *("motif_video", "pixart", "sana", "allegro"),
)


def attention_row(model: Any) -> Any:
    """What the pass says of the first graph."""
    (row,) = [row for row in hvcompile.stats(model).journal[0] if row.name == "UnmaskedAttention"]
    return row


def hoisted(trunk: Trunk) -> journal.JournalRow:
    rows: list[journal.JournalRow] = []
    pipeline.run(trunk, [(UnmaskedAttention(), False)], lambda *_: None, rows)
    return rows[0]


def operations(trunk: Trunk) -> list[str]:
    return [op_name(node) for node in trunk.graph.nodes if node.op in {"call_function", "call_method"}]


class Prompted(Toy):
    """A ``Toy`` that projects its text before the blocks, in a way of its own."""

    def __init__(self, prepare: Callable[..., Any] = lambda self, text, _: self.project(text)) -> None:
        super().__init__()
        self.project, self.prepare = nn.Linear(WIDTH, WIDTH), prepare

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return super().forward(sample, timestep, self.prepare(self, text, sample))


def products(call: Callable[[], Any]) -> int:
    """Linear layers that a call runs, from torch's profiler."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return sum(event.count for event in profile.key_averages() if event.key == "aten::linear")


def test_a_step_makes_no_rotary_tables() -> None:
    """Of the sines and cosines only those of timestep and guidance are left, and nothing counts tokens."""
    family = zoo.FAMILIES["hunyuan_video"]
    trunk = recovered(family.build(), **family.inputs(), return_dict=False)
    before = operations(trunk)
    row = hoisted(trunk)
    after = operations(trunk)
    assert [before.count(name) for name in ("cos", "sin", "outer", "arange", "meshgrid")] == [6, 6, 3, 10, 1]
    assert [after.count(name) for name in ("cos", "sin", "outer", "arange", "meshgrid")] == [3, 3, 0, 0, 0]
    assert [line for line in row.report.matched if "once a step" in line or "once, not" in line]
    names = [node.name for node in trunk.added]
    assert "hoisted_freqs_cos_3" in names
    assert len([name for name in names if "freqs" in name]) == 2  # once for both kinds of blocks


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    """Other conditions and sizes each time, the same ones again, and every other step reused; all equal to eager."""
    family = zoo.FAMILIES[name]
    model = family.build()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"})
    for seed in (0, 1, 0):
        check(fast, model, family.inputs(seed) | {"return_dict": False})
    assert any("once, not once a step" in line for line in attention_row(fast).report.matched)


@pytest.mark.parametrize("cache", [True, False])
def test_what_reads_a_tensor_stays_in_the_step(cache: bool) -> None:
    """The text's projection: a weight or a text that was written to unseen takes effect at once."""
    model = Prompted()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"} | ({} if cache else NO_CACHE))
    inputs = toy_inputs()
    check(fast, model, inputs)
    hvcompile.reset(fast)
    counts = [products(lambda: fast(**inputs)) for _ in range(4)]
    # Projection, embedder, time, four blocks of three and the head; a reused step runs one block.
    assert counts == ([16, 7, 7, 7] if cache else [16] * 4)
    for tensor in (model.project.weight, inputs["text"], model.project.bias):
        tensor.data.mul_(3)
        check(fast, model, inputs)


class Tabled(Toy):
    """A ``Toy`` that adds a table of its length, and returns it too, or a part of it."""

    def __init__(self, part: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.part = part

    def forward(  # type: ignore[override]
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, Any]:
        table = torch.arange(sample.shape[1], device=sample.device)[:, None].float().cos()
        return super().forward(sample + table, timestep, text), self.part(table)


@pytest.mark.parametrize("part", [lambda table: table, lambda table: table[2:5], lambda table: table.view(-1)])
@pytest.mark.parametrize("lower", ["eager", "aot"])
def test_what_the_caller_gets_is_not_kept(part: Callable[[torch.Tensor], Any], lower: str) -> None:
    """Who calls the model may write into its results; what is kept is not among them."""
    model = Tabled(part)
    fast = hvfast(model, fullgraph=True, options={"lower": lower} | NO_CACHE)
    inputs = toy_inputs()
    with torch.no_grad():
        for _ in range(3):
            (expected, _), (actual, table) = model(**inputs), fast(**inputs)
            assert relative_error(actual, expected) < 1e-5
            table.mul_(2)


@pytest.mark.parametrize("lower", ["eager", "aot"])
def test_tables_are_made_once(lower: str) -> None:
    model = Tabled(lambda table: table.sum())
    fast = hvfast(model, fullgraph=True, options={"lower": lower} | NO_CACHE)
    check(fast, model, toy_inputs())
    assert any("hoisted" in name for name in fake_names(model))


def fake_names(model: Any) -> list[str]:
    trunk = recovered(model, **toy_inputs())
    hoisted(trunk)
    return [node.name for node in trunk.added]


def test_guidance_halves_in_turn() -> None:
    """Both are right in every step."""
    model = Prompted()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"} | NO_CACHE)
    halves = [toy_inputs(0), toy_inputs(4)]
    counts = []
    for time in (900.0, 800.0, 700.0):
        for half in halves:
            half["timestep"] = torch.tensor([time])
            with torch.no_grad():
                assert relative_error(fast(**half), model(**half)) < 1e-5
            counts.append(products(lambda half=half: fast(**half)))  # type: ignore[misc]
    assert len(set(counts)) == 1  # none of them was the first call of its half


def test_conditions_written_in_place() -> None:
    model = Prompted()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"} | NO_CACHE)
    inputs = toy_inputs()
    check(fast, model, inputs)
    inputs["text"].mul_(2)
    check(fast, model, inputs)


@pytest.mark.parametrize("cache", [True, False])
def test_weights_written_in_place(cache: bool) -> None:
    """A LoRA that is fused and taken out again."""
    model = Prompted()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"} | ({} if cache else NO_CACHE))
    inputs = toy_inputs()
    for change in (0.0, 0.5, -0.5):
        with torch.no_grad():
            model.project.weight.add_(change)
        check(fast, model, inputs)


def test_weights_that_are_replaced() -> None:
    model = Prompted()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"} | NO_CACHE)
    inputs = toy_inputs()
    check(fast, model, inputs)
    model.project.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    check(fast, model, inputs)


def test_inference_tensors() -> None:
    """They carry no version counter, and need none."""
    model = Prompted()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"} | NO_CACHE)
    with torch.inference_mode():
        inputs = {key: held.clone() for key, held in toy_inputs().items()}
        for _ in range(3):
            assert relative_error(fast(**inputs), model(**inputs)) < 1e-5
            inputs["text"].mul_(1.5)


def test_sizes_that_change() -> None:
    family = zoo.FAMILIES["hunyuan_video"]
    model = family.build()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"} | NO_CACHE)
    for frames in (3, 5, 7, 3, 5):
        inputs = family.inputs(frames) | {"return_dict": False}
        inputs["hidden_states"] = torch.randn(1, 4, frames, 4, 6, generator=torch.Generator().manual_seed(frames))
        check(fast, model, inputs)
    assert hvcompile.stats(fast).recompiles == 1


def test_memory_is_counted_and_let_go() -> None:
    model = Prompted()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"} | NO_CACHE)
    inputs = toy_inputs()
    check(fast, model, inputs)
    held = hvcompile.stats(fast).bytes
    assert held > 0
    for seed in range(1, 20):  # prompts one after the other: nothing of them is kept
        inputs = toy_inputs(seed)
        check(fast, model, inputs)
    assert hvcompile.stats(fast).bytes == held
    hvcompile.reset(fast)
    assert hvcompile.stats(fast).bytes == 0
    check(fast, model, inputs)


def test_two_models_of_one_class() -> None:
    models = [Prompted(), Prompted()]
    with torch.no_grad():
        models[1].project.weight.mul_(3)
    fast = [hvfast(model, fullgraph=True, options={"lower": "eager"}) for model in models]
    inputs = toy_inputs()
    for _ in range(2):
        for model, run in zip(models, fast, strict=True):
            check(run, model, inputs)


def written(self: Any, text: torch.Tensor, _: Any) -> torch.Tensor:
    held: torch.Tensor = self.project(text)
    held[:, 0] = 1.0
    return held


def in_autocast(self: Any, text: torch.Tensor, _: Any) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return self.project(text).float()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "prepare",
    [
        written,
        in_autocast,
        lambda self, text, _: self.project(text) + torch.randn(1) * 0,
        lambda self, text, sample: self.project(text + sample.mean()),
    ],
)
def test_what_stays_in_the_step(prepare: Callable[..., Any]) -> None:
    """Written to in place, in an autocast region, random, of the sample: the projection is where it was, and right."""
    model = Prompted(prepare)
    trunk = recovered(model, **toy_inputs())
    before = operations(trunk).count("linear")
    hoisted(trunk)
    stays = operations(trunk).count("linear")
    assert stays == before or "randn" in operations(trunk)
    torch._dynamo.reset()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"} | NO_CACHE)
    check(fast, model, toy_inputs())
    check(fast, model, toy_inputs(1))


def test_casts_and_views_are_no_reason() -> None:
    model = Prompted(lambda self, text, _: text.double().float().transpose(1, 2).transpose(1, 2))
    trunk = recovered(model, **toy_inputs())
    hoisted(trunk)
    assert all("text" not in node.name for node in trunk.added)


def test_switched_off() -> None:
    model = Prompted()
    options = {"lower": "eager", "attention": {"hoist": False, "kernel": "math"}}
    fast = hvfast(model, fullgraph=True, options=options)
    check(fast, model, toy_inputs())
    assert not any("once a step" in line for line in attention_row(fast).report.matched)


@SLOW
def test_compiled() -> None:
    """By Inductor, with the cache and symbolic sizes: one graph a size kind, equal to eager, other prompts in turn."""
    family = zoo.FAMILIES["hunyuan_video"]
    model = family.build(num_layers=1, num_single_layers=2)
    fast = hvfast(model, fullgraph=True)
    for frames, seed in ((3, 0), (3, 1), (5, 0), (7, 1), (3, 0)):
        inputs = family.inputs(seed) | {"timestep": torch.tensor([9.0]), "guidance": torch.tensor([6.0])}
        inputs["hidden_states"] = torch.randn(1, 4, frames, 4, 6, generator=torch.Generator().manual_seed(seed))
        check(fast, model, inputs | {"return_dict": False})
    stats = hvcompile.stats(fast)
    assert (stats.graphs, stats.recompiles) == (1, 1)
    assert [step.reused for step in stats.steps] == [False, True] * 5
    with torch.no_grad():
        assert first(fast(**inputs, return_dict=False)).isfinite().all()
