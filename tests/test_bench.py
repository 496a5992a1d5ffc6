"""``hvcompile bench``: small ones without Inductor; a peer that is missing, dies or hangs; what it makes of results."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import multiprocessing.forkserver
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import hvcompile
from hvcompile.app import cli, pipelines, tables, tiny
from hvcompile.app.bench import contenders, results
from hvcompile.app.bench import run as bench_run
from hvcompile.app.bench.process import COMPUTED, PARTLY, REUSED, Contender, Protocol, Shape, mark
from hvcompile.app.bench.results import Result, Row
from hvcompile.app.bench.seat import FailedError, Seat
from hvcompile.app.request.bench import KEYS, Request

TINY = ("--blocks", "1+2", "--hidden", "32", "--frames", "5", "--height", "32", "--width", "32", "--threads", "1")
QUICK = ("--steps", "5", "--repeats", "1", "--lower", "eager", "--device", "cpu", "--threshold", "0.3")
SHAPE = Shape(num_frames=5, height=32, width=32, text_tokens=10, prompt_tokens=7)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)], env={"COLUMNS": "160"})


def fake_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str) -> None:
    """Put a cache_dit of our own before the real one, in the processes of a bench too: they inherit sys.path."""
    folder = tmp_path / "peers"
    folder.mkdir()
    (folder / "cache_dit.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "cache_dit", raising=False)


@pytest.fixture
def quick_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes are forked from one that has imported torch and diffusers, as ranks are."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(ranks.PRELOAD)
    multiprocessing.forkserver.ensure_running()
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)


def protocol(threshold: float = 0.06, **changed: Any) -> Protocol:
    held: dict[str, Any] = {
        "model": None,
        "config": tiny.transformer_config(1, 2, 2),
        "shape": SHAPE,
        "steps": 6,
        "threshold": threshold,
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
        "threads": None,
        "lower": "eager",
    }
    return Protocol(**{**held, **changed})


@pytest.mark.usefixtures("quick_starts")
def test_a_small_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two contenders run, and cache-dit is not installed: it is a row that says so."""
    pytest.importorskip("matplotlib")
    fake_peer(monkeypatch, tmp_path, "raise ModuleNotFoundError(\"No module named 'cache_dit'\", name='cache_dit')")
    files = ("--json", tmp_path / "b.json", "--plot", tmp_path / "b.png")
    done = invoke(*TINY, *QUICK, "--contenders", "cache-dit,hvfast", *files)
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.replace("│", " ").split())
    assert "No module named 'cache_dit'): pip install 'hvcompile[bench]'" in said

    record = json.loads((tmp_path / "b.json").read_text())
    check_schema(record)
    rows = {row["system"]: row for row in record["contenders"]}
    assert list(rows) == ["eager", "cache-dit", "hvfast"]
    assert rows["cache-dit"]["error"].startswith("can't be imported")
    assert rows["cache-dit"]["seconds"] == {}
    eager, ours = rows["eager"], rows["hvfast"]
    assert eager["steps"] == "#####"
    assert (eager["regions"], ours["regions"]) == ([0] * 5, [1] * 5)
    assert 0 < ours["hits"] < 5, "both kinds of steps"
    assert (eager["graphs"], ours["graphs"]) == (0, 1)
    assert [case["graphs"] for case in eager["recompile_cases"]] == [0] * 4
    assert ours["recompile_cases"][0]["graphs"] == 0, "another prompt of the same padded length"
    assert 1 <= ours["recompiles"] <= 3
    assert eager["compile_seconds"] is None
    assert ours["compile_seconds"] > 0
    assert eager["quality"] is None
    assert ours["quality"]["psnr_db"]["mean"] > 20
    assert all(row["repeatable"] for row in (eager, ours))
    (ratio,) = record["ratios"]
    assert (ratio["numerator"], ratio["denominator"], ratio["same_steps_reused"]) == ("eager", "hvfast", False)
    assert ratio["run"]["median"] == pytest.approx(eager["seconds"]["0"] / ours["seconds"]["0"])
    with Image.open(tmp_path / "b.png") as picture:
        assert float(np.asarray(picture.convert("L")).std()) > 10


