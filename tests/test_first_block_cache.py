"""The pass: what it makes of a graph, what it decides, and why it declines."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import golden
import pytest
import torch
from oracle import hvfast, relative_error, timesteps
from torch import nn
from toy import TOKENS, WIDTH, Toy, toy_inputs
from trunks import recovered

import hvcompile
from hvcompile import journal, pipeline
from hvcompile.errors import OptionError
from hvcompile.passes.first_block_cache import FirstBlockCache
from hvcompile.pipeline import Context
from hvcompile.rewriting.reuse import steps_left
from hvcompile.runtime import call, left_state, state
from hvcompile.torch_private.fakes import TAG
from hvcompile.torch_private.lowering import COND, INVOKE_SUBGRAPH


def compiled(model: nn.Module, **fields: Any) -> Any:
    options = {"lower": "eager", "first_block_cache": fields}
    return hvfast(model, fullgraph=True, options=options)


def run(model: Any, clock: list[float], drift: float = 0.0, **inputs: Any) -> list[bool]:
    """Call once for each clock value, the sample moving a little each time, and return the decisions."""
    inputs = toy_inputs() | inputs
    with torch.no_grad():
        for place, time in enumerate(clock):
            sample = inputs["sample"] + drift * place
            model(sample=sample, timestep=torch.full_like(inputs["timestep"], time), text=inputs["text"])
    return [step.reused for step in hvcompile.stats(model).steps][-len(clock) :]


DOWN = [900.0, 890.0, 880.0, 870.0, 860.0, 850.0]


def test_golden_text() -> None:
    """What the class's docstring shows."""
    trunk = recovered(Toy(blocks=3), **toy_inputs())
    before = golden.text_of(trunk)
    FirstBlockCache().apply(trunk, Context())
    golden.check(FirstBlockCache, before, golden.text_of(trunk))


def test_graph() -> None:
    """One cond at the top level, block 1 before it, the others inside its miss branch."""
    trunk = recovered(Toy(), **toy_inputs())
    rows: list[journal.JournalRow] = []
    pipeline.run(trunk, [(FirstBlockCache(), True)], lambda *_: None, rows)
    names = {id(node.target): node for node in trunk.graph.nodes if node.op == "call_function"}
    assert id(COND) in names
    assert len(trunk.graph.find_nodes(op="call_function", target=INVOKE_SUBGRAPH)) == 1
    miss: Any = trunk.module.cache_miss
    hit: Any = trunk.module.cache_hit
    assert len(miss.graph.find_nodes(op="call_function", target=INVOKE_SUBGRAPH)) == 3
    assert [str(node.target) for node in hit.graph.nodes if node.op == "call_function" and "add" in str(node.target)]
    assert not hit.graph.find_nodes(op="call_function", target=INVOKE_SUBGRAPH)
    assert [state.name for state in trunk.states] == [
        *("first_residual", "residual_0", "counters", "direction", "last_clock", "last_contents", "last_sample"),
        *("past_marks", "lead_clock", "lead_marks", "lead_reused", "lead_number"),
    ]
    assert rows[0].op_changes["cond"] == 1
    assert "blocks.1 .. blocks.3" in rows[0].report.matched[0]
    made = [node for node in trunk.graph.nodes if node.meta.get(TAG) == "FirstBlockCache"]
    assert {"cond", "isfinite"} <= {getattr(node.target, "__name__", str(node.target)) for node in made}
    assert all("nn_module_stack" in block.call.meta for block in trunk.blocks)


def test_applied_twice_changes_nothing() -> None:
    trunk = recovered(Toy(), **toy_inputs())
    FirstBlockCache().apply(trunk, Context())
    before = str(trunk.graph)
    report = FirstBlockCache().apply(trunk, Context())
    assert not report.applied
    assert "already" in report.declined[0][1]
    assert str(trunk.graph) == before


@pytest.mark.parametrize("lower", ["eager", "aot"])
def test_reuses_the_last_computed_residual(lower: str) -> None:
    """A reused step is block 1 of now plus the change over blocks 2..N of the last computed step, to 1e-6 in fp32."""
    model, inputs = Toy(), toy_inputs()
    later = {**inputs, "timestep": inputs["timestep"] - 50, "sample": inputs["sample"] + 0.01}
    fast = hvfast(model, options={"lower": lower, "first_block_cache": {"threshold": 0.5}})
    taken: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        hooks = [
            block.register_forward_hook(lambda _m, _i, o, n=n: taken.update({n: o}))
            for n, block in enumerate(model.blocks)
        ]
        model(**inputs)
        change = taken[3] - taken[0]
        model(**later)
        expected = model.head(taken[0] + change)
        for hook in hooks:
            hook.remove()
        fast(**inputs)
        actual = fast(**later)
    assert [step.reused for step in hvcompile.stats(fast).steps] == [False, True]
    assert relative_error(actual, expected) < 1e-6
    assert relative_error(actual, model(**later)) > 1e-5  # it did skip something


