"""Models that Dynamo breaks into several graphs: blocks are found, cached and told of in the piece that holds them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ranks
import torch
import zoo
from oracle import first, hvfast, relative_error
from slow import SLOW
from torch import nn
from toy import Toy, toy_inputs

import hvcompile
import hvcompile.runtime.lineage
from hvcompile.graph.nodes import reached_from
from hvcompile.journal import JournalRow

ALWAYS = {"first_block_cache": {"threshold": 1e9}}
NEVER = {"first_block_cache": {"threshold": 0.0}}
BROKEN = ["hunyuan_video15", "lumina2", "omnigen"]


@pytest.fixture(autouse=True)
def _mask_indexing_is_captured() -> Iterator[None]:
    """What HunyuanVideo 1.5 needs for its blocks to come into one piece; the other models need nothing."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


def rows_of(model: Any, name: str) -> list[JournalRow]:
    return [row for journal in hvcompile.stats(model).journal for row in journal if row.name == name]


class Reference:
    """The model run eagerly, which hooks make reuse what blocks 2..N did in the last step that computed them."""

    def __init__(self, model: nn.Module, blocks: Any) -> None:
        self.model, self.reuse = model, False
        self._entered: torch.Tensor | None = None
        self._change: torch.Tensor | None = None
        for block in blocks[1:]:
            block.register_forward_hook(self._after(block is blocks[1], block is blocks[-1]))

    def _after(self, is_second: bool, is_last: bool) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            given = args[0]
            self._entered = given if is_second else self._entered
            assert self._entered is not None
            if not self.reuse:
                if is_last:
                    self._change = first(output) - self._entered
                return output
            handed_on = given + self._change if is_last else given
            return (handed_on, *output[1:]) if isinstance(output, tuple) else handed_on

        return hook

    def __call__(self, *, reuse: bool, **inputs: Any) -> torch.Tensor:
        self.reuse = reuse
        with torch.no_grad():
            return first(self.model(**inputs))


