"""Whole pipelines of several families through the command's own code: equal to diffusers' own run, to the last step.

Each is written to a directory, loaded as a user's would be, and lowered eagerly here. ``benchmarks/pipelines.py`` runs
all of them by Inductor.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import imageio.v3
import numpy as np
import pytest
import tiny_pipelines
import torch
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from slow import SLOW
from typer.testing import CliRunner

from hvcompile.app import adapters, cli, pipelines
from hvcompile.app.generate import generate
from hvcompile.errors import InputError

QUICK = ("mochi", "wan22", "qwen_image")
NAMES = [name if name in QUICK else pytest.param(name, marks=SLOW) for name in tiny_pipelines.PIPELINES]


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_generates_what_diffusers_does(name: str, tmp_path: Path) -> None:
    tiny = tiny_pipelines.PIPELINES[name]
    request = tiny.request(tiny_pipelines.write(name, tmp_path), tmp_path, mode="exact")
    loaded = pipelines.load(request.model)
    expected = tiny_pipelines.eager(loaded, request)
    result = generate(request, loaded=loaded)
    assert result.run.size == tiny.shape
    assert float(np.abs(result.run.frames - expected).max()) < 1e-4
    assert result.stats is not None
    assert (result.stats.graphs, result.stats.recompiles) == (tiny.num_denoisers, tiny.recompiles)
    written = imageio.v3.imread(result.output)
    assert written.shape[-3:] == (*tiny.shape[1:], 3)


def invoke(*arguments: str) -> Any:
    torch._dynamo.reset()
    return CliRunner().invoke(cli.app, ("generate", *arguments))


def test_what_a_pipeline_does_not_take_or_lacks_is_one_line(tmp_path: Path) -> None:
    flux, i2v = (str(tiny_pipelines.write(name, tmp_path)) for name in ("flux", "wan22_i2v"))
    picture = tmp_path / "in.png"
    Image.new("RGB", (48, 32)).save(picture)
    for arguments, message in (
        (("--model", flux, "--frames", "9"), "frames can't be used: FluxPipeline makes pictures"),
        (("--model", flux, "-o", str(tmp_path / "a.mp4")), "does not fit FluxPipeline, which makes pictures"),
        (("--model", flux, "--height", "41"), "height is 41, but this pipeline takes multiples of 4"),
        (("--model", flux, "--image", str(picture)), "image can't be used: FluxPipeline has no image"),
        (("--model", flux, "--set", "max_sequence=3"), "FluxPipeline has no such argument; allowed are prompt_2,"),
        (("--model", flux, "--set", "max_sequence_length=much"), "is 'much', a str; FluxPipeline takes int"),
        (("--model", flux, "--set", "height=32"), "--set height can't be given: use --height"),
        (("--model", flux, "--set", "output_type=pil"), "it is how the run is followed"),
        (("--model", flux, "--lora", str(tmp_path / "none")), "none' is not there: give a file or directory"),
        (("--model", i2v), "WanImageToVideoPipeline needs image: give --image"),
    ):
        done = invoke("a red ball", *arguments, "--steps", "2")
        assert (done.exit_code, done.stdout) == (2, ""), message
        assert message in done.stderr
        assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
        assert "Traceback" not in done.stderr


def damage(model: Path, how: str) -> None:
    """Damage a part of a pipeline's directory."""
    weights, config = (
        model / "transformer" / "diffusion_pytorch_model.safetensors",
        model / "transformer" / "config.json",
    )
    parts = {"of the transformer": weights, "of the VAE": model / "vae" / weights.name}
    parts |= {f"of {name}": model / name / "model.safetensors" for name in ("text_encoder", "text_encoder_2")}
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-500])
    elif how == "gone":
        weights.unlink()
    elif how in parts:
        held = load_file(parts[how])
        for name in sorted(name for name in held if name.endswith(".weight"))[:3]:
            del held[name]
        save_file(held, parts[how], {"format": "pt"})
    elif how == "another shape":
        held = load_file(parts["of text_encoder"])
        name = min(name for name in held if name.endswith(".weight"))
        save_file(
            held | {name: held[name].repeat(2, *[1] * (held[name].ndim - 1))},
            parts["of text_encoder"],
            {"format": "pt"},
        )
    elif how == "truncated in the encoder":
        file = model / "text_encoder_2" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:200])
    elif how == "of another size":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_attention_heads": 4}))
    else:
        config.write_text("{")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "truncated",
            r"transformer/diffusion_pytorch_model\.safetensors is damaged",
        ),
        ("gone", "no file named .* found in directory transformer|no file named .*transformer"),
        ("of another size", r"expected shape torch.Size\(\[64\]\)"),
        ("of the transformer", r"the weights of transformer \(FluxTransformer2DModel\) lack \S+, \S+ and others: copy"),
        ("of the VAE", r"the weights of vae \(AutoencoderKL\) lack \S+, \S+ and others: copy"),
        ("of text_encoder", r"the weights of text_encoder \(\w+\) lack \S+.*: copy"),
        ("of text_encoder_2", r"the weights of text_encoder_2 \(\w+\) lack \S+.*: copy"),
        (
            "another shape",
            r"the weights of text_encoder \(\w+\) have another shape than its configuration asks for in ",
        ),
        ("unreadable", r"the config file at '.*transformer/config.json' is not a valid JSON"),
    ],
)
def test_a_damaged_pipeline_is_one_line(how: str, message: str, tmp_path: Path) -> None:
    model = tiny_pipelines.write("flux", tmp_path / ("deep" * 30))
    damage(model, how)
    done = invoke("a red ball", "--model", str(model), "--steps", "1", "-o", str(tmp_path / "a.png"))
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert (done.exit_code, len(lines)) == (2, 1), done.stderr
    assert lines[0].startswith(f"error: model '{model}'")
    assert re.search(message, lines[0])


