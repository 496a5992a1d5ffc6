"""The tiny models' training data, training scripts and pixel check, in examples/tiny_model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import check
import clips
import muon
import numpy as np
import pytest
import torch
import train_transformer
import train_vae
import wan
from families import FAMILIES, Name, family_of
from runs import Averaged, Run

from hvcompile.app import tiny


@pytest.fixture(scope="module", params=list(Name))
def name(request: pytest.FixtureRequest) -> Name:
    """Each family."""
    found: Name = request.param
    return found


@pytest.fixture(scope="module")
def vae(name: Name) -> Any:
    """An untrained one, none of whose weights is zero."""
    torch.manual_seed(0)
    made = FAMILIES[name].autoencoder().eval()
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.03 * torch.randn_like(value))
    return made


@pytest.fixture(scope="module")
def pipe(name: Name, vae: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An untrained one, none of whose transformer's weights is zero."""
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    made = FAMILIES[name].new_pipeline(folder)
    with torch.no_grad():
        for value in made.transformer.parameters():
            value.add_(0.03 * torch.randn_like(value))
    return made


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


CAPTIONS = ["a red circle rises over a black background", "", clips.make(0).caption]


def encoded(name: Name, pipe: Any) -> dict[str, torch.Tensor]:
    """The captions' text as the training gives it to the transformer."""
    kind = FAMILIES[name]
    assert family_of(pipe) is kind
    with torch.no_grad():
        return kind.encode_text({part: getattr(pipe, part) for part in kind.trained}, kind.tokenise(pipe, CAPTIONS))


