"""State between calls: whose it is, which generation's, and when it goes."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from oracle import hvfast
from toy import TEXT, TOKENS, WIDTH, Toy, toy_inputs

import hvcompile
from hvcompile.ranks.fingerprints import fingerprint, hash_of
from hvcompile.runtime import slots, state

SCHEDULE = [900.0, 870.0, 800.0, 790.0, 600.0, 580.0, 300.0, 250.0]


def compiled(model: Toy, threshold: float = 0.2, **fields: Any) -> Any:
    options = {"lower": "eager", "first_block_cache": {"threshold": threshold, **fields}}
    return hvfast(model, fullgraph=True, options=options)


class Generation:
    """One denoising run, a step at a time."""

    def __init__(self, model: Any, seed: int, tokens: int = TOKENS) -> None:
        self.model, self.inputs, self.place = model, toy_inputs(seed, tokens), 0
        self.reused: list[bool] = []

    def step(self) -> None:
        time = torch.full((1,), SCHEDULE[self.place])
        with torch.no_grad():
            velocity = self.model(**self.inputs | {"timestep": time})
        self.inputs["sample"] = self.inputs["sample"] - 0.05 * velocity
        self.reused.append(hvcompile.stats(self.model).steps[-1].reused)
        self.place += 1

    def run(self) -> Generation:
        while self.place < len(SCHEDULE):
            self.step()
        return self


def alone(seed: int, tokens: int = TOKENS) -> Generation:
    """The same run in a fresh model."""
    torch._dynamo.reset()
    return Generation(compiled(Toy()), seed, tokens).run()


def same(one: Generation, other: Generation) -> bool:
    return one.reused == other.reused and torch.equal(one.inputs["sample"], other.inputs["sample"])


def test_the_runs_decide_differently() -> None:
    """What the other tests rest on: both decisions occur, and another prompt decides otherwise."""
    decisions = [alone(seed).reused for seed in range(6)]
    assert all(True in row and False in row for row in decisions)
    assert len({tuple(row) for row in decisions}) > 1


def test_guidance_halves_decide_apart() -> None:
    expected = [alone(seed) for seed in (0, 4)]
    model = compiled(Toy())
    halves = [Generation(model, 0), Generation(model, 4)]
    for _ in SCHEDULE:
        for half in halves:
            half.step()
    assert all(same(half, lonely) for half, lonely in zip(halves, expected, strict=True))
    assert hvcompile.stats(model).slots == 2


def test_one_prompt_after_another_and_again() -> None:
    expected = [alone(seed) for seed in (0, 4, 0)]
    model = compiled(Toy())
    assert all(same(Generation(model, seed).run(), lonely) for seed, lonely in zip((0, 4, 0), expected, strict=True))
    assert hvcompile.stats(model).graphs == 1


def test_same_prompt_other_noise_begins_anew() -> None:
    model = compiled(Toy(), threshold=1e9)
    first = Generation(model, 0).run()
    second = Generation(model, 0)
    second.inputs["sample"] = toy_inputs(9)["sample"]
    second.run()
    assert first.reused == second.reused == [False] + [True] * (len(SCHEDULE) - 1)


def test_another_shape_has_its_own_state() -> None:
    expected = [alone(0), alone(4, tokens=20), alone(4, tokens=28), alone(0)]
    model = compiled(Toy())
    runs = [Generation(model, seed, tokens).run() for seed, tokens in ((0, 12), (4, 20), (4, 28), (0, 12))]
    assert [run.reused for run in runs] == [lonely.reused for lonely in expected]
    for run, lonely in zip(runs, expected, strict=True):
        torch.testing.assert_close(run.inputs["sample"], lonely.inputs["sample"], rtol=1e-5, atol=1e-5)
    stats = hvcompile.stats(model)
    assert (stats.graphs, stats.recompiles) == (1, 1)  # Dynamo makes the length dynamic at the second one


def test_shapes_interleaved() -> None:
    expected = [alone(0), alone(4, tokens=20)]
    model = compiled(Toy())
    runs = [Generation(model, 0), Generation(model, 4, tokens=20)]
    for _ in SCHEDULE:
        for run in runs:
            run.step()
    assert [run.reused for run in runs] == [lonely.reused for lonely in expected]


def test_two_models_share_code_but_no_state() -> None:
    """Dynamo runs one compiled graph for all models of a class; state goes by the model."""
    expected = alone(0)
    one, other = Toy(), copy.deepcopy(Toy())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    fast = [compiled(one), compiled(other)]
    runs = [Generation(model, 0) for model in fast]
    for _ in SCHEDULE:
        for run in runs:
            run.step()
    assert same(runs[0], expected)
    assert [hvcompile.stats(model).slots for model in fast] == [1, 1]
    assert not torch.equal(runs[0].inputs["sample"], runs[1].inputs["sample"])


def test_two_threads_with_one_prompt() -> None:
    expected = alone(0)
    model = compiled(Toy())
    Generation(model, 4).step()  # compiled before the threads start
    barrier, finished = threading.Barrier(2), []

    def work() -> None:
        inputs, reused = toy_inputs(0), []
        for time in SCHEDULE:
            barrier.wait(timeout=60)
            with torch.no_grad():
                velocity = model(**inputs | {"timestep": torch.full((1,), time)})
            inputs["sample"] = inputs["sample"] - 0.05 * velocity
            reused.append(0)
        finished.append(inputs["sample"])

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(finished) == 2
    assert all(torch.equal(sample, expected.inputs["sample"]) for sample in finished)
    Generation(model, 4).step()
    assert hvcompile.stats(model).slots == 1  # those of finished threads are freed at the next call


def test_conditions_rebuilt_every_step_are_recognised() -> None:
    model, inputs = compiled(Toy(), threshold=1e9), toy_inputs()
    with torch.no_grad():
        for time in SCHEDULE:
            model(**inputs | {"timestep": torch.full((1,), time), "text": inputs["text"].clone()})
    stats = hvcompile.stats(model)
    assert (stats.hits, stats.misses, stats.slots) == (len(SCHEDULE) - 1, 1, 1)


def test_conditions_changed_in_place_are_noticed() -> None:
    model, inputs = compiled(Toy(), threshold=1e9), toy_inputs()
    with torch.no_grad():
        model(**inputs)
        inputs["text"].add_(1.0)
        model(**inputs | {"timestep": inputs["timestep"] - 10})
    assert hvcompile.stats(model).misses == 2


def test_inference_mode() -> None:
    model = compiled(Toy(), threshold=1e9)
    with torch.inference_mode():
        inputs = toy_inputs()
        for time in SCHEDULE:
            model(**inputs | {"timestep": torch.full((1,), time)})
    assert hvcompile.stats(model).hits == len(SCHEDULE) - 1


def test_reset_and_stats() -> None:
    model = compiled(Toy(), threshold=1e9)
    run = Generation(model, 0)
    run.run()
    stats = hvcompile.stats(model)
    assert (stats.hits, stats.misses, stats.slots) == (len(SCHEDULE) - 1, 1, 1)
    tensors = 2 * TOKENS * WIDTH * 4 + TOKENS * WIDTH * 4  # first residual, cached residual, last sample
    tensors += 2 * 8 + 2 * 8  # the content of the weights and of the text; which samples were seen and computed
    tensors += 8 + 4 * 8 + 1 + 8  # what guidance's first call did: its timestep, marks, whether it reused, its number
    assert tensors <= stats.bytes <= tensors + 64
    assert stats.steps[0].difference == float("inf")
    assert all(step.slot == 0 and step.difference >= 0 for step in stats.steps)
    hvcompile.reset(model)
    stats = hvcompile.stats(model._orig_mod)  # the module itself will do
    assert (stats.hits, stats.misses, stats.slots, stats.bytes, stats.steps) == (0, 0, 0, 0, [])
    assert stats.graphs == 1
    run = Generation(model, 0)
    run.step()
    assert run.reused == [False]


def test_stale_slots_are_freed() -> None:
    model = compiled(Toy(), threshold=1e9)
    with torch.no_grad():
        model(**toy_inputs(1))
        for place in range(slots.STALE_AFTER_CALLS + 1):
            model(**toy_inputs(0) | {"timestep": torch.full((1,), 900.0 - place)})
    assert hvcompile.stats(model).slots == 1


def test_state_dies_with_the_model() -> None:
    model = Toy()
    fast = compiled(model)
    with torch.no_grad():
        fast(**toy_inputs())
    (kept,) = state._states_of(model)
    alive = [weakref.ref(tensor) for slot in kept.slots.values() for tensor in slot.tensors]
    weak_model = weakref.ref(model)
    del kept, fast, model
    gc.collect()
    assert weak_model() is None
    assert not [reference for reference in alive if reference() is not None]


def test_dynamo_reset_begins_with_fresh_state() -> None:
    """Dynamo numbers its graphs from 0 again; the state of the old ones must not be taken for theirs."""
    model = Toy()
    with torch.no_grad():
        compiled(model, threshold=1e9)(**toy_inputs())
        torch._dynamo.reset()
        fast = compiled(model, threshold=1e9, last_steps_computed=1)
        fast(**toy_inputs(timestep=700.0))
    assert [step.reused for step in hvcompile.stats(fast).steps] == [False, False]


def test_weights_changed_in_place_are_noticed() -> None:
    """A LoRA fused between two calls, or a checkpoint loaded into the model, makes the cache another model's."""
    model = Toy()
    fast = compiled(model, threshold=1e9)
    with torch.no_grad():
        fast(**toy_inputs())
        model.blocks[2].out.weight.add_(0.1)  # type: ignore[union-attr, operator]
        assert torch.equal(fast(**toy_inputs()), model(**toy_inputs()))
        model.load_state_dict({name: held * 1.1 for name, held in model.state_dict().items()})
        assert torch.equal(fast(**toy_inputs()), model(**toy_inputs()))
    assert hvcompile.stats(fast).misses == 3


