"""Guidance by several calls a step: the later ones do what the first did."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import pytest
import ranks
import sharded_cases as cases
import torch
from oracle import hvfast, relative_error
from toy import TEXT, WIDTH, Toy, toy_inputs

import hvcompile

STEPS = 14


def compiled(model: Any, **fields: Any) -> Any:
    return hvfast(model, fullgraph=True, options={"lower": "eager", "first_block_cache": {"threshold": 0.08, **fields}})


def texts(count: int = 2, seed: int = 3) -> list[torch.Tensor]:
    """Of which the later ones weigh more, so that their halves change by other amounts."""
    generator = torch.Generator().manual_seed(seed)
    return [(1 + 3 * place) * torch.randn(1, TEXT, WIDTH, generator=generator) for place in range(count)]


def samples(seed: int = 5, steps: int = STEPS) -> list[torch.Tensor]:
    """A path whose pace changes, so that some steps are reused and some are not."""
    generator = torch.Generator().manual_seed(seed)
    start, way = (torch.randn(1, 9, WIDTH, generator=generator) for _ in range(2))
    paces = torch.rand(steps, generator=generator).cumsum(0)
    return [start + 0.12 * float(pace) * way for pace in paces]


def guided(fast: Any, conditions: list[torch.Tensor], path: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The outputs of every step's calls."""
    with torch.no_grad():
        return [
            [fast(sample=sample, timestep=torch.full((1,), 900.0 - 20 * place), text=text) for text in conditions]
            for place, sample in enumerate(path)
        ]


def decisions(fast: Any, calls: int = 2) -> list[list[bool]]:
    """Each call's, in a row a step."""
    flat = [step.reused for step in hvcompile.stats(fast).steps]
    return [flat[place : place + calls] for place in range(0, len(flat), calls)]


class Reference:
    """The cache as its documentation has it, on the model run as it is: block 1 always, the others on a miss."""

    def __init__(self, model: Toy, threshold: float) -> None:
        self.model, self.threshold = model, threshold
        self.firsts: dict[int, torch.Tensor] = {}
        self.rests: dict[int, torch.Tensor] = {}
        self.has_led = False

    def __call__(self, half: int, sample: torch.Tensor, clock: float, text: torch.Tensor) -> tuple[bool, torch.Tensor]:
        taken: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        hooks = [
            block.register_forward_hook(lambda _m, i, o, n=n: taken.update({n: (i[0], o)}))
            for n, block in enumerate(self.model.blocks)
        ]
        full = self.model(sample, torch.full((1,), clock), text)
        for hook in hooks:
            hook.remove()
        (before, after), end = taken[0], taken[len(self.model.blocks) - 1][1]
        first = after - before
        reused = False
        if half in self.firsts:
            last = self.firsts[half]
            change = float((first - last).abs().mean() / last.abs().mean())
            reused = change <= self.threshold if half == 0 else self.has_led
        if half == 0:
            self.has_led = reused
        if reused:
            return True, self.model.head(after + self.rests[half])
        self.firsts[half], self.rests[half] = first, end - after
        return False, full


@pytest.mark.parametrize("calls", [2, 3])
@pytest.mark.parametrize("seed", [5, 6])
def test_later_calls_follow_the_first(calls: int, seed: int) -> None:
    conditions, path = texts(calls, seed), samples(seed)
    fast, reference = compiled(Toy()), Reference(Toy(), 0.08)
    found = guided(fast, conditions, path)
    expected = []
    with torch.no_grad():
        for place, (sample, row) in enumerate(zip(path, found, strict=True)):
            for half, text in enumerate(conditions):
                reused, output = reference(half, sample, 900.0 - 20 * place, text)
                expected.append(reused)
                assert relative_error(row[half], output) < 1e-5
    rows = decisions(fast, calls)
    assert [item for row in rows for item in row] == expected
    assert all(len(set(row)) == 1 for row in rows)
    assert 2 < sum(row[0] for row in rows) < STEPS - 2
    torch._dynamo.reset()
    apart = compiled(Toy(), guidance="apart")
    guided(apart, conditions, path)
    assert any(len(set(row)) > 1 for row in decisions(apart, calls))


def test_apart_each_decides_as_if_it_were_alone() -> None:
    conditions, path = texts(), samples()
    apart = compiled(Toy(), guidance="apart")
    found = guided(apart, conditions, path)
    for half, text in enumerate(conditions):
        torch._dynamo.reset()
        alone = compiled(Toy())
        single = guided(alone, [text], path)
        assert all(torch.equal(row[half], other[0]) for row, other in zip(found, single, strict=True))
        assert [row[half] for row in decisions(apart)] == [row[0] for row in decisions(alone, 1)]


@pytest.mark.parametrize("forecast", [1, 2])
@pytest.mark.parametrize("decide_by", ["change", "error"])
def test_forecasts_follow_too(forecast: int, decide_by: str) -> None:
    fast = compiled(Toy(), forecast=forecast, decide_by=decide_by, threshold=0.08)
    guided(fast, texts(), samples())
    rows = decisions(fast)
    assert all(len(set(row)) == 1 for row in rows)
    assert 2 < sum(row[0] for row in rows) < STEPS - 2