def check_schema(record: dict[str, Any]) -> None:
    assert set(record) == {
        *("command", "date", "versions", "machine", "seconds_in_all", "interrupted", "protocol"),
        *("contenders", "ratios"),
    }
    assert {"model", "blocks", "hidden", "tokens", "steps", "threshold", "dtype", "restart"} <= set(record["protocol"])
    number = (int, float)
    kinds: dict[str, Any] = {
        "system": str,
        "how": str,
        "error": (str, type(None)),
        "seconds": dict,
        "step_seconds": dict,
        "step_cpu_seconds": dict,
        "warm_seconds": list,
        "compile_seconds": (*number, type(None)),
        "median_step_seconds": dict,
        "steps": (str, type(None)),
        "hits": (int, type(None)),
        "partly_reused": (int, type(None)),
        "hit_rate": (float, type(None)),
        "regions": list,
        "regions_of_a_step": dict,
        "graphs": (int, type(None)),
        "recompiles": (int, type(None)),
        "recompile_cases": (list, type(None)),
        "recompile_error": (str, type(None)),
        "peak_bytes": dict,
        "repeatable": (bool, type(None)),
        "quality": (dict, type(None)),
    }
    for row in record["contenders"]:
        assert set(row) == set(kinds)
        for name, kind in kinds.items():
            assert isinstance(row[name], kind), f"{row['system']}: {name} is {row[name]!r}"
    for ratio in record["ratios"]:
        assert set(ratio) == {
            *("numerator", "denominator", "run", "run_cpu", "computed_step", "reused_step", "same_steps_reused"),
        }
        assert ratio["run"]["min"] <= ratio["run"]["median"] <= ratio["run"]["max"]


