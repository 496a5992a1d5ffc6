"""The shipped weights: they make what the caption says, and the cache at its default threshold pays and spoils nothing.

A sample of what ``examples/tiny_model/check.py`` shows for 64 captions.
"""

from __future__ import annotations

import functools
from typing import Any

import architecture
import check
import clips
import pytest
import torch
import train_vae
from diffusers import HunyuanVideoPipeline

import hvcompile
from hvcompile.backend import hvfast

NUM_CLIPS = 16


@pytest.fixture(scope="module", params=["exact", "default"])
def generated(request: pytest.FixtureRequest) -> tuple[str, check.Score]:
    """Held-out captions, 30 steps each, in a mode of the backend."""
    pipe: Any = HunyuanVideoPipeline.from_pretrained(architecture.DIRECTORY)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.compile(backend=functools.partial(hvfast, mode=request.param, options={"lower": "eager"}))
    score = check.Score()
    for seed in range(NUM_CLIPS):
        clip = clips.make(seed, held_out=True)
        generator = torch.Generator().manual_seed(seed)
        made = pipe(clip.caption, generator=generator, output_type="np", num_inference_steps=30, **architecture.SIZE)
        score.add(made.frames[0], clip)
    stats = hvcompile.stats(pipe.transformer)
    score.reused, score.steps = stats.hits, stats.hits + stats.misses
    return request.param, score


def test_colour_direction_and_background_are_the_captions(generated: tuple[str, check.Score]) -> None:
    _, score = generated
    assert (score.colour, score.direction, score.background) == (NUM_CLIPS,) * 3


def test_the_default_threshold_reuses_nearly_a_third_of_the_steps(generated: tuple[str, check.Score]) -> None:
    mode, score = generated
    if mode == "default":
        assert score.steps == 30 * NUM_CLIPS
        assert score.reused >= 0.3 * score.steps
    else:
        assert score.steps == 0  # there is no cache, and so no decision


def test_the_vae_gives_held_out_clips_back() -> None:
    pipe: Any = HunyuanVideoPipeline.from_pretrained(architecture.DIRECTORY)
    assert train_vae.psnr(pipe.vae.eval(), range(16)) >= 28
