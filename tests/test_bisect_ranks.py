"""Ranks bisect what they dumped together: one verdict for all, wherever the fault is, and no rank left waiting."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import bisect_cases as cases
import pytest
import ranks
from test_bisect import dump as dump_alone
from typer.testing import CliRunner

from hvcompile.app import cli
from hvcompile.dump import bisect
from hvcompile.dump import read as dump_read
from hvcompile.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("bisect_ranks")]  # one dump for all of them


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dumps")
    ranks.results(ranks.launch(cases.dump, 2, directory))
    return directory


def _edit(file: Path, pattern: str, text: str) -> None:
    """Replace the first match in what stands from the class of the whole graph on."""
    head, root = file.read_text().split("class Root(")
    root, count = re.subn(pattern, text, root, count=1)
    assert count, pattern
    file.write_text(f"{head}class Root({root}")


def spoiled(dumps: Path, kind: str, spoil: Callable[[Path], object]) -> Path:
    """A copy of the sound dump with something wrong in the graph's folder of rank 1."""
    directory = dumps / kind
    shutil.copytree(dumps / "sound", directory)
    spoil(directory / "rank_1" / "run_1" / "graph_0_0")
    return directory


def scaled(folder: Path) -> None:
    _edit(folder / "02_sharded_attention.py", r"( return \()(\w+)", r"\1\2 * 1.01")


def run(*arguments: str) -> tuple[int, str]:
    ran = CliRunner().invoke(cli.app, ["bisect", *arguments])
    return ran.exit_code, " ".join(ran.output.split())


def test_what_is_wrong_on_one_rank_is_the_verdict_of_all(dumps: Path) -> None:
    """A fault of any kind on rank 1, and none."""
    unbuilt = r"def build\(\):", "def build():\n    raise OSError('odd')"
    expected = {
        dumps / "sound": (0, "nothing found: captured, outlined, ShardedAttention"),
        spoiled(dumps, "scaled", scaled): (
            1,
            "ShardedAttention: output 0 (float32 [1, 13, 64]) on rank 1 differs from that of outlined by",
        ),
        spoiled(dumps, "unbuilt", lambda folder: _edit(folder / "03_unmasked_attention.py", *unbuilt)): (
            1,
            "UnmaskedAttention: on rank 1 raises OSError: odd. Switch it off with options={'attention': False}",
        ),
        spoiled(dumps, "lacking", lambda folder: (folder / "02_sharded_attention.py").unlink()): (
            2,
            "lacks the graph file number 02",
        ),
        spoiled(dumps, "unreadable", lambda folder: (folder / "outputs.pt").write_bytes(b"nothing")): (
            2,
            "outputs.pt' can't be read",
        ),
        spoiled(dumps, "unsaved", lambda folder: (folder / "inputs.pt").unlink()): (2, "on rank 1 is another"),
        spoiled(dumps, "more", lambda folder: shutil.copytree(folder, folder.with_name("graph_1_0"))): (
            2,
            "it has graph_1_0",
        ),
        dumps / "mesh": (2, "talks over the process group '1', one of a mesh that the script made"),
    }
    first, second = ranks.results(ranks.launch(cases.bisected, 2, list(expected)))
    for (status, said), (other_status, other_said), (wanted, text) in zip(
        first, second, expected.values(), strict=True
    ):
        assert (status, other_status) == (wanted, wanted), said
        assert text in said
        assert (text in other_said) == (wanted == 2)  # of a verdict the first alone speaks


def test_a_rank_that_raises_while_another_waits_for_it(dumps: Path) -> None:
    """The other is in a collective by then and raises too, later: the first to raise is named."""
    broken = r"\n( +)(broadcast_1: )", r"\n\1raise OSError('odd')\n\1\2"
    directory = spoiled(dumps, "raising", lambda folder: _edit(folder / "02_sharded_attention.py", *broken))
    ended = ranks.launch(cases.bisected, 2, [directory], "--rank-timeout", "5", group_timeout=5, limit=100)
    ((status, said),), ((other_status, _),) = ranks.results(ended)
    assert (status, other_status) == (1, 1)
    assert "ShardedAttention: on rank 1 raises OSError: odd" in said


def test_torchrun_bisects(dumps: Path) -> None:
    directory = spoiled(dumps, "from_torchrun", scaled)
    figures = dumps / "figures.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ran = subprocess.run(
        [*command, "-m", "hvcompile", "bisect", str(directory), "--json", str(figures)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 1, ran.stderr
    assert ran.stdout.count("ShardedAttention: output 0 (float32 [1, 13, 64]) on rank 1 differs from") == 1
    (graph,) = json.loads(figures.read_text())["graphs"]
    assert (graph["finding"]["stage"], graph["stages"][-1]["figures"][0]["rank"]) == ("ShardedAttention", 1)


def test_one_process_is_told_to_start_the_ranks(dumps: Path) -> None:
    directory = dumps / "sound"
    command = f"torchrun --nproc-per-node=2 -m hvcompile bisect {directory}"
    for given in (directory, directory / "rank_0", directory / "rank_1" / "run_1" / "graph_0_0"):
        status, said = run(str(given))
        assert status == 2
        assert command in said
    with pytest.raises(InputError, match=r"is one rank's share .* torchrun --nproc-per-node=2"):
        bisect.bisect(directory / "rank_0" / "run_1" / "graph_0_0")


def test_as_many_ranks_as_dumped(dumps: Path, tmp_path: Path) -> None:
    directory = dumps / "sound"
    assert dump_read.of_rank(directory, 1, 2) == directory / "rank_1" / "run_1"
    with pytest.raises(InputError, match=r"is the dump of 2 ranks, and 3 were started: .* --nproc-per-node=2 "):
        dump_read.of_rank(directory, 0, 3)
    with pytest.raises(InputError, match=r"is the dump of one rank, and 2 ranks were started: give .*sound, which"):
        dump_read.of_rank(directory / "rank_0", 0, 2)
    alone = dump_alone(tmp_path / "alone")
    assert dump_read.of_rank(alone, 0, 1) == alone
    with pytest.raises(InputError, match=r"is the dump of one process, and 2 ranks were started: run it without"):
        dump_read.of_rank(tmp_path / "alone", 0, 2)
    uneven = tmp_path / "uneven"
    shutil.copytree(directory, uneven)
    shutil.copytree(uneven / "rank_0" / "run_1", uneven / "rank_0" / "run_2")
    with pytest.raises(InputError, match="latest are run_2 of rank_0, run_1 of rank_1"):
        dump_read.of_rank(uneven, 0, 2)
    half = tmp_path / "half"
    shutil.copytree(directory / "rank_0", half / "rank_0")
    with pytest.raises(InputError, match="lacks rank_1"):
        dump_read.of_rank(half, 1, 2)
    journal = half / "rank_0" / "run_1" / "graph_0_0" / "journal.json"
    other = half / "rank_0" / "run_1" / "graph_0_0-2"
    shutil.copytree(journal.parent, other)
    (other / "journal.json").write_text(json.dumps(json.loads(journal.read_text()) | {"ranks": 4}))
    with pytest.raises(InputError, match="holds dumps of runs on 2 and on 4 ranks"):
        dump_read.of_rank(half, 0, 2)
    assert json.loads((alone / "journal.json").read_text())["ranks"] == 1