@pytest.mark.usefixtures("quick_starts")
def test_the_full_protocol_at_a_small_size_and_a_peer_that_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full each process ends after its turn and is started again; bfloat16, and no other shapes, are the default."""
    fake_peer(monkeypatch, tmp_path, "import os, sys\nprint('so long', file=sys.stderr, flush=True)\nos._exit(7)")
    done = invoke("--full", *TINY, *QUICK, "--contenders", "cache-dit", "--json", tmp_path / "b.json")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "b.json").read_text())
    check_schema(record)
    assert (record["protocol"]["dtype"], record["protocol"]["restart"]) == ("bfloat16", True)
    rows = {row["system"]: row for row in record["contenders"]}
    assert rows["cache-dit"]["error"] == "its process died in 'about' (exit code 7): so long"
    assert rows["eager"]["recompiles"] is None
    assert rows["eager"]["steps"] == "#####"
    assert rows["eager"]["repeatable"]
    assert "exit code 7" in done.stdout


def test_a_given_model(tmp_path: Path) -> None:
    """Weights from a directory; and where a contender of ours fails, the command does."""
    tiny.write(tmp_path / "model")
    request = Request(model=str(tmp_path / "model"), device="cpu")
    request.check()
    assert request.protocol().config == {}
    given = Contender(contenders.EAGER, protocol(model=str(tmp_path / "model"), config={}))
    assert given.about()["blocks"] == 12
    assert given.run()["finite"]


def test_a_contender_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    seat = Seat(contenders.EAGER, protocol(), tmp_path, timeout=0.05)
    with pytest.raises(FailedError, match=r"no answer to 'about' in 0\.05 s"):
        seat.ask("about")
    assert seat._process is None
    seat.stop()


@pytest.mark.usefixtures("quick_starts")
def test_an_interrupt_or_a_failure_on_other_shapes_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(
        blocks="1+2", hidden=32, frames=5, height=32, width=32, steps=3, repeats=1, threads=1, lower="eager",
        contenders=("hvfast",), device="cpu",
    )  # fmt: skip

    def refuse(seat: Seat, row: Row, cases: object) -> None:
        if row.system == contenders.EAGER:
            raise FailedError("no such shape")
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_run, "_recompile", refuse)
    result = bench_run.bench(request)
    assert result.conditions["interrupted"]
    assert [(row.error, row.cases_error, len(row.rounds)) for row in result.rows] == [
        ("", "no such shape", 1),
        ("", "", 1),
    ]
    assert result.record()["contenders"][0]["recompile_error"] == "no such shape"
    assert result.ratio(contenders.EAGER, contenders.HVFAST) is not None


def test_what_had_no_turn_is_not_measured_and_has_not_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seat: Seat, row: Row) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_run, "_compile", interrupt)
    result = bench_run.bench(Request(contenders=("hvfast",), device="cpu"))
    assert [row.outcome for row in result.rows] == ["not measured"] * 2
    console = Console(file=io.StringIO(), width=200)
    for table in tables.bench_tables(result):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("not measured") == 2
    assert "failed" not in text


@pytest.mark.parametrize("system", [*KEYS.values()])
def test_what_the_profiler_sees_is_what_happened(system: str) -> None:
    """At a threshold that reuses every step: regions and blocks, against what hvfast itself says of its steps."""
    if system == contenders.CACHE_DIT:
        pytest.importorskip("cache_dit")
    contender, seen = observed(system, protocol(threshold=1000.0))
    is_cached = system in contenders.CACHED
    assert seen["steps"] == COMPUTED + (REUSED if is_cached else COMPUTED) * 5
    left = {contenders.DIFFUSERS: 1, contenders.HVFAST: 1, contenders.CACHE_DIT: 2}  # the last has a cache a list
    assert seen["blocks_computed"] == [3] + [left.get(system, 3)] * 5
    if system == contenders.HVFAST:
        steps = hvcompile.stats(contender.pipe.transformer).steps[-6:]
        assert [step.reused for step in steps] == [held == REUSED for held in seen["steps"]]
    if system in contenders.PEERS:
        assert min(seen["regions"]) > 1
    else:
        assert seen["regions"] == [int(system != contenders.EAGER)] * 6


def observed(system: str, given: Protocol) -> tuple[Contender, Any]:
    """A contender, when it captures nothing any more, and what it was seen to do."""
    torch._dynamo.reset()
    contender = Contender(system, given)
    try:
        for _ in range(4):
            if not contender.run()["graphs"]:
                return contender, contender.observe()
    finally:
        contender.close()
    return pytest.fail("it captures graphs in every run")


def test_hvfast_and_diffusers_reuse_the_same_steps() -> None:
    steps = [
        observed(system, protocol(threshold=0.3))[1]["steps"] for system in (contenders.HVFAST, contenders.DIFFUSERS)
    ]
    assert steps[0] == steps[1]
    assert {COMPUTED, REUSED} == set(steps[0])


def test_marks() -> None:
    assert [mark(count, 60, 2) for count in (60, 59, 21, 3, 2, 1)] == [COMPUTED, *[PARTLY] * 3, *[REUSED] * 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--blocks", "20"), "blocks is '20': give dual-stream and single-stream blocks, such as 20+40"),
        (("--hidden", "100"), "hidden is 100: give a multiple of 16"),
        (("--height", "100"), "height is 100, but this pipeline takes multiples of 16: give 96 or 112"),
        (("--height", "16"), "height is 16: give 32 or more"),
        (("--frames", "10"), "frames is 10, but this pipeline takes a multiple of 4, plus 1: give 9 or 13"),
        (("--tokens", "500", "--frames", "9"), "give one or the other"),
        (("--contenders", "hvfast,teacache"), "contenders has 'teacache': give some of eager,inductor,diffusers"),
        (("--contenders", ","), "contenders has nothing"),
        (("--repeats", "0"), "repeats is 0: give 1 or more"),
        (("--threshold", "nan"), "threshold is nan: give a finite number, 0 or more"),
        (("--timeout", "0"), "timeout is 0.0: give seconds, more than 0"),
        (("--seed", "-1"), "seed is -1"),
        (("--lower", "triton"), "lower is 'triton': give one of inductor, aot, eager"),
        (("--dtype", "int8"), "dtype 'int8' is unknown"),
        (("--json", "a.txt"), "json 'a.txt' is no JSON file"),
        (("--plot", "none/a.png"), "there is no directory"),
        (("--full", "--device", "cpu"), "full, on the CPU, is a model of 12.8 billion parameters"),
        (("no/such/model/here",), "is neither a directory nor a hub id"),
        ((".",), "is a directory without model_index.json"),
    ],
)
def test_what_can_t_be_measured_is_refused_before_anything_is(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Seat, "_start", lambda _: pytest.fail("nothing may start"))
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert done.output.count("\n") == 1, "one line"


def test_a_model_with_weights_has_its_own_size(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    done = invoke(tmp_path, "--blocks", "1+2")
    assert done.exit_code == 2
    assert "blocks is 1+2, but a model with weights of its own is given" in done.output


@pytest.mark.parametrize(
    ("given", "size", "steps", "config"),
    [
        ({}, (9, 96, 96), 20, (2, 4, 8)),
        ({"tokens": 978}, (29, 176, 176), 20, (2, 4, 8)),
        ({"blocks": "20+40", "hidden": 64, "steps": 7, "height": 48}, (9, 48, 96), 7, (20, 40, 4)),
    ],
)
def test_defaults(given: Any, size: tuple[int, ...], steps: int, config: tuple[int, ...]) -> None:
    held = Request(device="cpu", **given).protocol()
    assert (held.shape.num_frames, held.shape.height, held.shape.width) == size
    assert held.steps == steps
    assert held.dtype == "float32"
    names = ("num_layers", "num_single_layers", "num_attention_heads")
    assert tuple(held.config[name] for name in names) == config


def test_full_is_the_reference_s_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is at hand: what a process would be given there, whose building is tested at a small size."""
    monkeypatch.setattr(pipelines, "resolve_device", torch.device)
    request = Request(device="cuda", full=True)
    request.check()
    held = request.protocol()
    assert held.config == {}, "HunyuanVideo's own: 20+40 blocks, hidden 3072"
    assert (held.shape.num_frames, held.shape.height, held.shape.width) == (129, 720, 1280)
    assert (held.steps, held.threshold, held.dtype, held.device) == (30, 0.06, "bfloat16", "cuda")
    assert held.shape.text_tokens == 256


