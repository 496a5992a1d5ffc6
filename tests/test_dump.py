"""Dumps: every file runs alone, computes what the others compute, shows each body once, and overwrites none."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import json
import math
import operator
import os
import re
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from oracle import hvfast
from torch import fx
from torch._dynamo.exc import BackendCompilerFailed
from toy import Toy, toy_inputs

from hvcompile.dump import read as dump_read
from hvcompile.dump.source_reader import load, read_graph
from hvcompile.dump.write import Dump
from hvcompile.errors import OptionError
from hvcompile.journal import JournalRow, PassReport
from hvcompile.passes import PASSES
from hvcompile.torch_private import lowering

pytestmark = pytest.mark.xdist_group("dump")  # one dump of each family for all of them

FILES = ["00_captured.py", "01_outlined.py", "02_unmasked_attention.py", "03_first_block_cache.py", "04_sealed.py"]
BESIDE = ["inputs.pt", "journal.json", "outputs.pt"]
if importlib.util.find_spec("depyf") is not None:
    BESIDE.append("dynamo_frame.py")
FAMILIES = ("hunyuan_video", "mochi", "hunyuan_video_framepack")


def compile_and_run(
    model: torch.nn.Module, inputs: dict[str, Any], *, dynamic: bool | None = None, **options: Any
) -> Any:
    settings: dict[str, Any] = {"lower": "eager", **options}
    compiled = hvfast(model.eval(), fullgraph=True, dynamic=dynamic, options=settings)
    with torch.no_grad():
        return compiled(**inputs)


def evaluate(path: Path) -> Any:
    module = load(path)
    with torch.no_grad():
        return module.build()(*module.example_inputs())


def run_alone(*paths: Path) -> str:
    """Run files as a user would, in a process that can't import this project."""
    runs = [f"runpy.run_path({str(path)!r}, run_name='__main__')" for path in paths]
    code = "; print('--'); ".join(["import runpy, sys; sys.modules['hvcompile'] = None; " + runs[0], *runs[1:]])
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def only_folder(directory: Path) -> Path:
    (folder,) = dump_read.folders(directory)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One dump of every family."""
    found = {}
    for name in FAMILIES:
        torch._dynamo.reset()
        directory = tmp_path_factory.mktemp(name)
        family = zoo.FAMILIES[name]
        compile_and_run(family.build(), family.inputs(), dump=directory)
        found[name] = only_folder(directory)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_holds_one_file_a_step_and_the_journal(folders: dict[str, Path], name: str) -> None:
    assert sorted(path.name for path in folders[name].iterdir()) == sorted([*FILES, *BESIDE])


@pytest.mark.parametrize("name", FAMILIES)
def test_every_body_is_one_class_and_one_instance(folders: dict[str, Path], name: str) -> None:
    num_attentions = (folders[name] / FILES[0]).read_text().count("scaled_dot_product_attention(")
    for file, classes in (
        (FILES[0], ["Root"]),
        (FILES[1], ["Block0", "Block1", "Root"]),
        (FILES[3], ["Block0", "Block1", "CacheHit", "CacheMiss", "Root"]),
    ):
        text = (folders[name] / file).read_text()
        lines = text.splitlines()
        assert (
            sorted(line[6 : line.index("(")] for line in lines if line.startswith("class ") and "Derived" not in line)
            == classes
        )
        assert all(text.count(f" = {class_name}()") == 1 for class_name in classes)
        outside = num_attentions - zoo.FAMILIES[name].num_blocks
        attentions = text.count("scaled_dot_product_attention(")
        assert attentions == (num_attentions if file == FILES[0] else outside + 2)
    root = load(folders[name] / FILES[3]).build()
    assert isinstance(root.block_0, torch.nn.Module)
    bodies = [held for held in root.cache_miss.children() if type(held).__name__ == "Block0"]
    assert bodies in ([], [root.block_0])


@pytest.mark.parametrize("inputs", ["kept", "drawn"])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_files_compute_the_same(folders: dict[str, Path], name: str, inputs: str, tmp_path: Path) -> None:
    folder = folders[name]
    if inputs == "drawn":
        folder = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("inputs.pt"))
    captured, *others = [evaluate(folder / file) for file in FILES]
    assert captured[0].isfinite().all()
    assert captured[0].std() > 1e-3
    for other in others:
        torch.testing.assert_close(other[0], captured[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_file_reproduces_the_output_of_the_first_call(folders: dict[str, Path], name: str) -> None:
    (expected,) = torch.load(folders[name] / "outputs.pt")
    torch.manual_seed(0)
    family = zoo.FAMILIES[name]
    with torch.no_grad():
        torch.testing.assert_close(family.build().eval()(**family.inputs())[0], expected, rtol=1e-5, atol=1e-5)
    for file in FILES:
        module = load(folders[name] / file)
        with torch.no_grad():
            again, read = module.build()(*module.example_inputs()), read_graph(module)(*module.example_inputs())
        torch.testing.assert_close(again[0], expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(again[0], read[0])  # and what bisect lowers is what the file computes


@pytest.mark.parametrize("name", FAMILIES)
def test_every_file_runs_alone(folders: dict[str, Path], name: str) -> None:
    outputs = run_alone(*(folders[name] / file for file in FILES)).split("--\n")
    assert len(outputs) == len(FILES)
    shape = tuple(zoo.FAMILIES[name].inputs()["hidden_states"].shape)
    for output in outputs:
        printed = output.splitlines()
        assert printed[0].startswith(f"0: {shape} torch.float32 norm ")
        assert math.isfinite(float(printed[0].split()[-1]))
        assert re.fullmatch(r"0 differs from what the first call gave by (0|\d\.?\d*e-0[6-9]) at most", printed[-1])


def test_a_file_computes_what_the_model_computes(tmp_path: Path) -> None:
    model, inputs = Toy(), toy_inputs()
    expected = compile_and_run(model, inputs, dump=tmp_path)
    held = {name.replace(".", "_"): tensor for name, tensor in model.state_dict().items()}
    for file in FILES:
        module = load(only_folder(tmp_path) / file)
        names = [name for name in inspect.signature(module.Root.forward).parameters if name != "self"]
        assert set(held) < set(names)
        given = [
            held.get(name, inputs.get(name.removeprefix("l_").removesuffix("_"), example))
            for name, example in zip(names, module.example_inputs(), strict=True)
        ]
        with torch.no_grad():
            torch.testing.assert_close(module.build()(*given)[0], expected, rtol=1e-5, atol=1e-5)


def test_where_a_node_comes_from_stands_above_it(folders: dict[str, Path]) -> None:
    text = (folders["hunyuan_video"] / FILES[3]).read_text()
    comments = [line.strip() for line in text.splitlines() if line.startswith("        # ")]
    for comment in ("transformer_blocks.0.attn", "transformer_blocks.1 (outline)", "(FirstBlockCache)", "x_embedder"):
        assert comments.count(f"# {comment}") >= 1, comment
    assert all(first != second for first, second in itertools.pairwise(comments))
    assert "site-packages" not in text
    assert "l_self_" not in text.lower()


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_symbolic_sizes_have_the_value_of_the_captured_run(tmp_path: Path, dynamic: bool | None) -> None:
    model = Toy()
    for tokens in (12, 9):  # the second length makes the size symbolic where that is automatic
        inputs = toy_inputs(tokens=tokens)
        compile_and_run(model, inputs, dynamic=dynamic, dump=tmp_path)
    folder = dump_read.folders(tmp_path)[-1]
    tokens = 12 if dynamic else 9
    assert '"Sym(s' in (folder / FILES[0]).read_text()
    outputs = [evaluate(folder / file)[0] for file in FILES]
    assert outputs[0].shape == (1, tokens, 16)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-5)
    assert f"(1, {tokens}, 16)" in run_alone(folder / FILES[3])


class Numbers(torch.nn.Module):
    """A number of Python's that becomes an input, a table of one row, and a function of NumPy's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(1, 4)

    def forward(self, sample: torch.Tensor, index: torch.Tensor, rate: float) -> torch.Tensor:
        kept = torch.nn.functional.dropout(sample * float(np.sqrt(1.0 / 4)), rate, training=False)
        shifted: torch.Tensor = kept + self.table(index)
        return shifted


