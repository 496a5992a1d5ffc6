"""What torch's own switches turn on: the log by TORCH_LOGS, artifacts for tlparse by TORCH_TRACE."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hvcompile
from hvcompile.dump.write import stem_of
from hvcompile.passes import PASSES
from hvcompile.torch_private import dynamo

pytestmark = pytest.mark.xdist_group("logging")  # one traced run for all of them

ROOT = Path(hvcompile.__file__).parents[1]
RUN = """
import torch
from toy import Toy, toy_inputs

compiled = torch.compile(Toy().eval(), backend="hvfast", options={"lower": "eager"})
with torch.no_grad():
    compiled(**toy_inputs())
"""


def run(code: str, **variables: str) -> str:
    """Run code in a fresh process, since torch reads its switches when it is imported; returns what it logs."""
    environment = {name: held for name, held in os.environ.items() if not name.startswith("TORCH_")}
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": paths, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[tuple[dict[str, Any], str]]]:
    """A run with both switches on: what it logged, and the trace's records, each with its payload."""
    directory = tmp_path_factory.mktemp("trace")
    logged = run(RUN, TORCH_LOGS="+hvcompile", TORCH_TRACE=str(directory))
    records = []
    for file in directory.iterdir():
        for entry in re.split(r"^(?=[VIWE]\d{4} )", file.read_text(), flags=re.MULTILINE):
            found = re.search(r"\] (\{.*\})\n", entry)
            if found:
                payload = re.sub(r"^\t", "", entry[found.end() :], flags=re.MULTILINE)
                records.append((json.loads(found[1]), payload))
    return logged, records


def test_torch_logs_turns_the_log_on(traced: tuple[str, Any]) -> None:
    lines = traced[0].splitlines()
    assert [line.split("] ")[-1].split(":")[0] for line in lines] == ["outline", *(item.__name__ for item in PASSES)]
    assert all("hvcompile/" in line for line in lines)


def test_torch_logs_is_understood_where_this_package_is_imported_first() -> None:
    """Torch imports what the variable names while it is itself being imported."""
    code = "import hvcompile.app.cli, hvcompile.backend, logging; logging.getLogger('hvcompile.backend').debug('here')"
    assert run(code, TORCH_LOGS="+hvcompile").count("here") == 1


def test_without_the_switch_nothing_is_logged_and_nothing_traced() -> None:
    assert run(RUN) == ""
    assert not dynamo.is_tracing()
    dynamo.trace_artifact("name", "string", lambda: pytest.fail("asked for"))


def test_every_pass_and_the_journal_are_artifacts_of_the_trace(traced: tuple[str, Any]) -> None:
    found = {
        record["artifact"]["name"]: (record, payload)
        for record, payload in traced[1]
        if record.get("artifact", {}).get("name", "").startswith("hvcompile_")
    }
    applied = ("UnmaskedAttention", "FirstBlockCache")  # what changes nothing has no graph
    passes = [f"hvcompile_{place:02d}_{stem_of(name)}" for place, name in enumerate(applied, start=2)]
    assert list(found) == [
        *("hvcompile_00_captured", "hvcompile_01_outlined", *passes),
        *("hvcompile_journal", f"hvcompile_{2 + len(passes):02d}_sealed"),
    ]
    record, text = found[passes[-1]]
    assert (record["artifact"]["encoding"], record["frame_id"], record["frame_compile_id"]) == ("string", 0, 0)
    assert "torch.ops.higher_order.cond(" in text
    compile(text, "a graph", "exec")
    record, text = found["hvcompile_journal"]
    assert record["artifact"]["encoding"] == "json"
    assert [row["name"] for row in json.loads(text)["passes"]] == ["outline", *(item.__name__ for item in PASSES)]


def test_a_torch_without_this_trace_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._logging._internal", None)
    assert not dynamo.is_tracing()
    dynamo.trace_artifact("name", "string", lambda: pytest.fail("asked for"))
    assert torch.__version__