def generation(inputs: dict[str, Any], steps: int = 3, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Steps of one generation: the timestep falls, the sample changes, and both are new tensors."""
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        sample = inputs["hidden_states"]
        yield inputs | {
            "timestep": inputs["timestep"] * (1 - 0.1 * step),
            "hidden_states": sample + 0.05 * step * torch.randn(sample.shape, generator=draw),
        }


def blocks_of(model: nn.Module, family: zoo.Family) -> Any:
    return model.get_submodule(family.blocks[0])


@pytest.mark.parametrize(
    ("name", "lower"),
    [
        *((name, "eager") for name in BROKEN),
        *(pytest.param(name, "inductor", marks=SLOW) for name in BROKEN),
    ],
)
def test_blocks_are_cached_in_their_piece(name: str, lower: str) -> None:
    """Three generations in turn: every first step is computed, every later one is the eager reference's reuse."""
    family = zoo.FAMILIES[name]
    model = family.build()
    fast = hvfast(model, options={"lower": lower, **ALWAYS})
    results = []
    with torch.no_grad():
        for seed in (3, 4, 3):
            results += [first(fast(**step, return_dict=False)) for step in generation(family.inputs(seed=seed))]
    stats = hvcompile.stats(fast)
    assert [step.reused for step in stats.steps] == [False, True, True] * 3
    outlined = [row for row in rows_of(fast, "outline") if row.report.matched]
    assert [row.report.matched[0].split(":")[0] for row in outlined] == [f"{family.blocks[0]} x {family.num_blocks}"]
    reference = Reference(model, blocks_of(model, family))
    wanted = []
    for seed in (3, 4, 3):
        steps = enumerate(generation(family.inputs(seed=seed)))
        wanted += [reference(reuse=place > 0, **step, return_dict=False) for place, step in steps]
    for result, expected in zip(results, wanted, strict=True):
        assert relative_error(result, expected) < 1e-4


@pytest.mark.parametrize("name", BROKEN)
def test_nothing_is_reused_at_a_threshold_of_zero(name: str) -> None:
    family = zoo.FAMILIES[name]
    model = family.build()
    fast = hvfast(model, options={"lower": "eager", **NEVER})
    with torch.no_grad():
        for seed in (3, 5):
            for step in generation(family.inputs(seed=seed)):
                assert relative_error(first(fast(**step)[0]), first(model(**step)[0])) < 1e-5
    assert hvcompile.stats(fast).hits == 0


@pytest.mark.parametrize("name", BROKEN)
def test_two_prompts_in_turn(name: str) -> None:
    """The halves of classifier-free guidance, one after the other in every step, don't see each other's state."""
    family = zoo.FAMILIES[name]
    model = family.build()
    fast = hvfast(model, options={"lower": "eager", **ALWAYS})
    halves = [family.inputs(seed=3), family.inputs(seed=8)]
    same = {key: halves[0][key] for key in ("hidden_states", "timestep")}
    results: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for pair in zip(*(generation(half | same) for half in halves), strict=True):
            for place, step in enumerate(pair):
                results[place].append(first(fast(**step, return_dict=False)))
    assert [step.reused for step in hvcompile.stats(fast).steps] == [False, False, *[True] * 4]
    reference = Reference(model, blocks_of(model, family))
    for half, found in zip(halves, results, strict=True):
        for place, step in enumerate(generation(half | same)):
            assert relative_error(found[place], reference(reuse=place > 0, **step, return_dict=False)) < 1e-5


@pytest.mark.parametrize("name", BROKEN)
def test_a_batch_of_other_samples_and_odd_sizes(name: str) -> None:
    """A step of another size is a generation of its own, whether Dynamo makes the size symbolic or not."""
    family = zoo.FAMILIES[name]
    model = family.build()
    fast = hvfast(model, options={"lower": "eager", **ALWAYS})
    with torch.no_grad():
        for _ in range(2):
            for width in (1, 2, 3) if name != "omnigen" else (1, 2):
                inputs = family.inputs(seed=width)
                sample = inputs["hidden_states"]
                wide = sample.repeat(*[1] * (sample.ndim - 1), width)
                if name == "omnigen":
                    tokens = zoo.TEXT + 1 + wide[0, 0].numel() // 4
                    inputs |= {
                        "attention_mask": torch.ones(1, tokens, tokens).tril(),
                        "position_ids": torch.arange(tokens)[None],
                    }
                inputs |= {"hidden_states": wide}
                assert relative_error(first(fast(**inputs)[0]), first(model(**inputs)[0])) < 1e-5


class Broken(Toy):
    """A toy that Dynamo breaks, as ``where`` says."""

    def __init__(self, where: str, blocks: int = 4) -> None:
        super().__init__(blocks)
        self.where, self.shift = where, 0.0
        self.later = Toy(2 * (where == "between")).blocks

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, guidance: float = 1.0
    ) -> torch.Tensor:
        frequencies = torch.exp(-torch.arange(16 // 2, device=timestep.device) * 0.7)
        if self.where == "clock eagerly":
            timestep = eagerly(timestep)
        angles = timestep[:, None].float() / 1000 * frequencies[None]
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) * guidance
        hidden = self.embed(sample)
        text = text + self.shift
        torch._dynamo.graph_break()
        if self.where == "copied":
            hidden, time = eagerly(hidden), eagerly(time)
        if self.where == "written":
            write(time)
        for block in self.blocks:
            hidden = block(hidden, text, time)
        if self.where == "between":
            torch._dynamo.graph_break()
        for block in self.later:
            hidden = block(hidden, text, time)
        if self.where == "after":
            torch._dynamo.graph_break()
        result: torch.Tensor = self.head(hidden)
        return result


@torch.compiler.disable  # type: ignore[untyped-decorator]
def eagerly(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 1


@torch.compiler.disable  # type: ignore[untyped-decorator]
def write(tensor: torch.Tensor) -> None:
    tensor.mul_(2)


def denoised(call: Any, seeds: tuple[int, ...] = (0, 1), steps: int = 3, **more: Any) -> list[torch.Tensor]:
    results = []
    with torch.no_grad():
        for seed in seeds:
            for step in range(steps):
                inputs = toy_inputs(seed=seed, timestep=900.0 - 50 * step)
                inputs["sample"] = inputs["sample"] * (1 + 0.01 * step)
                results.append(call(**inputs, **more))
    return results


def steps_of(model: Any) -> list[bool]:
    return [step.reused for step in hvcompile.stats(model).steps]


@pytest.mark.parametrize("where", ["before", "clock eagerly"])
def test_a_break_before_the_blocks(where: str) -> None:
    model = Broken(where)
    fast = hvfast(model, options={"lower": "eager", **ALWAYS})
    found = denoised(fast)
    assert steps_of(fast) == [False, True, True] * 2
    assert hvcompile.stats(fast).graphs == 2  # one that reads no weight belongs to no model
    for place in (0, 3):
        assert relative_error(found[place], denoised(model)[place]) < 1e-6


@pytest.mark.parametrize("where", ["copied", "written"])
def test_what_is_not_known_is_computed(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where Python between the pieces makes or writes what they take, no step is reused, and that is told."""
    model = Broken(where)
    fast = hvfast(model, options={"lower": "eager"})
    with caplog.at_level(logging.INFO, "hvcompile"):
        found = denoised(fast)
    assert not any(steps_of(fast))
    for result, expected in zip(found, denoised(model), strict=True):
        assert relative_error(result, expected) < 1e-6
    cache = rows_of(fast, "FirstBlockCache")[0].report
    assert cache.declined


def test_what_is_lost_later_is_computed(caplog: pytest.LogCaptureFixture) -> None:
    """The graph was compiled where all was known; then a step in which it is not is computed, and keeps nothing."""
    model = Broken("before")
    fast = hvfast(model, options={"lower": "eager", **ALWAYS})
    denoised(fast)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvcompile.runtime.lineage._known", lambda item: None)
        found = denoised(fast)
    assert steps_of(fast) == [False, True, True] * 2 + [False] * 6
    for result, expected in zip(found, denoised(model), strict=True):
        assert relative_error(result, expected) < 1e-6
    assert "can't tell what an input of this graph was made of" in caplog.text


def test_a_pass_that_is_asked_for_is_looked_for_in_every_piece() -> None:
    """It is an error where the last piece can't have it, and not where an earlier one can't."""
    with torch.no_grad():
        fast = hvfast(Broken("before"), options={"lower": "eager", "first_block_cache": True})
        fast(**toy_inputs())
        assert rows_of(fast, "FirstBlockCache")[-1].report.applied
        refused = hvfast(Broken("copied"), options={"lower": "eager", "first_block_cache": True})
        with pytest.raises(Exception, match=r"first_block_cache.*Python between the pieces"):
            refused(**toy_inputs())


@pytest.mark.parametrize("where", ["between", "after"])
def test_breaks_among_and_after_the_blocks(where: str) -> None:
    """Each piece is right. Only one that gives what the model returns caches."""
    model = Broken(where)
    fast = hvfast(model, options={"lower": "eager"})
    found = denoised(fast, steps=1)
    for result, expected in zip(found, denoised(model, steps=1), strict=True):
        assert relative_error(result, expected) < 1e-6
    reports = [row.report for row in rows_of(fast, "FirstBlockCache")]
    assert "ends where Dynamo broke it" in reports[0].declined[0][1]
    assert [report.applied for report in reports] == [False, *[True] * (where == "between")]


def test_a_number_that_is_a_constant_of_an_earlier_piece() -> None:
    """Guidance as a Python number does not enter the piece with the blocks, and tells generations apart."""
    model = Broken("before")
    fast = hvfast(model, dynamic=False, options={"lower": "eager", **ALWAYS})
    with torch.no_grad():
        for step in range(3):
            for guidance in (1.0, 4.0):
                fast(**toy_inputs(timestep=900.0 - 50 * step), guidance=guidance)
    assert steps_of(fast) == [False, False, True, True, True, True]


def data(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor through which writes leave no trace that the host could see."""
    return tensor.data


@pytest.mark.parametrize("seen", [torch.Tensor.detach, data], ids=["seen", "unseen"])
@pytest.mark.parametrize("what", ["weight", "condition"])
def test_what_an_earlier_piece_was_given_changes(what: str, seen: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A step after a weight or a condition of an earlier piece has changed is computed, however it was written."""
    model = Broken("before")
    fast = hvfast(model, options={"lower": "eager", **ALWAYS})
    text = toy_inputs()["text"]
    with torch.no_grad():
        for step in range(4):
            if step == 2:
                seen(model.embed.weight if what == "weight" else text).mul_(1.5)
            inputs = toy_inputs(timestep=900.0 - 50 * step) | {"text": text}
            found = fast(**inputs)
            if step in (0, 2):
                assert relative_error(found, model(**inputs)) < 1e-6
    assert steps_of(fast) == [False, True, False, True]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def write_unseen(tensor: torch.Tensor, way: str, factor: float) -> None:
    if way == "data":
        tensor.data.mul_(factor)
    else:
        tensor.numpy()[:] *= factor


class Meddling(Broken):
    """Python between the pieces writes into what the earlier one made, and leaves no trace."""

    def __init__(self, what: str, way: str) -> None:
        super().__init__("before")
        self.what, self.way, self.factor = what, way, 1.0

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, guidance: float = 1.0
    ) -> torch.Tensor:
        frequencies = torch.exp(-torch.arange(16 // 2, device=timestep.device) * 0.7)
        angles = timestep[:, None].float() / 1000 * frequencies[None]
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) * guidance
        hidden, text = self.embed(sample), text * 1.5
        write_unseen({"hidden": hidden, "text": text, "time": time}[self.what], self.way, self.factor)
        for block in self.blocks:
            hidden = block(hidden, text, time)
        result: torch.Tensor = self.head(hidden)
        return result


@pytest.mark.parametrize("way", ["data", "numpy"])
@pytest.mark.parametrize("what", ["hidden", "text", "time"])
def test_what_is_written_unseen_between_the_pieces(what: str, way: str) -> None:
    model = Meddling(what, way)
    fast = hvfast(model, options={"lower": "eager", **ALWAYS})
    with torch.no_grad():
        for step in range(6):
            model.factor = 1.0 if step < 3 else 4.0
            inputs = toy_inputs(timestep=900.0 - step)
            found = fast(**inputs)
            if step in (0, 3):
                assert relative_error(found, model(**inputs)) < 1e-6
    assert steps_of(fast)[:4] == [False, True, True, False]


def test_one_step_generations() -> None:
    """A clock that stands still with another sample is another generation, which the embedded values can't tell."""
    model = Broken("before")
    fast = hvfast(model, options={"lower": "eager", **ALWAYS})
    text = toy_inputs()["text"]
    with torch.no_grad():
        for seed in range(3):
            inputs = toy_inputs(seed=seed) | {"text": text}
            assert relative_error(fast(**inputs), model(**inputs)) < 1e-6
    assert not any(steps_of(fast))


def test_inference_mode() -> None:
    model = Broken("before")
    fast = hvfast(model, options={"lower": "eager", **ALWAYS})
    with torch.inference_mode():
        denoised(fast)
    assert steps_of(fast) == [False, True, True] * 2


def test_two_models_of_one_class() -> None:
    models = [Broken("before"), Broken("before")]
    with torch.no_grad():
        models[1].embed.weight.mul_(3)
    fast = [hvfast(model, options={"lower": "eager", **ALWAYS}) for model in models]
    with torch.no_grad():
        for step in range(2):
            for model in fast:
                model(**toy_inputs(timestep=900.0 - 50 * step))
    assert [steps_of(model) for model in fast] == [[False, True]] * 2


def test_a_loop_of_graphs_keeps_nothing() -> None:
    """Where each step takes what the last returned, what is known of it does not grow."""
    model = Broken("before")
    fast = hvfast(model, options={"lower": "eager", **ALWAYS})
    inputs = toy_inputs()
    with torch.no_grad():
        for step in range(6):
            inputs |= {"sample": fast(**inputs), "timestep": torch.tensor([900.0 - 50 * step])}
    known = hvcompile.runtime.lineage.lineage_of(inputs["sample"])
    assert known is None or len(known.roots) <= 16


def test_the_reason_names_the_piece(caplog: pytest.LogCaptureFixture) -> None:
    family = zoo.FAMILIES["hunyuan_video15"]
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=False):
        fast = hvfast(family.build(), options={"lower": "eager"})
        fast(**family.inputs())
    assert "is_t2v" in caplog.text
    assert "a branch depends on a tensor's content" in caplog.text
    assert "capture_dynamic_output_shape_ops = True" in caplog.text
    assert not [row for row in rows_of(fast, "outline") if row.report.matched]


@pytest.mark.parametrize(
    ("name", "words"),
    [("lumina2", "capture_scalar_outputs = True"), ("omnigen", "a branch depends on a tensor's content")],
)
def test_reasons_of_other_models(name: str, words: str, caplog: pytest.LogCaptureFixture) -> None:
    family = zoo.FAMILIES[name]
    with torch.no_grad():
        hvfast(family.build(), options={"lower": "eager"})(**family.inputs())
    assert words in caplog.text
    assert "fullgraph=True keeps it whole" not in caplog.text


def test_a_whole_graph_without_blocks_is_no_piece(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        hvfast(model, options={"lower": "eager"})(torch.randn(2, 4))
    assert "piece" not in caplog.text


def test_a_refiner_in_its_own_piece_is_not_cached() -> None:
    """What does not follow from the sample tells nothing about how it changed."""
    family = zoo.FAMILIES["lumina2"]
    with torch.no_grad(), torch._dynamo.config.patch(capture_scalar_outputs=True):
        fast = hvfast(family.build(), options={"lower": "eager"})
        for step in generation(family.inputs(seed=3)):
            fast(**step)
    reports = [row.report for row in rows_of(fast, "FirstBlockCache")]
    assert reports[-1].applied
    assert len(reports) == 1 + (torch.torch_version.TorchVersion(torch.__version__) >= "2.12")
    for report in reports[:-1]:
        assert "ends where Dynamo broke it" in report.declined[0][1]


def test_what_is_written_reaches_views() -> None:
    def write_into(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = torch.zeros(2, 3)
        view = made.view(6)
        made[0, :] = a[0]
        return view, b + 1

    graphs = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.graph)
        return module.forward

    torch.compile(write_into, backend=keep)(torch.ones(2, 3), torch.ones(1))
    placeholders = list(graphs[0].find_nodes(op="placeholder"))
    reached = reached_from(graphs[0], {node: place for place, node in enumerate(placeholders)})
    results: Any = graphs[0].output_node().args[0]
    view, other = results
    assert (reached[view], reached[other]) == (frozenset([0]), frozenset([1]))


def broken_hunyuan_video() -> nn.Module:
    """A model that is captured whole but for a hook, as tools that look at activations put it on."""
    model = zoo.FAMILIES["hunyuan_video"].build(num_layers=2, num_single_layers=2, width=64)
    model.get_submodule("context_embedder").register_forward_hook(lambda *_: torch._dynamo.graph_break())
    return model


def on_this_rank(lower: str) -> tuple[list[float], list[bool], list[str]]:
    """A computed step's error in two generations, which steps were reused, and what the passes matched."""
    inputs = [zoo.FAMILIES["hunyuan_video"].inputs(seed=seed) for seed in (3, 4)]
    model = broken_hunyuan_video()
    fast = hvfast(model, options={"lower": lower, **ALWAYS})
    errors = []
    with torch.no_grad():
        for given in inputs:
            for place, step in enumerate(generation(given)):
                found = first(fast(**step, return_dict=False))
                if place == 0:
                    errors.append(relative_error(found, first(model(**step, return_dict=False))))
    matched = [
        name for name in ("ShardedAttention", "UnmaskedAttention") for row in rows_of(fast, name)[-1].report.matched
    ]
    return errors, steps_of(fast), matched


@pytest.mark.parametrize("lower", ["eager", pytest.param("inductor", marks=SLOW)])
def test_a_hook_that_breaks_a_model(lower: str) -> None:
    errors, reused, matched = on_this_rank(lower)
    assert max(errors) < 1e-5
    assert reused == [False, True, True] * 2
    assert set(matched) == {"UnmaskedAttention"}


def test_a_piece_on_two_ranks() -> None:
    """The piece with the blocks is sharded, and the ranks decide alike."""
    for errors, reused, matched in ranks.results(ranks.launch(on_this_rank, 2, "eager")):
        assert max(errors) < 1e-5
        assert reused == [False, True, True] * 2
        assert set(matched) == {"ShardedAttention", "UnmaskedAttention"}