def test_an_adapter_is_fused_with_its_scale(tmp_path: Path) -> None:
    """The same pixels as diffusers' own run has with the adapter loaded and not fused."""
    tiny = tiny_pipelines.PIPELINES["flux"]
    model = tiny_pipelines.write("flux", tmp_path)
    pipe = pipelines.load(str(model)).pipe
    torch.manual_seed(5)
    pipe.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    type(pipe).save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(pipe.transformer))
    request = tiny.request(model, tmp_path, mode="exact", lora=(f"{tmp_path / 'lora'}:0.5",))
    plain = pipelines.load(str(model))
    without = tiny_pipelines.eager(plain, request)
    plain.pipe.load_lora_weights(tmp_path / "lora", adapter_name="one")
    plain.pipe.set_adapters(["one"], [0.5])
    expected = tiny_pipelines.eager(plain, request)
    found = generate(request).run.frames
    assert float(np.abs(expected - without).max()) > 1e-2, "the adapter does nothing: the test is void"
    assert float(np.abs(found - expected).max()) < 1e-4


def test_an_adapter_goes_into_every_denoiser_or_is_refused(tmp_path: Path) -> None:
    model = tiny_pipelines.write("wan22", tmp_path)
    pipe = pipelines.load(str(model)).pipe
    pipe.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    type(pipe).save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(pipe.transformer))
    fresh, whole = (pipelines.load(str(model)).pipe for _ in range(2))
    adapters.fuse(fresh, [str(tmp_path / "lora")])
    for name in ("transformer", "transformer_2"):
        before, after = (getattr(item, name).state_dict() for item in (whole, fresh))
        assert before.keys() == after.keys()
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        assert changed == {key for key in before if key.endswith("to_q.weight")}
    held = load_file(next((tmp_path / "lora").glob("*.safetensors")))
    first = min(name for name in held if name.endswith("lora_B.weight"))
    elsewhere = {
        name.replace("blocks.0.", "blocks.9."): tensor.clone() for name, tensor in held.items() if "blocks.0." in name
    }
    assert elsewhere
    parts: dict[str, tuple[dict[str, torch.Tensor], str]] = {
        "more": (held | elsewhere, rf"fits \w+ only in part: {len(elsewhere)} .* no place there, such as blocks\.9\."),
        "text": (held | {"text_encoder.a.lora_A.weight": torch.zeros(2, 2)}, r"only in part: 1 .*text_encoder\.a\."),
        "less": ({name: tensor for name, tensor in held.items() if name != first}, r"is not whole: it lacks 1 tensor"),
    }
    for name, (tensors, message) in parts.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        with pytest.raises(InputError, match=message):
            adapters.fuse(whole, [str(tmp_path / f"{name}.safetensors")])
        whole.unload_lora_weights()
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "more.safetensors").read_bytes()[:-10])
    with pytest.raises(InputError, match=r"cut\.safetensors' can't be loaded into"):
        adapters.fuse(whole, [str(tmp_path / "cut.safetensors")])
    save_file({"nothing.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"can't be loaded into|fits no weight of"):
        adapters.fuse(fresh, [str(tmp_path / "other.safetensors")])
