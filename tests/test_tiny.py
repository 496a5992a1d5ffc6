"""The embedded tiny pipeline: loads by itself, takes any prompt, is the same every time, and is worth caching."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, HunyuanVideoPipeline
from diffusers.hooks import first_block_cache
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from hvcompile.app import tiny

PROMPT = "A cat walks on the grass"
SMALL = {"num_inference_steps": 2, "num_frames": 5, "height": 32, "width": 48}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny.write(path)
    return path


@pytest.fixture(scope="module")
def pipe(directory: Path) -> Any:
    pipe = HunyuanVideoPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, prompt: str | None = PROMPT, *, seed: int = 0, **arguments: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    frames = pipe(prompt, generator=generator, output_type="latent", **{**SMALL, **arguments}).frames
    assert isinstance(frames, torch.Tensor)
    return frames


def digest(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_it_is_the_same_every_time_and_leaves_the_global_generator_alone(directory: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    tiny.write(tmp_path)
    assert torch.equal(torch.rand(3), expected)
    assert digest(tmp_path) == digest(directory)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 32e6


def test_it_loads_in_a_process_without_this_project(directory: Path) -> None:
    script = (
        "import sys; from diffusers import HunyuanVideoPipeline\n"
        f"pipe = HunyuanVideoPipeline.from_pretrained({str(directory)!r})\n"
        "assert 'hvcompile' not in sys.modules; print(type(pipe.transformer).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd="/", capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "HunyuanVideoTransformer3DModel", done.stderr


def test_it_has_every_part_of_the_full_model(pipe: Any) -> None:
    config = pipe.transformer.config
    assert (config.num_layers, config.num_single_layers, config.num_refiner_layers) == (4, 8, 2)
    assert config.guidance_embeds
    assert pipe.scheduler.config.shift == 7.0
    assert (pipe.vae_scale_factor_spatial, pipe.vae_scale_factor_temporal) == (8, 4)


@pytest.mark.parametrize(
    "prompt",
    [PROMPT, "", "\nLead", " space", "Ein Mädchen — 猫が🐈 走る\x00\ufffd", "{} {x} <|eot_id|> <unk>", "é" * 400],
)
def test_any_prompt_tokenises_without_loss_after_exactly_the_cropped_template(pipe: Any, prompt: str) -> None:
    ids = pipe.tokenizer(DEFAULT_PROMPT_TEMPLATE["template"].format(prompt)).input_ids
    cropped, rest = ids[:95], ids[95:]
    assert pipe.tokenizer.decode(cropped).endswith("<|start_header_id|>user<|end_header_id|>\n\n")
    assert pipe.tokenizer.decode(rest) == prompt + "<|eot_id|>"

    embeds, pooled, mask = pipe.encode_prompt(prompt)
    assert embeds.shape == (1, 256, 64)
    assert torch.isfinite(embeds).all()
    assert torch.isfinite(pooled).all()
    assert int(mask.sum()) == min(256, len(rest))
    assert bool((mask.diff(dim=1) <= 0).all()), "the padding is a tail"
    assert pipe.tokenizer_2.unk_token_id not in pipe.tokenizer_2(prompt).input_ids[1:-1]


def test_known_words_are_one_token(pipe: Any) -> None:
    assert pipe.tokenizer.tokenize("a cat walks on the grass") == ["a", "▁cat", "▁walks", "▁on", "▁the", "▁grass"]
    assert pipe.tokenizer_2.tokenize("Cat, grass.") == ["cat</w>", ",</w>", "grass</w>", ".</w>"]


def test_the_prompt_the_guidance_and_the_text_padding_reach_the_output(pipe: Any) -> None:
    reference = latents(pipe)

    def change(other: torch.Tensor) -> float:
        return float((other - reference).norm() / reference.norm())

    assert change(latents(pipe)) == 0.0
    assert change(latents(pipe, "A red ball falls")) > 0.05
    assert change(latents(pipe, guidance_scale=1.0)) > 0.05
    assert change(latents(pipe, seed=1)) > 0.5
    # what lies in the padding does not
    embeds, pooled, mask = pipe.encode_prompt(PROMPT)
    noisy = torch.where(mask[..., None].bool(), embeds, torch.randn(embeds.shape))
    given = {"prompt_embeds": noisy, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}
    assert change(latents(pipe, None, **given)) < 1e-4


def test_the_output_depends_on_every_block(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = latents(pipe)
    for block in [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]:
        with monkeypatch.context() as patch:
            patch.setattr(block, "forward", lambda hidden, encoder, *_: (hidden, encoder))
            change = (latents(pipe) - reference).norm() / reference.norm()
        assert change > 0.02


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether diffusers' own first-block cache computed, a transformer call."""
    seen: list[bool] = []
    original = first_block_cache.FBCHeadBlockHook._should_compute_remaining_blocks

    def spy(self: Any, residual: torch.Tensor) -> bool:
        seen.append(bool(original(self, residual)))
        return seen[-1]

    monkeypatch.setattr(first_block_cache.FBCHeadBlockHook, "_should_compute_remaining_blocks", spy)
    return seen


@pytest.mark.parametrize("threshold", [0.06, 0.1])
def test_a_first_block_cache_reuses_some_steps_but_not_all(pipe: Any, decisions: list[bool], threshold: float) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    try:
        latents(pipe, PROMPT, seed=0, num_inference_steps=30, num_frames=17, height=64, width=96)
    finally:
        pipe.transformer.disable_cache()
    assert len(decisions) == 30
    assert 8 <= decisions.count(False) <= 24
    assert decisions[0]


def test_the_frames_are_neither_flat_nor_clipped(pipe: Any) -> None:
    frames = pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="np", **SMALL).frames[0]
    assert frames.shape == (5, 32, 48, 3)
    assert frames.std() > 0.08
    assert ((frames == 0) | (frames == 1)).mean() < 0.1
