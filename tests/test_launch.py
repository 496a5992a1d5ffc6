"""Several ranks from the command line, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch

from hvcompile.errors import InputError
from hvcompile.ranks import launch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "examples" / "launch"
SIZE = ["--steps", "4", "--frames", "9", "--height", "48", "--width", "80"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPTS / "torchrun_one_node.sh"), *arguments]
    inherited = os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "RANKS": "2"}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env=inherited | environment
    )


@pytest.mark.ranks
def test_two_ranks_make_one_video(tmp_path: Path) -> None:
    """One file, one table, and the dump of each rank says that it shared the work; with a home that takes no file."""
    size = [*SIZE, "--option", "lower=eager"]
    ran = run(
        "a red circle", *size, "--output", str(tmp_path / "a.mp4"), "--dump", str(tmp_path / "dump"), HOME="/proc/none"
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("seconds in all") == 1
    with av.open(str(tmp_path / "a.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 9
    for rank in ("rank_0", "rank_1"):
        (folder,) = (tmp_path / "dump" / rank / "run_1").glob("graph_*")
        assert "2 ranks share 45 tokens (23 each, 1 of them padding)" in (folder / "journal.json").read_text()


@pytest.mark.ranks
def test_what_is_wrong_for_all_is_said_once(tmp_path: Path) -> None:
    ran = run("a red circle", "--height", "-3", "--output", str(tmp_path / "a.mp4"))
    assert ran.returncode != 0
    assert ran.stderr.count("error: height is -3: give 1 or more") == 1


def test_ranks_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (launch.rank(), launch.num_ranks(), launch.of_this_rank(Path("dump"))) == (0, 1, Path("dump"))
    for name, held in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, held)
    assert (launch.rank(), launch.num_ranks(), launch.of_this_rank(Path("dump"))) == (5, 8, Path("dump/rank_5"))
    assert launch.device_of_this_rank("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch.device_of_this_rank(None) == "cuda:1"
    assert launch.device_of_this_rank("cuda") == "cuda:1"
    assert launch.own_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert launch.own_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(InputError, match="rank 5 was on cuda:0 and is now on cuda:1"):
        launch.own_device(torch.device("cuda:0"))
    with pytest.raises(InputError, match="'cuda:0' can't be shared by 8 ranks"):
        launch.device_of_this_rank("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="rank 5 is number 2 on a machine of 2 GPUs"):
        launch.device_of_this_rank(None)


def test_ranks_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, held in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, held)
    with (
        pytest.raises(InputError, match="rank 0 of 2 waited 1 s for the others"),
        launch.joined(torch.device("cpu"), timeout_seconds=1.0),
    ):
        pass


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.s*")), ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    ran = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert any(f"-m hvcompile {command}" in script.read_text() for command in ("generate", "batch"))
