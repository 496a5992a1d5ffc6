"""Warm starts: torch's caches take our graphs, keys are the same in every process, and artifacts are what they say."""

from __future__ import annotations

import io
import json
import operator
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import fx

import hvcompile
from hvcompile import artifacts
from hvcompile.app import generate, pipelines, store, warm
from hvcompile.app.request.warm import Request
from hvcompile.app.tables.warm import warm_tables
from hvcompile.artifacts import MANIFEST, load_artifacts, save_artifacts
from hvcompile.errors import InputError, OptionError
from hvcompile.explanation import figures
from hvcompile.torch_private import caching
from hvcompile.torch_private.caching import Lookups
from hvcompile.torch_private.kernels import join_each

ENTRY, CODE, LIBRARY = "fxgraph/ab/fabc/entry", "ab/cabc.py", "q2/cdef.main.so"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of a few files, some of which are not to be shipped."""
    place = tmp_path / "cache"
    for name in (ENTRY, CODE, LIBRARY, "locks/cabc.lock", "triton/0/X/kernel.json", "ab/.1.2.tmp", "ab/cabc.h.gch"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(name.encode())
    monkeypatch.setenv(store.VARIABLE, str(place))
    return place


@pytest.fixture
def saved(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Artifacts of that directory; the process then has another one, which is empty."""
    del cache
    found = save_artifacts(tmp_path / "artifacts", options={"first_block_cache": {"threshold": 0.1}})
    assert (found.num_files, found.refused) == (3, "")
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "other"))
    return found.path


def files_in(place: Path) -> set[str]:
    return {file.relative_to(place).as_posix() for file in place.rglob("*") if file.is_file()}


def edit(place: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((place / MANIFEST).read_text())
    change(manifest)
    (place / MANIFEST).write_text(json.dumps(manifest))


def test_saved_and_loaded(saved: Path, tmp_path: Path) -> None:
    assert files_in(saved) == {ENTRY, CODE, LIBRARY, MANIFEST}
    found = load_artifacts(saved)
    assert (found.num_files, found.refused) == (3, "")
    assert files_in(tmp_path / "other") == {ENTRY, CODE, LIBRARY}
    assert (tmp_path / "other" / LIBRARY).read_bytes() == LIBRARY.encode()
    assert load_artifacts(saved).num_files == 0, "they are there"
    (tmp_path / "other" / LIBRARY).write_bytes(b"cut off")
    assert load_artifacts(saved).num_files == 1, "what is damaged is put right"
    assert (tmp_path / "other" / LIBRARY).read_bytes() == LIBRARY.encode()
    assert not load_artifacts(saved, options={"first_block_cache": {"threshold": 0.1}}).refused


@pytest.mark.parametrize("name", ["torch", "hvcompile", "Python", "triton", "machine", "GPU", "CPU", "threads"])
def test_made_with_something_else(saved: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    edit(saved, lambda manifest: manifest["made_with"].update({name: "another"}))
    found = load_artifacts(saved)
    here = artifacts.made_here()[name]
    assert found.refused == f"they were made with {name} another, and here it is {here}"
    assert found.num_files == 0
    assert not files_in(tmp_path / "other")
    (record,) = caplog.records
    assert found.refused in record.getMessage()
    assert "\n" not in record.getMessage()


def test_made_for_a_cpu_that_can_more(saved: Path) -> None:
    edit(saved, lambda manifest: manifest["made_with"]["CPU flags"].append("avx4096"))
    assert load_artifacts(saved).refused == "they were made for a CPU with avx4096, which this one lacks"


def test_made_with_other_options(saved: Path) -> None:
    refused = load_artifacts(saved, options={"first_block_cache": {"threshold": 0.2}}).refused
    assert "threshold=0.1" in refused
    assert "threshold=0.2" in refused
    assert "FirstBlockCache off" not in refused
    refused = load_artifacts(saved, options={"first_block_cache": False}).refused
    assert refused.endswith("and wanted is FirstBlockCache off")
    with pytest.raises(OptionError, match="treshold"):
        load_artifacts(saved, options={"first_block_cache": {"treshold": 0.2}})


def test_options_that_nobody_told(cache: Path, tmp_path: Path) -> None:
    save_artifacts(tmp_path / "artifacts")
    assert not load_artifacts(tmp_path / "artifacts", options={"fp8": False}).refused


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda place: (place / ENTRY).write_bytes(b"fxgraph/ab/fabc/entrx"), f"{ENTRY} is not what was saved"),
        (lambda place: (place / CODE).unlink(), f"{CODE} can't be read"),
        (lambda place: (place / MANIFEST).write_text('{"format": 1'), f"{MANIFEST} can't be read"),
        (lambda place: (place / MANIFEST).write_text("[1]"), f"{MANIFEST} can't be read"),
        (lambda place: (place / MANIFEST).write_bytes(b"\xff\xfe"), f"{MANIFEST} can't be read"),
        (lambda place: edit(place, lambda manifest: manifest.pop("made_with")), f"{MANIFEST} can't be read"),
        (
            lambda place: edit(place, lambda manifest: manifest["files"].update({"../x.so": ""})),
            "is no file of a cache",
        ),
        (lambda place: edit(place, lambda manifest: manifest["files"].update({"/ab/x.so": ""})), "no file of a cache"),
    ],
)
def test_damaged(saved: Path, tmp_path: Path, damage: Callable[[Path], object], reason: str) -> None:
    """Nothing of damaged artifacts is taken, not even what is whole."""
    damage(saved)
    found = load_artifacts(saved)
    assert found.refused.startswith("they are damaged: ")
    assert reason in found.refused
    assert not files_in(tmp_path / "other")


