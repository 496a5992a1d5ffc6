"""Forecasts of skipped residuals: coefficients and decisions against a reference in numpy, and what can go wrong."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ranks
import sharded_cases as cases
import torch
from oracle import hvfast, relative_error
from slow import SLOW
from toy import Toy, toy_inputs

import hvcompile
from hvcompile.errors import OptionError
from hvcompile.passes.first_block_cache import FirstBlockCache
from hvcompile.rewriting import forecast

SETTINGS = [
    {"forecast": order, "decide_by": decided} for order, decided in itertools.product((1, 2), ("change", "error"))
]


def named(setting: dict[str, Any]) -> str:
    return "-".join(map(str, setting.values()))


def kept(difference: np.ndarray, keep: str) -> np.ndarray:
    """A difference as it comes back from the dtype that it is kept in; float8 has a scale."""
    tensor = torch.from_numpy(difference).float()
    if keep == "float8":
        scale = tensor.abs().max() / 448
        return ((tensor / scale).to(torch.float8_e4m3fn).float() * scale).double().numpy()
    return tensor.bfloat16().double().numpy() if keep == "bfloat16" else difference


# The reference: lists of numpy arrays in float64, and numpy's own least squares.


@dataclasses.dataclass
class Reference:
    """The cache as its documentation has it, for one generation; holds all that was computed."""

    threshold: float
    forecast: int = 0
    decide_by: str = "change"
    firsts: list[np.ndarray] = dataclasses.field(default_factory=list)
    rests: list[np.ndarray] = dataclasses.field(default_factory=list)
    missed: float = 0.0
    keep: str = "full"
    steps_between: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)

    def step(self, first: np.ndarray, compute: Callable[[], np.ndarray]) -> tuple[bool, float, np.ndarray]:
        """Whether a step is reused, what was compared with the threshold, and the change over blocks 2..N."""
        difference, order = math.inf, min(self.forecast, len(self.firsts) - 1)
        if self.firsts:
            last = self.firsts[-1]
            difference = float(np.abs(first - last).mean() / np.abs(last).mean())
            if self.decide_by == "error":
                off = np.linalg.norm(first - self.ahead(self.firsts, first, order)) / np.linalg.norm(first)
                self.missed += float(off)
                difference = self.missed + forecast.CHANGE_SHARE * difference
        if difference <= self.threshold:
            return True, difference, self.ahead(self.rests, first, order)
        self.missed = 0.0
        rest = compute()
        if self.firsts:
            self.steps_between.insert(
                0, (kept(first - self.firsts[-1], self.keep), kept(rest - self.rests[-1], self.keep))
            )
        self.firsts.append(first)
        self.rests.append(rest)
        return False, difference, rest

    def ahead(self, values: list[np.ndarray], first: np.ndarray, order: int) -> np.ndarray:
        """What a value is forecast to be, given those of the computed steps."""
        found, kind = values[-1], 0 if values is self.firsts else 1
        for n, weight in enumerate(self.weights(first, order)):
            found = found + weight * self.steps_between[n][kind]
        return found

    def weights(self, first: np.ndarray, order: int) -> list[float]:
        if not order:
            return []
        own = np.stack([self.steps_between[n][0].ravel() for n in range(order)], axis=1)
        # The ridge, as rows of their own.
        ridge = np.diag(np.sqrt(forecast.RIDGE) * np.linalg.norm(own, axis=0))
        change = (first - self.firsts[-1]).ravel()
        found = np.linalg.lstsq(np.vstack([own, ridge]), np.concatenate([change, np.zeros(order)]), rcond=None)[0]
        if np.abs(found).max() <= forecast.MOST_AHEAD:
            return [float(item) for item in found]
        if order > 1:
            return self.weights(first, 1)
        return [float(np.clip(found[0], -forecast.MOST_AHEAD, forecast.MOST_AHEAD))]


def denoised(call: Callable[..., torch.Tensor], clocks: list[float], seed: int = 0, pull: float = 0.6) -> torch.Tensor:
    """A closed loop: each step's result moves the next step's sample."""
    inputs = toy_inputs(seed)
    sample = inputs["sample"]
    with torch.no_grad():
        for now, then in itertools.pairwise([*clocks, 0.0]):
            velocity = call(sample=sample, timestep=torch.full((1,), now), text=inputs["text"])
            sample = sample - pull * (now - then) / 100 * velocity
    return sample


def referred(model: Toy, reference: Reference, differences: list[float]) -> Callable[..., torch.Tensor]:
    """The model under the reference, which is in float64."""
    exact = copy.deepcopy(model)
    taken: dict[int, torch.Tensor] = {}
    for place, block in enumerate(exact.blocks):
        block.register_forward_hook(lambda _m, _i, output, place=place: taken.update({place: output}))
        if place == 0:
            block.register_forward_pre_hook(lambda _m, inputs: taken.update({-1: inputs[0]}))

    def call(*, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        exact(sample=sample, timestep=timestep, text=text)
        first, last = taken[0], taken[len(exact.blocks) - 1]
        _, difference, rest = reference.step(
            (first - taken[-1]).double().numpy(), lambda: (last - first).double().numpy()
        )
        differences.append(difference)
        head: Callable[[torch.Tensor], torch.Tensor] = exact.head
        return head(first + torch.from_numpy(rest).float())

    return call


CLOCKS = [1000 * 7 * s / (1 + 6 * s) for s in np.linspace(1, 0.04, 24)]


@pytest.mark.parametrize("setting", SETTINGS, ids=named)
@pytest.mark.parametrize("seed", [3, 4])
def test_decides_and_computes_as_the_reference(setting: dict[str, Any], seed: int) -> None:
    """The same steps reused, the same differences, and the same result of a closed loop, to 1e-4."""
    model = Toy()
    expected: list[float] = []
    wanted = denoised(referred(model, Reference(0.1, **setting), expected), CLOCKS, seed)
    fast = hvfast(model, options={"lower": "eager", "first_block_cache": {"threshold": 0.1, **setting}})
    found = denoised(fast, CLOCKS, seed)
    steps = hvcompile.stats(fast).steps
    assert [step.reused for step in steps] == [difference <= 0.1 for difference in expected]
    assert 4 < sum(step.reused for step in steps) < len(CLOCKS) - 3
    assert [step.difference for step in steps] == pytest.approx(expected, rel=2e-3, abs=1e-5)
    assert relative_error(found, wanted) < 1e-4


@pytest.mark.parametrize(("keep", "lower"), [("bfloat16", "eager"), ("float8", "eager"), ("float8", "aot")])
def test_fewer_bits_decide_as_the_reference_with_the_same_bits(keep: str, lower: str) -> None:
    setting: dict[str, Any] = {"forecast": 2, "decide_by": "error", "keep": keep}
    model, expected = Toy(), list[float]()
    wanted = denoised(referred(model, Reference(0.1, **setting), expected), CLOCKS, 3)
    fast = hvfast(model, options={"lower": lower, "first_block_cache": {"threshold": 0.1, **setting}})
    found = denoised(fast, CLOCKS, 3)
    steps = hvcompile.stats(fast).steps
    assert [step.reused for step in steps] == [difference <= 0.1 for difference in expected]
    assert 4 < sum(step.reused for step in steps) < len(CLOCKS) - 3
    assert [step.difference for step in steps] == pytest.approx(expected, rel=5e-3, abs=1e-5)
    assert relative_error(found, wanted) < 1e-3


def run(
    fast: Any, clocks: list[float], sample: Callable[[int], torch.Tensor], text: torch.Tensor
) -> list[torch.Tensor]:
    """Call once for each clock; the outputs."""
    with torch.no_grad():
        return [
            fast(sample=sample(place), timestep=torch.full((1,), clock), text=text)
            for place, clock in enumerate(clocks)
        ]


def compiled(model: Toy, lower: str = "eager", **fields: Any) -> Any:
    return hvfast(model, options={"lower": lower, "first_block_cache": fields})


@pytest.mark.parametrize("order", [1, 2])
def test_a_generation_knows_nothing_of_the_one_before(order: int) -> None:
    """The same generation after another one, of other samples, gives the same bits."""
    model, text = Toy(), toy_inputs()["text"]
    fast = compiled(model, threshold=0.5, forecast=order)
    clocks = [900.0 - 30 * place for place in range(6)]

    def drifting(seed: int) -> Callable[[int], torch.Tensor]:
        start, way = toy_inputs(seed)["sample"], toy_inputs(seed + 50)["sample"]
        return lambda place: start + 0.2 * place * way

    alone = run(fast, clocks, drifting(1), text)
    run(fast, clocks, drifting(2), text)
    again = run(fast, clocks, drifting(1), text)
    assert any(step.reused for step in hvcompile.stats(fast).steps)
    assert all(torch.equal(one, other) for one, other in zip(alone, again, strict=True))


@pytest.mark.parametrize("decided", ["change", "error"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_gone_on_along(bad: float, decided: str) -> None:
    """A step that went wrong is not reused, and steps after it are right once there is something to go on along."""
    model, inputs = Toy(), toy_inputs()
    fast = compiled(model, threshold=0.6, forecast=2, decide_by=decided)
    clocks = [900.0 - 10 * place for place in range(12)]

    def sample(place: int) -> torch.Tensor:
        moved = inputs["sample"] + 0.02 * place
        return torch.full_like(moved, bad) if place == 4 else moved

    outputs = run(fast, clocks, sample, inputs["text"])
    steps = hvcompile.stats(fast).steps
    assert not steps[4].reused
    assert all(output.isfinite().all() for place, output in enumerate(outputs) if place != 4)
    assert any(step.reused for step in steps[6:])
    with torch.no_grad():
        for place in (7, 11):
            exact = model(sample=sample(place), timestep=torch.full((1,), clocks[place]), text=inputs["text"])
            assert relative_error(outputs[place], exact) < 0.1


@pytest.mark.parametrize("decided", ["change", "error"])
def test_a_generation_of_nan_leaves_nothing_behind(decided: str) -> None:
    model, inputs = Toy(), toy_inputs()
    fast = compiled(model, threshold=0.5, forecast=2, decide_by=decided)
    clocks = [900.0 - 30 * place for place in range(7)]

    def sample(place: int) -> torch.Tensor:
        return inputs["sample"] + 0.1 * place

    before = run(fast, clocks, sample, inputs["text"])
    run(fast, clocks, lambda place: sample(place) * math.nan, inputs["text"])
    after = run(fast, clocks, sample, inputs["text"])
    steps = [step.reused for step in hvcompile.stats(fast).steps]
    assert steps[:7] == steps[14:]
    assert sum(steps[:7]) > 2
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_guidance_halves_forecast_apart() -> None:
    """Two texts in turn, as guidance calls them, which decide apart: each as if it were alone."""
    model, texts = Toy(), [toy_inputs(seed)["text"] for seed in (0, 7)]
    inputs, clocks = toy_inputs(), [900.0 - 20 * place for place in range(10)]

    def sample(place: int) -> torch.Tensor:
        return inputs["sample"] + 0.05 * place

    together = compiled(model, threshold=0.3, forecast=2, decide_by="error", guidance="apart")
    found: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for place, clock in enumerate(clocks):
            for half, text in enumerate(texts):
                found[half].append(together(sample=sample(place), timestep=torch.full((1,), clock), text=text))
    assert hvcompile.stats(together).hits > 4
    for half, text in enumerate(texts):
        torch._dynamo.reset()
        alone = run(compiled(Toy(), threshold=0.3, forecast=2, decide_by="error"), clocks, sample, text)
        assert all(torch.equal(one, other) for one, other in zip(found[half], alone, strict=True))


def test_all_streams_and_symbolic_sizes_by_inductor() -> None:
    """What Inductor makes of it is what runs eagerly, for two sizes of one graph, and one graph computes a step."""
    runs = []
    for lower in ("eager", "inductor"):
        torch._dynamo.reset()
        cache = {"threshold": 0.4, "forecast": 2, "decide_by": "error", "keep": "float8"}
        options: dict[str, Any] = {"lower": lower, "first_block_cache": cache}
        fast = hvfast(Toy(), dynamic=True, fullgraph=True, options=options)
        found = []
        for tokens in (12, 19):
            inputs = toy_inputs(tokens=tokens)
            samples = [inputs["sample"] + 0.05 * place for place in range(8)]
            found += run(fast, [900.0 - 20 * place for place in range(8)], samples.__getitem__, inputs["text"])
        runs.append((found, hvcompile.stats(fast)))
    (eager, decided), (inductor, stats) = runs
    reused = [step.reused for step in stats.steps]
    assert reused == [step.reused for step in decided.steps]
    assert sum(reused) > 4
    assert stats.graphs + stats.recompiles == 1
    assert max(relative_error(one, other) for one, other in zip(inductor, eager, strict=True)) < 1e-5


def test_a_reused_step_leaves_what_is_kept_where_it_is() -> None:
    """No tensor of the cache is copied on a hit: order 2 keeps three of the stream and three of block 1."""
    model, inputs = Toy(), toy_inputs()
    fast = compiled(model, threshold=0.5, forecast=2)
    plain = compiled(Toy(), threshold=0.5)
    for one in (fast, plain):
        run(one, [900.0, 880.0, 860.0], lambda place: inputs["sample"] + 0.01 * place, inputs["text"])
    stream = inputs["sample"].numel() * 4
    assert hvcompile.stats(fast).bytes - hvcompile.stats(plain).bytes == 4 * stream + 8
    small = compiled(Toy(), threshold=0.5, forecast=2, keep="float8")
    run(small, [900.0, 880.0, 860.0], lambda place: inputs["sample"] + 0.01 * place, inputs["text"])
    assert hvcompile.stats(small).bytes - hvcompile.stats(plain).bytes == 4 * (stream // 4 + 4) + 8


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("size", "layouts"),
    [(2, [True]), pytest.param(4, [True, {"ulysses": 2, "ring": 2}], marks=SLOW)],
    ids=["two", "four"],
)
def test_ranks_forecast_as_one_does(size: int, layouts: list[Any]) -> None:
    """Thirty steps of a HunyuanVideo whose sequence is split: the same steps reused, outputs to 1e-3."""
    decisions = functools.partial(cases.decisions, forecast=2, decide_by="error")
    for found in ranks.results(ranks.launch(decisions, size, "eager", [0.9], layouts)):
        for together, alone, error in found:
            assert together == alone
            assert 3 < sum(together) < 27
            assert error < 1e-3


@pytest.mark.ranks
def test_no_rank_forecasts_what_another_can_not() -> None:
    """One rank's state is lost: until it has computed enough steps again, no rank goes on along what it has not."""
    lost = functools.partial(cases.lost, forecast=2, decide_by="error")
    first, second = ranks.results(ranks.launch(lost, 2, [0.25, 0.372, 0.4]))
    for one, other in zip(first, second, strict=True):
        assert [reused for reused, _ in one] == [reused for reused, _ in other]
        assert [difference for _, difference in one[7:]] == [difference for _, difference in other[7:]]
        assert any(reused for reused, _ in one[7:])


