"""Dynamo's limit on compiling again: each model has its own, and what runs uncompiled beyond it is told and counted."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo import config
from torch._dynamo.exc import FailOnRecompileLimitHit
from toy import Toy, toy_inputs

import hvcompile
from hvcompile.runtime import uncompiled
from hvcompile.torch_private import limits

EXACT: dict[str, Any] = {"lower": "eager", "mode": "exact"}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def compiled(model: Any, **kwargs: Any) -> Any:
    return torch.compile(model, backend="hvfast", options=EXACT, dynamic=False, **kwargs)


def call(run: Callable[..., torch.Tensor], tokens: int) -> torch.Tensor:
    return run(**toy_inputs(tokens=tokens))


def counted(model: Any) -> tuple[int, int]:
    """How many graphs were compiled for a model, and how many of its calls were not."""
    stats = hvcompile.stats(model)
    return stats.graphs + stats.recompiles, stats.eager_calls


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == uncompiled.__name__ and record.levelno == logging.WARNING
    ]


def test_twelve_sizes_are_twelve_graphs(caplog: pytest.LogCaptureFixture) -> None:
    model = Toy(1)
    run = compiled(model)
    for tokens in range(4, 16):
        call(run, tokens)
    assert counted(model) == (12, 0)
    assert not told(caplog)


def test_each_model_has_its_own_limit_and_what_is_beyond_is_told_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Toy(1), Toy(1)
    run, run_second = compiled(first), compiled(second)
    with config.patch(recompile_limit=2):
        for tokens in (4, 5):
            call(run, tokens)
        assert counted(first) == (2, 0)
        for tokens in (6, 7, 6):
            torch.testing.assert_close(call(run, tokens), call(first, tokens))
        assert counted(first) == (2, 3)
        call(run, 5)
        assert counted(first) == (2, 3)  # it has a graph for that
        for tokens in (8, 9):
            call(run_second, tokens)
        assert counted(second) == (2, 0)
    (message,) = told(caplog)
    assert "this Toy" in message
    assert "recompile_limit (2)" in message
    assert "size mismatch at index 1. expected" in message
    assert "dynamic=True" in message
    assert "hit config" not in caplog.text  # Dynamo's own warning
    hvcompile.reset(first)
    assert counted(first) == (2, 0)
    call(run, 7)
    assert counted(first) == (3, 0)  # the limit is torch's own again


def test_a_model_of_which_no_graph_has_run_tells_its_calls() -> None:
    model = Toy(1)
    run = compiled(model)
    with config.patch(recompile_limit=0):
        call(run, 4)
    assert counted(model) == (0, 1)


def test_the_calls_of_a_function_count_for_its_model() -> None:
    model = Toy(1)

    def step(**inputs: torch.Tensor) -> torch.Tensor:
        return model(**inputs)  # type: ignore[no-any-return]

    run = compiled(step)
    with config.patch(recompile_limit=1):
        for tokens in (4, 5, 5):
            call(run, tokens)
    assert counted(model) == (1, 2)


def test_what_runs_around_a_break_is_counted_too() -> None:
    class Broken(Toy):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            sample = self.embed(sample)
            torch._dynamo.graph_break()
            return super().forward(sample, timestep, text)

    model = Broken(1)
    run = compiled(model)
    with config.patch(recompile_limit=1):
        call(run, 4)
        before = counted(model)
        torch.testing.assert_close(call(run, 5), call(model, 5))
    assert before[1] == 0
    assert counted(model) == (before[0], 1)


def test_an_error_that_was_asked_for_stays_one(caplog: pytest.LogCaptureFixture) -> None:
    model = Toy(1)
    run = compiled(model, fullgraph=True)
    with config.patch(recompile_limit=1):
        call(run, 4)
        with pytest.raises(FailOnRecompileLimitHit, match="fullgraph=True"):
            call(run, 5)
    assert counted(model) == (1, 0)
    assert "hvfast does not compile a call of this Toy" in told(caplog)[0]


@pytest.mark.skipif("recompile_limit" not in inspect.signature(torch.compile).parameters, reason="torch 2.11 has none")
def test_the_limit_that_torch_compile_was_given_holds() -> None:
    model = Toy(1)
    run = compiled(model, recompile_limit=1)
    for tokens in (4, 5):
        call(run, tokens)
    assert counted(model) == (1, 1)


def test_other_backends_keep_dynamos_limit(caplog: pytest.LogCaptureFixture) -> None:
    class Scale(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    graphs = []

    def other(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        del inputs
        graphs.append(module)
        return module.forward

    compiled(Scale())(torch.ones(3))
    assert limits.GRAPHS_OF_A_MODEL > config.recompile_limit == 8
    torch._dynamo.reset()
    for model in (Scale(), Scale()):
        run = torch.compile(model, backend=other, dynamic=False)
        for size in range(1, 13):
            assert run(torch.ones(size)).sum() == 2 * size
    assert len(graphs) == 8  # for all models of the class
    assert caplog.text.count("torch._dynamo hit config.recompile_limit (8)") == 1
    assert not told(caplog)


def test_a_torch_without_the_check_keeps_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch._dynamo.convert_frame.exceeds_recompile_limit")
    limits.count_each_model(lambda _: None)
    assert not hasattr(torch._dynamo.convert_frame, "exceeds_recompile_limit")
