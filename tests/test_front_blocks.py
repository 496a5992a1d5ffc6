"""A cache that skips block 1 too: steps and forecasts against a reference in plain Python, and what can go wrong."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import ranks
import sharded_cases as cases
import torch
from oracle import hvfast, relative_error
from test_forecast import CLOCKS, denoised
from test_guidance import guided, samples, texts
from toy import Toy, toy_inputs
from trunks import recovered

import hvcompile
from hvcompile.errors import OptionError
from hvcompile.passes.first_block_cache import FirstBlockCache
from hvcompile.pipeline import Context
from hvcompile.torch_private.lowering import INVOKE_SUBGRAPH

STEPS = (0, 1, 4, 7, 8, 13, 17, 22)
FIXED: dict[str, Any] = {"front_blocks": 0, "threshold": 1e9}


def compiled(model: Any, lower: str = "eager", **fields: Any) -> Any:
    return hvfast(model, fullgraph=True, options={"lower": lower, "first_block_cache": {**FIXED, **fields}})


def reused(model: Any) -> list[bool]:
    return [step.reused for step in hvcompile.stats(model).steps]


class Reference:
    """The cache as its documentation has it, on the model's own modules; what no list names is not computed."""

    def __init__(self, model: Toy, steps: tuple[int, ...], order: int) -> None:
        self.model, self.steps, self.order = model, steps, order
        self.number = 0
        self.known: list[tuple[float, torch.Tensor]] = []

    def __call__(self, *, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        entered, clock = self.model.embed(sample), float(timestep[0])
        if self.number in self.steps:
            taken: list[torch.Tensor] = []
            hook = self.model.blocks[-1].register_forward_hook(lambda *made: taken.append(made[-1]))
            output = self.model(sample, timestep, text)
            hook.remove()
            self.known.append((clock, taken[0] - entered))
        else:
            (last_clock, change), *earlier = reversed(self.known)
            if self.order and earlier:
                before_clock, before = earlier[0]
                ahead = (clock - last_clock) / (last_clock - before_clock)
                change = change + min(ahead, 8.0) * (change - before)
            output = self.model.head(entered + change)
        self.number += 1
        return output  # type: ignore[no-any-return]


@pytest.mark.parametrize("lower", ["eager", "aot"])
@pytest.mark.parametrize("order", [0, 1])
def test_computes_as_the_reference(order: int, lower: str) -> None:
    """The steps of the list and no other, and the same result of a closed loop, in a second generation too."""
    fast = compiled(Toy(), lower, computed_steps=STEPS, forecast=order)
    for seed in (3, 4):
        wanted = denoised(Reference(Toy(), STEPS, order), CLOCKS, seed)
        assert relative_error(denoised(fast, CLOCKS, seed), wanted) < 1e-4
    decided = reused(fast)
    assert [[place for place, hit in enumerate(part) if not hit] for part in (decided[:24], decided[24:])] == [
        list(STEPS)
    ] * 2
    assert {step.difference for step in hvcompile.stats(fast).steps} == {0.0, math.inf}
    assert (hvcompile.stats(fast).graphs, hvcompile.stats(fast).recompiles) == (1, 0)


def test_a_difference_in_float8_costs_little() -> None:
    wanted = denoised(Reference(Toy(), STEPS, 1), CLOCKS, 3)
    fast = compiled(Toy(), computed_steps=STEPS, forecast=1, keep="float8")
    assert 1e-7 < relative_error(denoised(fast, CLOCKS, 3), wanted) < 1e-2


def test_no_block_stands_before_the_branch() -> None:
    trunk = recovered(Toy(), **toy_inputs())
    report = FirstBlockCache(**FIXED, computed_steps=(0, 1), forecast=1).apply(trunk, Context())
    assert "blocks.0 .. blocks.3 run on a miss" in report.matched[0]
    assert not trunk.graph.find_nodes(op="call_function", target=INVOKE_SUBGRAPH)
    hit: Any = trunk.module.cache_hit
    assert not hit.graph.find_nodes(op="call_function", target=INVOKE_SUBGRAPH)
    assert [state.name for state in trunk.states][:4] == [
        *("residual_0", "residual_0_difference_1", "is_number", "counters")
    ]


def test_what_is_no_number_serves_no_later_step() -> None:
    """A sample of NaN in a step of the list: the next is computed whatever the list says, and forecasts are finite."""
    fast, model, inputs = compiled(Toy(), computed_steps=(0, 1, 3), forecast=1), Toy(), toy_inputs()
    with torch.no_grad():
        for place in range(8):
            sample = inputs["sample"] * (math.nan if place == 3 else 1.0) + 0.01 * place
            clock = torch.full((1,), 900.0 - 20 * place)
            output = fast(sample=sample, timestep=clock, text=inputs["text"])
            if place != 3:
                assert relative_error(output, model(sample, clock, inputs["text"])) < 0.05
    assert reused(fast) == [False, False, True, False, False, True, True, True]


def test_other_weights_conditions_and_generations_are_computed() -> None:
    model = Toy()
    fast, inputs = compiled(model, computed_steps=(0,), max_consecutive_hits=4, forecast=1), toy_inputs()
    text = inputs["text"].clone()

    def step(clock: int) -> bool:
        with torch.no_grad():
            fast(sample=inputs["sample"], timestep=torch.tensor([clock]), text=text)  # whole numbers
        return reused(fast)[-1]

    assert [step(clock) for clock in (900, 880, 860, 840, 820, 800, 780)] == [False, *[True] * 4, False, True]
    text.data.add_(1.0)
    assert [step(760), step(740)] == [False, True]
    next(model.blocks.parameters()).data.mul_(0.5)
    assert [step(720), step(700)] == [False, True]
    assert [step(900), step(880)] == [False, True], "the clock has turned back"
    hvcompile.reset(fast)
    assert [step(860), step(840)] == [False, True]


def test_guidance_s_calls_skip_the_same_steps() -> None:
    fast, path = compiled(Toy(), computed_steps=(0, 1, 3, 6), forecast=1), samples(steps=9)
    found = guided(fast, texts(), path)
    decided = reused(fast)
    assert decided[::2] == decided[1::2] == [place not in {0, 1, 3, 6} for place in range(9)]
    for half, text in enumerate(texts()):
        reference = Reference(Toy(), (0, 1, 3, 6), 1)
        for place, row in enumerate(found):
            with torch.no_grad():
                wanted = reference(sample=path[place], timestep=torch.full((1,), 900.0 - 20 * place), text=text)
            assert relative_error(row[half], wanted) < 1e-4


@pytest.mark.parametrize("front_blocks", [0, 1])
def test_a_call_that_holds_another_step_than_the_first_is_computed(front_blocks: int) -> None:
    """Guidance that pauses; and two requests in turn that share a negative prompt, whose state is the other's then."""
    (one, other, negative), path, others = texts(3), samples(7, steps=9), samples(8, steps=9)
    fast = compiled(Toy(), front_blocks=front_blocks, computed_steps=(0, 1, 4), forecast=1)
    for turns, guided_steps in (
        ([(one, path)], {0, 1, 6, 7}),
        ([(one, path), (other, others)], set(range(9))),
    ):
        for place in range(9):
            for text, way in turns:
                for condition in (text, negative)[: 2 if place in guided_steps else 1]:
                    clock = torch.full((1,), 900.0 - 20 * place)
                    with torch.no_grad():
                        output = fast(sample=way[place], timestep=clock, text=condition)
                        wanted = Toy()(way[place], clock, condition)
                    assert reused(fast)[-1] == (condition is not negative and place not in {0, 1, 4})
                    assert condition is not negative or relative_error(output, wanted) < 1e-5


@pytest.mark.ranks
def test_ranks_skip_as_one_does() -> None:
    """Two ranks and one; then one of the two loses its state between two calls of a step, and none waits."""
    cache = {**FIXED, "computed_steps": [0, 1, 4, 8], "forecast": 1}
    found = ranks.results(ranks.launch(functools.partial(cases.guided, cache=cache), 2, True))
    for rows, alone, error in found:
        assert alone == [(place not in {0, 1, 4, 8},) * 2 for place in range(12)]
        assert rows[:7] == alone[:7]
        assert rows[7][1] is False
        assert rows == found[0][0]
        assert error < 1e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": 0.06, "computed_steps": [0]}, "threshold, 0.06, has nothing to be compared with; set it to 1e"),
        (
            {"computed_steps": [0], "forecast": 1, "decide_by": "error"},
            "decide_by='error' goes by; allowed is 'change'",
        ),
        ({"computed_steps": [0], "forecast": 2}, "forecast=2 goes by; allowed is 0 or 1"),
        ({}, r"nothing says which steps are computed; give first_block_cache\.computed_steps or"),
        ({"front_blocks": 2}, "front_blocks is 2; allowed is 0 or 1"),
    ],
    ids=["threshold", "error", "two", "nothing", "more"],
)
def test_errors_say_what_needs_block_1(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        FirstBlockCache(**{**FIXED, **fields})
