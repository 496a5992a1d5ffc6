"""Explaining: operations as torch counts them, nothing computed, and the full-size model on a small machine."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy import Toy
from toy import toy_inputs as drawn
from typer.testing import CliRunner
from wide import Wide, wide_inputs

import hvcompile
from hvcompile.app import cli, tables, tiny
from hvcompile.app.explain import explain_script
from hvcompile.app.request.explain import Request
from hvcompile.app.skeleton import skeleton, transformer_call
from hvcompile.app.tables import explanation_tables
from hvcompile.errors import InputError, OptionError, QuantizedWeightError, UntraceableModelError
from hvcompile.explanation.condensed import condensed
from hvcompile.explanation.explain import explain
from hvcompile.float8.weights import QuantizedWeight
from hvcompile.graph.costs import DEVICES, Cost
from hvcompile.torch_private import torchao


def toy_inputs() -> dict[str, Any]:
    return dict(drawn())


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline without its weights."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny.write(directory)
    for weights in directory.rglob("*.safetensors"):
        weights.unlink()
    return directory


@pytest.mark.parametrize("name", ["hunyuan_video", "hunyuan_video_i2v_replace", "cogvideox", "wan_t2v", "flux"])
def test_operations_agree_with_torch(name: str) -> None:
    family = zoo.FAMILIES[name]
    model, inputs = family.build(), family.inputs(seed=1)
    explanation = explain(model, **inputs, return_dict=False)
    # the kernels that fuse attention are not all known to the counter; spelled out as products they are
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs, return_dict=False)
    assert explanation.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_trunk_and_passes_are_told() -> None:
    model, inputs = Toy(blocks=4), toy_inputs()
    explanation = hvcompile.explain(model, **inputs)
    assert explanation.lists == "blocks x 4"
    (kind,) = explanation.kinds
    assert (kind.count, kind.first, kind.last) == (4, "blocks.0", "blocks.3")
    assert [stream.shape for stream in kind.streams] == [(1, 12, 16)]
    sharded, *_, row, _ = explanation.journal
    assert "no process group" in sharded.line()
    assert row.name == "FirstBlockCache"
    assert row.report.applied
    assert explanation.weight_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    outside, block = 2 * 16 * 16 * (12 + 1 + 12), 2 * 16 * 16 * (12 + 5 + 12) + 4 * 12 * 17 * 16
    assert explanation.flops == outside + 4 * block
    assert explanation.reused_flops == outside + block


def test_a_pass_that_is_off_says_so() -> None:
    explanation = explain(Toy(), **toy_inputs(), mode="exact")
    assert "exact" in next(row for row in explanation.journal if row.name == "FirstBlockCache").line()
    assert explanation.reused_flops == explanation.flops
    assert explanation.state_bytes == 0


def test_nothing_is_computed_and_the_model_is_left_as_it_was() -> None:
    """A model on the meta device has nothing to compute with; one that is explained compiles afterwards as ever."""
    with torch.device("meta"):
        assert explain(Toy(), **{name: item.to("meta") for name, item in toy_inputs().items()}).kinds
    model, inputs = Toy(), toy_inputs()
    for _ in range(12):  # more often than Dynamo compiles one function anew
        explain(model, **inputs)
    compiled = torch.compile(model, backend="hvfast", fullgraph=True, options={"lower": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs), model(**inputs))
    assert (hvcompile.stats(model).graphs, hvcompile.stats(model).recompiles) == (1, 0)
    assert explain(model, **inputs).kinds


def test_a_length_that_depends_on_data_is_told() -> None:
    """Mochi drops the padding from its text by looking at the mask, whose values no trace can know."""
    family = zoo.FAMILIES["mochi"]
    explanation = explain(family.build(), **family.inputs(seed=1), return_dict=False)
    assert explanation.depends_on_data
    assert not explain(Toy(), **toy_inputs()).depends_on_data


def test_a_model_without_blocks_is_costed_all_the_same() -> None:
    model = torch.nn.Linear(8, 4)
    explanation = explain(model, torch.ones(3, 8))
    assert "no module list" in explanation.reason
    assert explanation.flops == explanation.reused_flops == 2 * 3 * 8 * 4


class Breaks(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum().item() > 0 else -x


def test_errors_say_what_to_do() -> None:
    with pytest.raises(UntraceableModelError, match=r"Breaks does not trace as one graph: .*fullgraph=True"):
        explain(Breaks(), torch.ones(2))
    with pytest.raises(OptionError, match=r"device 'h1000' is unknown: give one of a100, .*h100"):
        explain(Toy(), **toy_inputs(), device="h1000")
    with pytest.raises(OptionError, match="first_block_cach"):
        explain(Toy(), **toy_inputs(), options={"first_block_cach": False})


class Autocasts(torch.nn.Module):
    def __init__(self, dtype: torch.dtype, *, enabled: bool) -> None:
        super().__init__()
        self.linear, self.dtype, self.enabled = torch.nn.Linear(8, 8), dtype, enabled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, self.dtype, enabled=self.enabled):
            return self.linear(x)  # type: ignore[no-any-return]


def test_regions_of_autocast_on_meta() -> None:
    x = torch.ones(5, 8, device="meta")
    with torch.device("meta"):
        harmless = [Autocasts(torch.float32, enabled=True), Autocasts(torch.bfloat16, enabled=False)]
        casting = Autocasts(torch.bfloat16, enabled=True)
    for model in harmless:
        assert explain(model, x).flops == 2 * 5 * 8 * 8
    with pytest.raises(UntraceableModelError, match="autocast device_type 'meta'"):  # on a GPU it would cast
        explain(casting, x)


def test_roofline_takes_the_longer_of_computing_and_moving() -> None:
    device = DEVICES["h100"]
    computing = Cost(part="linear", flops=int(989.4e12), bytes=1, dtype=torch.bfloat16)
    moving = Cost(part="linear", flops=1, bytes=int(3.35e12), dtype=torch.bfloat16)
    assert computing.seconds(device) == pytest.approx(1)
    assert moving.seconds(device) == pytest.approx(1)
    assert Cost(part="linear", flops=int(67e12), bytes=1, dtype=torch.float32).seconds(device) == pytest.approx(1)


def test_bytes_of_one_product() -> None:
    """A product moves its operands and its result; a region of pointwise work reads once and writes once."""

    class Regions(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(self.linear(x * 2 + 1)) * 3

    explanation = explain(Regions(), torch.ones(5, 8))
    linear, rest = explanation.costs
    assert linear.bytes == 4 * (40 + 64 + 40)
    assert rest.bytes == 4 * (40 + 40 + 40 + 40)  # x in, operand out; result in, output out


def test_skeleton_calls_its_transformer_as_the_pipeline_does(tiny_directory: Path) -> None:
    pipe = skeleton(str(tiny_directory), torch.float32)
    _, kwargs = transformer_call(pipe, "a cat", {"num_frames": 9, "height": 48, "width": 80})
    assert kwargs["hidden_states"].shape == (1, 16, 3, 6, 10)
    assert kwargs["encoder_hidden_states"].shape[1] == 256
    assert kwargs["hidden_states"].device.type == "meta"


def test_skeleton_errors(tiny_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a directory nor a hub id"):
        skeleton(str(tmp_path / "nothing"))
    pipe = skeleton(str(tiny_directory))
    with pytest.raises(InputError, match="fails before it calls its transformer"):
        transformer_call(pipe, "a cat", {"height": 41})


# Of the published checkpoint, as in tencent/HunyuanVideo and its diffusers conversion.
FULL_SIZE: dict[str, dict[str, Any]] = {
    "transformer": {
        **{"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20, "num_single_layers": 40},
        **{"text_embed_dim": 4096, "pooled_projection_dim": 768, "rope_axes_dim": [16, 56, 56]},
    },
    "text_encoder": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "head_dim": 128},
    },
    "text_encoder_2": {
        **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        "projection_dim": 768,
    },
}


def test_full_size_model_on_a_small_machine(tiny_directory: Path, tmp_path: Path) -> None:
    """12.8 billion parameters at 1280x720x129: the operations of the design, in less than 4 GiB."""
    for name, changes in FULL_SIZE.items():
        path = tiny_directory / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    output = tmp_path / "explained.json"
    size = ["--frames", "129", "--height", "720", "--width", "1280"]
    command = [sys.executable, "-m", "hvcompile", "explain", str(tiny_directory), *size, "--json", str(output)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ran.returncode == 0, ran.stderr
    explained = json.loads(output.read_text())
    flops = {part["part"]: part["flops"] / 1e12 for part in explained["costs"]}
    assert flops["linear"] == pytest.approx(1618, rel=1e-3)
    assert flops["attention"] == pytest.approx(10450, rel=1e-3)
    assert explained["weight_bytes"] == pytest.approx(2 * 12.82e9, rel=1e-2)
    assert [kind["count"] for kind in explained["kinds"]] == [20, 40]
    assert explained["kinds"][0]["streams"][0]["shape"] == [1, 118800, 3072]
    assert "FirstBlockCache" in ran.stdout
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak < 4 * 2**30


SCRIPT = """
import sys
import torch
sys.path.insert(0, {tests!r})
from toy import Toy, toy_inputs
assert sys.argv == [{path!r}]
model = Toy(blocks={blocks})
if {compiles}:
    model.compile(backend="hvfast", options={{"lower": "eager", "first_block_cache": {{"threshold": 0.2}}}})
