"""The command line: its table and marks; one clear line and exit code 2 for bad input, before anything is compiled."""

from __future__ import annotations

import importlib
import inspect
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

import hvcompile
from hvcompile import outputs
from hvcompile.app import cli, doctor, generate, metrics, video
from hvcompile.app.cli import console, main
from hvcompile.app.cli.display import COMPUTED, REUSED, STRIP, Display


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, arguments)


def run(backend: str, reused: list[bool], seconds: float) -> metrics.Run:
    steps = tuple(
        metrics.Step(backend=backend, index=i, num_steps=len(reused), seconds=seconds, reused=mark, difference=0.05)
        for i, mark in enumerate(reused)
    )
    return metrics.Run(frames=np.zeros((5, 32, 48, 3), np.float32), seconds=10 * seconds, steps=steps)


def result(output: Path, *, compare: bool) -> generate.Result:
    ours, plain = run("hvfast", [False, True, True, False], 1.0), run("inductor", [False] * 4, 2.0)
    quality = metrics.Quality(psnr=(30.0, math.inf), ssim=(0.9, 1.0), temporal_psnr=(31.0,))
    comparison = metrics.Comparison(run=ours, plain=plain, quality=quality) if compare else None
    sheet = output.with_name("a.sheet.png") if compare else None
    stats = hvcompile.Stats(graphs=1, recompiles=0, hits=2, misses=2, slots=1, bytes=0, steps=[], journal=[])
    return generate.Result(output=output, run=ours, stats=stats, comparison=comparison, sheet=sheet)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[generate.Request]:
    """Stand in for the generation; the list holds what it was asked for."""
    seen: list[generate.Request] = []

    def generated(request: generate.Request, observe: generate.Observer) -> generate.Result:
        seen.append(request)
        assert request.output is not None
        outcome = result(request.output, compare=request.compare)
        observe("loading")
        for step in outcome.run.steps:
            observe(step)
        return outcome

    monkeypatch.setattr(generate, "generate", generated)
    return seen


def test_every_option_reaches_the_request(requests: list[generate.Request], tmp_path: Path) -> None:
    output = tmp_path / "a.mp4"
    done = invoke(
        *("generate", "a cat", "--steps", "9", "--frames", "5", "--height", "32", "--width", "48", "--seed", "3"),
        *("--guidance", "4", "--true-cfg", "2", "--negative-prompt", "dog", "--threshold", "0.1", "--compare"),
        *("--sheet", str(tmp_path / "s.png"), "--json", str(tmp_path / "f.json"), "--html", str(tmp_path / "r.html")),
        *(
            "--device",
            "cpu",
            "--dtype",
            "bfloat16",
            "--fps",
            "8",
            "--output",
            str(output),
            "--dump",
            str(tmp_path / "d"),
        ),
    )
    assert done.exit_code == 0, done.output
    assert requests == [
        generate.Request(
            prompt="a cat",
            output=output,
            steps=9,
            frames=5,
            height=32,
            width=48,
            seed=3,
            guidance=4.0,
            true_cfg=2.0,
            negative_prompt="dog",
            threshold=0.1,
            compare=True,
            sheet_file=tmp_path / "s.png",
            json_file=tmp_path / "f.json",
            html_file=tmp_path / "r.html",
            device="cpu",
            dtype="bfloat16",
            fps=8,
            dump=tmp_path / "d",
        )
    ]
    assert invoke("generate", "x", "--mode", "exact", "-o", str(output)).exit_code == 0
    assert requests[1] == generate.Request(prompt="x", output=output, mode="exact")


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
    return {label: [cell for cell in values if cell] for label, *values in cells}


