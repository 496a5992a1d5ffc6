"""The script for GPUs, tried out on the CPU: what it finds, keeps and says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hvcompile.torch_private import torchao

ROOT = Path(__file__).resolve().parent.parent
TRIED = ("--device", "cpu", "--scale", "tiny", "--lower", "eager")


def run(*arguments: str) -> Any:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *TRIED, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_checks_are_kept_as_rows(tmp_path: Path) -> None:
    names = ["cache", *(["float8_linears"] if torchao.is_available() else [])]
    ended = run("--output", str(tmp_path / "found"), *(word for name in names for word in ("--only", name)))
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert [row["name"] for row in found["rows"]] == names
    assert found["rows"][0]["same decisions"]
    assert 0 < found["rows"][0]["reused"] < 16
    assert all(row["passes"] == "outline, UnmaskedAttention, Float8Linears" for row in found["rows"][1:])
    assert "| cache | yes |" in (tmp_path / "found.md").read_text("utf-8")


def test_what_there_was_no_time_for_is_said(tmp_path: Path) -> None:
    ended = run("--output", str(tmp_path / "found"), "--only", "speed_of_the_whole", "--minutes", "0.1")
    assert ended.returncode == 1
    (row,) = json.loads((tmp_path / "found.json").read_text("utf-8"))["rows"]
    assert "not done after" in row["failed"] or "no time" in row["failed"]


def test_an_unknown_check_is_refused() -> None:
    ended = run("--only", "speeed")
    assert ended.returncode == 2
    assert "speed_of_the_whole" in ended.stderr.replace("\n", "").replace("│", "").replace(" ", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_refused(tmp_path: Path) -> None:
    ended = run("--device", "cuda", "--output", str(tmp_path / "found"))
    told = " ".join(ended.stderr.replace("│", "").split())
    assert ended.returncode == 2
    assert "finds no CUDA device. --device cpu --scale tiny --lower eager tries" in told
    assert not list(tmp_path.iterdir())