@pytest.mark.parametrize("name", [Name.HUNYUAN_VIDEO], indirect=True)
def test_text_is_encoded_in_training_as_by_the_pipeline(name: Name, pipe: Any) -> None:
    actual = encoded(name, pipe)
    with torch.no_grad():
        embeds, pooled, mask = pipe.encode_prompt(CAPTIONS)
    length = int(mask.sum(dim=1).max())
    assert actual["encoder_hidden_states"].shape[1] == length
    assert torch.equal(actual["encoder_attention_mask"], mask[:, :length])
    valid = mask[:, :length, None].bool()
    torch.testing.assert_close(
        actual["encoder_hidden_states"].where(valid, 0), embeds[:, :length].where(valid, 0), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(actual["pooled_projections"], pooled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [Name.WAN], indirect=True)
def test_one_token_of_padding_counts_in_training_as_all_that_the_pipeline_adds(name: Name, pipe: Any) -> None:
    """Texts of a dozen tokens give what the pipeline's of 512 give, which cross-attention sees to the last."""
    short = encoded(name, pipe)["encoder_hidden_states"]
    with torch.no_grad():
        whole, _ = pipe.encode_prompt(CAPTIONS, max_sequence_length=512, do_classifier_free_guidance=False)
        assert not whole[:, short.shape[1] - 1 :].any()
        torch.testing.assert_close(short, whole[:, : short.shape[1]], rtol=1e-4, atol=1e-4)
        inputs = {"hidden_states": torch.randn(3, 16, 5, 4, 6), "timestep": torch.tensor([3.0, 500.0, 999.0])}
        wanted = pipe.transformer(**inputs, encoder_hidden_states=whole, return_dict=False)[0]
        cut = pipe.transformer(**inputs, encoder_hidden_states=short, return_dict=False)[0]
        FAMILIES[name].prepare(pipe.transformer, FAMILIES[name].tokenise(pipe, CAPTIONS))
        actual = pipe.transformer(**inputs, encoder_hidden_states=short, return_dict=False)[0]
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    assert float((cut - wanted).abs().max()) > 1e-2


def test_the_tokenizer_of_wan_knows_every_word_of_the_captions() -> None:
    words = {word for seed in range(300) for word in clips.make(seed).caption.split()}
    ids = wan.tokenizer()([*sorted(words), "", "Ж"]).input_ids
    assert {len(each) for each in ids[:-2]} == {2}  # the word and the end
    assert ids[-2] == [1]
    assert 2 in ids[-1]


def test_matrices_of_one_shape_are_moved_together_as_each_alone() -> None:
    torch.manual_seed(0)
    shapes = ((16, 16), (40, 16), (16, 16), (16, 40))
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(value.detach().clone()) for value in ours]
    optimisers = (
        muon.Muon(ours, lr=0.1, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimiser in optimisers:
            optimiser.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=5e-3)  # torch's is in bfloat16; a step is 0.08 to 0.13


def test_times_lie_between_clean_and_noise_and_lean_to_noise() -> None:
    times = train_transformer.draw_times(4096, torch.Generator().manual_seed(0))
    assert 0 < times.min() < times.max() < 1
    assert 0.6 < times.mean() < 0.8


def test_the_vae_in_one_piece_is_the_vae(name: Name, vae: Any) -> None:
    """That of Wan goes a latent frame at a time, training doesn't. The other blends parts from 17 frames on."""
    kind, num_frames = FAMILIES[name], 17 if name is Name.WAN else 13
    pixels = train_vae.batch_of(range(2))[:, :, :num_frames]
    with torch.no_grad():
        encoded = vae.encode(pixels).latent_dist
        moments = kind.moments(vae, pixels)
        torch.testing.assert_close(moments, encoded.parameters, rtol=1e-4, atol=1e-4)
        assert moments[:, :16].shape == train_vae.latent_shape(2, num_frames)
        decoded = vae.decode(encoded.mode()).sample
        torch.testing.assert_close(
            kind.pixels(vae, encoded.mode()).clamp(-1, 1), decoded.clamp(-1, 1), rtol=1e-4, atol=1e-4
        )


def test_measuring_the_latents_changes_no_reconstruction(name: Name, vae: Any) -> None:
    kind, vae = FAMILIES[name], copy.deepcopy(vae)
    pixels = train_vae.batch_of(range(2))
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        train_vae.scale_latents(kind, vae)
        after = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        many = kind.normalised(vae, vae.encode(train_vae.batch_of(range(64))).latent_dist.mode())
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert float(many.std()) == pytest.approx(1, abs=0.2)
    assert float(many.mean()) == pytest.approx(0, abs=0.2)


def test_kernels_of_convolutions_are_trained_as_matrices_in_their_own_memory(vae: Any) -> None:
    vae = train_vae.channels_last(copy.deepcopy(vae))
    matrices = train_vae.kernels_as_matrices(vae)
    assert len(matrices) > 20
    for kernel, matrix in matrices.items():
        assert torch.equal(train_vae.as_matrix(kernel), matrix)
        assert kernel.data_ptr() == matrix.data_ptr()


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


def test_larger_clips_show_the_same() -> None:
    """Four pixels in the place of one hold what that one did."""
    clip = clips.make(5)
    small, large = clip.frames(), clip.frames(4)
    assert large.shape == (17, 128, 192, 3)
    pooled = large.reshape(17, 32, 4, 48, 4, 3).mean(axis=(2, 4))
    assert np.abs(pooled - small).mean() < 2e-3


def test_finer_patches_begin_where_larger_ones_ended(pipe: Any, name: Name) -> None:
    """Where the values of a patch are alike, embedding and output are what they were."""
    kind = FAMILIES[name]
    if name is Name.WAN:
        with pytest.raises(ValueError, match="can't be given finer patches"):
            kind.finer(pipe.transformer)
        return
    fine, latents = kind.finer(pipe.transformer), torch.randn(1, 16, 2, 2, 3)
    embed, embed_fine = pipe.transformer.x_embedder, fine.x_embedder
    alike = latents.repeat_interleave(2, 3).repeat_interleave(2, 4)
    torch.testing.assert_close(embed_fine(latents), embed(alike))
    hidden = torch.randn(1, 12, fine.proj_out.in_features)
    patches = pipe.transformer.proj_out(hidden).unflatten(-1, (16, 4)).mean(dim=-1)
    torch.testing.assert_close(fine.proj_out(hidden), patches)