def test_the_table_of_one_run_and_of_a_comparison(requests: list[generate.Request], tmp_path: Path) -> None:
    output = tmp_path / "a.mp4"
    table = rows(invoke("generate", "x", "-o", str(output)).stdout)
    assert table["seconds in all"] == ["10.00"]
    assert table["steps computed"] == ["2"]
    assert table["steps reused"] == ["2"]
    assert table["graphs"] == ["1"]
    assert table["clip"] == ["48x32, 5 frames"]
    assert "PSNR" not in table

    table = rows(invoke("generate", "x", "--compare", "-o", str(output)).stdout)
    assert table["steps reused"] == ["2", "0"]
    assert table["seconds a step after"] == ["1.0000", "2.0000"]
    assert table["speed-up a step"] == ["2.00x"]
    assert table["speed-up in all"] == ["2.00x"]
    assert table["PSNR"] == ["30.00 dB"]
    assert table["SSIM"] == ["0.9500"]
    assert table["SSIM, worst frame"] == ["0.9000"]
    assert table["temporal PSNR"] == ["31.00 dB"]
    assert "contact sheet" in table


def clip(path: Path, frames: int, noise: float) -> Path:
    draw = np.random.default_rng(0)
    picture = np.linspace(0.2, 0.8, 48, dtype=np.float32)[None, None, :, None]
    pixels = picture + noise * draw.standard_normal((frames, 32, 48, 3))
    video.write(pixels.astype(np.float32), path, fps=12)
    return path


def test_two_files_are_compared(tmp_path: Path) -> None:
    files = [str(clip(tmp_path / "a.mp4", 3, 0.0)), str(clip(tmp_path / "b.mp4", 3, 0.2))]
    sheet, figures = tmp_path / "s.png", tmp_path / "f.json"
    done = invoke("compare", *files, "--sheet", str(sheet), "--json", str(figures))
    assert done.exit_code == 0, done.output
    record, table = json.loads(figures.read_text()), rows(done.stdout)
    assert table["clip"] == ["48x32, 3 frames"]
    assert table["PSNR"] == [f"{record['psnr_db']['mean']:.2f} dB"]
    assert table["temporal PSNR"] == [f"{record['temporal_psnr_db']['mean']:.2f} dB"]
    for frame in range(3):
        psnr, ssim, change = table[str(frame)]
        assert psnr == f"{record['psnr_db']['each'][frame]:.2f}"
        assert ssim == f"{record['ssim']['each'][frame]:.4f}"
        assert change == (f"{record['temporal_psnr_db']['each'][frame - 1]:.2f}" if frame else "-")
    assert sheet.is_file()
    assert rows(invoke("compare", files[0], files[0]).stdout)["PSNR"] == ["identical"]


def test_files_that_can_t_be_compared_are_one_line_and_exit_code_2(tmp_path: Path) -> None:
    whole, short = str(clip(tmp_path / "a.mp4", 3, 0.0)), str(clip(tmp_path / "b.mp4", 1, 0.0))
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    for arguments, message in (
        ((str(tmp_path / "none.mp4"), whole), "is not there"),
        ((whole, str(text)), "can't be read as a video"),
        ((whole, short), "has a length of 1 frames"),
        ((whole, whole, "--sheet", str(tmp_path / "s.jpg")), "is no PNG picture"),
    ):
        done = invoke("compare", *arguments)
        assert done.exit_code == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert not done.stdout


def test_the_display_marks_every_step_with_the_last_difference() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with Display(console) as display:
        display("loading")
        for step in run("hvfast", [False, True, True, False], 1.0).steps:
            display(step)
        assert f"hvfast {COMPUTED}{REUSED}{REUSED}{COMPUTED} 4/4, 2 reused, last 0.050" in [
            task.description for task in display.progress.tasks
        ]
        for step in run("inductor", [False] * 100, 1.0).steps:
            display(step)
        assert display.progress.tasks[-1].description.startswith(f"inductor {COMPUTED * STRIP} 100/100, 0 reused")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "error: steps is 0: give 1 or more"),
        (["--mode", "turbo"], "error: mode 'turbo' is unknown"),
        (["--threshold", "-1"], "error: threshold is -1.0"),
        (["--output", "/"], "error: output '/' is a directory"),
        (["--output", "/no/such/place.mp4"], "error: output '/no/such/place.mp4': there is no directory"),
        (["--model", "/no/such/model"], "error: model '/no/such/model' is neither"),
        (["--height", "100"], "error: height is 100, but this pipeline takes multiples of 16: give 96 or 112"),
        (["--frames", "16"], "error: frames is 16, but this pipeline takes a multiple of 4, plus 1: give 13 or 17"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: pytest.fail("nothing may be compiled"))
    done = invoke("generate", "x", *arguments)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.exit_code == 2
    assert len(lines) == 1
    assert lines[0].startswith(message)
    assert "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_a_complaint_of_the_backend_is_found_below_dynamos_wrapping(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: Any) -> None:
        try:
            raise hvcompile.OptionError("threshold is 7;\nallowed is 0 to 1")
        except hvcompile.OptionError as error:
            raise RuntimeError("backend='hvfast' raised") from error

    monkeypatch.setattr(generate, "generate", refuse)
    done = invoke("generate", "x", "-o", str(tmp_path / "a.mp4"))
    assert done.exit_code == 2
    assert "error: threshold is 7; allowed is 0 to 1\n" in done.stderr


