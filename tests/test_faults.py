"""Exceptions that nobody foresaw: what fails is left out and said, what it left half done is gone, the rest still runs.

Faults are put into the middle of every pass, and of what stands around them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ranks
import sharded_cases as cases
import torch
import torch.distributed as dist
from oracle import hvfast, relative_error
from slow import SLOW
from torch import fx
from torch._dynamo.exc import BackendCompilerFailed
from torch.testing._internal.distributed.fake_pg import FakeStore
from zoo import Draw

import hvcompile
from hvcompile import backend
from hvcompile.dump import bisect
from hvcompile.errors import InvalidRewriteError, QuantizedWeightError, RequestedPassError
from hvcompile.passes import (
    PASSES,
    FirstBlockCache,
    Float8Attention,
    Float8Linears,
    HostWeights,
    ShardedAttention,
    SparseAttention,
    UnmaskedAttention,
    float8_attention,
    float8_linears,
)
from hvcompile.pipeline import STRICT_VARIABLE
from hvcompile.trunk.trunk import Trunk

Apply = Callable[..., Any]
Fault = Callable[[pytest.MonkeyPatch, Any, int], None]
TOKENS = 41


def inputs_of(seed: int = 0) -> dict[str, Any]:
    """Two samples with three and five valid text tokens; other noise and prompts for each seed."""
    given = cases.masked_inputs((3, 5), tokens=TOKENS)
    draw = Draw(seed + 20)
    return given | {"sample": draw.normal(2, TOKENS, cases.WIDTH), "text": draw.normal(2, 5, cases.WIDTH)}


class Flaw(LookupError):  # noqa: N818  (not an error of anything here)
    """What the tests have raised: no error that anything here knows of."""


def in_the_middle(monkeypatch: pytest.MonkeyPatch, kind: Any, made: int) -> None:
    """Raise when a pass has made half of the nodes that it makes."""
    apply: Apply = kind.apply
    create = fx.Graph.create_node

    def broken(self: Any, trunk: Trunk, context: Any) -> Any:
        left = [made // 2]

        def creating(graph: fx.Graph, *args: Any, **kwargs: Any) -> fx.Node:
            left[0] -= 1
            if left[0] < 0:
                raise Flaw("in the middle at 0x7f00aa\nof it")
            return create(graph, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fx.Graph, "create_node", creating)
            return apply(self, trunk, context)

    monkeypatch.setattr(kind, "apply", broken)


def at_the_end(monkeypatch: pytest.MonkeyPatch, kind: Any, made: int) -> None:
    """Lose the outputs, which a postcondition finds."""
    del made
    apply: Apply = kind.apply

    def broken(self: Any, trunk: Trunk, context: Any) -> Any:
        report = apply(self, trunk, context)
        assert report.applied, report
        trunk.output.args = ((),)
        return report

    monkeypatch.setattr(kind, "apply", broken)


def with_a_broken_graph(monkeypatch: pytest.MonkeyPatch, kind: Any, made: int) -> None:
    """Leave a body that reads a node of another graph, which the graph's own lint finds."""
    del made
    apply: Apply = kind.apply

    def broken(self: Any, trunk: Trunk, context: Any) -> Any:
        report = apply(self, trunk, context)
        trunk.bodies[0].module.graph.output_node().args = ((next(iter(trunk.graph.nodes)),),)
        return report

    monkeypatch.setattr(kind, "apply", broken)


@pytest.fixture(autouse=True)
def _as_a_user_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STRICT_VARIABLE)


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have float8 apply on the CPU without being asked for by name."""
    monkeypatch.setattr(float8_linears, "check_device", lambda *_: None)
    monkeypatch.setattr(float8_attention, "_check_device", lambda *_: None)


@contextlib.contextmanager
def second_of_two() -> Iterator[None]:
    """Makes this process rank 1 of a group whose other rank doesn't exist."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def counting(kind: Any) -> tuple[pytest.MonkeyPatch, list[int]]:
    """Has the nodes counted that a pass makes."""
    apply: Apply = kind.apply
    create, made, patch = fx.Graph.create_node, [0], pytest.MonkeyPatch()

    def counted(self: Any, trunk: Trunk, context: Any) -> Any:
        def creating(graph: fx.Graph, *args: Any, **kwargs: Any) -> fx.Node:
            made[0] += 1
            return create(graph, *args, **kwargs)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(fx.Graph, "create_node", creating)
            return apply(self, trunk, context)

    patch.setattr(kind, "apply", counted)
    return patch, made


def run(lower: str, **options: Any) -> tuple[list[float], dict[str, str], list[bool]]:
    """Three calls of the small model, the second as the first: errors, the journal, and what was reused."""
    torch._dynamo.reset()
    model, errors = cases.Joint(5), []
    made = cases.Joint(5)
    if options.pop("offload", False):
        hvcompile.offload(made, "cpu")
    fast = hvfast(made, fullgraph=True, options={"lower": lower, **options})
    with torch.no_grad():
        for seed in (1, 1, 2):
            errors.append(relative_error(fast(**inputs_of(seed)), model(**inputs_of(seed))))
    (journal,) = hvcompile.stats(fast).journal
    return errors, {row.name: row.line() for row in journal}, [step.reused for step in hvcompile.stats(fast).steps]


