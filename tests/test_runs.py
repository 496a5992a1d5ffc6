"""A dump that is made again does not mix with the older one, and a bisection says which it looks at."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_bisect import dump as dump_one
from test_bisect import invoke, spoil_stage

from hvcompile.dump import read, runs

AGAIN = """
import sys
from pathlib import Path
from hvcompile.dump import runs
print(runs.own_run(Path(sys.argv[1])).name)
"""


def in_another_process(directory: Path) -> str:
    done = subprocess.run([sys.executable, "-c", AGAIN, str(directory)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_process_has_one_folder_and_another_process_another(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        (own,) = set(pool.map(runs.own_run, [tmp_path / "new"] * 32))
    assert own == tmp_path / "new" / "run_1"
    assert [in_another_process(tmp_path / "new") for _ in range(2)] == ["run_2", "run_3"]
    assert runs.own_run(tmp_path / "new") == own
    assert runs.own_run(None) is None
    (tmp_path / "new" / "run_10").mkdir()
    assert runs.latest(tmp_path / "new").name == "run_10"
    assert runs.latest(tmp_path / "other") == tmp_path / "other"


def test_an_older_fault_is_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        spoil_stage(patch, "outlined", math.nan)
        dump_one(tmp_path)
    older = runs.latest(tmp_path)
    torch._dynamo.reset()
    runs._new_run.cache_clear()  # as in a new process
    dump_one(tmp_path)
    done = invoke(str(tmp_path), "--lower", "eager")
    assert done.exit_code == 0, done.output
    began = json.loads((tmp_path / "run_2" / "run.json").read_text())["started"]
    assert f"looking at run_2 of {str(tmp_path)!r}, the latest of 2, begun {began} by " in done.stdout
    done = invoke(str(older), "--lower", "eager")
    assert done.exit_code == 1
    assert "looking at run_1 of" in done.stdout
    assert "an older one of 2" in done.stdout


def test_a_dump_without_runs_is_read_as_before(tmp_path: Path) -> None:
    folder = dump_one(tmp_path)
    folder.rename(tmp_path / folder.name)
    for rest in (tmp_path / "run_1").iterdir():
        rest.unlink()
    (tmp_path / "run_1").rmdir()
    assert read.folders(tmp_path) == [tmp_path / folder.name]
    assert read.of_rank(tmp_path, 0, 1) == tmp_path
    assert runs.describe(tmp_path) == ""
