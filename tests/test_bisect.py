"""Bisection names the stage that was broken on purpose, whichever it is, and finds nothing where nothing is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracle import hvfast
from rich.console import Console
from sharded_cases import Joint, masked_inputs
from toy import Toy, toy_inputs
from typer.testing import CliRunner
from wide import Wide, wide_inputs

from hvcompile import backend
from hvcompile.app import cli, tables
from hvcompile.dump import bisect
from hvcompile.dump import read as dump_read
from hvcompile.dump.bisect import Bisection, Stage
from hvcompile.dump.figures import Figure
from hvcompile.errors import InputError, InvalidRewriteError
from hvcompile.passes import PASSES
from hvcompile.torch_private import fakes, lowering
from hvcompile.trunk import outline
from hvcompile.trunk.branch import Branch
from hvcompile.trunk.trunk import Trunk

ROOT = Path(backend.__file__).parents[1]
# In float32 the tolerance is 1e-4; the smallest fault planted here makes 5e-3 of it, the default's fiftyfold.
FACTORS = {"scaled": 1.01, "NaN": math.nan}


def dump(directory: Path, model: torch.nn.Module | None = None, lower: str = "eager", **inputs: Any) -> Path:
    compiled = hvfast((model or Toy()).eval(), fullgraph=True, options={"lower": lower, "dump": directory})
    with torch.no_grad():
        compiled(**(inputs or toy_inputs()))
    (folder,) = dump_read.folders(directory)
    return folder


def spoil(trunk: Trunk, factor: float) -> None:
    """Multiply the graph's first output: a fault that any pass can make without breaking a signature."""
    returned: Any = trunk.output.args[0]
    first, *others = returned
    with trunk.graph.inserting_before(trunk.output):
        made = trunk.graph.call_function(torch.mul, (first, factor))
    made.meta = fakes.provenance(first, "spoiled", fakes.value(first))
    trunk.output.args = ((made, *others),)
    trunk.module.recompile()


def spoil_stage(monkeypatch: pytest.MonkeyPatch, name: str, factor: float) -> None:
    """Make a pass, the outlining or a lowering wrong for the rest of a test."""
    if name in lowering.LOWERINGS:
        lower: Any = lowering.LOWERINGS[
            "aot" if name == "inductor" else name
        ]  # Inductor's own half minute is not needed

        def lowered(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            run = lower(module, inputs)

            def spoiled(*arguments: Any) -> tuple[Any, ...]:
                first, *others = run(*arguments)
                return (first * factor, *others)

            return spoiled

        monkeypatch.setattr(lowering, "LOWERINGS", {**lowering.LOWERINGS, name: lowered})
        return
    if name == "outlined":
        recover = outline.recover

        def recovered(captured: torch.fx.GraphModule) -> Any:
            trunk = recover(captured)
            assert isinstance(trunk, Trunk)
            spoil(trunk, factor)
            return trunk

        monkeypatch.setattr(backend, "recover", recovered)
        return
    (kind,) = [item for item in PASSES if item.__name__ == name]
    apply = kind.apply

    def applied(self: Any, trunk: Trunk, context: Any) -> Any:
        report = apply(self, trunk, context)
        if not report.applied:  # on a CPU, in one process: a pass that changes nothing has no file to look at
            report = dataclasses.replace(report, matched=("the spoiled output",))
        spoil(trunk, factor)
        return report

    monkeypatch.setattr(kind, "apply", applied)


@pytest.mark.parametrize("fault", FACTORS)
@pytest.mark.parametrize("name", ["outlined", *(item.__name__ for item in PASSES)])
def test_a_fault_in_a_pass_is_found_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: str
) -> None:
    may_change = {item.__name__: item.tolerance for item in PASSES}.get(name, 0.0)
    factor = FACTORS[fault] + 2 * may_change  # what a pass may change is no fault
    spoil_stage(monkeypatch, name, factor)
    found = bisect.bisect(dump(tmp_path)).finding
    assert found is not None
    assert (found.stage, found.output) == (name, 0)
    assert re.match(r"output 0 \(float32 \[1, 12, 16\]\) ", found.problem)
    if fault == "NaN":
        assert "192 values that" in found.problem
        assert "NaN or infinite" in found.problem
    else:
        assert f"a relative {factor - 1:.3g};" in found.problem
    sections = {item.__name__: item.section for item in PASSES}
    assert (
        "backend='inductor'" if name == "outlined" else f"options={{'{sections[name]}': False}}"
    ) in found.switch_off