with torch.no_grad():
    model(**toy_inputs())
{end}
"""


def script(path: Path, *, compiles: bool = True, end: str = "raise RuntimeError('ran on')", blocks: int = 5) -> str:
    tests = str(Path(__file__).parent)
    path.write_text(SCRIPT.format(tests=tests, path=str(path), compiles=compiles, end=end, blocks=blocks))
    return str(path)


def test_a_script_runs_up_to_its_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hvcompile", "explain", script(tmp_path / "mine.py")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert "blocks.0 .. blocks.4" in ran.stdout
    assert "Failed to load" not in ran.stderr, "kernels of torchao's, which diffusers imports"
    assert "is an Enum subclass" not in ran.stderr


def test_scripts_are_explained_beside_models_that_run(tmp_path: Path) -> None:
    """Dynamo looks a backend up once and keeps what it compiled: neither hides a model that a script compiles."""
    options: dict[str, Any] = {"lower": "eager", "first_block_cache": {"threshold": 0.2}}
    models = [Toy(blocks=5), Toy(blocks=5)]
    with torch.no_grad():
        expected = models[0](**drawn())
        models[0].compile(backend="hvfast", options=options)
        for blocks in (5, 3, 5):
            torch.testing.assert_close(models[0](**drawn()), expected)
            path = script(tmp_path / "mine.py", blocks=blocks)
            assert explain_script(Request(model=path)).lists == f"blocks x {blocks}"
        models[1].compile(backend="hvfast", options=options)
        torch.testing.assert_close(models[1](**drawn()), expected)
    assert [hvcompile.stats(model).misses for model in models] == [3, 1]  # Dynamo began anew each time


def test_what_a_script_ran_uncompiled_is_not_run_for_what_is_compiled(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="would have rewritten none"):
        explain_script(Request(model=script(tmp_path / "mine.py", blocks=1, end="")))
    model = Toy(blocks=1)
    model.compile(backend="hvfast", options={"lower": "eager", "first_block_cache": {"threshold": 0.2}})
    with torch.no_grad(), pytest.raises(Exception, match="options ask for 'first_block_cache'"):
        model(**drawn())


def test_a_script_that_compiles_nothing_or_fails(tmp_path: Path) -> None:
    path = script(tmp_path / "mine.py", compiles=False, end="raise SystemExit")
    done = CliRunner().invoke(cli.app, ["explain", path])
    assert (done.exit_code, "called no model compiled with hvfast" in " ".join(done.stderr.split())) == (2, True)
    done = CliRunner().invoke(cli.app, ["explain", script(tmp_path / "mine.py", compiles=False)])
    assert (done.exit_code, "ran on; run it by itself first" in " ".join(done.stderr.split())) == (2, True)


def test_a_device_goes_by_its_name() -> None:
    explanation = explain(Toy(), **toy_inputs(), device="h100")
    assert (explanation.device, explanation.seconds is not None) == (DEVICES["h100"].name, True)


GRADIENTS = """
import sys
import torch
from beside import WIDTH
assert sys.argv[1:] == ["--size", "3"]
model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(3)))
torch.compile(model, backend="hvfast")(torch.ones(2, WIDTH))
"""


def test_a_script_is_run_as_python_runs_it_and_told_what_was_met(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("WIDTH = 8")
    (tmp_path / "mine.py").write_text(GRADIENTS)
    command = [sys.executable, "-m", "hvcompile", "explain", str(tmp_path / "mine.py"), "--", "--size", "3"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert ran.returncode == 2, ran.stderr
    said = " ".join(ran.stderr.split())
    assert "of the 1 graphs that hvfast was given it would have rewritten none: gradients are enabled" in said
    assert "torch.no_grad()" in said


def test_a_step_that_reuses_is_told_of_where_one_can() -> None:
    for mode, is_told in ((None, True), ("exact", False)):
        cost = tables.explanation_tables(explain(Toy(), **toy_inputs(), mode=mode), "h100")[-2]
        assert any("a step that reuses" in str(cell) for cell in cost.columns[0].cells) == is_told


def test_what_is_kept_is_what_a_call_keeps() -> None:
    model, inputs = Toy(), toy_inputs()
    explanation = explain(model, **inputs)
    assert explanation.staging_bytes == 0
    compiled = torch.compile(model, backend="hvfast", fullgraph=True, options={"lower": "eager"})
    with torch.no_grad():
        compiled(**inputs)
    assert explanation.derived_bytes > 0
    assert explanation.state_bytes + explanation.derived_bytes == hvcompile.stats(model).bytes


def test_the_passes_shorten_a_step() -> None:
    inputs: dict[str, Any] = {name: item.to("meta", torch.bfloat16) for name, item in wide_inputs(tokens=4096).items()}
    with torch.device("meta"):
        model = Wide().bfloat16()
    exact = explain(model, **inputs, mode="exact", device="h100")
    fast = explain(model, **inputs, options={"fp8": True}, device="h100")
    assert exact.reused_seconds == exact.passed_seconds
    assert fast.reused_seconds is not None
    assert fast.passed_seconds is not None
    assert fast.reused_bytes is not None
    assert exact.reused_bytes is not None
    assert fast.reused_seconds < fast.passed_seconds
    assert 0 < fast.reused_bytes < exact.reused_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h1000"], "gpu 'h1000' is unknown: give one of a100"),
        (["--height", "0"], "height is 0: give 1 or more"),
        (["--height", "50"], "height is 50, but this pipeline takes multiples of 16: give 48 or 64"),
        (["--mode", "fast"], "mode 'fast' is unknown"),
        (["--dtype", "int8"], "dtype 'int8' is unknown"),
        (["--json", "out.txt"], "json 'out.txt' is no JSON file"),
        (["/nowhere"], "neither a directory nor a hub id"),
        (["/nowhere.py"], "there is no such script"),
        (["/nowhere.py", "--frames", "9"], "frames can't be given with a script"),
        (["/nowhere.py", "--dtype", "float32"], "dtype can't be given with a script"),
        (["/nowhere.py", "--prompt", "a dog"], "prompt can't be given with a script"),
        (["/nowhere", "/nowhere"], "only a script is given arguments"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(cli.app, ["explain", *arguments])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_model_that_is_quantised_already() -> None:
    """What is true of it: its layers are float8 products, on a CPU too, and its weights take what they take."""
    from test_float8_linears import compiled
    from wide import Wide, wide_inputs

    if not torchao.is_available():
        pytest.skip("torchao is not installed")
    model, inputs = Wide(), dict[str, Any](wide_inputs())
    before = explain(model, **inputs)
    with torch.no_grad():
        compiled(model)(**inputs)
    options = {"fp8": {"keep_last_blocks": 0}, "first_block_cache": False}
    explanation = explain(model, **inputs, options=options)
    (row,) = [row for row in explanation.journal if row.name == "Float8Linears"]
    assert "15 of 18 linear layers" in row.report.matched[0]
    held = [weight for weight in model.parameters() if isinstance(weight, QuantizedWeight)]
    freed = sum(4 * weight.numel() for weight in held)
    kept = sum(weight.numel() + 4 * weight.shape[0] for weight in held)
    assert explanation.weight_bytes == before.weight_bytes - freed + kept
    for other in ({"fp8": False}, {"fp8": {"skip": ["up"]}}):
        with pytest.raises(QuantizedWeightError, match=r"hvcompile\.restore\(model\)"):
            explain(model, **inputs, options=other)


def test_layers_are_told_where_many_are_alike_at_once() -> None:
    """As text and in the report: a row for each that differs from others in more than the block's number."""
    from wide import Wide, wide_inputs

    if not torchao.is_available():
        pytest.skip("torchao is not installed")
    model = Wide(6).to("meta")
    inputs: dict[str, Any] = {name: item.to("meta") for name, item in wide_inputs().items()}
    explanation = explain(model, **inputs, device=DEVICES["h100"])
    (row,) = [row for row in explanation.journal if row.name == "Float8Linears"]
    rows = condensed(row.report.table)
    assert sum(item["count"] for item in rows) == len(row.report.table) == 36
    told = {item["linear"]: item for item in rows}
    assert told["blocks.1-3.up"] == {
        **{"linear": "blocks.1-3.up", "count": 3, "shape": "128 x 64", "done": "float8", "why": ""},
        **{"bytes_before": 3 * 128 * 64 * 4, "bytes_after": 3 * (128 * 64 + 4 * 128)},
    }
    assert "compared from step to step" in told["blocks.0.up"]["why"]
    assert "keep_last_blocks" in told["blocks.4-5.up"]["why"]
    text = io.StringIO()
    for table in explanation_tables(explanation, "h100"):
        Console(file=text, width=200).print(table)
    assert "blocks.1-3.up" in text.getvalue()


def test_condensed_rows() -> None:
    table = [{"linear": f"blocks.{n}.0.w", "done": "x", "bytes": 2, "error": n / 100} for n in (0, 1, 3)]
    table += [{"linear": "head", "done": "x", "bytes": 7, "error": None}]
    assert condensed(table) == [
        {"linear": "blocks.0-1,3.0.w", "count": 3, "done": "x", "bytes": 6, "error": "0 .. 0.03"},
        {"linear": "head", "count": 1, "done": "x", "bytes": 7, "error": ""},
    ]
    assert condensed([]) == []
