"""``hvcompile doctor``: what is here of what compiling needs, and an exit code that says whether all is."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._inductor.config as inductor
from typer.testing import CliRunner

from hvcompile.app import cli, doctor
from hvcompile.torch_private import compilers

ROOT = Path(__file__).parents[1]


def found() -> dict[str, doctor.Finding]:
    return {item.name: item for item in doctor.examine()}


def test_all_is_here(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    done = CliRunner().invoke(cli.app, ["doctor", "--json", str(file)])
    assert done.exit_code == 0, done.output
    assert "everything that compiling needs is here" in done.stdout
    record = json.loads(file.read_text())
    rows = {row["name"]: row for row in record["findings"]}
    assert record["can_compile"] is True
    assert rows["torch"]["found"] == torch.__version__
    assert "flash, math" in rows["attention on cpu"]["found"]
    assert rows["Inductor's cache"]["found"].startswith("/")
    assert all(name in done.stdout for name in rows)


def test_no_compiler_and_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(compilers, "cpp_compiler", lambda: compilers.NO_COMPILER)
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", "/proc")
        done = CliRunner().invoke(cli.app, ["doctor"])
    assert done.exit_code == 1
    assert "apt install g++" in done.stdout
    assert "name another directory in the environment variable TORCHINDUCTOR_CACHE_DIR" in done.stdout
    full = SimpleNamespace(free=doctor.LEAST_FREE - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert found()["Inductor's cache"].status == "missing"


@pytest.mark.parametrize("name", ["none", "."])
def test_what_inductor_takes_as_a_compiler(name: str, tmp_path: Path) -> None:
    """A setting that names no program is a missing compiler, of whatever kind the error is."""
    with inductor.patch({"cpp.cxx": (None, str(tmp_path / name))}):
        assert compilers.cpp_compiler() == compilers.NO_COMPILER
        assert compilers.why_no_compiling(torch.device("cpu")) == compilers.NO_COMPILER.reason


@pytest.mark.parametrize(
    ("version", "status"), [("2.10.1", "missing"), ("2.11.0", "ok"), ("2.13.1+cu130", "ok"), ("2.14.0a0+git", "note")]
)
def test_versions_of_torch(version: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert found()["torch"].status == status


def test_the_versions_are_those_that_the_package_takes() -> None:
    first, last = (tuple(map(int, text.split("."))) for text in doctor.SUPPORTED)
    bounds = re.search(r'"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert bounds is not None
    assert tuple(map(int, bounds.groups())) == (*first, last[0], last[1] + 1)


def test_an_extra_and_the_backend_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "is_there", lambda module: module != "torchao")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    findings = found()
    assert findings["extra fp8"].advice == "pip install 'hvcompile[fp8]' for torchao"
    assert findings["extra fp8"].status == "note"
    assert findings["hvcompile"].status == "missing"


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "is_there", lambda _: False)
    assert doctor._triton(is_needed=False).status == "ok"
    assert doctor._triton(is_needed=True).status == "missing"


def test_without_torch_it_says_so() -> None:
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['hvcompile', 'doctor']\n"
    code += "runpy.run_module('hvcompile', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "install torch 2.11 to 2.13" in done.stdout
    assert done.stderr == ""