def test_a_format_to_come(saved: Path) -> None:
    edit(saved, lambda manifest: manifest.update(format=2))
    assert load_artifacts(saved).refused == "their format is 2; this hvcompile reads 1"


def test_places_that_can_not_be(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="are not there"):
        load_artifacts(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match=r"has no manifest\.json: give one that hvcompile warm made"):
        load_artifacts(tmp_path / "bare")
    with pytest.raises(InputError, match="is a file: give a directory"):
        load_artifacts(cache / CODE)
    with pytest.raises(InputError, match="holds no artifacts"):
        save_artifacts(cache)
    save_artifacts(tmp_path / "artifacts")
    (cache / CODE).write_bytes(b"else")
    save_artifacts(tmp_path / "artifacts")  # takes the place of the first ones
    assert (tmp_path / "artifacts" / CODE).read_bytes() == b"else"
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "empty"))
    with pytest.raises(InputError, match="nothing has been compiled"):
        save_artifacts(tmp_path / "artifacts")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "file"))
    assert "can't write" in load_artifacts(tmp_path / "artifacts").refused


def graph_of(function: Callable[..., Any], **attributes: Any) -> fx.GraphModule:
    graph = fx.Graph()
    inputs = [graph.placeholder("x"), *map(graph.get_attr, attributes)]
    graph.output(graph.call_function(function, (inputs,)))
    return fx.GraphModule(attributes, graph)


def test_own_functions_are_marked_in_bodies_too() -> None:
    outer = graph_of(torch.stack)
    assert set(caching.marked_for_caches(outer)) == {"torch.ops.higher_order.cond"}
    outer.add_module("body", graph_of(join_each))
    marked = caching.marked_for_caches(outer)
    assert set(marked) == {"torch.ops.higher_order.cond", "hvcompile.torch_private.kernels.join_each"}
    (key,) = set(marked.values())
    assert key.startswith(caching.source_digest())


def test_settings_that_choose_a_kernel_are_in_the_key() -> None:
    graph = graph_of(torch.stack)
    keys = {str(caching.marked_for_caches(graph))}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        keys.add(str(caching.marked_for_caches(graph)))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            keys.add(str(caching.marked_for_caches(graph)))
    assert len(keys) == 4
    assert str(caching.marked_for_caches(graph)) in keys


