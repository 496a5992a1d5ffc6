"""Models with float8 weights as files: what is loaded computes the same bits, and what does not fit is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracle import first, hvfast
from quantised_cases import rows_of
from wide import Wide, wide_inputs

import hvcompile
from hvcompile.errors import InputError, QuantizedWeightError
from hvcompile.float8.saved import MANIFEST, TENSORS, digest_of, load_float8, save_float8
from hvcompile.float8.weights import QuantizedWeight

pytest.importorskip("torchao")
pytest.importorskip("safetensors")
FP8 = {"lower": "eager", "fp8": {"keep_last_blocks": 0}, "first_block_cache": False}


def empty() -> Wide:
    with torch.device("meta"):
        return Wide()


def saved(directory: Path, **fields: Any) -> dict[int, torch.Tensor]:
    """Save a model, and give what it computes at two sizes."""
    model = Wide()
    fast = hvfast(model, fullgraph=True, options={**FP8, "fp8": {"keep_last_blocks": 0, **fields}})
    with torch.no_grad():
        results = {tokens: fast(**wide_inputs(tokens=tokens)) for tokens in (24, 37)}
    assert save_float8(fast, directory) == directory
    return results


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_computes_the_same_bits(tmp_path: Path, granularity: str) -> None:
    results = saved(tmp_path, granularity=granularity)
    torch._dynamo.reset()
    model = load_float8(tmp_path, empty())
    assert sum(isinstance(item, QuantizedWeight) for item in model.parameters()) == 15
    fast = hvfast(model, fullgraph=True, options={**FP8, "fp8": {"keep_last_blocks": 0, "granularity": granularity}})
    with torch.no_grad():
        for tokens, expected in results.items():
            assert torch.equal(fast(**wide_inputs(tokens=tokens)), expected)
    assert f"weights loaded in float8 from {tmp_path}" in rows_of(fast)["Float8Linears"]


def test_what_is_loaded_outlives_another_save(tmp_path: Path) -> None:
    """A file that is mapped into memory, or that a link leads to, is replaced and not written into."""
    place, blob = tmp_path / "model", tmp_path / "blob"
    results = saved(place)
    (place / "model.safetensors").rename(blob)
    (place / "model.safetensors").symlink_to(blob)
    content = blob.read_bytes()
    torch._dynamo.reset()
    fast = hvfast(load_float8(place, empty()), fullgraph=True, options=FP8)
    with torch.no_grad():
        assert torch.equal(fast(**wide_inputs(tokens=24)), results[24])
        save_float8(fast, place)
        assert torch.equal(fast(**wide_inputs(tokens=24)), results[24])
        torch._dynamo.reset()
        again = hvfast(load_float8(place, empty()), fullgraph=True, options=FP8)
        assert torch.equal(again(**wide_inputs(tokens=24)), results[24])
    assert blob.read_bytes() == content
    assert sorted(path.name for path in place.iterdir()) == ["manifest.json", "model.safetensors"]


def test_no_copy_is_made(tmp_path: Path) -> None:
    """The matrices of the file are those that the graph takes."""
    saved(tmp_path)
    torch._dynamo.reset()
    model: Any = load_float8(tmp_path, empty())
    before = model.blocks[1].to_q.weight.joined.data.data_ptr()
    fast = hvfast(model, fullgraph=True, options=FP8)
    with torch.no_grad():
        fast(**wide_inputs())
    assert model.blocks[1].to_q.weight.joined.data.data_ptr() == before
    assert model.blocks[1].to_q.weight.joined is model.blocks[1].to_k.weight.joined


def test_a_model_of_diffusers_makes_itself(tmp_path: Path) -> None:
    family = zoo.FAMILIES["hunyuan_video"]
    plain: Any = family.build(width=64)
    inputs = {**family.inputs(3), "return_dict": False}
    options = {"lower": "eager", "fp8": True, "first_block_cache": {"threshold": 0.0}}
    with torch.no_grad():
        expected = first(hvfast(plain, fullgraph=True, options=options)(**inputs))
    save_float8(plain, tmp_path)
    torch._dynamo.reset()
    model = load_float8(tmp_path)
    assert not any(item.is_meta for item in [*model.parameters(), *model.buffers()])
    with torch.no_grad():
        assert torch.equal(first(hvfast(model, fullgraph=True, options=options)(**inputs)), expected)
    settings = {name: item for name, item in plain.config.items() if not name.startswith("_")}
    other = type(plain).from_config({**settings, "rope_theta": 100.0})
    with pytest.raises(InputError, match=r"another configuration: rope_theta is 256.0 there, and 100.0 here"):
        load_float8(tmp_path, other)


def test_what_is_left_says_so(tmp_path: Path) -> None:
    """Restoring, running eagerly, and options that would have other weights."""
    saved(tmp_path)
    model = load_float8(tmp_path, empty())
    with pytest.raises(QuantizedWeightError, match=r"loaded in float8 from .*never here: load the original"):
        hvcompile.restore(model)
    asked: list[Callable[[], Any]] = [lambda: model(**wide_inputs()), lambda: copy.deepcopy(model)]
    elsewhere: Any = torch.compile(model, backend="aot_eager")
    asked.append(lambda: elsewhere(**wide_inputs()))
    for ask in asked:
        with torch.no_grad(), pytest.raises(Exception, match="load the original checkpoint") as caught:
            ask()
        assert "hvcompile.restore" not in str(caught.value)
    for options, said in (
        ({**FP8, "fp8": {"granularity": "tensor"}}, "with a scale a row, and fp8.granularity is 'tensor' now"),
        ({**FP8, "fp8": {"skip": ["to_q"]}}, r"fp8.skip names it"),
        (
            {**FP8, "fp8": False},
            "since hvcompile.load_float8, .* the options that this was done with, or load the original checkpoint",
        ),
    ):
        torch._dynamo.reset()
        fast = hvfast(model, fullgraph=True, options=options)
        with torch.no_grad(), pytest.raises(Exception, match=said) as caught:
            fast(**wide_inputs())
        assert options["fp8"] is False or f"loaded from {tmp_path}" in str(caught.value)
    assert model.to("cpu") is model
    with pytest.raises(QuantizedWeightError, match="Weights that were cast before this one stay cast"):
        model.half()


def damage(directory: Path, how: str) -> None:
    file, manifest = directory / TENSORS, directory / MANIFEST
    held = json.loads(manifest.read_text())
    if how == "cut off":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "flipped":
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    elif how == "gone":
        file.unlink()
    elif how == "no manifest":
        manifest.unlink()
    elif how == "no JSON":
        manifest.write_text("{")
    elif how == "later":
        manifest.write_text(json.dumps({**held, "format": 2}))
    elif how == "lacking":
        del held["sha256"]
        manifest.write_text(json.dumps(held))
    elif how == "renamed":
        held["tensors"]["other"] = held["tensors"].pop("head.bias")
        manifest.write_text(json.dumps({**held, "digest": digest_of(held)}))
    elif how == "swapped":
        first, second = held["float8"][0]["weights"][:2]
        first["start"], second["start"] = second["start"], first["start"]
        manifest.write_text(json.dumps(held))
    elif how == "of another kind":
        held["float8"][0]["weights"] = 7
        manifest.write_text(json.dumps(held))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved")
    saved(place)
    return place


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut off", r"has \d+ bytes, and should have \d+"),
        ("flipped", "is damaged: its SHA-256"),
        ("gone", "is not there"),
        ("no manifest", r"manifest.json can't be read"),
        ("no JSON", r"manifest.json can't be read"),
        ("later", "is of format 2, and this hvcompile reads 1"),
        ("lacking", "lacks sha256"),
        ("swapped", r"manifest.json is damaged: its digest"),
        ("of another kind", r"manifest.json is damaged: its digest"),
        ("renamed", "it has other and 0 more beyond, it lacks head.bias"),
    ],
)
def test_damaged_files(directory: Path, tmp_path: Path, how: str, said: str) -> None:
    place = tmp_path / "copy"
    shutil.copytree(directory, place)
    damage(place, how)
    with pytest.raises(InputError, match=said):
        load_float8(place, empty())


def test_another_model(directory: Path) -> None:
    with torch.device("meta"):
        deeper = Wide(blocks=4)
    with pytest.raises(InputError, match=r"of another model: it lacks blocks.3"):
        load_float8(directory, deeper)
    with pytest.raises(InputError, match="is of a Wide, not of a Linear"):
        load_float8(directory, torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="is of a Wide, which is no model of diffusers"):
        load_float8(directory)


def test_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no weight of this Wide is in float8"):
        save_float8(Wide(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"load": "none"}, "holds no transformer with float8 weights"),
        ({"save": "new", "fp8": False}, "no-fp8 rules them out"),
        ({"load": "saved", "mode": "exact"}, "mode exact rules them out"),
        ({"load": "saved", "save": "new"}, "give one of them"),
        ({"load": "saved", "lora": ("style.safetensors",)}, "lora can't be fused"),
        ({"load": "saved", "compare": True}, "leave one of the two out"),
        ({"save": "file"}, "is a file: give a directory"),
        ({"save": "full"}, "holds something else"),
    ],
)
def test_the_command_line_refuses(directory: Path, tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    from hvcompile.app.request.generate import Request

    shutil.copytree(directory, tmp_path / "saved" / "transformer")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    places = {f"{name}_fp8": tmp_path / arguments.pop(name) for name in ("load", "save") if name in arguments}
    with pytest.raises(InputError, match=said):
        Request(prompt="x", **places, **arguments).check()


def test_transformers_of_a_pipeline(tmp_path: Path) -> None:
    """Each has a folder, and comes back by its name in the pipeline; another dtype is refused."""
    from types import SimpleNamespace

    from hvcompile.app import saved as of_pipelines

    plain: Any = zoo.FAMILIES["hunyuan_video"].build(width=64)
    inputs = {**zoo.FAMILIES["hunyuan_video"].inputs(3), "return_dict": False}
    options = {"lower": "eager", "fp8": True, "first_block_cache": False}
    with torch.no_grad():
        expected = first(hvfast(plain, fullgraph=True, options=options)(**inputs))
    of_pipelines.save(SimpleNamespace(components={"transformer": plain, "vae": torch.nn.Linear(1, 1)}), tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["transformer"]
    (model,) = of_pipelines.load(tmp_path, torch.float32).values()
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(first(hvfast(model, fullgraph=True, options=options)(**inputs)), expected)
    with pytest.raises(InputError, match="computes in float32: give dtype float32"):
        of_pipelines.load(tmp_path, torch.bfloat16)