@pytest.mark.parametrize("fault", FACTORS)
@pytest.mark.parametrize("name", ["aot", "inductor"])
def test_a_fault_in_a_lowering_is_found_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: str
) -> None:
    spoil_stage(monkeypatch, name, FACTORS[fault])
    found = bisect.bisect(dump(tmp_path), lower=name).finding
    assert found is not None
    assert (found.stage, found.output) == (name, 0)
    assert f"'lower': '{'aot' if name == 'inductor' else 'eager'}'" in found.switch_off


def test_nothing_is_found_where_nothing_is_wrong_through_inductor(tmp_path: Path) -> None:
    folder = dump(tmp_path, Toy(blocks=2), lower="inductor")
    result = bisect.bisect(folder)
    assert result.finding is None
    names = [stage.name for stage in result.stages]
    assert names == ["captured", "outlined", "UnmaskedAttention", "FirstBlockCache", "sealed", "aot", "inductor", "run"]
    assert all(figure.relative < 1e-5 for stage in result.stages for figure in stage.figures)
    assert result.verdict().startswith("nothing found: captured, outlined, ")
    assert "def call(" in (folder / "inductor_output.py").read_text()


def test_nothing_is_found_in_a_real_transformer(tmp_path: Path) -> None:
    family = zoo.FAMILIES["hunyuan_video"]
    result = bisect.bisect(dump(tmp_path, family.build(), **family.inputs()), lower="aot")
    assert result.finding is None
    assert [stage.name for stage in result.stages][-2:] == ["sealed", "aot"]


def test_the_cache_is_judged_in_a_computed_step_and_by_the_captured_outputs_alone(tmp_path: Path) -> None:
    result = bisect.bisect(dump(tmp_path))
    assert result.finding is None
    assert any("compared in a computed step" in note for note in result.notes)
    calls = [[figure.call for figure in stage.figures] for stage in result.stages]
    assert calls[-2:] == [[1, 2], [1]]  # not the added state; a step that reuses once it can
    assert all(call == [1] for call in calls[:-2])


def test_a_fault_of_the_branch_that_reuses_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Branch.call

    def spoiled(self: Branch, function: Any, *args: Any) -> Any:
        made = call(self, function, *args)
        return (
            call(self, torch.add, made, made) if function is torch.add else made
        )  # the branch that computes subtracts

    monkeypatch.setattr(Branch, "call", spoiled)
    found = bisect.bisect(dump(tmp_path)).finding
    assert found is not None
    assert found.stage == "FirstBlockCache"
    assert "of a second call on the same inputs differs from that of its first call" in found.problem
    assert "'first_block_cache': False" in found.switch_off


def test_a_cache_that_computes_a_second_call_says_so(tmp_path: Path) -> None:
    options = {"lower": "eager", "dump": tmp_path, "first_block_cache": {"warmup_steps": 3}}
    with torch.no_grad():
        hvfast(Toy().eval(), fullgraph=True, options=options)(**toy_inputs())
    (folder,) = dump_read.folders(tmp_path)
    assert any("computes a second call too" in note for note in bisect.bisect(folder).notes)


def test_after_float8_another_pass_is_looked_at_as_closely_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"lower": "aot", "fp8": {"keep_last_blocks": 0}}
    with torch.no_grad():
        hvfast(Wide(), fullgraph=True, options={**options, "dump": tmp_path / "right"})(**wide_inputs())
        spoil_stage(monkeypatch, "FirstBlockCache", 1.008)
        hvfast(Wide(), fullgraph=True, options={**options, "dump": tmp_path / "wrong"})(**wide_inputs())
    (right,), (wrong,) = dump_read.folders(tmp_path / "right"), dump_read.folders(tmp_path / "wrong")
    result = bisect.bisect(right)
    assert result.finding is None
    assert " to a relative 0.0001 (Float8Linears to 0.1; aot, run to 0.01), " in result.verdict()
    found = bisect.bisect(wrong).finding
    assert found is not None
    assert found.stage == "FirstBlockCache"
    assert "the tolerance is 0.0001" in found.problem


