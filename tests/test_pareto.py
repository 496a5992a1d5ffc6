"""The benchmark of speed against fidelity: a small run of it all without Inductor, and what it makes of its results."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from hvcompile.app.bench import contenders

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
SMALL = ("--seeds", "1", "--steps", "4", "--frames", "5", "--height", "32", "--width", "48", "--lower", "eager")


@pytest.fixture(scope="module")
def pareto() -> ModuleType:
    """The script as a module; it is no part of the package."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("pareto")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def report(pareto: ModuleType) -> Any:
    return sys.modules["pareto_report"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("# one a line\n\na red circle moves to the left\n")
    return path


def invoke(pareto: ModuleType, *arguments: object) -> Any:
    app = typer.Typer()
    app.command()(pareto.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


def results(path: Path) -> dict[str, dict[str, Any]]:
    record = json.loads(path.read_text())
    return {f"{row['system']} {row['threshold']} {row['options']}": row for row in record["settings"]}


def test_a_small_run(pareto: ModuleType, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At threshold 1000 all steps but the first are reused; cache-dit is not there; a second run measures only it."""
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    monkeypatch.setattr(pareto, "INTERVALS", (2,))
    given = ("--prompts", prompts, *SMALL, "--threshold", 1000, "--percent", 50, "--output", tmp_path / "p")
    options = ("--options", "warmup_steps=3", "--options-threshold", 1000)
    done = invoke(pareto, *given, *options)
    assert done.exit_code == 0, done.output
    rows = results(tmp_path / "p.json")
    for row in rows.values():
        assert "error" in row or {len(row[name]) for name in sys.modules["pareto_report"].MEASURES} == {1}

    blocks = 12
    saved_by_a_step = (blocks - 1) / (4 * blocks)
    for system in ("Inductor", "hvfast, exact", "eager"):
        row = rows[f"{system} None {{}}"]
        assert row["saved"] == [0]
        assert row["psnr_db"][0] is None or row["psnr_db"][0] > 90
    ours, diffusers = rows["hvfast 1000.0 {}"], rows["diffusers 1000.0 {}"]
    assert ours["saved"] == diffusers["saved"] == pytest.approx([3 * saved_by_a_step], abs=1e-5)
    assert ours["psnr_db"] == pytest.approx(diffusers["psnr_db"], abs=0.1)
    assert ours["psnr_db"][0] < 60
    fewer = rows["hvfast 1000.0 {'warmup_steps': 3}"]
    assert fewer["saved"] == pytest.approx([saved_by_a_step], abs=1e-5)
    assert fewer["psnr_db"][0] > ours["psnr_db"][0]
    assert rows["cache-dit 1000.0 {}"]["error"].startswith("ModuleNotFoundError")
    # The first three steps are always computed, the fourth is forecast.
    assert rows["diffusers' TaylorSeer None {'cache_interval': 2}"]["saved"] == pytest.approx([0.25], abs=1e-5)
    assert 0 <= rows["diffusers' MagCache 1000.0 {}"]["saved"][0] <= 0.75

    page = (tmp_path / "p.md").read_text()
    assert "| hvfast | 1000 | 68.8 % |" in page
    assert "ModuleNotFoundError" in page
    assert "ModuleNotFoundError" in done.stdout
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 1000
        assert float(np.asarray(picture.convert("L")).std()) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "p.md", "p.png", "prompts.txt"]

    measured: list[str] = []

    def measure(setting: Any, model: Any, references: Path, advance: Any) -> dict[str, Any]:
        measured.append(str(setting))
        return {**rows["eager None {}"], **setting.record()}

    monkeypatch.setattr(pareto, "measure", measure)
    assert invoke(pareto, *given, *options).exit_code == 0
    assert measured == ["Inductor", "cache-dit at 1000", "cache-dit's TaylorSeer at 1000"], (
        "the exact clips' pixels are needed, and not kept"
    )
    measured.clear()
    assert invoke(pareto, *given, *options).exit_code == 0
    assert measured == []
    assert invoke(pareto, *given, "--steps", 5, "--no-peers").exit_code == 0
    assert len(measured) > 3, "other conditions, other figures"


@pytest.mark.parametrize(("model", "calls"), [(None, 1), (str(Path(__file__).parent / "tiny_wan_video"), 2)])
def test_saved_is_of_all_passes_of_guidance(pareto: ModuleType, model: str | None, calls: int) -> None:
    size = {"height": 32, "width": 48, "num_frames": 5}
    given = {"dtype": None, "device": None, "prompts": ("a red circle",), "seeds": 1, "size": size, "lower": "eager"}
    assert pareto.Model(pareto.Job(model=model, **given), {}).calls_a_step == calls


def test_cache_dit_is_undone(pareto: ModuleType, prompts: Path, tmp_path: Path) -> None:
    """It patches the pipeline's class; an eager run afterwards must compute everything again."""
    pytest.importorskip("cache_dit")
    job = pareto.Job(
        model=None,
        dtype=None,
        device=None,
        prompts=("a red circle",),
        seeds=1,
        size={"num_inference_steps": 4, "num_frames": 5, "height": 32, "width": 48},
        lower="eager",
    )
    encoded: dict[str, Any] = {}
    systems = {
        "Inductor": pareto.Setting(system=pareto.REFERENCE),
        "cached": pareto.Setting(system=contenders.CACHE_DIT, threshold=1000.0),
        "eager": pareto.Setting(system=contenders.EAGER),
    }
    rows = {name: pareto.measure(setting, pareto.Model(job, encoded), tmp_path) for name, setting in systems.items()}
    assert len(encoded) == 1, "a prompt is encoded once"
    # two caches, one for each kind of block: the first of 4 and the first of 8 are computed
    assert rows["cached"]["saved"] == pytest.approx([3 * 10 / 48], abs=1e-5)
    assert rows["cached"]["psnr_db"][0] < 60
    assert rows["eager"]["saved"] == [0]
    assert rows["eager"]["psnr_db"][0] is None or rows["eager"]["psnr_db"][0] > 90


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompts", "none.txt"), "can't be read: give a text file"),
        (("--prompts", "empty.txt"), "holds no prompt"),
        (("--options", "warmup_steps"), "write options as"),
        (("--options", "warm_up=3"), "unknown key 'warm_up'"),
        (("--options", "max_consecutive_hits=0"), "first_block_cache.max_consecutive_hits is 0"),
        (("--threshold", "-1"), "first_block_cache.threshold is -1"),
        (("--height", "50"), "height is 50, but this pipeline takes multiples of 16: give 48 or 64"),
        (("--model", "/no/such/model"), "is neither a directory nor a hub id"),
    ],
)
def test_what_can_t_be_measured_is_refused_before_anything_is(
    arguments: tuple[str, ...],
    message: str,
    pareto: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pareto, "measure", lambda *_: pytest.fail("nothing may be measured"))
    (tmp_path / "empty.txt").write_text("# nothing\n")
    done = invoke(pareto, *arguments, "--output", tmp_path / "p")
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "p.json").exists()