def test_the_difference_is_against_the_last_computed_step() -> None:
    model = compiled(Toy(), threshold=0.05)
    decisions = run(model, [900.0 - 10 * place for place in range(30)], drift=0.05)
    assert True in decisions
    assert decisions.count(False) > 1  # small steps add up: the reference is not the step before


def test_threshold_zero_reuses_only_repeats() -> None:
    model = compiled(Toy(), threshold=0.0)
    assert run(model, DOWN, drift=0.01) == [False] * 6
    hvcompile.reset(model)
    assert run(model, [900.0, 900.0]) == [False, True]


def test_warmup() -> None:
    assert run(compiled(Toy(), threshold=1e9, warmup_steps=3), DOWN) == [False] * 3 + [True] * 3


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_a_schedule_of_computed_steps(lower: str) -> None:
    numbers = (0, 3, 4, 61, 62, 64, 130)
    cache = {"threshold": 1e9, "computed_steps": numbers}
    model = hvfast(Toy(), fullgraph=True, options={"lower": lower, "first_block_cache": cache})
    for _ in range(2):  # the numbers begin anew with a generation
        decisions = run(model, [900.0 - place for place in range(140)])
        assert tuple(step for step, reused in enumerate(decisions) if not reused) == numbers
    few = compiled(Toy(), threshold=0.05, computed_steps=[1])
    assert run(few, [900.0, 899.0, 898.0, 100.0]) == [False, False, True, False], "the others are decided as ever"


@pytest.mark.parametrize("num_made", [1, 2])
def test_a_generation_that_was_broken_off_at_its_first_step_shifts_no_schedule(num_made: int) -> None:
    """The same prompt, seed and timestep again: nothing has moved, so the first step is numbered 0 once more."""
    cache = {"threshold": 1e9, "computed_steps": [0, 1, 2, 4], "guidance": "apart"}
    model, (one, other) = compiled(Toy(), **cache), (toy_inputs(seed) for seed in (0, 7))
    with torch.no_grad():
        for half in (one, other)[:num_made]:
            model(**half)
        for place in range(7):
            for text in (one["text"], other["text"]):
                model(sample=one["sample"], timestep=torch.tensor([900.0 - 9 * place]), text=text)
    made = [step.reused for step in hvcompile.stats(model).steps[num_made:]]
    assert made[::2] == made[1::2] == [False, False, False, True, False, True, True]


@pytest.mark.parametrize("wrong", [[-1], [True], [1.5], "1", [10**10]])
def test_a_schedule_has_numbers_of_steps(wrong: Any) -> None:
    with pytest.raises(OptionError, match=r"first_block_cache\.computed_steps"):
        FirstBlockCache(computed_steps=wrong)