def test_a_fault_of_ours_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(generate, "generate", fail)
    done = invoke("generate", "x", "-o", str(tmp_path / "a.mp4"))
    assert isinstance(done.exception, ZeroDivisionError)
    assert done.exit_code == 1


def test_each_command_s_sentence_in_the_help_is_its_own() -> None:
    for name, sentence in main.COMMANDS.items():
        text = inspect.getdoc(getattr(importlib.import_module(f"hvcompile.app.cli.{name}"), name))
        assert text is not None
        assert " ".join(text.split("\n\n")[0].split()) == sentence


HELP = """
import sys
from hvcompile.app.cli import app
for words in {commands!r}:
    try:
        app([*words, "--help"])
    except SystemExit as done:
        assert done.code == 0
heavy = {{"torch", "diffusers", "transformers", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_help_imports_neither_torch_nor_diffusers() -> None:
    commands = [[], *([name] for name in main.COMMANDS)]
    code = HELP.format(commands=commands)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tables_are_not_cut_where_the_output_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    wide = Table("a heading")
    wide.add_row("word " * 60)
    console.out.print(wide)
    assert ("word " * 60).strip() in capsys.readouterr().out


INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from hvcompile.app import doctor
doctor.examine_request = lambda _: signal.raise_signal(signal.SIGINT)
sys.argv = ["hvcompile", "doctor"]
from hvcompile.app.cli import app
app()
"""
INTERRUPTED_IMPORT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = ["hvcompile", "explain"]
import runpy
runpy.run_module("hvcompile", run_name="__main__")
"""


@pytest.mark.parametrize(
    "code", [INTERRUPTED, *(INTERRUPTED_IMPORT.format(module=name) for name in ("typer", "diffusers"))]
)
def test_an_interrupt_is_one_line(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (130, "stopped\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", [["--help"], ["doctor"]])
def test_a_screen_that_takes_nothing_is_one_line(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "hvcompile", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/a/report.html"), "'/a/report.html': No space left on device"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (OSError("an encoder's words,\non two lines"), "an encoder's words, on two lines"),
        (OSError(), "OSError"),
    ],
)
def test_what_the_system_refuses_is_one_line(error: OSError, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> None:
        raise error

    monkeypatch.setattr(doctor, "examine_request", refuse)
    done = invoke("doctor")
    assert (done.exit_code, done.stderr) == (2, f"error: {line}\n")


def test_the_version_and_the_help() -> None:
    assert invoke("--version").stdout.startswith("hvcompile ")
    assert "generate" in invoke("--help").stdout
    wrong = invoke("generate", "x", "--steps", "many")
    assert wrong.exit_code == 2
    assert "--steps" in wrong.output
    assert invoke("generate").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a cat", "-o", "a" * 260 + ".mp4"], "give a shorter name"),
        (["\udcff\udcfe"], "prompt is no valid text"),
        (["a cat", "--device", "meta"], "device 'meta' can't be used: it computes nothing"),
        (["a cat", "--threshold", "1e10"], "allowed is a number from 0 to 1e+09"),
        (["a cat", "--model", ""], "neither a directory nor a hub id"),
    ],
)
def test_what_a_reader_broke_is_one_line(arguments: list[str], message: str) -> None:
    done = invoke("generate", *arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_link_leads_to_the_file_that_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("{}")
    link.symlink_to(target)
    outputs.write_json({"a": 1}, link)
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"a": 1}
