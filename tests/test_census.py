"""The census: a row a model, from a process of its own; finished rows are kept, and a crash costs one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def census(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import census as module

    path = list(sys.path)
    yield module
    sys.path[:] = path


def run(census: Any, file: Path, *words: str) -> str:
    app = census.typer.Typer()
    app.command()(census.main)
    result = CliRunner().invoke(app, ["--json", str(file), "--lower", "eager", *words])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_row_from_its_own_process_is_kept(census: Any, tmp_path: Path) -> None:
    file = tmp_path / "census.json"
    assert "wan_t2v | eager | yes | blocks x 3 | reused | yes" in run(census, file, "--only", "wan_t2v")
    (row,) = json.loads(file.read_text())["rows"]
    assert (row["class"], row["whole"], row["graphs"]) == ("WanTransformer3DModel", True, 1)
    assert row["cache"]
    assert row["reused"]
    assert max(row["computed_error"], row["again_error"], row["other_error"]) < 1e-5
    assert run(census, file, "--only", "wan_t2v") == ""
    assert "| wan_t2v | eager | yes | blocks x 3 | reused | yes |" in file.with_suffix(".md").read_text()
    assert "ran past 1 s" in run(census, file, "--only", "wan_t2v", "--again", "--limit", "1")


def test_what_fails_is_in_the_row(census: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Family:
        def __init__(self, error: str, when: str) -> None:
            self.error, self.when = error, when

        def build(self) -> torch.nn.Module:
            family = self

            class Model(torch.nn.Linear):
                def forward(self, x: torch.Tensor, return_dict: bool = False) -> Any:
                    is_compiling = torch.compiler.is_compiling()
                    if family.when == ("compiled" if is_compiling else "eager"):
                        raise ValueError(family.error)
                    return (super().forward(x),)

            return Model(4, 4).requires_grad_(requires_grad=False)

        def inputs(self, seed: int) -> dict[str, Any]:
            return {"x": torch.randn(1, 4, generator=torch.Generator().manual_seed(seed))}

    monkeypatch.setattr(
        census,
        "families",
        lambda: {"a": Family("no | luck", "eager"), "b": Family("no", ""), "c": Family("no", "compiled")},
    )
    rows = [census.measure(name, "eager") for name in "abc"]
    assert rows[0]["eager_failed"] == "ValueError: no | luck"
    assert rows[1]["trunk"] == []
    assert "no module list" in rows[1]["why_no_trunk"][0]
    assert not census.is_right(rows[2])
    table = census.table(rows)
    assert "- 2 run without a compiler" in table
    assert "- 0 have a trunk" in table
    assert all(line.replace("\\|", "").count("|") == 10 for line in table.splitlines() if line.startswith("|"))


def test_errors(census: Any) -> None:
    one, two = torch.ones(2), torch.tensor([1.0, 3.0])
    assert census.relative_error((one, [two]), (one, [two])) == 0
    assert census.relative_error(one, two) == pytest.approx(2 / 3)
    assert census.relative_error((one,), (one, two)) == float("inf")
    assert census.relative_error(one * float("nan"), one) != census.relative_error(one, one)
    assert census.repeated({"a": torch.ones(1, 2), "b": [torch.ones(3)], "c": 4}, 2)["a"].shape == (2, 2)


def test_every_model_of_the_zoo_is_counted(census: Any) -> None:
    import zoo

    assert set(zoo.FAMILIES) <= set(census.families())