def test_max_consecutive_hits() -> None:
    model = compiled(Toy(), threshold=1e9, max_consecutive_hits=2)
    assert run(model, DOWN) == [False, True, True, False, True, True]


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0, 12.0])
@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize(("steps", "last"), [(30, 1), (30, 4), (7, 2), (50, 3), (4, 2)])
def test_last_steps_are_computed(shift: float, inverted: bool, steps: int, last: int) -> None:
    clock = [float(t) for t in timesteps(steps, shift, inverted).timesteps]
    if inverted:
        clock = [min(t, 999.0) for t in clock]
    decisions = run(compiled(Toy(), threshold=1e9, last_steps_computed=last), clock)
    expected = [place >= 2 and place < steps - last for place in range(steps)]
    assert decisions == expected


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_last_steps_of_evenly_spaced_schedules(spacing: str) -> None:
    """The last steps are always computed; at most one step more than asked for is."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(20)
    decisions = run(compiled(Toy(), threshold=1e9, last_steps_computed=3), [float(t) for t in scheduler.timesteps])
    assert decisions[-3:] == [False] * 3
    assert decisions[2:-4] == [True] * 14


def test_steps_left_of_a_constant_clock_is_infinite() -> None:
    guidance, falling = [6.0, 6.0, 6.0], [300.0, 200.0, 100.0]
    values = [torch.tensor(pair, dtype=torch.float64) for pair in zip(guidance, falling, strict=True)]
    assert steps_left(*values).tolist() == [math.inf, pytest.approx(1.0)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_never_reuses(bad: float) -> None:
    model, inputs = compiled(Toy(), threshold=1e9), toy_inputs()
    broken = torch.full_like(inputs["sample"], bad)
    with torch.no_grad():
        for place, sample in enumerate([inputs["sample"], broken, broken, inputs["sample"], inputs["sample"]]):
            model(**inputs | {"sample": sample, "timestep": inputs["timestep"] - place})
    # The step after a broken one compares with a broken residual: it is computed, and mends the cache.
    assert [step.reused for step in hvcompile.stats(model).steps] == [False, False, False, False, True]


def test_new_generation_when_the_clock_turns_back() -> None:
    model = compiled(Toy(), threshold=1e9)
    assert run(model, [*DOWN, *DOWN]) == [False, *[True] * 5, False, *[True] * 5]
    hvcompile.reset(model)
    rising = [1000.0 - time for time in DOWN]
    assert run(model, [*rising, *rising]) == [False, *[True] * 5, False, *[True] * 5]


@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_one_step_generations_do_not_share(lower: str) -> None:
    """The clock stands still where every generation has one step; another sample then means another generation.

    The sample lies in memory in another order than the state that keeps it.
    """
    options = {"lower": lower, "first_block_cache": {"threshold": 1e9}}
    model, inputs = hvfast(Toy(2), fullgraph=True, options=options), toy_inputs()
    with torch.no_grad():
        for seed in (0, 1, 1, 2):
            sample = toy_inputs(seed)["sample"].transpose(1, 2).contiguous().transpose(1, 2)
            model(**inputs | {"sample": sample})
    assert [step.reused for step in hvcompile.stats(model).steps] == [False, False, True, False]


def test_repeated_timesteps_within_a_generation_go_on() -> None:
    """A second-order solver calls twice at one timestep."""
    assert run(compiled(Toy(), threshold=1e9), [900.0, 800.0, 800.0, 700.0, 700.0], drift=0.01) == [False, *[True] * 4]


def test_every_stream_that_leaves_is_cached() -> None:
    import zoo

    family = zoo.FAMILIES["ltx2"]  # video and audio
    model = hvfast(family.build(), options={"lower": "eager"})
    with torch.no_grad():
        model(**family.inputs())
    (row,) = [row for row in hvcompile.stats(model).journal[0] if row.name == "FirstBlockCache"]
    assert row.report.matched[0].count("getitem") == 2, row.line()


class TwoWays(nn.Module):
    """Blocks without a residual: block 1 hands on a tensor of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 8)])

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = x + timestep.sin()[:, None, None]
        for block in self.blocks:
            x = block(x)
        return x


def test_declines_with_a_reason() -> None:
    x = torch.randn(2, 3, 8), torch.tensor([5.0, 5.0])
    with torch.no_grad():
        model = hvfast(TwoWays(), options={"lower": "eager"})
        assert torch.equal(model(*x), model._orig_mod(*x))
        row = hvcompile.stats(model).journal[0][-1]
        assert "no residual" in row.report.declined[0][1]
        asked = hvfast(TwoWays(), options={"lower": "eager", "first_block_cache": True})
        with pytest.raises(Exception, match=r"first_block_cache.*no residual"):
            asked(*x)


