"""What the tests of bisection on several ranks run on every rank."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from oracle import hvfast
from sharded_cases import Joint, joint_inputs, rank
from torch.distributed.device_mesh import DeviceMesh
from typer.testing import CliRunner

import hvcompile.launch
from hvcompile import cli

SHARDED = "02_sharded_attention.py"


def _dump(directory: Path, parallel: Any = True, tokens: int = 13) -> None:
    torch._dynamo.reset()
    options = {"lower": "eager", "first_block_cache": {"threshold": 1.0}, "context_parallel": parallel}
    fast = hvfast(Joint(), fullgraph=True, options={**options, "dump": directory})
    with torch.no_grad():
        fast(**joint_inputs(tokens=tokens))


def bisected(directory: Path, *options: str) -> tuple[int, str]:
    """The status and the output of the command on this rank; where it is not the first, its stderr alone says any."""
    torch.distributed.barrier()
    ran = CliRunner().invoke(cli.app, ["bisect", str(directory), *options], env={"COLUMNS": "200"})
    return ran.exit_code, " ".join(ran.output.split())


def scaled(file: Path) -> None:
    """Make a file's graph give a hundredth more."""
    head, root = file.read_text().split("class Root(")
    root, count = re.subn(r"( return \()(\w+)", r"\1\2 * 1.01", root, count=1)
    assert count
    file.write_text(f"{head}class Root({root}")


def outcomes(directory: Path, timeout: float) -> dict[str, tuple[int, str]]:
    """What the command says of a dump, as it is and with something wrong on rank 1."""
    hvcompile.launch.GRACE_SECONDS = 0.0
    sound = directory / "sound"
    _dump(sound)
    found = {"sound": bisected(sound)}
    _dump(directory / "mesh", {"mesh": DeviceMesh.from_group(torch.distributed.new_group([0, 1]), "cpu")})
    for kind in ("scaled", "raises when built", "lacks", "unreadable", "more", "raises"):  # the last breaks the group
        spoiled = directory / kind.replace(" ", "_")
        own = spoiled / f"rank_{rank()}"
        shutil.copytree(sound / own.name, own)
        graph = own / "graph_0_0"
        if rank() == 1:
            file = graph / SHARDED
            text = file.read_text()
            if kind == "scaled":
                scaled(file)
            if kind == "raises":  # the other has entered a collective by then
                file.write_text(re.sub(r"\n( +)(broadcast_1: )", r"\n\1raise OSError('odd')\n\1\2", text, count=1))
            if kind == "raises when built":
                file.write_text(text.replace("def build():", "def build():\n    raise OSError('odd')"))
            if kind == "lacks":
                file.unlink()
            if kind == "unreadable":
                (graph / "outputs.pt").write_bytes(b"nothing")
            if kind == "more":
                shutil.copytree(graph, own / "graph_1_0")
        options = ["--rank-timeout", str(timeout)]
        found[kind] = bisected(spoiled, *options)
    return found


def again(directory: Path) -> tuple[int, str]:
    """What the command says of a dump over a mesh that is gone."""
    hvcompile.launch.GRACE_SECONDS = 0.0
    return bisected(directory)