def is_done(line: str) -> bool:
    return "left the graph as it was" not in line


UNASKED = [kind for kind in PASSES if kind is not SparseAttention]
"""Passes that may run without being asked for by name; where one that was asked for fails, that is an error."""
OPTIONS: dict[Any, dict[str, Any]] = {
    Float8Attention: {"mode": "max", "fp8": False},
    Float8Linears: {},
    HostWeights: {"fp8": False, "offload": True},
}
"""With which a pass runs, and is not asked for by name; "offload" has the model offloaded first."""
FAULTS = [
    *((kind, fault, "eager") for kind in UNASKED for fault in (in_the_middle, at_the_end, with_a_broken_graph)),
    (FirstBlockCache, in_the_middle, "inductor"),
    *(
        pytest.param(kind, in_the_middle, "inductor", marks=SLOW)  # what is left is compiled as it is without the fault
        for kind in UNASKED
        if kind is not FirstBlockCache
    ),
]


@pytest.mark.parametrize(("kind", "fault", "lower"), FAULTS, ids=lambda item: getattr(item, "__name__", item))
@pytest.mark.usefixtures("everywhere")
def test_a_pass_that_fails_is_left_out(
    kind: Any, fault: Fault, lower: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The model is right, the journal and one warning say why, and the other passes run as if it were switched off."""
    options = OPTIONS.get(kind, {"fp8": False})
    off = {kind.section: {"unmask": False, "hoist": False} if kind is UnmaskedAttention else False}
    with second_of_two() if kind is ShardedAttention else contextlib.nullcontext():
        patch, made = counting(kind)
        run("eager", **options)
        patch.undo()
        assert made[0] > 1
        _, without, decided = run(
            "eager", **{**options, **(off if kind is not Float8Attention else {"mode": "default"})}
        )
        fault(monkeypatch, kind, made[0])
        with caplog.at_level(logging.WARNING, logger="hvcompile"):
            errors, journal, reused = run(lower, **options)
    assert max(errors) < 1e-5
    why = journal.pop(kind.__name__)
    assert not is_done(why)
    assert "it failed in a way that nobody foresaw: " + ("Flaw: in the m" if fault is in_the_middle else "") in why
    (told,) = [record.message for record in caplog.records if "is left out" in record.message]
    assert told.startswith(f"{kind.__name__} is left out: ")
    assert "\n" not in told
    assert "0x7f" not in told
    assert reused == decided
    assert journal == {name: line for name, line in without.items() if name != kind.__name__}


@pytest.mark.parametrize("stage", ["recover", "seal"])
@pytest.mark.parametrize("lower", ["eager", "inductor"])
def test_what_stands_around_the_passes_fails(
    stage: str, lower: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The graph is compiled as it was captured, or it is an error where a pass was asked for."""

    def broken(*_: Any) -> Any:
        raise Flaw("of a stage")

    monkeypatch.setattr(backend, stage, broken)
    with caplog.at_level(logging.WARNING, logger="hvcompile"):
        errors, journal, reused = run(lower, dump=str(tmp_path))
    assert max(errors) < 1e-5
    assert not reused
    assert list(journal) == ["outline"]
    assert "nobody foresaw: Flaw: of a stage" in journal["outline"]
    assert any("is left out" in record.message for record in caplog.records)
    (folder,) = (tmp_path / "run_1").glob("graph_*")
    assert [file.name for file in sorted(folder.glob("0*.py"))] == ["00_captured.py"]
    (fault,) = folder.glob("fault_*.txt")
    assert "Flaw: of a stage" in fault.read_text()
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
        hvfast(cases.Joint(), options={"lower": lower, "first_block_cache": True})(**inputs_of())
    error = caught.value.inner_exception
    assert isinstance(error, RequestedPassError)
    assert isinstance(error.__cause__, Flaw)


def test_looking_for_scales_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """All else is done as ever."""

    def broken(*_: Any) -> Any:
        raise Flaw("of the scales")

    monkeypatch.setattr(backend, "constant_scales", broken)
    with caplog.at_level(logging.WARNING, logger="hvcompile"):
        errors, journal, _ = run("eager")
    assert max(errors) < 1e-5
    assert "FirstBlockCache" in journal
    assert any("nobody foresaw: Flaw: of the scales" in record.message for record in caplog.records)


@pytest.mark.parametrize("fault", [in_the_middle, at_the_end], ids=lambda fault: fault.__name__)
def test_a_pass_that_was_asked_for_fails_with_an_error_of_ours(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch, FirstBlockCache, 40)
    with torch.no_grad(), pytest.raises(BackendCompilerFailed) as caught:
        hvfast(cases.Joint(), options={"lower": "eager", "first_block_cache": True})(**inputs_of())
    error = caught.value.inner_exception
    assert isinstance(error, RequestedPassError)
    assert isinstance(error.__cause__, Flaw if fault is in_the_middle else InvalidRewriteError)
    assert "options ask for 'first_block_cache'" in str(error)
    assert "nobody foresaw" in str(error)


def test_errors_on_purpose_stay_and_strict_runs_raise_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt too, whatever is set."""

    def raising(error: BaseException) -> Any:
        def broken(*_: Any) -> Any:
            raise error

        monkeypatch.setattr(FirstBlockCache, "apply", broken)
        torch._dynamo.reset()
        try:
            with torch.no_grad():
                hvfast(cases.Joint(), options={"lower": "eager"})(**inputs_of())
        except BackendCompilerFailed as caught:
            return caught.inner_exception
        except BaseException as caught:
            return caught
        return None

    assert raising(Flaw()) is None
    assert isinstance(raising(QuantizedWeightError("on purpose")), QuantizedWeightError)
    assert isinstance(raising(KeyboardInterrupt()), KeyboardInterrupt)
    monkeypatch.setenv(STRICT_VARIABLE, "1")
    assert isinstance(raising(Flaw()), Flaw)
    monkeypatch.setenv(STRICT_VARIABLE, "0")
    assert raising(Flaw()) is None


def test_dumps_explanations_and_bisection_are_of_what_ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The stages are those of the passes that ran, numbered in order; the traceback lies beside them."""
    in_the_middle(monkeypatch, UnmaskedAttention, 8)
    errors, _, _ = run("eager", fp8=False, dump=str(tmp_path))
    assert max(errors) < 1e-5
    (folder,) = (tmp_path / "run_1").glob("graph_*")
    stages = ["00_captured.py", "01_outlined.py", "02_first_block_cache.py", "03_sealed.py"]
    assert [file.name for file in sorted(folder.glob("0*.py"))] == stages
    assert "Flaw" in (folder / "fault_unmasked_attention.txt").read_text()
    passes = json.loads((folder / "journal.json").read_text())["passes"]
    (row,) = [row for row in passes if row["name"] == "UnmaskedAttention"]
    assert "nobody foresaw" in row["declined"][0]["why"]
    result = bisect.bisect(folder)
    assert result.finding is None
    explained = hvcompile.explain(cases.Joint(), options={"fp8": False}, **inputs_of())
    (line,) = [row.line() for row in explained.journal if row.name == "UnmaskedAttention"]
    assert "nobody foresaw" in line
    assert [row.name for row in explained.journal if row.report.applied] == ["FirstBlockCache"]


def fails_on(who: str, what: str) -> tuple[str, list[float]]:
    """Run the small model on this rank; a pass, or sealing, fails on the second or on both. What was raised; errors."""
    del os.environ[STRICT_VARIABLE]
    kinds = {"sharding": ShardedAttention, "cache": FirstBlockCache}
    with pytest.MonkeyPatch.context() as patch:
        if who == "both" or cases.rank() == 1:
            if what in kinds:
                in_the_middle(patch, kinds[what], 60)
            else:
                patch.setattr(backend, "seal", lambda _: dict[str, Any]()["of sealing"])
        options = {"lower": "eager", "fp8": False}
        fast, model, errors = hvfast(cases.Joint(), fullgraph=True, options=options), cases.Joint(), []
        try:
            with torch.no_grad():
                for seed in (1, 2):
                    errors.append(relative_error(fast(**inputs_of(seed)), model(**inputs_of(seed))))
        except Exception as error:
            return str(error), errors
    return "nothing", errors


def fails_on_both(faults: Sequence[str]) -> list[tuple[str, list[float]]]:
    """As ``fails_on`` for each of several faults, one after the other."""
    ended = []
    for what in faults:
        torch._dynamo.reset()
        ended.append(fails_on("both", what))
        os.environ[STRICT_VARIABLE] = "1"
    return ended


RANKS_FAULTS = ("sharding", "cache", "sealing")


@pytest.mark.ranks
def test_ranks_decline_together() -> None:
    for ended in ranks.results(ranks.launch(fails_on_both, 2, RANKS_FAULTS)):
        assert [raised for raised, _ in ended] == ["nothing"] * len(RANKS_FAULTS)
        assert max(error for _, errors in ended for error in errors) < 1e-5


@pytest.mark.ranks
@pytest.mark.parametrize("what", RANKS_FAULTS)
def test_no_rank_declines_alone(what: str) -> None:
    """Where one rank alone fails, each says so at once, and none waits for another."""
    for raised, errors in ranks.results(ranks.launch(fails_on, 2, "one", what, group_timeout=30, limit=100)):
        assert "ranks that share a sequence differ: " in raised
        assert "nobody foresaw: " in raised
        assert not errors