def test_a_model_that_gives_nan_itself_is_named_before_any_pass(tmp_path: Path) -> None:
    model = Toy()
    model.head.weight.data[0, 0] = math.nan
    found = bisect.bisect(dump(tmp_path, model)).finding
    assert found is not None
    assert (found.stage, found.output) == ("captured", 0)
    assert "12 values that are NaN or infinite" in found.problem
    assert "switch off nothing" in found.switch_off


def test_a_run_that_differs_from_its_own_graph_is_found_last(tmp_path: Path) -> None:
    folder = dump(tmp_path)
    outputs = torch.load(folder / "outputs.pt")
    torch.save([outputs[0] * 1.01], folder / "outputs.pt")
    found = bisect.bisect(folder).finding
    assert found is not None
    assert found.stage == "run"
    assert bisect.bisect(folder, tolerance=0.1).finding is None


def test_a_graph_that_was_broken_by_hand_is_found(tmp_path: Path) -> None:
    folder = dump(tmp_path)
    file = folder / "01_outlined.py"
    text = file.read_text()
    file.write_text(text.replace("torch.cat(", "torch.no_such_function(", 1))
    found = bisect.bisect(folder).finding
    assert found is not None
    assert (found.stage, found.output) == ("outlined", None)
    assert "AttributeError" in found.problem
    file.write_text(re.sub(r"return \(linear_\d+,\)", "return ()", text))
    found = bisect.bisect(folder).finding
    assert found is not None
    assert found.problem == "gives 0 outputs where the captured graph gives 1"


def test_without_a_saved_call_inputs_are_drawn_and_a_note_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_stage(monkeypatch, "outlined", 1.01)
    folder = dump(tmp_path)
    (folder / "inputs.pt").unlink()
    (folder / "outputs.pt").unlink()
    result = bisect.bisect(folder)
    assert result.finding is not None
    assert result.finding.stage == "outlined"
    assert any("drawn at random" in note for note in result.notes)


def test_a_compilation_that_broke_off_is_bisected_as_far_as_it_went(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(self: Any, trunk: Trunk) -> Any:
        raise InvalidRewriteError("on purpose")

    monkeypatch.setattr(PASSES[-1], "apply", breaks)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        dump(tmp_path)
    (folder,) = dump_read.folders(tmp_path)
    result = bisect.bisect(folder)
    assert [stage.name for stage in result.stages][:2] == ["captured", "outlined"]
    assert any("broke off after" in note for note in result.notes)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)],
    ids=str,
)
def test_the_tolerance_is_that_of_the_coarsest_dtype(tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    """Also: a graph that is left as it is has its lowerings alone to be compared."""

    class Mixed(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input.to(dtype)).double()

    folder = dump(tmp_path, Mixed(3, 3, dtype=dtype), "aot", input=torch.ones(2, 3, dtype=torch.float64))
    result = bisect.bisect(folder)
    assert [stage.name for stage in result.stages] == ["captured", "aot", "run"]
    assert (result.finding, result.tolerance) == (None, tolerance)


def only(result: Any) -> str:
    assert result.exit_code == 2, result.output
    assert result.output.count("\n") == 1
    return str(result.output)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["bisect", *arguments])


def test_the_command_line_names_the_fault_and_leaves_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvcompile.app.cli.bisect.out", Console(highlight=False, width=200))
    spoil_stage(monkeypatch, "outlined", math.nan)
    dump(tmp_path / "dump")
    done = invoke(str(tmp_path / "dump"), "--json", str(tmp_path / "found.json"))
    assert done.exit_code == 1, done.output
    record = json.loads((tmp_path / "found.json").read_text())["graphs"][0]
    assert record["finding"]["stage"] == "outlined"
    assert record["stages"][1]["figures"][0]["not_finite"] == 192


def test_the_command_line_says_that_nothing_was_found(tmp_path: Path) -> None:
    folder = dump(tmp_path)
    done = invoke(str(folder), "--tolerance", "0", "--lower", "eager")
    assert done.exit_code == 0, done.output
    assert "nothing found" in " ".join(done.output.split())


def test_the_table_marks_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_stage(monkeypatch, "outlined", 1.01)
    table = tables.bisection_table(bisect.bisect(dump(tmp_path)))
    assert list(map(str, table.columns[0]._cells)) == ["captured", "outlined <-"]
    assert [*table.columns[3]._cells][1] == "0.01"


