"""The trained pipelines: whole, small, loaded by diffusers alone, and they make what captions say.

One the package ships; the other, a Wan, lies beside these tests.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import check
import clips
import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, HunyuanVideoPipeline, UniPCMultistepScheduler, WanPipeline
from families import FAMILIES, Name
from slow import SLOW

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


def scored(pipe: Any) -> Any:
    """What eight held-out clips of a pipeline show, as ``examples/tiny_model/check.py`` sees it."""
    asked = [clips.make(seed, held_out=True) for seed in range(8)]
    generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
    captions = [clip.caption for clip in asked]
    videos = pipe(captions, generator=generators, output_type="np", **tiny.DEFAULTS).frames
    score = check.Score()
    for clip, frames in zip(asked, videos, strict=True):
        score.add(frames, clip)
    return score


def test_clips_show_what_their_held_out_captions_say(pipe: Any) -> None:
    """A sample of what ``examples/tiny_model/check.py`` checks on 64."""
    score = scored(pipe)
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


class Compared:
    """Clips by several settings of the cache, against those that compute every step, on one trajectory each."""

    def __init__(self, *settings: dict[str, Any]) -> None:
        self.pipes = [HunyuanVideoPipeline.from_pretrained(tiny.DIRECTORY) for _ in range(1 + len(settings))]
        for pipe, cache in zip(self.pipes[1:], settings, strict=True):
            pipe.transformer.compile(backend="hvfast", options={"lower": "eager", "first_block_cache": cache})
        for pipe in self.pipes:
            pipe.set_progress_bar_config(disable=True)

    def psnr(self, prompt: str, seed: int, **how: Any) -> list[float]:
        """Decibels of each setting's clip."""
        videos = []
        for pipe in self.pipes:
            generator = torch.Generator().manual_seed(seed)
            videos.append(pipe(prompt, generator=generator, output_type="pt", **{**tiny.DEFAULTS, **how}).frames)
        errors = [(video - videos[0]).double().square().mean() for video in videos[1:]]
        return [float(-10 * error.clamp(min=1e-14).log10()) for error in errors]

    def saved(self) -> list[float]:
        """The share of steps that each setting has reused."""
        all_stats = [hvcompile.stats(pipe.transformer) for pipe in self.pipes[1:]]
        return [stats.hits / (stats.hits + stats.misses) for stats in all_stats]


def test_a_forecast_is_closer_than_a_repetition() -> None:
    """At half of the steps reused, at least 6 dB in the mean and in the worst clip, for as many steps or more."""
    compared = Compared({"threshold": 0.1}, {"threshold": 0.08, "forecast": 2, "decide_by": "error"})
    prompts = [clips.make(seed, held_out=True).caption for seed in (3, 5, 8, 9)]
    repeated, forecast = zip(*(compared.psnr(prompt, 0) for prompt in prompts), strict=True)
    of_repeated, of_forecast = compared.saved()
    assert of_forecast >= of_repeated >= 0.4
    assert sum(forecast) / 4 >= sum(repeated) / 4 + 6
    assert min(forecast) >= min(repeated) + 6


def _jump(pipe: Any, step: int, _timestep: Any, now: dict[str, Any]) -> dict[str, Any]:
    del pipe
    noise = torch.randn(now["latents"].shape, generator=torch.Generator().manual_seed(step))
    return {"latents": now["latents"] + 0.5 * noise} if step in {11, 12, 19} else {}


@SLOW
@pytest.mark.parametrize("forecast", [1, 2])
def test_no_trajectory_makes_a_forecast_run_away(forecast: int) -> None:
    """Within 1 dB of repeating at the same threshold, or better: noise that jumps, few steps, late starts, two calls
    a step."""
    for threshold in (0.1, 0.2):
        compared = Compared({"threshold": threshold}, {"threshold": threshold, "forecast": forecast})
        prompt = "a yellow square rises over a blue background"
        found = {
            "plain": compared.psnr(prompt, 0),
            "jumps": compared.psnr(prompt, 1, callback_on_step_end=_jump),
            "few": compared.psnr(prompt, 2, num_inference_steps=8),
            "late": compared.psnr(prompt, 3, sigmas=np.linspace(0.5, 0.02, 15), latents=torch.randn(1, 16, 5, 4, 6)),
            "even": compared.psnr(prompt, 4, sigmas=np.linspace(1.0, 0.05, 20).tolist()),
        }
        for pipe in compared.pipes:
            pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=7.0)
        found["heun"] = compared.psnr(prompt, 5, num_inference_steps=15)
        worse = {name: two for name, two in found.items() if two[1] < two[0] - 1}
        assert not worse, found


def test_the_vae_keeps_held_out_clips(pipe: Any) -> None:
    """28 dB are wanted; the model card has the figure of 64 clips."""
    back = [check._through_vae(pipe.vae, clips.make(seed, held_out=True).frames()) for seed in range(8)]
    errors = [((made - clips.make(seed, held_out=True).frames()) ** 2).mean() for seed, made in enumerate(back)]
    assert sum(-10 * torch.tensor(error).log10().item() for error in errors) / len(errors) >= 28


def test_clips_of_wan_mostly_show_what_their_held_out_captions_say(wan: Any) -> None:
    """Of 64, 55 have the caption's colour and 39 its direction, where guessing would give 9 and 16."""
    score = scored(wan)
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
