"""What the tests of bisection on several ranks run on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from oracle import hvfast
from sharded_cases import Joint, joint_inputs
from torch.distributed.device_mesh import DeviceMesh
from typer.testing import CliRunner

import hvcompile.ranks.launch
from hvcompile.app import cli


def dump(directory: Path) -> None:
    """Dump a run of all ranks, and one over a mesh of a group of its own."""
    mesh = DeviceMesh.from_group(torch.distributed.new_group([0, 1]), "cpu")
    parallel: dict[str, Any] = {"sound": True, "mesh": {"mesh": mesh}}
    for name, fields in parallel.items():
        torch._dynamo.reset()
        options = {"lower": "eager", "first_block_cache": {"threshold": 1.0}, "context_parallel": fields}
        fast = hvfast(Joint(), fullgraph=True, options={**options, "dump": directory / name})
        with torch.no_grad():
            fast(**joint_inputs())


def bisected(directories: list[Path], *options: str) -> list[tuple[int, str]]:
    """The status and the output of the command for each dump on this rank."""
    hvcompile.ranks.launch.GRACE_SECONDS = 0.0
    found = []
    for directory in directories:
        ran = CliRunner().invoke(cli.app, ["bisect", str(directory), *options], env={"COLUMNS": "200"})
        found.append((ran.exit_code, " ".join(ran.output.split())))
    return found
