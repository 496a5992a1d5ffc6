"""Fixed schedules: found against all that there are, and followed by a compiled model."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from toy import Toy, toy_inputs

import hvcompile
from hvcompile.app.tuning import schedule
from hvcompile.app.tuning.candidates import ladder_of, scheduled
from hvcompile.runtime.probing import probing

T = 8


def walk(seed: int, num_steps: int = T) -> tuple[Any, Any, schedule.Trajectory]:
    """Block 1's residual and that of the others, which is like it in part, along a generation."""
    rng = np.random.default_rng(seed)
    first = rng.standard_normal((num_steps, 5)).cumsum(0)
    rest = first @ rng.standard_normal((5, 5)) + 0.3 * rng.standard_normal((num_steps, 5)).cumsum(0)
    clocks = np.linspace(1000, 30, num_steps) ** 1.1
    products = {"residual_0": rest[:, :3] @ rest[:, :3].T, "residual_1": rest[:, 3:] @ rest[:, 3:].T}
    whole = {"residual_0": (rest + first)[:, :3], "residual_1": (rest + first)[:, 3:]}
    return (
        first,
        rest,
        schedule.Trajectory(
            clocks=clocks,
            first=first @ first.T,
            rest=products,
            whole={name: changes @ changes.T for name, changes in whole.items()},
        ),
    )


def missed(walks: list[tuple[Any, Any, schedule.Trajectory]], steps: tuple[int, ...], front_blocks: int) -> float:
    """What the forecasts of a schedule are off, step by step as the definition has it."""
    total = 0.0
    for first, others, trajectory in walks:
        clocks, rest = trajectory.clocks, others if front_blocks else others + first
        lengths = [*-np.diff(clocks), clocks[-1]]
        for step in set(range(T)) - set(steps):
            *earlier, last = [place for place in steps if place < step]
            error = rest[step] - rest[last]
            if earlier:
                along = first[last] - first[earlier[-1]]
                ahead = along @ (first[step] - first[last]) / (along @ along * 1.001)
                if not front_blocks:
                    ahead = (clocks[step] - clocks[last]) / (clocks[last] - clocks[earlier[-1]])
                ahead = np.clip(ahead, -8, 8)
                error = error - ahead * (rest[last] - rest[earlier[-1]])
            for part, whole in ((error[:3], rest[:, :3]), (error[3:], rest[:, 3:])):
                total += lengths[step] * (part @ part) / (whole * whole).sum() * T / len(walks)
    return total


@pytest.mark.parametrize("front_blocks", [1, 0])
def test_of_all_schedules_of_a_number_of_steps_the_best_is_found(front_blocks: int) -> None:
    walks = [walk(seed) for seed in range(3)]
    found = schedule.schedules([trajectory for *_, trajectory in walks], front_blocks)
    assert list(found) == list(range(1, T + 1))
    for number, steps in found.items():
        every = [(0, *rest) for rest in itertools.combinations(range(1, T), number - 1)]
        assert steps == min(every, key=lambda item: missed(walks, item, front_blocks))


def test_parts_of_the_streams_on_ranks_are_the_whole_stream() -> None:
    first, rest, whole = walk(0)
    parts = [
        schedule.Trajectory(
            clocks=whole.clocks,
            first=first[:, part] @ first[:, part].T,
            rest={"residual_0": rest[:, part] @ rest[:, part].T},
            whole={"residual_0": (rest + first)[:, part] @ (rest + first)[:, part].T},
        )
        for part in (slice(0, 2), slice(2, 5))
    ]
    parts = [schedule.Trajectory.read(part.record()) for part in parts]
    joined = parts[0].joined(parts[1:])
    assert np.allclose(joined.first, whole.first)
    assert np.allclose(joined.rest["residual_0"], rest @ rest.T)
    assert np.allclose(joined.whole["residual_0"], (rest + first) @ (rest + first).T)


def test_what_is_no_number_is_in_no_schedule() -> None:
    *_, trajectory = walk(0)
    trajectory.rest["residual_0"][3, :] = trajectory.rest["residual_0"][:, 3] = math.nan
    found = schedule.schedules([trajectory])
    assert found == {T: tuple(range(T))}, "all streams are measured by their mean, which is none either"
    assert schedule.schedules([]) == {}
    assert schedule.why_none([trajectory]) == "what the blocks made is no number in some step of a clip"


def test_a_stream_of_nothing_and_a_long_generation() -> None:
    *_, trajectory = walk(0)
    found = schedule.schedules([trajectory])
    trajectory.rest["residual_2"] = np.zeros((T, T))
    assert schedule.schedules([trajectory]) == found
    *_, long = walk(0, schedule.MOST_STEPS + 1)
    assert schedule.schedules([long]) == {}
    assert schedule.why_none([long]) == "of generations of 129 steps, more than 128, none is sought"