def test_errors_say_what_is_allowed() -> None:
    with pytest.raises(OptionError, match=r"first_block_cache\.forecast is 3; allowed is 0 or 1 or 2"):
        FirstBlockCache(forecast=3)
    with pytest.raises(OptionError, match=r"keep is 'int8'; allowed is 'full' or 'bfloat16' or 'float8'"):
        FirstBlockCache(keep="int8")
    with pytest.raises(OptionError, match=r"decide_by is 'sigma'; allowed is 'change' or 'error'"):
        FirstBlockCache(forecast=1, decide_by="sigma")
    with pytest.raises(
        OptionError, match=r"decide_by is 'error', which has no meaning without a forecast; set .*1 or 2"
    ):
        FirstBlockCache(decide_by="error")


def coefficients(change: torch.Tensor, *differences: torch.Tensor) -> tuple[list[float], float]:
    """Those of a forecast, and its error as a share of the change."""
    vectors = [change, change, *differences]
    order = len(differences)
    all_products = {(row, column): vectors[row] @ vectors[column] for row, column in forecast.pairs(order)}
    products, flags = forecast.usable(all_products, [torch.tensor(True)] * order)
    found = forecast.along_first_block(products, flags)
    return [float(item) for item in found], float(forecast.error(products, found))


@pytest.mark.parametrize("order", [1, 2])
def test_no_combination_is_worse_than_none(order: int) -> None:
    """Whatever the differences: parallel, nothing, tiny, not finite, or such that only large parts of both cancel."""
    generator = torch.Generator().manual_seed(0)
    change, across = (torch.randn(50, generator=generator) for _ in range(2))
    cases_: list[tuple[torch.Tensor, torch.Tensor]] = [
        *[(change, change), (change, 0 * change), (0 * change, change), (1e-9 * change, change)],
        *[(across, 10 * across + change), (across, 100 * across - change), (across * math.nan, change)],
        (change, across * math.inf),
    ]
    for _ in range(300):
        sizes = 10 ** (4 * torch.rand(3, generator=generator) - 2)
        one, other = sizes[0] * change + sizes[1] * across, sizes[2] * torch.randn(50, generator=generator)
        cases_ += [(one, one + 0.01 * other), (one, other), (other, one)]
    for one, other in cases_:
        found, error = coefficients(change, *(one, other)[:order])
        assert all(math.isfinite(item) and abs(item) <= forecast.MOST_AHEAD for item in found)
        assert error <= 1 + 1e-4


def test_a_line_and_a_parabola_go_on() -> None:
    """Two differences forecast a parabola three steps ahead, where its coefficients are 6 and -3 or more."""
    generator = torch.Generator().manual_seed(0)
    slope, bend = (torch.randn(50, generator=generator) for _ in range(2))

    def at(time: float) -> torch.Tensor:
        return time * slope + 0.2 * time * time * bend

    for ahead in (1, 2):
        found, error = coefficients(at(ahead) - at(0), at(0) - at(-1), at(-1) - at(-2))
        assert error < 0.03
        assert found[1] < 0
    _, alone = coefficients(at(3) - at(0), at(0) - at(-1))
    _, both = coefficients(at(3) - at(0), at(0) - at(-1), at(-1) - at(-2))
    assert both <= alone