@pytest.mark.parametrize("prepare", ["none", "file", "empty", "text"])
def test_what_is_no_dump_is_one_clear_line(tmp_path: Path, prepare: str) -> None:
    place = tmp_path / "given"
    if prepare in {"file", "text"}:
        place.write_text("")
    elif prepare == "empty":
        place.mkdir()
    line = only(invoke(str(place)))
    assert str(place) in line
    assert {"none": "no directory", "file": "is a file", "text": "is a file", "empty": "is no dump"}[prepare] in line


def test_a_folder_that_is_incomplete_or_from_elsewhere_is_one_clear_line(tmp_path: Path) -> None:
    folder = dump(tmp_path)
    journal = json.loads((folder / "journal.json").read_text())
    broken: list[tuple[Callable[[], object], str]] = [
        (lambda: torch.save([None], folder / "outputs.pt"), "holds no tensor"),
        (lambda: (folder / "outputs.pt").write_text("no archive"), "outputs.pt' can't be read"),
        (lambda: (folder / "00_captured.py").write_text("raise SystemExit(0)"), "can't be read (SystemExit"),
        (lambda: (folder / "inputs.pt").write_text("no archive"), "can't be read"),
        (lambda: (folder / "99_mine.py").write_text(""), "99_mine.py, a number too high"),
        ((folder / "99_mine.py").unlink, "can't be read"),
        ((folder / "01_outlined.py").unlink, "lacks the graph file number 01"),
        (lambda: (folder / "journal.json").write_text(json.dumps({**journal, "torch": "1.0"})), "dumped on torch 1.0"),
        (lambda: (folder / "journal.json").write_text(json.dumps({**journal, "lower": "x"})), "this version"),
        (lambda: (folder / "journal.json").write_text(json.dumps({**journal, "passes": [1]})), "this version"),
        (lambda: (folder / "journal.json").write_text("{}"), "no journal of a dump"),
        ((folder / "journal.json").unlink, "has no journal.json"),
    ]
    for break_it, said in broken:
        break_it()
        assert said in only(invoke(str(folder)))


def test_constants_that_are_missing_are_named(tmp_path: Path) -> None:
    folder = dump(tmp_path)
    file = folder / "00_captured.py"
    file.write_text(file.read_text().replace("    root = Root()", "    constants = torch.load('')\n    root = Root()"))
    assert "00_captured.pt" in only(invoke(str(folder)))


@pytest.mark.parametrize(("option", "given"), [("--tolerance", "-1"), ("--tolerance", "nan"), ("--lower", "xla")])
def test_an_argument_out_of_range_is_one_clear_line(tmp_path: Path, option: str, given: str) -> None:
    assert "allowed is" in only(invoke(str(dump(tmp_path)), option, given))


def test_a_json_file_that_cannot_be_written_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bisect, "bisect", pytest.fail)
    assert "json" in only(invoke(str(tmp_path), "--json", str(tmp_path)))


def test_a_bisection_is_json_even_where_a_figure_is_infinite() -> None:
    figure = Figure(
        output=0, shape=(1,), dtype="float32", largest=math.inf, relative=math.nan, not_finite=1, newly_not_finite=1
    )
    stage = Stage(name="captured", what="", figures=(figure,), tolerance=1e-4)
    result = Bisection(folder=Path("a"), tolerance=1e-4, stages=(stage,), finding=None, notes=())
    assert json.loads(json.dumps(result.record(), allow_nan=False))["stages"][0]["figures"][0]["largest"] == "inf"
    with pytest.raises(InputError):
        dump_read.folders(Path("/no/such/directory"))


def test_a_number_that_blocks_are_given_is_lowered_too(tmp_path: Path) -> None:
    """How many keys a prompt has is an input of the blocks' shared body, within the cache's branch and before it."""
    folder = dump(tmp_path, Joint(), **masked_inputs((3,)))
    assert 'valid_keys_0_0: "Sym(' in (folder / "04_sealed.py").read_text()
    found = bisect.bisect(folder, lower="inductor")
    assert found.finding is None, found.verdict()
    assert found.stages[-1].name == "inductor"


def test_the_example_finds_its_fault(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "debug_graph.py"), str(tmp_path / "dump")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ScaledResidual: output 0" in done.stdout
    assert "options={'scaled_residual': False}" in done.stdout
    assert "3. Without that pass it is off by 0." in done.stdout