def test_candidates_go_from_many_steps_to_few_and_bound_what_follows_the_schedule() -> None:
    found = {number: (*range(number - 1), 40) for number in range(2, 51)}
    made = ladder_of(found)
    assert len(made) == 15
    assert [len(candidate.computed_steps) for candidate in made] == sorted(
        (len(candidate.computed_steps) for candidate in made), reverse=True
    )
    assert made[-1] == scheduled(found)[10]
    assert made[-1].computed_steps == (*range(9), 40)
    assert made[-1].max_consecutive_hits == 31
    assert (scheduled({}), ladder_of({})) == ({}, ())


def generation(model: torch.nn.Module, text: torch.Tensor, num_steps: int) -> list[torch.Tensor]:
    """What a model gives in the steps of a generation whose sample drifts."""
    sample = toy_inputs(1)["sample"]
    found = []
    for step in range(num_steps):
        time = torch.full((1,), 1000.0 - 90.0 * step)
        with torch.no_grad():
            found.append(model(sample + 0.02 * step * sample.roll(1, 1), time, text))
    return found


def test_a_recorder_sees_what_the_blocks_made_and_a_schedule_is_followed() -> None:
    plain, texts = Toy(), [toy_inputs(seed)["text"] for seed in (1, 2)]
    seen: list[list[torch.Tensor]] = []
    for block in plain.blocks:
        block.register_forward_hook(lambda *made: seen[-1].append(made[-1]))
    plain.blocks[0].register_forward_pre_hook(lambda _, given: seen.append([given[0]]))
    for text in texts:
        generation(plain, text, 6)

    model = Toy()
    model.compile(backend="hvfast", options={"lower": "eager", "first_block_cache": schedule.COMPUTED})
    recorder = schedule.Recorder()
    with probing(recorder):
        for text in texts:
            generation(model, text, 6)
            recorder.end()
    first, second = recorder.trajectories()
    assert first.clocks.tolist() == [1000.0 - 90.0 * step for step in range(6)]
    for trajectory, steps in ((first, seen[:6]), (second, seen[6:])):
        residuals = torch.stack([(step[1] - step[0]).flatten() for step in steps]).double()
        rest = torch.stack([(step[-1] - step[1]).flatten() for step in steps]).double()
        assert np.allclose(trajectory.first, residuals @ residuals.T, rtol=1e-5)
        assert np.allclose(trajectory.rest["residual_0"], rest @ rest.T, rtol=1e-5)
        whole = rest + residuals
        assert np.allclose(trajectory.whole["residual_0"], whole @ whole.T, rtol=1e-5)

    for front_blocks in (1, 0):
        candidate = scheduled(schedule.schedules([first, second], front_blocks), front_blocks)[3]
        again = Toy()
        again.compile(backend="hvfast", options={"lower": "eager", "first_block_cache": candidate.section()})
        generation(again, texts[0], 10)
        decided = [step.reused for step in hvcompile.stats(again).steps]
        assert [place for place, hit in enumerate(decided[:6]) if not hit] == list(candidate.computed_steps)
        assert not all(decided[6:]), "beyond its end, too, steps are computed"


def test_generations_that_cannot_be_told_apart_give_no_schedule() -> None:
    state = {"counters": torch.tensor([1, 0]), "last_clock": torch.tensor([900.0]), "first_residual": torch.ones(2)}
    one_model, two_models, gap, lengths = (schedule.Recorder() for _ in range(4))
    for step in (1, 2):
        state["counters"] = torch.tensor([step, 0])
        one_model(0, 0, {**state, "residual_0": torch.ones(3)})
        two_models(step, step, {**state, "residual_0": torch.ones(3)})
        gap(0, 0, {**state, "counters": torch.tensor([3 * step, 0]), "residual_0": torch.ones(3)})
    lengths(0, 0, {**state, "counters": torch.tensor([1, 0])})
    lengths(0, 0, {"weights": torch.ones(1)})
    assert len(one_model.trajectories()) == 1
    assert [item.trajectories() for item in (two_models, gap, lengths, schedule.Recorder())] == [[], [], [], []]


@pytest.mark.parametrize("num_steps", [2, 3, 50])
def test_the_last_step_of_a_clock_that_falls_ends_at_0(num_steps: int) -> None:
    falling = np.linspace(900.0, 40.0, num_steps)
    assert schedule._lengths(falling)[-1] == 40.0
    assert schedule._lengths(1000 - falling)[-1] == pytest.approx(abs(np.diff(falling)[-1]))
    assert schedule._lengths(np.append(falling, 0.0))[-1] == 40.0, "one that comes to 0 has a last step all the same"


def test_a_call_that_corrects_a_step_is_as_long_as_that() -> None:
    heun = np.array([1000.0, 700.0, 700.0, 200.0, 200.0])
    assert schedule._lengths(heun).tolist() == [300.0, 300.0, 500.0, 500.0, 200.0]
    assert schedule._lengths(heun[1:]).tolist() == [500.0, 500.0, 500.0, 200.0]
    assert schedule._lengths(np.full(3, 5.0)).tolist() == [1.0] * 3
