"""Whole pipelines of several families through the command's own code: equal to diffusers' own run, to the last step.

Each is written to a directory, loaded as a user's would be, and lowered eagerly here. ``benchmarks/pipelines.py`` runs
all of them by Inductor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v3
import numpy as np
import pytest
import tiny_pipelines
import torch
from PIL import Image
from slow import SLOW
from typer.testing import CliRunner

from hvcompile.app import cli, pipelines
from hvcompile.app.generate import generate

QUICK = ("mochi", "wan22", "hunyuan_video_i2v_concat", "qwen_image")
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
        (("--model", flux, "--lora", str(tmp_path / "none")), "can't be loaded into FluxPipeline"),
        (("--model", i2v), "WanImageToVideoPipeline needs image: give --image"),
    ):
        done = invoke("a red ball", *arguments, "--steps", "2")
        assert (done.exit_code, done.stdout) == (2, ""), message
        assert message in done.stderr
        assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
        assert "Traceback" not in done.stderr
