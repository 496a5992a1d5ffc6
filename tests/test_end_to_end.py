"""The main job from the command line, compiled by Inductor: a prompt in, a video out that plays, our words alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from test_quiet import first_cells

LABELS = [
    *("seconds in all", "seconds compiling", "compiled code", "seconds a step after"),
    *("steps computed", "steps reused"),
    *("memory at most", "graphs", "recompiles", "clip", "output"),
]


@pytest.mark.xdist_group("tiny_by_inductor")  # what is compiled first, the others find
def test_generate_makes_a_video(tmp_path: Path) -> None:
    output = tmp_path / "clip.mp4"
    command = [sys.executable, "-m", "hvcompile", "generate", "a red circle moves to the left", "--steps", "8"]
    ran = subprocess.run(
        [*command, "--output", str(output), "--dump", str(tmp_path / "dump")],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    with av.open(str(output)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert [frame.shape for frame in frames] == [(32, 48, 3)] * 17
    assert float(np.std(np.stack(frames))) > 5  # not one flat colour
    assert re.fullmatch(r"\s*hvfast [█·]{8} 8/8, \d reused(, last [\d.]+)? \d+:\d\d:\d\d\s*", ran.stderr.rstrip("\n"))
    assert first_cells(ran.stdout.splitlines()) == LABELS
    assert len(ran.stdout.splitlines()) == len(LABELS) + 2, "the table's frame is all else"
    (folder,) = (tmp_path / "dump" / "run_1").glob("graph_*")
    assert {path.name for path in folder.iterdir()} >= {"00_captured.py", "journal.json"}
    assert list(folder.glob("*_first_block_cache.py"))