def test_models_that_share_a_block_share_no_state() -> None:
    one, other = Toy(), Toy()
    other.blocks[0] = one.blocks[0]
    with torch.no_grad():
        other.blocks[2].out.weight.mul_(-3)  # type: ignore[union-attr, operator]
        compiled(one, threshold=1e9)(**toy_inputs())
        assert torch.equal(compiled(other, threshold=1e9)(**toy_inputs()), other(**toy_inputs()))


def test_slots_are_bounded_and_churn_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = compiled(Toy(), threshold=1e9)
    with torch.no_grad():
        for seed in range(slots.MOST_SLOTS + 3):
            model(**toy_inputs(seed))
    assert hvcompile.stats(model).slots <= slots.MOST_SLOTS
    assert caplog.text.count("changes at every step") == 1


def test_a_generation_s_state_goes_with_its_conditions(caplog: pytest.LogCaptureFixture) -> None:
    """Twenty prompts of four steps, one after the other: at most one has state, none when the last is over."""
    model = compiled(Toy(), threshold=1e9)
    with torch.no_grad():
        for seed in range(20):
            inputs = toy_inputs(seed)
            for place in range(4):
                model(**inputs | {"timestep": torch.full((1,), 900.0 - place)})
            assert hvcompile.stats(model).slots == 1
    del inputs
    stats = hvcompile.stats(model)
    assert (stats.slots, stats.bytes) == (0, 8 * 4 + 49)  # hoisted frequencies, and the record of guidance
    assert [step.reused for step in stats.steps] == [False, True, True, True] * 20
    assert "hvfast has dropped state" not in caplog.text