def test_texts_of_other_lengths_are_other_graphs_and_follow_all_the_same() -> None:
    long, short = texts()
    fast = hvfast(
        Toy(), fullgraph=True, dynamic=False, options={"lower": "eager", "first_block_cache": {"threshold": 0.08}}
    )
    guided(fast, [long, short[:, :3]], samples())
    assert hvcompile.stats(fast).recompiles == 1
    rows = decisions(fast)
    assert all(len(set(row)) == 1 for row in rows)
    assert sum(row[0] for row in rows) > 2


def test_the_same_call_again_is_no_other_call_of_its_step() -> None:
    """Inputs that stay as they are, as in a measurement: the first call is computed, and all others reuse it."""
    fast, inputs = compiled(Toy()), toy_inputs()
    with torch.no_grad():
        for _ in range(4):
            fast(**inputs)
    assert [step.reused for step in hvcompile.stats(fast).steps] == [False, True, True, True]


def test_a_call_that_may_not_reuse_computes_whatever_the_first_did() -> None:
    """A third prompt comes in the middle; then the second one's text is written to, unseen, and its state is lost."""
    fast, conditions, path = compiled(Toy(), threshold=10.0), texts(3), samples(steps=6)
    conditions[1] = conditions[1].clone()
    with torch.no_grad():
        for place, sample in enumerate(path):
            clock = torch.full((1,), 900.0 - 20 * place)
            if place == 4:
                conditions[1].data.add_(1.0)
            for text in conditions[: 3 if place > 2 else 2]:
                fast(sample=sample, timestep=clock, text=text)
    flat = [step.reused for step in hvcompile.stats(fast).steps]
    assert flat == [False, False, True, True, True, True] + [True, True, False] + [True, False, True] + [True] * 3


def test_a_reset_between_two_calls_of_a_step_is_right() -> None:
    fast, conditions, path = compiled(Toy(), threshold=10.0), texts(), samples(steps=3)
    clock = [torch.full((1,), 900.0 - 20 * place) for place in range(3)]
    with torch.no_grad():
        for place in range(2):
            for half, text in enumerate(conditions):
                if (place, half) == (1, 1):
                    hvcompile.reset(fast)
                output = fast(sample=path[place], timestep=clock[place], text=text)
    assert [step.reused for step in hvcompile.stats(fast).steps] == [False]
    assert relative_error(output, Toy()(path[1], clock[1], conditions[1])) < 1e-5


def test_another_sample_or_timestep_leads_nobody() -> None:
    """Two prompts in turn, each with a sample of its own: every call decides by itself, as if it were alone."""
    conditions, paths = texts(), [samples(7), samples(8)]
    fast = compiled(Toy())
    with torch.no_grad():
        for place in range(STEPS):
            for text, path in zip(conditions, paths, strict=True):
                fast(sample=path[place], timestep=torch.full((1,), 900.0 - 20 * place), text=text)
    rows = decisions(fast)
    for half, (text, path) in enumerate(zip(conditions, paths, strict=True)):
        torch._dynamo.reset()
        alone = compiled(Toy())
        guided(alone, [text], path)
        assert [row[half] for row in rows] == [row[0] for row in decisions(alone, 1)]


def test_a_sample_that_is_no_number_is_computed() -> None:
    fast, conditions = compiled(Toy(), threshold=10.0), texts()
    path = samples(steps=4)
    path[2] = path[2] * math.nan
    found = guided(fast, conditions, path)
    assert decisions(fast) == [[False] * 2, [True] * 2, [False] * 2, [False] * 2]
    assert found[3][1].isfinite().all()


def test_threads_lead_their_own_calls() -> None:
    """Two threads of one model, at the same samples and timesteps, which begin at other places."""
    model = compiled(Toy())
    guided(model, texts(), samples())
    expected = decisions(model)
    hvcompile.reset(model)

    def other() -> None:
        guided(model, texts(seed=11), samples())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    hvcompile.stats(model)
    before = len(hvcompile.stats(model).steps)
    guided(model, texts(), samples())
    flat = [step.reused for step in hvcompile.stats(model).steps][before:]
    assert [flat[place : place + 2] for place in range(0, len(flat), 2)] == expected


def test_two_models_lead_apart() -> None:
    first = compiled(Toy(), threshold=10.0)
    second = compiled(copy.deepcopy(Toy()), threshold=10.0)
    path, (one, other) = samples(steps=4), texts()
    with torch.no_grad():
        for place, sample in enumerate(path):
            clock = torch.full((1,), 900.0 - 20 * place)
            first(sample=sample, timestep=clock, text=one)
            if place > 0:
                second(sample=sample, timestep=clock, text=other)
    assert [step.reused for step in hvcompile.stats(second).steps] == [False, True, True]


