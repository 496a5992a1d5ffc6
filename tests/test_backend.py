"""The backend as a user meets it: registered by the package, one graph, clear about what it can't do."""

from __future__ import annotations

import importlib.metadata
import logging
import re
import subprocess
import sys
from typing import Any

import pytest
import sympy
import torch
from oracle import hvfast, relative_error
from torch import nn
from torch._inductor.exc import InductorError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from toy import Toy, toy_inputs

import hvcompile
from hvcompile.passes import PASSES
from hvcompile.torch_private import lowering


def test_registered_by_the_entry_point_without_an_import() -> None:
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="hvfast")
    assert entry.value == "hvcompile.backend:hvfast"
    code = "import sys, torch; assert 'hvfast' in torch.compiler.list_backends(); assert 'hvcompile' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_passes_have_one_identity() -> None:
    code = "import passes"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=sys.path[0] + "/.."
    )
    assert "hvcompile.passes" in ran.stderr


@pytest.mark.parametrize("lower", ["eager", "aot"])
def test_all_lowerings_agree(lower: str) -> None:
    model, inputs = Toy(), toy_inputs()
    fast = hvfast(model, fullgraph=True, options={"lower": lower})
    with torch.no_grad():
        assert relative_error(fast(**inputs), model(**inputs)) < 1e-6


def test_a_length_that_inductor_asks_for_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what Inductor asked, on which torch, and the way around it; its other errors stay as they are."""

    def failing(cause: Exception) -> Any:
        def compile_fx(*_: Any, **__: Any) -> Any:
            raise InductorError(cause, None)

        return compile_fx

    known = "Could not guard on data-dependent expression Eq(1, u1)"
    for cause, told in (
        (
            GuardOnDataDependentSymNode(sympy.true, f"{known}\nconsider"),
            f"LoweringError.*{re.escape(torch.__version__)} asks",
        ),
        (ValueError(known), "ValueError: "),
    ):
        monkeypatch.setattr(lowering, "compile_fx", failing(cause))
        torch._dynamo.reset()
        with torch.no_grad(), pytest.raises(Exception, match=told) as raised:
            hvfast(Toy(), fullgraph=True)(**toy_inputs())
        assert known in str(raised.value)
        assert ("{'lower': 'aot'}" in str(raised.value)) == told.startswith("LoweringError")


def count_lowerings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = lowering.LOWERINGS["eager"]

    def counted(module: Any, inputs: Any) -> Any:
        calls.append(len(inputs))
        return original(module, inputs)

    monkeypatch.setitem(lowering.LOWERINGS, "eager", counted)
    return calls


def test_one_lowering_for_computed_and_reused_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_lowerings(monkeypatch)
    model = hvfast(Toy(), fullgraph=True, options={"lower": "eager"})
    with torch.no_grad():
        for _ in range(3):
            model(**toy_inputs())
    stats = hvcompile.stats(model)
    assert (len(calls), stats.graphs, stats.recompiles, stats.hits, stats.misses) == (1, 1, 0, 2, 1)


def test_exact_mode_computes_every_step() -> None:
    model = hvfast(Toy(), mode="exact")
    module = Toy()
    inductor_free = hvfast(module, options={"lower": "eager", "first_block_cache": False})
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(inductor_free(**toy_inputs()), module(**toy_inputs()))
        assert relative_error(model(**toy_inputs()), module(**toy_inputs())) < 1e-5
    assert hvcompile.stats(model).steps == []
    row = next(row for row in hvcompile.stats(model).journal[0] if row.name == "FirstBlockCache")
    assert row.report.declined == (("switched off", "mode='exact' keeps only passes that do not change numerics"),)


def test_gradients_fall_back_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = Toy(), toy_inputs()
    fast = hvfast(model, options={"lower": "aot"})
    with caplog.at_level(logging.WARNING, logger="hvcompile"):
        loss = fast(**inputs).sum()
    assert "gradients are enabled" in caplog.text
    assert "torch.no_grad()" in caplog.text
    loss.backward()
    expected = torch.autograd.grad(model(**inputs).sum(), model.head.weight)[0]
    assert relative_error(model.head.weight.grad, expected) < 1e-6  # type: ignore[arg-type]
    assert "gradients" in hvcompile.stats(fast).journal[0][0].report.declined[0][1]
    asked = hvfast(Toy(), options={"lower": "aot", "first_block_cache": True})
    with pytest.raises(Exception, match=r"first_block_cache.*gradients are enabled"):
        asked(**inputs)


def test_gradients_then_none(caplog: pytest.LogCaptureFixture) -> None:
    """A first call without no_grad costs a capture, not the model's later calls."""
    fast = hvfast(Toy(), options={"lower": "eager"})
    fast(**toy_inputs())
    with torch.no_grad():
        for _ in range(2):
            fast(**toy_inputs())
    assert hvcompile.stats(fast).hits == 1


def test_no_blocks(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 4)
    fast = hvfast(model, options={"lower": "eager"})
    x = torch.randn(2, 4)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="hvcompile"):
        assert torch.equal(fast(x), model(x))
    assert "no module list" in caplog.text
    assert "no module list" in hvcompile.stats(fast).journal[0][0].report.declined[0][1]
    asked = hvfast(nn.Linear(4, 4), options={"lower": "eager", "first_block_cache": True})
    with torch.no_grad(), pytest.raises(Exception, match=r"first_block_cache.*no module list"):
        asked(x)


def test_no_parameters() -> None:
    fast = hvfast(lambda x: x.sin() + 1, options={"lower": "eager"})
    x = torch.randn(3)
    with torch.no_grad():
        assert torch.equal(fast(x), x.sin() + 1)


def test_a_function_around_the_model() -> None:
    """What is compiled may be a function that calls the model twice, as guidance in one call does."""
    model = Toy()

    def guided(sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return 2 * model(sample, timestep, text) - model(sample, timestep, other)

    fast = hvfast(guided, fullgraph=True, options={"lower": "eager"})
    inputs = toy_inputs() | {"other": toy_inputs(1)["text"]}
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(fast(**inputs), guided(**inputs)) < 1e-5


def test_a_changed_weight_is_seen() -> None:
    """Nothing of the weights is baked into the compiled graph."""
    model = Toy()
    fast = hvfast(model, options={"lower": "eager", "first_block_cache": False})
    with torch.no_grad():
        fast(**toy_inputs())
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert torch.equal(fast(**toy_inputs()), model(**toy_inputs()))


def test_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hvcompile"), torch.no_grad():
        hvfast(Toy(), options={"lower": "eager"})(**toy_inputs())
    lines = [record.message for record in caplog.records if record.name.startswith("hvcompile")]
    assert [line.split(":")[0] for line in lines] == ["outline", *(item.__name__ for item in PASSES)]
    assert lines[0] == "outline: blocks x 4: 4 blocks share 1 bodies"
    assert lines[2].startswith("UnmaskedAttention: 1 values that follow from sizes are computed once")
    assert lines[-2].startswith("FirstBlockCache: blocks.1 .. blocks.3 run on a miss; cached: ")


def test_a_missing_compiler_is_an_error_of_one_line() -> None:
    fast = hvfast(Toy().eval(), fullgraph=True)
    without = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
    with torch.no_grad(), without, pytest.raises(Exception, match=r"LoweringError: there is no C\+\+ compiler"):
        fast(**toy_inputs())
