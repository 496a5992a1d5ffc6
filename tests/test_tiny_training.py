"""The tiny model's training data, training scripts and pixel check, in examples/tiny_model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import architecture
import check
import clips
import numpy as np
import pytest
import torch
import train_transformer
import train_vae
from runs import Averaged, Run

from hvcompile.app import tiny


@pytest.fixture(scope="module")
def pipe() -> Any:
    """An untrained one, whose text is encoded by the same code."""
    return tiny.pipeline()


def key(clip: clips.Clip) -> tuple[str, str, str, str]:
    thing = clip.things[0]
    return (thing.colour, thing.shape, clip.direction, clip.background)


def test_a_clip_follows_from_its_seed_alone() -> None:
    assert clips.make(7) == clips.make(7)
    assert clips.make(7) != clips.make(8)
    assert clips.make(7) != clips.make(7, held_out=True)
    assert np.array_equal(clips.make(7).frames(), clips.make(7).frames())


def test_held_out_combinations_are_in_no_training_clip() -> None:
    trained = [clips.make(seed) for seed in range(1500)]
    held_out = [clips.make(seed, held_out=True) for seed in range(200)]
    assert not {key(clip) for clip in trained} & {key(clip) for clip in held_out}
    assert all(clip.direction for clip in held_out)
    combinations = [
        clips.holds_out(colour, shape, direction, background)
        for colour in clips.OBJECT_COLOURS
        for shape in clips.SHAPES
        for direction in clips.DIRECTIONS
        for background in clips.BACKGROUNDS
    ]
    assert 0.08 < np.mean(combinations) < 0.18
    words = {word for clip in trained for word in clip.caption.split()}
    assert words - set(tiny.WORDS) == {"diamond"}  # spelt in pieces


def test_every_kind_of_motion_occurs_and_stays_in_the_picture() -> None:
    made = [clips.make(seed) for seed in range(400)]
    assert {clip.direction for clip in made} == {*clips.DIRECTIONS, ""}
    assert any("bounces" in clip.caption for clip in made)
    assert any(len(clip.things) == 2 for clip in made)
    assert all(clip.things[0].colour != clip.background for clip in made)
    for clip in made:
        frames = clip.frames()
        assert frames.shape == (clips.NUM_FRAMES, clips.HEIGHT, clips.WIDTH, 3)
        assert 0 <= frames.min() <= frames.max() <= 1
        for thing in clip.things:
            assert all(0 <= x < clips.WIDTH and 0 <= y < clips.HEIGHT for x, y in thing.centres)


@pytest.mark.parametrize("shape", clips.SHAPES)
def test_a_shape_has_antialiased_edges_and_about_the_area_of_its_circle(shape: str) -> None:
    centres = ((24.3, 15.6),) * clips.NUM_FRAMES
    for size, radius in clips.SIZES.items():
        thing = clips.Thing(colour="red", shape=shape, size=size, phrase="rises", centres=centres)
        coverage = thing.coverage()
        assert coverage[0].sum() == pytest.approx(np.pi * radius**2, rel=0.2)
        assert ((coverage > 0.1) & (coverage < 0.9)).any()


def test_the_check_sees_what_real_clips_show() -> None:
    score = check.Score()
    for seed in range(100):
        clip = clips.make(seed, held_out=True)
        score.add(clip.frames(), clip)
    assert (score.colour, score.direction, score.background) == (100, 100, 100)


def test_the_check_sees_nothing_in_a_flat_clip_and_no_direction_in_a_still_one() -> None:
    frames = clips.make(3, held_out=True).frames()
    flat = check.look(np.broadcast_to(frames[:, :1, :1], frames.shape))
    assert (flat.colour, flat.direction) == ("", "")
    assert check.look(np.broadcast_to(frames[:1], frames.shape)).direction == ""


def test_backwards_clips_move_the_other_way() -> None:
    for seed in range(20):
        clip = clips.make(seed, held_out=True)
        seen = check.look(clip.frames()[::-1])
        assert np.array_equal(clips.DIRECTIONS[seen.direction], -np.array(clips.DIRECTIONS[clip.direction]))


def test_text_is_encoded_in_training_as_by_the_pipeline(pipe: Any) -> None:
    captions = ["a red circle rises over a black background", "", clips.make(0).caption]
    text = train_transformer.Text.of(pipe, captions)
    with torch.no_grad():
        actual = text.encode(pipe.text_encoder, pipe.text_encoder_2)
        embeds, pooled, mask = pipe.encode_prompt(captions)
    length = int(mask.sum(dim=1).max())
    assert actual["encoder_hidden_states"].shape[1] == length
    assert torch.equal(actual["encoder_attention_mask"], mask[:, :length])
    valid = mask[:, :length, None].bool()
    torch.testing.assert_close(
        actual["encoder_hidden_states"].where(valid, 0), embeds[:, :length].where(valid, 0), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(actual["pooled_projections"], pooled, rtol=1e-4, atol=1e-4)


def test_times_lie_between_clean_and_noise_and_lean_to_noise() -> None:
    times = train_transformer.draw_times(4096, torch.Generator().manual_seed(0))
    assert 0 < times.min() < times.max() < 1
    assert 0.6 < times.mean() < 0.8


def test_scaling_the_latents_changes_no_reconstruction() -> None:
    vae = train_vae.initialised(architecture.autoencoder()).eval()
    pixels = train_vae.batch_of(range(2))
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        train_vae.scale_latents(vae)
        latents = vae.encode(pixels).latent_dist.mode()
        after = vae.decode(latents).sample
        many = vae.encode(train_vae.batch_of(range(64))).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert float(many.std()) == pytest.approx(1, abs=0.2)
    assert float(many.mean()) == pytest.approx(0, abs=0.2)


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    def train(directory: Path, steps: int, stop_at: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)
        optimiser = torch.optim.Adam(model.parameters())
        average = Averaged({"model": model}, decay=0.9)
        run = Run(
            directory=directory,
            steps=steps,
            minutes=60,
            parts={"model": model, "optimiser": optimiser, "average": average},
            log_every=2,
        )
        run.resume()
        for step in run.loop():
            if step == stop_at:
                run.save()
                break
            optimiser.param_groups[0]["lr"] = 0.1 * run.learning_rate_share()
            loss = model(torch.full((1, 3), float(step % 3))).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            average.update()
            run.log(loss=loss.item())
        average.swap()
        return model.weight.detach()

    whole = train(tmp_path / "whole", 12)
    train(tmp_path / "parts", 12, stop_at=5)
    assert torch.equal(train(tmp_path / "parts", 12), whole)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3, 5, 7, 9, 11]