def test_a_digest_of_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hvcompile").mkdir()
    (tmp_path / "passes").mkdir()
    (tmp_path / "hvcompile" / "passes").symlink_to(tmp_path / "passes")
    (tmp_path / "passes" / "one.py").write_text("a = 1")
    monkeypatch.setattr(caching, "PACKAGE", tmp_path / "hvcompile")
    digests = {caching.source_digest.__wrapped__()}
    (tmp_path / "passes" / "one.py").write_text("a = 2")  # behind the link
    digests.add(caching.source_digest.__wrapped__())
    (tmp_path / "hvcompile" / "one.py").write_text("a = 2")
    digests.add(caching.source_digest.__wrapped__())
    assert len(digests) == 3


def test_tensors_that_a_graph_holds_keep_it_from_the_cache() -> None:
    """Of such a tensor, the cache's key has the layout alone."""
    enabled = torch._functorch.config.enable_autograd_cache
    plain = graph_of(torch.stack)
    plain.add_module("body", graph_of(torch.stack))
    with caching.no_unseen_content(plain):
        assert torch._functorch.config.enable_autograd_cache == enabled
    plain.add_module("other", graph_of(torch.stack, held=torch.zeros(2)))
    with caching.no_unseen_content(plain):
        assert not torch._functorch.config.enable_autograd_cache
    assert torch._functorch.config.enable_autograd_cache == enabled