@pytest.fixture
def result() -> Callable[..., Result]:
    def make(**changed: Any) -> Result:
        step = {"eager": (4.0, 4.0), "diffusers": (3.0, 1.0), "hvfast": (2.0, 0.5)}
        rows = []
        for system, (computed, reused) in step.items():
            steps = "####" if system == "eager" else "##.."
            runs = {
                n: [speed * (computed if held == "#" else reused) for held in steps]
                for n, speed in ((0, 1.0), (1, 2.0))
            }
            runs[1] = [9.0, *runs[1][1:]] if system == "eager" else runs[1]
            graphs = 0 if system == "eager" else 3
            rows.append(Row(system=system, how="so", rounds=runs, steps=steps, regions=[graphs] * 4, graphs=graphs))
            rows[-1].cpu_rounds = {n: [second / 2 + (system == "eager") for second in run] for n, run in runs.items()}
            rows[-1].warm_seconds = [30.0, 20.0] if graphs else []
        rows.append(Row(system="cache-dit", error="can't be imported | [bench]", **changed))
        protocol = {
            **{"model": "m", "blocks": "1+2", "hidden": 32, "width": 32, "height": 32, "frames": 5, "tokens": 8},
            **{"steps": 4, "threshold": 0.06, "dtype": "float32", "device": "cpu", "repeats": 2, "lower": "inductor"},
        }
        return Result(conditions={"protocol": protocol}, rows=tuple(rows))

    return make


def test_ratios_are_taken_within_a_round(result: Callable[..., Result]) -> None:
    made = result()
    whole = made.ratio("eager", "hvfast")
    assert whole is not None
    assert (whole.least, whole.largest) == (16 / 5, 33 / 10)
    cpu = made.ratio("eager", "hvfast", cpu=True)
    assert cpu is not None
    assert cpu.largest == pytest.approx((16 / 2 + 4) / 2.5)
    computed, reused = made.ratio("diffusers", "hvfast", COMPUTED), made.ratio("diffusers", "hvfast", REUSED)
    assert computed is not None
    assert reused is not None
    assert computed.median == pytest.approx(1.5)
    assert reused.median == pytest.approx(2.0)
    assert made.ratio("eager", "hvfast", REUSED) is None
    assert made.ratio("cache-dit", "hvfast") is None
    assert made.has_same_steps("diffusers", "hvfast")
    assert not made.has_same_steps("eager", "hvfast")
    ours = made.row("hvfast")
    assert ours is not None
    assert ours.compile_seconds == pytest.approx(50 - 2 * 7.5), "what two runs took beyond two steady ones"


def test_tables_and_plot_of_a_result(result: Callable[..., Result], tmp_path: Path) -> None:
    console = Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    for table in tables.bench_tables(result()):
        console.print(table)
    text = console.export_text()
    assert "can't be imported | [bench]" in text
    assert "3.25 (3.20-3.30)" in text
    assert "##.." in text
    pytest.importorskip("matplotlib")
    results.plot(result(), tmp_path / "b.png")
    failed = Result(conditions=result().conditions, rows=result().rows[-1:])
    results.plot(failed, tmp_path / "none.png")
    assert tables.bench_tables(failed)
    assert (tmp_path / "none.png").stat().st_size > 5_000


def test_latents_are_measured_on_the_reference_s_scale() -> None:
    reference = np.linspace(-4, 6, 2 * 4 * 4 * 3, dtype=np.float32).reshape(2, 4, 4, 3)
    moved, target = results.scaled(reference + 1, reference)
    assert (target.min(), target.max()) == pytest.approx((0, 1))
    assert moved - target == pytest.approx(0.1)
    assert math.isfinite(float(results.scaled(reference * 0, reference * 0)[0].sum()))