class Written(Toy):
    """Writes in place between, before or inside the blocks, as ``where`` says."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.act = nn.LeakyReLU(0.1, inplace=True)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        hidden, text = self.embed(sample), self.time(text)
        time = self.time(timestep[:, None].sin().expand(-1, 16))
        late = text * 2
        if self.where == "before":
            text.mul_(0.3)
        for place, block in enumerate(self.blocks):
            if self.where == "strided":
                text = text.transpose(1, 2).contiguous().transpose(1, 2)
            hidden = block(hidden, late if place and self.where == "before" else text, time)
            if self.where in {"between", "strided"}:
                text.mul_(0.5)
            if self.where == "activation":
                self.act(hidden)
        return self.head(hidden)


@pytest.mark.parametrize("where", ["before", "between", "strided", "activation"])
def test_writes_in_place_around_the_blocks(where: str) -> None:
    """Either the pass declines or the result is right, computed and reused."""
    model = Written(where)
    fast = hvfast(model, options={"lower": "eager"})
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(fast(**toy_inputs()), model(**toy_inputs())) < 1e-6


def test_no_timestep_no_cache() -> None:
    class Timeless(Toy):
        def forward(self, sample: torch.Tensor, timestep: Any, text: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(sample)
            time = sample.mean(dim=1) if timestep is None else (timestep * torch.ones(1, 16)).sin()
            for block in self.blocks:
                hidden = block(hidden, text, time)
            return self.head(hidden)

    fast = hvfast(Timeless(), options={"lower": "eager"}, dynamic=True)
    inputs = toy_inputs()
    with torch.no_grad():
        fast(**inputs | {"timestep": None})
        for number in (900, 870):
            fast(**inputs | {"timestep": number})
    stats = hvcompile.stats(fast)
    assert stats.steps == []
    rows = [row for journal in stats.journal for row in journal if row.name == FirstBlockCache.__name__]
    reasons = [row.report.declined[0][1] for row in rows]
    assert "no input is a timestep" in reasons[0]
    assert "is a Python number; pass the timestep as a tensor" in reasons[1]


def test_small_conditions_are_not_clocks() -> None:
    """Calls that differ in a class label or a length have state of their own."""

    class Labelled(Toy):
        def forward(self, sample: Any, timestep: Any, text: Any, label: Any) -> Any:  # type: ignore[override]
            return super().forward(sample, timestep, text + label[:, None, None])

    fast = compiled(Labelled(), threshold=1e9)
    with torch.no_grad():
        for time in DOWN:
            for label in (1.0, 5.0):
                inputs = toy_inputs(timestep=time)
                fast(**inputs, label=torch.tensor([label]))
    stats = hvcompile.stats(fast)
    assert (stats.slots, stats.misses, stats.hits) == (2, 2, 2 * len(DOWN) - 2)


def test_intermediate_results_leave_too() -> None:
    """A model that returns the outputs of all its blocks gets each of them from the cache."""

    class Deep(Toy):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> Any:
            hidden, kept = self.embed(sample), []
            for block in self.blocks:
                hidden = block(hidden, text, self.time(timestep[:, None].expand(-1, 16)))
                kept.append(hidden)
            return self.head(hidden), kept

    model, inputs = Deep(), toy_inputs()
    fast = hvfast(model, options={"lower": "eager"})
    with torch.no_grad():
        expected, expected_kept = model(**inputs)
        for _ in range(2):
            output, kept = fast(**inputs)
            assert relative_error(output, expected) < 1e-6
            assert all(relative_error(a, b) < 1e-6 for a, b in zip(kept, expected_kept, strict=True))
    assert [step.reused for step in hvcompile.stats(fast).steps] == [False, True]


HEUN = [900.0, *(time for time in (800.0, 700.0, 600.0, 500.0, 400.0, 300.0, 200.0, 100.0) for _ in range(2))]


def test_last_timesteps_of_a_second_order_scheduler_are_computed() -> None:
    """Heun calls twice at every timestep but the first; both calls at the last three are computed."""
    decisions = run(compiled(Toy(), threshold=1e9, last_steps_computed=3), HEUN, drift=0.01)
    assert decisions[-6:] == [False] * 6
    assert decisions[:3] == [False] * 3  # two timesteps are not enough to see where it ends
    assert decisions[3:-6] == [True] * 8


def test_one_step_generations_with_other_guidance_are_told_apart() -> None:
    class Guided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.toy = Toy()

        def forward(self, sample: Any, timestep: Any, guidance: Any, text: Any) -> Any:
            return self.toy(sample, timestep, text) + self.toy(sample, guidance, text)

    model, inputs = compiled(Guided(), threshold=1e9), toy_inputs()
    with torch.no_grad():
        for guidance in (6000.0, 1000.0):
            model(**inputs, guidance=torch.tensor([guidance]))
    assert [step.difference for step in hvcompile.stats(model).steps] == [math.inf, math.inf]


def test_a_list_without_residual_streams_is_not_cached() -> None:
    """Members that put something new in place of their input have no residual to compare or to add."""

    class Perceptron(Toy):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)]
            self.net = nn.Sequential(*layers)
            self.blocks = nn.ModuleList()

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return self.head(self.net(self.embed(sample) + self.time((timestep[:, None] / 1000).cos() * text[:, 0])))

    model, inputs = Perceptron(), toy_inputs()
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"})
    with torch.no_grad():
        for time in DOWN:
            now = inputs | {"timestep": torch.tensor([time])}
            assert relative_error(fast(**now), model(**now)) < 1e-6
    assert not hvcompile.stats(fast).steps


class Streamed(Toy):
    """Blocks whose operands a subclass derives; in the first place, by handing one tensor on under two names."""

    def operands(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return text, text.float()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        hidden, time = self.embed(sample), self.time((timestep[:, None] / 1000).cos() * text[:, 0])
        one, other = self.operands(text)
        for place, block in enumerate(self.blocks):
            hidden = block(hidden, one if place % 2 else other, time)
        return self.head(hidden)


class FromOneInput(Streamed):
    def operands(self, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return text.unbind(0)[0][None], text[:1].expand_as(text[:1])


class Float32Stream(Toy):
    """A residual stream in fp32 around blocks that compute in bf16."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        hidden, time = self.embed(sample), self.time((timestep[:, None] / 1000).cos() * text[:, 0])
        for block in self.blocks:
            hidden = hidden + block(hidden.bfloat16(), text.bfloat16(), time.bfloat16()).float()
        return self.head(hidden)