def row(report: Any, system: str, threshold: float | None, saved: list[float], psnr: list[float | None]) -> Any:
    columns: dict[str, Any] = {name: [1.0] * len(saved) for name in report.MEASURES}
    columns |= {"saved": saved, "psnr_db": psnr, "worst_psnr_db": psnr}
    return {"system": system, "threshold": threshold, "options": {}, **columns}


def test_a_line_of_the_table_is_over_all_clips(report: Any) -> None:
    measured = row(report, "hvfast", 0.06, [0.1, 0.2, 0.6], [30.0, None, 20.0])
    headings, lines = report.table_of([measured])
    assert dict(zip(headings, lines[0], strict=True)) == {
        "system": "hvfast",
        "threshold": "0.06",
        "blocks saved": "30.0 %",
        "s a clip": "1.00",
        "CPU s": "1.00",
        "PSNR, dB": "30.00",
        "mean": "identical",
        "least": "20.00",
        "worst frame": "20.00",
        "SSIM": "1.0000",
        "temporal": "1.00",
    }
    failed = {"system": "cache-dit", "threshold": 0.06, "options": {}, "error": "a | b\n" * 99}
    headings, lines = report.table_of([measured, failed])
    assert headings[-1] == "failed"
    assert lines[0][-1] == ""
    assert "\n" not in lines[1][-1]
    assert (
        len({line.count("|") for line in report.markdown([measured, failed], "t", "c").splitlines() if "|" in line})
        == 1
    )


def test_clips_that_are_all_identical_have_no_point_in_the_plot(report: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row(report, "Inductor", None, [0.0], [None]),
        row(report, "hvfast", 0.01, [0.0], [None]),
        row(report, "hvfast", 0.1, [0.5], [40.0]),
    ]
    for clock in report.CLOCKS:
        report.plot(rows, "a title", tmp_path / f"{clock}.png", clock=clock)
        assert (tmp_path / f"{clock}.png").stat().st_size > 10_000