def test_conditions_that_are_made_anew_at_every_step_keep_their_state(caplog: pytest.LogCaptureFixture) -> None:
    """With the same content they are the same generation's, also where guidance runs two beside each other."""
    model = compiled(Toy(), threshold=1e9)
    with torch.no_grad():
        for seed in range(0, 12, 2):
            for place in range(4):
                for half in range(2):
                    time = torch.full((1,), 900.0 - place)
                    model(**toy_inputs(seed + half) | {"timestep": time, "sample": toy_inputs(seed)["sample"]})
            assert hvcompile.stats(model).slots <= 4
    assert [step.reused for step in hvcompile.stats(model).steps] == [False, False, *[True] * 6] * 6
    assert "hvfast has dropped state" not in caplog.text


def test_too_many_generations_at_once_are_said(caplog: pytest.LogCaptureFixture) -> None:
    model = compiled(Toy(), threshold=1e9)
    kept = [toy_inputs(seed) for seed in range(slots.MOST_SLOTS + 1)]
    with torch.no_grad():
        for place in range(3):
            for inputs in kept:
                model(**inputs | {"timestep": torch.full((1,), 900.0 - place)})
    assert hvcompile.stats(model).slots == slots.MOST_SLOTS
    assert caplog.text.count("hvfast has dropped state") == 1