def bfloat16_blocks(model: Toy) -> Toy:
    model.blocks.to(torch.bfloat16)
    return model


@pytest.mark.parametrize("build", [Streamed, FromOneInput, lambda: bfloat16_blocks(Float32Stream())])
@pytest.mark.parametrize("lower", ["aot", "inductor"])
def test_operands_that_share_memory_or_differ_in_dtype(build: Callable[[], Toy], lower: str) -> None:
    model, inputs = build(), toy_inputs()
    fast = hvfast(model, fullgraph=True, options={"lower": lower, "first_block_cache": {"threshold": 0.5}})
    tolerance = 2e-2 if isinstance(model, Float32Stream) else 1e-5
    with torch.no_grad():
        expected = model(**inputs)
        assert relative_error(fast(**inputs), expected) < tolerance
        assert relative_error(fast(**inputs), expected) < tolerance
    assert [step.reused for step in hvcompile.stats(fast).steps] == [False, True]


def test_inputs_that_are_views_of_one_tensor() -> None:
    class Rotated(Toy):
        def forward(self, sample: Any, timestep: Any, text: Any, rope: Any) -> Any:  # type: ignore[override]
            hidden, time = self.embed(sample), self.time((timestep[:, None] / 1000).cos() * text[:, 0])
            for block in self.blocks:
                hidden = block(hidden * rope[0] + rope[1], text, time)
            return self.head(hidden)

    model, inputs = Rotated(), toy_inputs() | {"rope": torch.randn(2, TOKENS, WIDTH).unbind()}
    fast = hvfast(model, fullgraph=True, options={"lower": "aot"})
    with torch.no_grad():
        assert relative_error(fast(**inputs), model(**inputs)) < 1e-5


@pytest.mark.parametrize("lower", ["eager", "aot"])
def test_a_step_that_reuses_leaves_the_cache_where_it_is(lower: str) -> None:
    """The same tensors, with what the last computed step wrote; and a later computed step writes them anew."""
    model = Toy()
    run = hvfast(model, options={"lower": lower, "first_block_cache": {"threshold": 0.9, "max_consecutive_hits": 2}})
    text, kept = toy_inputs()["text"], []
    with torch.no_grad():
        for timestep in (900.0, 800.0, 700.0, 600.0):
            run(**toy_inputs(timestep=timestep) | {"text": text})
            (slot,) = next(iter(state._states_in(model))).slots.values()
            kept.append([(id(tensor), tensor.clone()) for tensor in slot.tensors[:2]])
    assert [step.reused for step in hvcompile.stats(model).steps] == [False, True, True, False]
    for place in range(2):
        (first, _, again, anew) = (step[place] for step in kept)
        assert first[0] == again[0] != anew[0]
        assert torch.equal(first[1], again[1])
        assert first[1].abs().max() > 0


def test_a_step_leaves_all_of_its_cache_or_none() -> None:
    """Were one tensor's place in a branch to be taken by a copy, the next step would not read what is unwritten."""
    layout = call.StateLayout(
        name="residual", shape=(1,), dtype=torch.float32, device=torch.device("cpu"), may_be_left=True
    )
    plan = SimpleNamespace(states=(layout, layout, dataclasses.replace(layout, may_be_left=False)))
    graph = SimpleNamespace(_plan=plan)
    next_state = functools.partial(call.CompiledGraph._next_state, graph)  # type: ignore[arg-type]
    before, after = [torch.zeros(1) for _ in range(3)], [torch.ones(1) for _ in range(3)]
    assert next_state(before, after, left_state.Left(2)) == [*before[:2], after[2]]
    assert next_state(before, after, left_state.Left(0)) == after
    with pytest.raises(RuntimeError, match="left 1 of the tensors"):
        next_state(before, after, left_state.Left(1))