def somebodys(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2


def test_functions_of_others_in_a_body_keep_it_from_the_cache() -> None:
    """As torch does in the outermost graph: of such a function, the cache's key has the name alone."""
    enabled = torch._functorch.config.enable_autograd_cache
    for function, is_asked in ((torch.relu, enabled), (operator.add, enabled), (somebodys, False)):
        graph = fx.Graph()
        tensor = graph.placeholder("tensor")
        graph.output(graph.call_function(function, (tensor,) * (2 if function is operator.add else 1)))
        outer = graph_of(torch.stack)
        outer.add_module("body", fx.GraphModule(torch.nn.Module(), graph))
        with caching.no_unseen_content(outer):
            assert torch._functorch.config.enable_autograd_cache == is_asked, function
    assert torch._functorch.config.enable_autograd_cache == enabled


def test_decompositions_are_pickled_by_name() -> None:
    table = caching.inductors_decompositions()
    assert len(pickle.dumps(table)) < 200
    assert pickle.loads(pickle.dumps(table)) == table


SCRIPT = """
import sys, json
from dataclasses import astuple
sys.path.insert(0, {tests!r})
import torch
import hvcompile
from wide import Wide, wide_inputs
from hvcompile.torch_private.caching import lookups

refused = hvcompile.load_artifacts(sys.argv[2]).refused if sys.argv[1] == "load" else ""
model = Wide(3)
options = {{"fp8": {{"keep_last_blocks": 0}}, "first_block_cache": {{"threshold": 0.2}}}}
step = torch.compile(model, backend="hvfast", fullgraph=True, dynamic=False, options=options)
given = wide_inputs()
with torch.no_grad():
    results = [step(**given).double().sum().item() for _ in range(2)]
if sys.argv[1] == "save":
    hvcompile.save_artifacts(sys.argv[2], options=options)
print(json.dumps([results, hvcompile.stats(model).hits, astuple(lookups()), refused]))
"""


def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    """By artifacts, in a cache directory of its own: a ``cond``, ``invoke_subgraph``, float8, and functions of ours."""
    made = []
    for number, task in enumerate(("save", "load")):
        command = [sys.executable, "-c", SCRIPT.format(tests=str(Path(__file__).parent)), task, str(tmp_path / "ship")]
        places = {store.VARIABLE: str(tmp_path / task), "PYTHONHASHSEED": str(number)}
        done = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        made.append(json.loads(done.stdout.splitlines()[-1]))
    (first, second) = made
    assert first[2] == [0, 1, 0], "compiled, and kept"
    assert second[2] == [1, 0, 0], "found"
    assert second[3] == ""
    assert first[:2] == second[:2], "the same numbers, to the last bit"
    assert first[1] == 1


def test_the_store_of_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(store.VARIABLE, "/elsewhere")
    store.use_own()
    assert store.current() == "/elsewhere", "the user decides"
    with store.fresh() as directory:
        assert store.current() == str(directory)
        assert directory.is_dir()
    assert not directory.exists()
    assert store.current() == "/elsewhere"
    monkeypatch.delenv(store.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with store.fresh():
        pass
    assert store.VARIABLE not in os.environ
    assert store.current() == str(tmp_path / "hvcompile" / "compiled")
    monkeypatch.setenv(store.VARIABLE, "")  # so that monkeypatch puts back what was there
    monkeypatch.delenv(store.VARIABLE)
    store.use_own()
    assert os.environ[store.VARIABLE] == str(tmp_path / "hvcompile" / "compiled")


@pytest.mark.parametrize("sizes", ["48x", "48x32x17x1", "a", "48X32"])
def test_sizes_that_are_none(sizes: str) -> None:
    with pytest.raises(InputError, match="give WIDTHxHEIGHTxFRAMES"):
        Request(sizes=(sizes,)).check()


def test_sizes_are_asked_for_as_generate_is() -> None:
    first, second = Request(sizes=("48x32x17", "64x48"), mode="exact", dynamic=True).generations()
    assert (first.width, first.height, first.frames, first.mode, first.dynamic) == (48, 32, 17, "exact", True)
    assert (second.width, second.height, second.frames) == (64, 48, None)
    assert Request().generations()[0].width is None
    (third,) = Request(options_file=Path("tuned.json"), fp8=True).generations()
    assert (third.options_file, third.fp8) == (Path("tuned.json"), True)


@pytest.fixture(scope="module")
def loaded() -> pipelines.Loaded:
    """The tiny pipeline with a shallow transformer."""
    whole = pipelines.load()
    config = whole.pipe.transformer.config
    shallow = {**config, "num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1}
    whole.pipe.transformer = type(whole.pipe.transformer).from_config(shallow).eval()
    return whole


def test_a_pipeline_is_run_at_each_size(loaded: pipelines.Loaded, tmp_path: Path) -> None:
    sizes, lower = ("48x32x5", "32x32x5"), ("lower=eager",)
    request = Request(sizes=sizes, backend_settings=lower, steps=1, json_file=tmp_path / "warm.json")
    made = warm.warm(request, loaded=loaded)
    assert [(size.width, size.height, size.num_frames) for size in made.sizes] == [(48, 32, 5), (32, 32, 5)]
    assert (made.missed, made.artifacts) == ((), None)
    assert json.loads((tmp_path / "warm.json").read_text())["sizes"][1]["width"] == 32
    assert hvcompile.stats(loaded.pipe.transformer).graphs >= 1
    with pytest.raises(InputError, match="nothing has been compiled"):
        warm.warm(Request(sizes=sizes[:1], backend_settings=lower, steps=1, output=tmp_path / "ship"), loaded=loaded)
    assert not (tmp_path / "ship").exists()


def test_generate_says_why_artifacts_are_refused(
    saved: Path, loaded: pipelines.Loaded, caplog: pytest.LogCaptureFixture
) -> None:
    request = generate.Request(prompt="a red ball", artifacts=saved, threshold=0.3)
    with caplog.at_level("WARNING", logger="hvcompile"), generate.ready(request, lambda _: None, loaded):
        pass
    (record,) = [item for item in caplog.records if "refused" in item.getMessage()]
    assert "threshold=0.3" in record.getMessage()
    with pytest.raises(InputError, match="are not there"):
        generate.Request(prompt="a red ball", artifacts=saved / "nowhere").check()


def test_what_was_compiled_as_a_table(tmp_path: Path) -> None:
    size = warm.Size(num_frames=17, height=32, width=48, first_seconds=9.0, seconds=10.0, graphs=Lookups(1, 2, 3))
    made = artifacts.Artifacts(path=tmp_path, num_files=7, num_bytes=2000)
    console = Console(record=True, width=200, file=io.StringIO())
    for table in warm_tables(warm.Warmed(sizes=(size,), missed=(), artifacts=made)):
        console.print(table)
    text = console.export_text()
    assert "48x32" in text
    assert "1 found, 2 compiled, 3 compiled and not kept" in text
    assert figures.with_prefix(2000, "B") in text
    assert str(tmp_path) in text
    assert hvcompile.load_artifacts is load_artifacts
