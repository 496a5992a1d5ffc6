"""The examples that no other test runs: each as its own process, as a reader would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples" / "one_line.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, cwd=cwd, env=environment)


@pytest.mark.xdist_group("tiny_by_inductor")  # what is compiled first, the others find
def test_one_line_makes_a_clip_and_says_what_was_reused(tmp_path: Path) -> None:
    ran = run(cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "step 0: computed, difference inf" in ran.stdout
    assert "of 30 steps reused, 1 graph, out.mp4 written" in ran.stdout
    with av.open(str(tmp_path / "out.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 17


def test_one_line_wants_a_model_and_a_prompt_or_neither(tmp_path: Path) -> None:
    ran = run("a prompt alone", cwd=tmp_path)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == "give both a model and a prompt, or neither"  # after what imports complain of
