"""The trained pipelines: whole, small, loaded by diffusers alone, and they make what captions say.

One the package ships; the other, a Wan, lies beside these tests.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import check
import clips
import pytest
import torch
from diffusers import HunyuanVideoPipeline, UniPCMultistepScheduler, WanPipeline
from families import FAMILIES, Name

import hvcompile
from hvcompile.app import pipelines, tiny

MOST_BYTES = {Name.HUNYUAN_VIDEO: 12 * 2**20, Name.WAN: 8 * 2**20}


@pytest.fixture(scope="module")
def pipe() -> Any:
    loaded = HunyuanVideoPipeline.from_pretrained(tiny.DIRECTORY)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def wan() -> Any:
    loaded = WanPipeline.from_pretrained(FAMILIES[Name.WAN].directory)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize("name", list(Name))
def test_it_is_small_and_whole(name: Name) -> None:
    files = [path for path in FAMILIES[name].directory.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES[name]
    assert {"README.md", "loss.png", "samples.png", "model_index.json"} <= {path.name for path in files}


def test_it_loads_in_a_process_without_this_project() -> None:
    script = (
        "import sys; sys.modules['hvcompile'] = None\n"
        "from diffusers import HunyuanVideoPipeline\n"
        f"pipe = HunyuanVideoPipeline.from_pretrained({str(tiny.DIRECTORY)!r})\n"
        "assert sum(weight.numel() for weight in pipe.transformer.parameters()) > 4e6\n"
    )
    subprocess.run([sys.executable, "-I", "-c", script], check=True, timeout=300, capture_output=True)


def test_it_is_the_default() -> None:
    loaded = pipelines.load()
    assert loaded.defaults == tiny.DEFAULTS
    assert next(loaded.pipe.transformer.parameters()).dtype == torch.float32


def test_clips_show_what_their_held_out_captions_say(pipe: Any) -> None:
    """A sample of what ``examples/tiny_model/check.py`` checks on 64."""
    asked = [clips.make(seed, held_out=True) for seed in range(8)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    captions = [clip.caption for clip in asked]
    videos = pipe(captions, generator=generators, output_type="np", **tiny.DEFAULTS).frames
    score = check.Score()
    for clip, frames in zip(asked, videos, strict=True):
        score.add(frames, clip)
    assert (score.num_clips, score.colour, score.background) == (8, 8, 8)
    assert score.direction >= 7


def test_the_cache_at_its_default_threshold_pays_and_spoils_nothing() -> None:
    """A sample of 64 held-out captions, of which 31.6 % of the steps are reused, and all are right."""
    loaded: Any = HunyuanVideoPipeline.from_pretrained(tiny.DIRECTORY)
    loaded.set_progress_bar_config(disable=True)
    loaded.transformer.compile(backend="hvfast", options={"lower": "eager"})
    score = check.Score()
    for seed in range(16):
        clip = clips.make(seed, held_out=True)
        generator = torch.Generator().manual_seed(seed)
        score.add(loaded(clip.caption, generator=generator, output_type="np", **tiny.DEFAULTS).frames[0], clip)
    assert (score.colour, score.direction, score.background) == (16, 16, 16)
    stats = hvcompile.stats(loaded.transformer)
    assert stats.hits + stats.misses == 16 * 30
    assert stats.hits >= 0.3 * 16 * 30


def test_the_vae_keeps_held_out_clips(pipe: Any) -> None:
    """28 dB are wanted; the model card has the figure of 64 clips."""
    back = [check._through_vae(pipe.vae, clips.make(seed, held_out=True).frames()) for seed in range(8)]
    errors = [((made - clips.make(seed, held_out=True).frames()) ** 2).mean() for seed, made in enumerate(back)]
    assert sum(-10 * torch.tensor(error).log10().item() for error in errors) / len(errors) >= 28


def test_clips_of_wan_mostly_show_what_their_held_out_captions_say(wan: Any) -> None:
    """Of 64, 55 have the caption's colour and 39 its direction, where guessing would give 9 and 16."""
    asked = [clips.make(seed, held_out=True) for seed in range(8)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    captions = [clip.caption for clip in asked]
    videos = wan(captions, generator=generators, output_type="np", **tiny.DEFAULTS).frames
    score = check.Score()
    for clip, frames in zip(asked, videos, strict=True):
        score.add(frames, clip)
    assert (score.num_clips, score.background) == (8, 8)
    assert score.colour >= 6
    assert score.direction >= 4


def test_wan_is_as_the_full_one_is_published(wan: Any) -> None:
    """Of what a cache meets: the scheduler, two passes a step, norms across heads, one projection of the timestep."""
    assert isinstance(wan.scheduler, UniPCMultistepScheduler)
    assert wan.scheduler.config.use_flow_sigmas
    assert wan.scheduler.config.prediction_type == "flow_prediction"
    config = wan.transformer.config
    assert (config.qk_norm, config.cross_attn_norm, config.freq_dim) == ("rms_norm_across_heads", True, 256)
    assert (config.num_layers, wan.transformer.blocks[0].attn1.inner_dim) == (8, 128)


def test_the_vae_of_wan_keeps_held_out_clips(wan: Any) -> None:
    originals = [clips.make(seed, held_out=True).frames() for seed in range(4)]
    errors = [((check._through_vae(wan.vae, frames) - frames) ** 2).mean() for frames in originals]
    assert sum(-10 * torch.tensor(error).log10().item() for error in errors) / len(errors) >= 25