def test_inputs_that_not_every_number_suits_get_one_that_does(tmp_path: Path) -> None:
    inputs = {"sample": torch.ones(2, 4), "index": torch.tensor([0, 0]), "rate": 0.25}
    compile_and_run(Numbers(), inputs, dynamic=True, dump=tmp_path)
    path = only_folder(tmp_path) / FILES[0]
    assert "torch.full((), 0.25, dtype=torch.float64" in path.read_text()
    assert evaluate(path)[0].isfinite().all()
    path.with_name("inputs.pt").unlink()
    assert evaluate(path)[0].isfinite().all()


def test_the_journal_says_what_each_pass_did(folders: dict[str, Path]) -> None:
    journal = json.loads((folders["mochi"] / "journal.json").read_text())
    assert (journal["torch"], journal["compile_id"]) == (torch.__version__, "0/0")
    outline, *others = journal["passes"]
    assert [row["name"] for row in (outline, *others)] == ["outline", *(item.__name__ for item in PASSES)]
    cache = next(row for row in others if row["name"] == "FirstBlockCache")
    assert "no process group" in others[0]["declined"][0]["why"]
    assert cache["op_changes"]["cond"] == 1
    assert len(cache["matched"]) == 1
    assert cache["declined"] == []


def test_the_journal_gives_the_reasons(tmp_path: Path) -> None:
    compile_and_run(torch.nn.Linear(3, 3), {"input": torch.ones(2, 3)}, dump=tmp_path)
    folder = only_folder(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == sorted([FILES[0], *BESIDE])
    ((declined,),) = [row["declined"] for row in json.loads((folder / "journal.json").read_text())["passes"]]
    assert declined["what"] == "graph"
    assert "module list" in declined["why"]
    run_alone(folder / FILES[0])


def test_rows_are_written_as_they_are(tmp_path: Path) -> None:
    report = PassReport(matched=("a",), declined=(("b", "for c"),), table=({"d": 1},))
    row = JournalRow(name="P", report=report, op_changes={"mul": -2}, section="p", is_exact=False, tolerance=0.1)
    Dump(tmp_path, (3, 1)).journal([row])
    assert json.loads((tmp_path / "graph_3_1" / "journal.json").read_text())["passes"] == [
        {
            "name": "P",
            "section": "p",
            "is_exact": False,
            "tolerance": 0.1,
            "matched": ["a"],
            "declined": [{"what": "b", "why": "for c"}],
            "unmet": [],
            "noted": [],
            "op_changes": {"mul": -2},
            "table": [{"d": 1}],
        }
    ]


def test_without_a_directory_nothing_is_written_or_even_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HVCOMPILE_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    compile_and_run(Toy(), toy_inputs())
    dump, nothing = Dump(None, (0, 0)), object()
    dump.graph("captured", nothing)  # type: ignore[arg-type]
    dump.journal(nothing)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_the_environment_variable_gives_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVCOMPILE_DUMP", str(tmp_path / "new" / "directory"))
    compile_and_run(Toy(), toy_inputs())
    names = [path.name for path in only_folder(tmp_path / "new" / "directory").iterdir()]
    assert sorted(names) == sorted([*FILES, *BESIDE])


def test_captures_of_the_same_id_get_folders_of_their_own(tmp_path: Path) -> None:
    for tokens in (12, 9):
        torch._dynamo.reset()
        compile_and_run(Toy(), toy_inputs(tokens=tokens), dump=tmp_path)
    first, second = dump_read.folders(tmp_path)
    assert (first.name, second.name, first.parent) == ("graph_0_0", "graph_0_0-2", second.parent)
    assert "f32[1, 12, 16]" in (first / FILES[3]).read_text()
    assert "f32[1, 9, 16]" in (second / FILES[3]).read_text()


def test_captures_at_the_same_time_get_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        for dump in pool.map(lambda _: Dump(tmp_path / "new", (0, 0)), range(64)):
            dump.journal([])
    assert len(list(tmp_path.glob("new/*/journal.json"))) == 64


def test_a_directory_that_cannot_be_written_is_an_error_before_compilation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(lowering, "LOWERINGS", {"eager": pytest.fail})
    with pytest.raises(BackendCompilerFailed) as raised:
        compile_and_run(Toy(), toy_inputs(), dump=tmp_path / "file" / "below")
    error = raised.value.inner_exception
    assert isinstance(error, OptionError)
    assert str(tmp_path / "file" / "below") in str(error)
    assert "HVCOMPILE_DUMP" in str(error)
    for directory in (tmp_path / "file", Path("/proc/hvcompile"), Path("/dev/null/dump")):
        with pytest.raises(OptionError, match="Give options"):
            Dump(directory, (0, 0))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(OptionError, match="Permission denied"):
        Dump(tmp_path, (0, 0))


class Graph:
    """A graph made by hand, whose inputs look like Dynamo's."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def input(self, name: str, held: Any, source: str | None = None) -> fx.Node:
        node: Any = self.graph.placeholder(name)
        node.meta["example_value"] = held
        node._dynamo_source = types.SimpleNamespace(
            name=f"L[{name!r}]" if source is None else source,
            guard_source=types.SimpleNamespace(is_unspecialized_nn_module=lambda: False),
        )
        return node  # type: ignore[no-any-return]

    def module(self, results: Any, **attributes: Any) -> fx.GraphModule:
        self.graph.output(results)
        root = torch.nn.Module()
        for name, held in attributes.items():
            setattr(root, name, held)
        return fx.GraphModule(root, self.graph)


def dump_alone(directory: Path, module: fx.GraphModule) -> Path:
    Dump(directory, (0, 0)).graph("MadeByHandV2", module)
    return directory / "graph_0_0" / "00_made_by_hand_v2.py"


def test_the_text_of_a_small_graph(tmp_path: Path) -> None:
    body = Graph()
    entered = body.input("x", torch.empty(2, 3))
    doubled = body.graph.call_function(torch.mul, (entered, math.inf))
    doubled.meta = {
        "example_value": torch.empty(2, 3),
        "hvcompile": "Doubled",
        "nn_module_stack": {"0": ("L['self'].__dict__['_modules']['blocks'].0", object)},
    }
    inner = body.module((doubled,))

    outer = Graph()
    given = outer.input("L_x_", torch.empty(2, 3))
    weight = outer.input("L_w_", torch.empty(4, 3), "L['self']._modules['proj']._parameters['weight']")
    state = outer.input("state_a", torch.empty(2, 3), "")
    first = outer.graph.get_attr("body")
    call = outer.graph.call_function(torch.ops.higher_order.invoke_subgraph, (first, "body", given))
    second = outer.graph.get_attr("again")
    more = outer.graph.call_function(torch.ops.higher_order.invoke_subgraph, (second, "body", state))
    left, right = (outer.graph.call_function(operator.getitem, (node, 0)) for node in (call, more))
    made = outer.graph.call_function(torch.nn.functional.linear, (left, weight))
    text = dump_alone(tmp_path, outer.module((made, right), body=inner, again=inner)).read_text()
    text = text[text.index("\nimport torch\n") :]
    assert (
        text[: text.index("def draw")]
        == '''
import torch
inf = float("inf")


class Body(torch.nn.Module):
    def forward(
        self,
        x: "f32[2, 3]",
    ):
        # blocks.0 (Doubled)
        mul: "f32[2, 3]" = torch.mul(x, inf)
        return (mul,)


class Root(torch.nn.Module):
    def forward(
        self,
        l_x_: "f32[2, 3]",
        proj_weight: "f32[4, 3]",
        state_a: "f32[2, 3]",
    ):
        body = self.body
        invoke_subgraph = torch.ops.higher_order.invoke_subgraph(body, 'body', l_x_);  body = None
        again = self.again
        invoke_subgraph_1 = torch.ops.higher_order.invoke_subgraph(again, 'body', state_a);  again = None
        getitem = invoke_subgraph[0];  invoke_subgraph = None
        getitem_1 = invoke_subgraph_1[0];  invoke_subgraph_1 = None
        linear = torch._C._nn.linear(getitem, proj_weight);  getitem = None
        return (linear, getitem_1)


def build():
    """The module of the whole graph; a body that is called from several places is one instance."""
    body = Body()
    root = Root()
    root.body = body
    root.again = body
    return root


KEPT = {}  # inputs of the first call, by name


'''
    )
    assert (
        """
        draw("L_x_", (2, 3), torch.float32),
        draw("proj.weight", (4, 3), torch.float32, scale=0.5774),
        torch.full((2, 3), 0, dtype=torch.float32, device="cpu"),
"""
        in text
    )


def test_example_inputs_have_the_recorded_layout(tmp_path: Path) -> None:
    shown: list[Any] = [
        torch.empty(2, 3, 4).permute(2, 0, 1),
        torch.empty(1, 3).expand(4, 3),
        torch.empty(5, dtype=torch.complex64),
        torch.empty(2, 3, dtype=torch.bfloat16),
        torch.empty(3, dtype=torch.float8_e4m3fn),
        torch.empty(2, 7, dtype=torch.bool),
        torch.empty(3, dtype=torch.int32),
        torch.empty(0, 3),
        torch.empty(()),
        7,
        0.5,
        True,
        None,
    ]
    made = Graph()
    nodes = [made.input(f"L_x{place}_", held) for place, held in enumerate(shown)]
    path = dump_alone(tmp_path, made.module(tuple(nodes)))
    again, given = load(path).example_inputs(), evaluate(path)
    for want, got, repeated in zip(shown, given, again, strict=True):
        assert type(want) is type(got)
        if isinstance(want, torch.Tensor):
            assert (want.shape, want.dtype, want.stride()) == (got.shape, got.dtype, got.stride())
            assert torch.equal(got.to(torch.complex64), repeated.to(torch.complex64))
            assert got.dtype.is_floating_point or got.dtype.is_complex or bool((got == 1).all())
        else:
            assert want == got
    assert "norm" in run_alone(path)


def test_constants_are_saved_beside_the_file(tmp_path: Path) -> None:
    made, scale, inner = Graph(), torch.tensor([2.0, 3.0]), torch.nn.Module()
    inner.shift = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    given = made.input("input", torch.empty(2))  # fx calls the node input_1, since input is a builtin
    scaled = made.graph.call_function(torch.mul, (), {"input": given, "other": made.graph.get_attr("scale")})
    shifted = made.graph.call_function(torch.add, (scaled, made.graph.get_attr("inner.shift")))
    path = dump_alone(tmp_path, made.module((shifted,), scale=scale, inner=inner))
    module = load(path)
    with torch.no_grad():
        assert torch.equal(module.build()(torch.ones(2))[0], torch.tensor([3.0, 4.0]))
    assert path.with_suffix(".pt").exists()
    run_alone(path)


def test_what_cannot_be_imported_is_said_in_the_file(tmp_path: Path) -> None:
    made = Graph()
    given = made.input("L_x_", torch.empty(2))
    path = dump_alone(tmp_path, made.module((made.graph.call_function(lambda x: x, (given,)),)))
    assert "made at run time" in path.read_text()


def test_writing_does_not_change_the_graph(tmp_path: Path) -> None:
    made = Graph()
    given = made.input("L_x_", torch.empty(2))
    module = made.module((made.graph.call_function(torch.neg, (given,)),))
    before = module.graph.python_code("self").src
    dump_alone(tmp_path, module)
    assert module.graph.python_code("self").src == before


def notes(folder: Path) -> list[str]:
    found: list[str] = json.loads((folder / "journal.json").read_text())["notes"]
    return found


def test_weights_beyond_the_limit_are_not_kept_and_the_journal_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="hvcompile.dump.write"):
        compile_and_run(Toy(), toy_inputs(), dump=tmp_path, dump_limit_gib=1e-6)
    folder = only_folder(tmp_path)
    said = [note for note in notes(folder) if "weights" in note]
    assert said == [
        "the weights are not kept and are drawn at random instead: they take 1.52e-05 GiB, more than the 1e-06 of "
        "options['dump_limit_gib']"
    ]
    assert said[0] in caplog.text
    kept = torch.load(folder / "inputs.pt")
    assert sorted(kept) == ["L_sample_", "L_text_", "L_timestep_"]
    assert not (folder / "outputs.pt").exists()  # no file could reproduce them
    assert torch.equal(kept["L_sample_"], toy_inputs()["sample"])
    captured, *others = [evaluate(folder / file)[0] for file in FILES]
    assert captured.isfinite().all()
    for other in others:
        torch.testing.assert_close(other, captured, rtol=1e-5, atol=1e-5)


def test_only_the_first_call_is_kept(tmp_path: Path) -> None:
    compiled = hvfast(Toy().eval(), fullgraph=True, options={"lower": "eager", "dump": tmp_path})
    with torch.no_grad():
        first = compiled(**toy_inputs(seed=1))
        compiled(**toy_inputs(seed=2, timestep=800.0))
    folder = only_folder(tmp_path)
    assert torch.equal(torch.load(folder / "inputs.pt")["L_sample_"], toy_inputs(seed=1)["sample"])
    assert torch.equal(torch.load(folder / "outputs.pt")[0], first)


def test_a_view_is_kept_with_its_layout_and_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    large = torch.randn(64, 1000, 16)
    inputs = toy_inputs() | {"sample": large[:1, 10:22], "text": large.new_ones(1, 1, 16).expand(1, 5, 16)}
    compile_and_run(Toy(), inputs, dump=tmp_path)
    folder = only_folder(tmp_path)
    assert (folder / "inputs.pt").stat().st_size < 100_000
    kept = torch.load(folder / "inputs.pt")
    for name, tensor in (("L_sample_", inputs["sample"]), ("L_text_", inputs["text"])):
        assert torch.equal(kept[name], tensor)
        assert kept[name].stride() == tensor.stride()


class WritesIntoItsInput(torch.nn.Module):
    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        sample.add_(1.0)
        return sample * 2


def test_inputs_are_kept_as_they_were_before_the_call(tmp_path: Path) -> None:
    compile_and_run(WritesIntoItsInput(), {"sample": torch.zeros(3)}, dump=tmp_path)
    path = only_folder(tmp_path) / FILES[0]
    for _ in range(2):  # nor does running the file change what it keeps
        assert torch.equal(evaluate(path)[0], torch.full((3,), 2.0))


def test_what_cannot_be_given_back_is_drawn_and_said(tmp_path: Path) -> None:
    class Tagged(torch.Tensor):
        pass

    dump = Dump(tmp_path, (0, 0))
    made = Graph()
    nodes = [made.input(f"L_x{place}_", torch.empty(2)) for place in range(2)]
    dump.journal([])
    dump.graph("captured", made.module(tuple(nodes)))
    run = dump.around_calls(lambda *args: args, lambda _: {})
    run(torch.ones(2), torch.ones(2).as_subclass(Tagged))
    folder = tmp_path / "graph_0_0"
    assert list(torch.load(folder / "inputs.pt")) == ["L_x0_"]
    assert notes(folder) == ["1 inputs are of a kind that torch.save can't give back and are drawn at random instead"]


def test_a_first_call_that_cannot_be_written_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("[enforce fail] No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OptionError, match="No space left on device"):
        compile_and_run(Toy(), toy_inputs(), dump=tmp_path)
    assert not list(only_folder(tmp_path).glob("*.p*t"))


def test_dynamos_frame_is_decompiled(tmp_path: Path) -> None:
    pytest.importorskip("depyf")
    compile_and_run(Toy(), toy_inputs(), dump=tmp_path)
    folder = only_folder(tmp_path)
    text = (folder / "dynamo_frame.py").read_text()
    assert text.startswith("# Toy.forward, from ")
    assert "def forward(self, sample, timestep, text):" in text
    assert "__compiled_fn_" in text
    compile(text, "a frame", "exec")
    assert notes(folder) == []


@pytest.mark.parametrize("trouble", ["missing", "failing"])
def test_without_a_frame_one_line_says_why_and_the_rest_is_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    def fails(_: Any) -> str:
        raise ValueError("an opcode from the future")

    fake: Any = types.SimpleNamespace(decompile=fails)
    monkeypatch.setitem(sys.modules, "depyf", None if trouble == "missing" else fake)
    compile_and_run(Toy(), toy_inputs(), dump=tmp_path)
    folder = only_folder(tmp_path)
    (note,) = notes(folder)
    assert ("pip install 'hvcompile[debug]'" if trouble == "missing" else "an opcode from the future") in note
    assert {path.name for path in folder.iterdir()} == {*FILES, *BESIDE} - {"dynamo_frame.py"}