def test_a_model_that_never_ran() -> None:
    for ask in (hvcompile.stats, hvcompile.reset):
        with pytest.raises(hvcompile.UncompiledModelError, match="compile it with"):
            ask(Toy())
    with pytest.raises(hvcompile.UncompiledModelError, match="this ReLU has no weights"):
        hvcompile.stats(torch.nn.ReLU())
    with pytest.raises(TypeError, match="str"):
        hvcompile.stats("model")  # type: ignore[arg-type]


def test_many_steps_are_counted_beyond_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "KEPT_STEPS", 5)
    model = compiled(Toy(), threshold=1e9)
    for _ in range(2):
        Generation(model, 0).run()
    stats = hvcompile.stats(model)
    assert stats.hits + stats.misses == 2 * len(SCHEDULE)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float16]
)
def test_fingerprints(dtype: torch.dtype) -> None:
    tensor = (
        (torch.randn(TEXT, WIDTH) > 0).to(dtype) if dtype == torch.bool else torch.randn(TEXT, WIDTH).mul(9).to(dtype)
    )
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    assert fingerprint(tensor) == fingerprint(tensor.t().contiguous().t())
    seen = {fingerprint(tensor.roll(shift, 0)) for shift in range(TEXT)}
    assert len(seen) == TEXT
    changed = tensor.clone()
    changed[0, 0] = ~changed[0, 0] if dtype == torch.bool else changed[0, 0] + 1
    assert fingerprint(changed) not in seen
    assert isinstance(fingerprint(tensor[:0]), int)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.float64]
)
def test_a_hash_is_the_same_compiled(dtype: torch.dtype) -> None:
    """In every step the graph makes it; of bools, C++ compilers once took the overflow of a position for impossible."""
    torch._dynamo.reset()
    run = torch.compile(hash_of, fullgraph=True, dynamic=False)
    for shape in ((2, 17), (1,), (3, 5, 31), (64, 64)):
        tensor = (torch.randn(shape) * 9).to(dtype)
        for _ in range(3):
            assert torch.equal(run(tensor), hash_of(tensor))


def last_reused(model: Any) -> bool:
    return hvcompile.stats(model).steps[-1].reused


def test_weights_that_change_places_are_other_weights() -> None:
    model = Toy()
    fast, inputs = compiled(model, threshold=1e9), toy_inputs()
    with torch.no_grad():
        fast(**inputs)
        fast(**inputs)
        assert last_reused(fast)
        model.blocks[2], model.blocks[3] = model.blocks[3], model.blocks[2]
        fast(**inputs)
    assert not last_reused(fast)


def test_a_weight_at_the_address_of_a_freed_one_is_another() -> None:
    model: Any = Toy()
    fast, inputs = compiled(model, threshold=1e9), toy_inputs()
    base = model.blocks[2].out.weight.detach().clone()
    with torch.no_grad():
        for scale in range(12):
            model.blocks[2].out.weight = torch.nn.Parameter(base * (1 + scale))
            fast(**inputs)
            assert not last_reused(fast)


def test_a_buffer_made_under_inference_mode_does_not_hide_the_weights() -> None:
    class Rotated(Toy):
        rope: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            with torch.inference_mode():
                self.register_buffer("rope", torch.ones(WIDTH))

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return super().forward(sample * self.rope, timestep, text)

    model: Any = Rotated()
    fast, inputs = compiled(model, threshold=1e9), toy_inputs()
    with torch.no_grad():
        fast(**inputs)
        model.blocks[2].out.weight.add_(0.3)
        fast(**inputs)
        assert not last_reused(fast)
        fast(**inputs)
        assert last_reused(fast)


def test_a_model_is_found_by_its_parameters_though_a_buffer_comes_first() -> None:
    model: Any = Toy()
    for block in model.blocks:
        block.register_buffer("scaling", torch.ones(WIDTH))
        forward = block.forward
        block.forward = lambda h, t, e, block=block, forward=forward: forward(h * block.scaling, t, e)
    fast = compiled(model)
    with torch.no_grad():
        fast(**toy_inputs())
    assert hvcompile.stats(fast).misses == 1
    hvcompile.reset(fast)


def test_stats_of_a_function_says_what_to_give() -> None:
    with pytest.raises(TypeError, match="give the module, also where only its forward was compiled"):
        hvcompile.stats(torch.compile(Toy().forward, backend="hvfast"))