@pytest.mark.parametrize("lower", ["aot", "inductor"])
def test_compiled_it_decides_alike(lower: str) -> None:
    """One graph, symbolic sizes, as run eagerly."""
    runs = []
    for kind in ("eager", lower):
        torch._dynamo.reset()
        options: dict[str, Any] = {"lower": kind, "first_block_cache": {"threshold": 0.08}}
        fast = hvfast(Toy(blocks=2), fullgraph=True, dynamic=True, options=options)
        found = guided(fast, texts(), samples(steps=8))
        runs.append((decisions(fast), found))
        assert (hvcompile.stats(fast).graphs, hvcompile.stats(fast).recompiles) == (1, 0)
    (one, outputs), (other, others) = runs
    assert one == other
    assert all(
        relative_error(a, b) < 1e-5
        for row, rows in zip(outputs, others, strict=True)
        for a, b in zip(row, rows, strict=True)
    )


@pytest.mark.ranks
@pytest.mark.parametrize("size", [2])
def test_ranks_follow_as_one_does(size: int) -> None:
    """Two ranks decide as one; then one of them loses its state between two calls of a step, and none waits."""
    for rows, alone, error in ranks.results(ranks.launch(cases.guided, size)):
        assert rows[: len(alone)] == alone
        assert error < 1e-5
        assert all(one == other for one, other in alone)
        assert any(one for one, _ in alone)
    lost = [rows for rows, *_ in ranks.results(ranks.launch(cases.guided, size, True))]
    assert all(rows == lost[0] for rows in lost)


def negative_now_and_then(steps: list[int], **fields: Any) -> list[tuple[bool, float]]:
    """What the second call decides, and its error, where it is made in these steps alone."""
    conditions, path, fast, model = texts(), samples(steps=STEPS), compiled(Toy(), **fields), Toy()
    found = []
    with torch.no_grad():
        for place, sample in enumerate(path):
            clock = torch.full((1,), 900.0 - 20 * place)
            for half, text in enumerate(conditions[: 2 if place in steps else 1]):
                output = fast(sample=sample, timestep=clock, text=text)
                if half:
                    reused = hvcompile.stats(fast).steps[-1].reused
                    found.append((reused, relative_error(output, model(sample, clock, text))))
    return found


def test_a_call_that_was_left_out_of_steps_decides_by_itself() -> None:
    """It holds another step than the first call does, so following it would repeat what is long past."""
    together, apart = (negative_now_and_then([0, 1, 8, 9, 10], guidance=how) for how in ("together", "apart"))
    assert together[2][0] is False
    assert max(error for _, error in together) <= 2 * max(0.02, *(error for _, error in apart))


@pytest.mark.parametrize("front_blocks", [1, 0])
@pytest.mark.parametrize("guidance", ["together", "apart"])
def test_guidance_that_starts_late_has_the_steps_of_the_schedule(guidance: str, front_blocks: int) -> None:
    """A second call from step 4 on computes its first step, and then what the list names; apart it counts its own."""
    cache = {"threshold": 1e9, "computed_steps": [0, 2, 5, 6, 11], "guidance": guidance, "front_blocks": front_blocks}
    decided = [reused for reused, _ in negative_now_and_then(list(range(4, STEPS)), **cache)]
    first = 4 if guidance == "apart" else 0
    assert decided == [place != 4 and place - first not in {2, 5, 6, 11} for place in range(4, STEPS)]


def test_requests_in_turn_may_share_a_negative_prompt() -> None:
    """Two prompts with samples of their own, and one slot of both for the negative one: never the other's residual."""
    (one, other, negative), model = texts(3), Toy()
    paths = [samples(7, 10), samples(8, 10)]
    fast = compiled(Toy())
    with torch.no_grad():
        for place in range(10):
            clock = torch.full((1,), 900.0 - 20 * place)
            for path, text in zip(paths, (one, other), strict=True):
                for condition in (text, negative):
                    output = fast(sample=path[place], timestep=clock, text=condition)
                assert relative_error(output, model(path[place], clock, negative)) < 0.1


def test_no_change_is_still_no_change() -> None:
    """At a threshold of 0 a call reuses what it computed of this very sample, whatever the first one did."""
    fast, (text, negative), path = compiled(Toy(), threshold=0.0), texts(), samples(steps=3)
    with torch.no_grad():
        fast(sample=path[0], timestep=torch.full((1,), 900.0), text=negative)
        for condition in (text, text, negative):
            fast(sample=path[2], timestep=torch.full((1,), 880.0), text=condition)
    assert [step.reused for step in hvcompile.stats(fast).steps] == [False, False, True, False]


def test_the_same_two_calls_again_and_again() -> None:
    """A record of a text that comes no more keeps no other from reusing."""
    fast, (one, other) = compiled(Toy()), texts()
    inputs = toy_inputs()
    with torch.no_grad():
        for text in (one, other, other, other, one):
            fast(sample=inputs["sample"], timestep=inputs["timestep"], text=text)
    assert [step.reused for step in hvcompile.stats(fast).steps] == [False, False, True, True, True]
