"""Compiled by Inductor, against eager diffusers and diffusers' own first-block cache.

Slow, because it compiles: every compilation is shared by all that a test can ask of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracle import STEPS, denoise, diffusers_cached, first, hvfast, relative_error, timesteps
from slow import SLOW

import hvcompile
from hvcompile.torch_private import lowering

pytestmark = pytest.mark.xdist_group("oracle")  # one tiny pipeline for all of them

SEEDS = (0, 1, 2)


def last_reused(model: Any) -> bool:
    return hvcompile.stats(model).steps[-1].reused


@pytest.fixture
def lowerings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the calls of Inductor, and of AOTAutograd where that is what lowers."""
    calls: list[int] = []

    def counting(original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(module: Any, inputs: Any) -> Any:
            calls.append(len(inputs))
            return original(module, inputs)

        return counted

    for name in ("inductor", "aot"):
        monkeypatch.setitem(lowering.LOWERINGS, name, counting(lowering.LOWERINGS[name]))
    return calls


@pytest.fixture(scope="module")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from hvcompile.app import pipelines, tiny

    directory: Path = tmp_path_factory.mktemp("tiny")
    tiny.write(directory)
    return pipelines.load(str(directory)).pipe


def prompt_inputs(pipe: Any, prompt: str, seed: int) -> dict[str, Any]:
    """What the pipeline hands its transformer for this prompt, with noise of this seed."""
    with torch.no_grad():
        embeds, pooled, mask = pipe.encode_prompt(prompt=prompt)
    noise = torch.randn(1, pipe.transformer.config.in_channels, 3, 8, 10, generator=torch.Generator().manual_seed(seed))
    return {
        "hidden_states": noise,
        "timestep": torch.zeros(1),
        "encoder_hidden_states": embeds,
        "encoder_attention_mask": mask,
        "pooled_projections": pooled,
        "guidance": torch.tensor([6000.0]),
    }


@pytest.mark.parametrize(
    ("threshold", "lower", "seeds"),
    [
        (0.08, "inductor", SEEDS),
        (0.05, "eager", SEEDS[:1]),
        (0.15, "eager", SEEDS[:1]),
        pytest.param(0.05, "inductor", SEEDS, marks=SLOW),
        pytest.param(0.15, "inductor", SEEDS, marks=SLOW),
    ],
)
def test_tiny_pipeline_decides_as_diffusers_does(
    tiny_pipeline: Any, threshold: float, lower: str, seeds: tuple[int, ...], lowerings: list[int]
) -> None:
    """30 steps, three seeds with a prompt each: equal hit/miss sequences, outputs to 1e-3 relative."""
    model = copy.deepcopy(tiny_pipeline.transformer)
    fast = hvfast(model, fullgraph=True, options={"lower": lower, "first_block_cache": {"threshold": threshold}})
    prompts = ["a red circle moves to the left", "snow", "two cats cross a very long bridge at night, slowly"]
    for seed, prompt in zip(seeds, prompts, strict=False):
        inputs = prompt_inputs(tiny_pipeline, prompt, seed)
        blocks = ("transformer_blocks", "single_transformer_blocks")
        expected = diffusers_cached(copy.deepcopy(tiny_pipeline.transformer), inputs, threshold, blocks=blocks)
        actual = denoise(fast, inputs, was_reused=lambda: last_reused(fast))
        assert actual.reused == expected.reused
        assert 0 < sum(actual.reused) < STEPS
        assert relative_error(actual.sample, expected.sample) < 1e-3
    stats = hvcompile.stats(fast)
    # One graph and one call of Inductor for computed and reused steps; prompts of other lengths recompile nothing.
    assert (stats.graphs, stats.recompiles, len(lowerings)) == (1, 0, int(lower == "inductor"))
    assert stats.hits + stats.misses == len(seeds) * STEPS


def test_guidance_halves_decide_as_on_their_own(tiny_pipeline: Any) -> None:
    """A pipeline run with true_cfg_scale, halves apart; each one's calls, replayed in a fresh model, decide alike."""
    pipe = copy.copy(tiny_pipeline)
    cache = {"threshold": 0.1, "guidance": "apart"}
    how = {"fullgraph": True, "options": {"lower": "eager", "first_block_cache": cache}}
    model = copy.deepcopy(tiny_pipeline.transformer)
    calls: list[dict[str, Any]] = []
    reused: list[bool] = []

    class Recorded:
        """Stands in the pipeline for its transformer and keeps what each call was given and decided."""

        def __init__(self) -> None:
            self.fast = hvfast(model, **how)

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        def __call__(self, **inputs: Any) -> Any:
            calls.append(
                {name: held.clone() if isinstance(held, torch.Tensor) else held for name, held in inputs.items()}
            )
            result = self.fast(**inputs)
            reused.append(last_reused(self.fast))
            return result

    recorded = Recorded()
    pipe.transformer = recorded
    size = {"height": 64, "width": 64, "num_frames": 9}
    pipe(
        "a red circle",
        negative_prompt="snow at night",
        true_cfg_scale=4.0,
        num_inference_steps=12,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        **size,
    )
    assert len(calls) == 24
    assert {step.slot for step in hvcompile.stats(recorded.fast).steps} == {0, 1}
    for half in (0, 1):
        torch._dynamo.reset()
        alone = hvfast(copy.deepcopy(model), **how)
        with torch.no_grad():
            for inputs in calls[half::2]:
                alone(**inputs)
        decisions = [step.reused for step in hvcompile.stats(alone).steps]
        assert decisions == reused[half::2]
        assert 0 < sum(decisions) < 12


@pytest.mark.parametrize("lower", ["aot", pytest.param("inductor", marks=SLOW)])
@pytest.mark.parametrize(
    ("name", "threshold", "inverted"), [("cogvideox", 0.8, False), ("mochi", 0.9, True)], ids=["cogvideox", "mochi"]
)
def test_other_families_decide_as_diffusers_does(
    name: str, threshold: float, inverted: bool, lower: str, lowerings: list[int]
) -> None:
    family = zoo.FAMILIES[name]
    options = {"first_block_cache": {"threshold": threshold}, "lower": lower}
    fast = hvfast(family.build(), fullgraph=True, options=options)
    scheduler = timesteps(inverted=inverted)
    for seed in SEEDS:
        inputs = family.inputs(seed)
        expected = diffusers_cached(family.build(), inputs, threshold, blocks=family.blocks, scheduler=scheduler)
        actual = denoise(fast, inputs, scheduler=scheduler, was_reused=lambda: last_reused(fast))
        assert actual.reused == expected.reused
        assert 0 < sum(actual.reused) < STEPS
        assert relative_error(actual.sample, expected.sample) < 1e-3
    stats = hvcompile.stats(fast)
    assert (stats.graphs, stats.recompiles, len(lowerings)) == (1, 0, 1)


# Before 2.13 Inductor asks for the length of Framepack's text, which depends on data.
ASKS_FOR_LENGTHS = torch.torch_version.TorchVersion(torch.__version__) < "2.13"


@pytest.mark.skipif(not ASKS_FOR_LENGTHS, reason="a limitation of Inductor in torch 2.11 and 2.12")
def test_a_length_that_inductor_asks_for_is_an_error_that_says_so() -> None:
    family = zoo.FAMILIES["hunyuan_video_framepack"]
    model, inputs = family.build(), family.inputs(5)
    told = "LoweringError: Inductor of torch .* asks for a length that depends on data.*'lower': 'aot'"
    with torch.no_grad(), pytest.raises(Exception, match=told):
        hvfast(model, fullgraph=True)(**inputs, return_dict=False)
    with torch.no_grad(), pytest.raises(Exception, match="data-dependent"):
        torch.compile(model, fullgraph=True)(**inputs, return_dict=False)


@pytest.mark.parametrize("lower", ["aot", pytest.param("inductor", marks=SLOW)])
@pytest.mark.parametrize(
    "name",
    ["hunyuan_video_i2v_concat", "hunyuan_video_i2v_replace", pytest.param("hunyuan_video_framepack", marks=SLOW)],
)
def test_image_to_video_kinds(name: str, lower: str, lowerings: list[int]) -> None:
    """One graph, one call of what lowers it, computed and reused steps equal to eager to 1e-4 relative."""
    if lower == "inductor" and name == "hunyuan_video_framepack" and ASKS_FOR_LENGTHS:
        pytest.skip("Inductor asks for a length that depends on data")
    family = zoo.FAMILIES[name]
    model, inputs = family.build(), family.inputs(5)
    fast = hvfast(model, fullgraph=True, options={"lower": lower})
    with torch.no_grad():
        expected = first(model(**inputs, return_dict=False))
        for _ in range(2):
            assert relative_error(first(fast(**inputs, return_dict=False)), expected) < 1e-4
    stats = hvcompile.stats(fast)
    assert [step.reused for step in stats.steps] == [False, True]
    assert (stats.graphs, stats.recompiles, len(lowerings)) == (1, 0, 1)


@pytest.mark.parametrize(("dual", "single", "lower"), [(2, 3, "aot"), pytest.param(20, 40, "inductor", marks=SLOW)])
def test_depth_equals_eager_with_the_cache_off(dual: int, single: int, lower: str) -> None:
    """Tiny width, fp32, to 1e-4 relative; HunyuanVideo's own depth where slow tests are asked for."""
    family = zoo.FAMILIES["hunyuan_video"]
    model = family.build(num_layers=dual, num_single_layers=single)
    fast = hvfast(model, fullgraph=True, options={"first_block_cache": False, "lower": lower})
    with torch.no_grad():
        for seed in (0, 7):
            inputs = family.inputs(seed)
            expected = first(model(**inputs, return_dict=False))
            assert relative_error(first(fast(**inputs, return_dict=False)), expected) < 1e-4
    row = hvcompile.stats(fast).journal[0][0]
    lists = f"transformer_blocks x {dual}, single_transformer_blocks x {single}"
    assert row.report.matched == (f"{lists}: {dual + single} blocks share 2 bodies",)


@pytest.mark.parametrize("lower", ["aot", pytest.param("inductor", marks=SLOW)])
def test_shapes_masks_and_batches_in_one_model(lower: str, lowerings: list[int]) -> None:
    """A new shape costs one capture with dynamic sizes; after it, further sizes and any mask cost none."""
    family = zoo.FAMILIES["hunyuan_video"]
    model = family.build()
    fast = hvfast(model, fullgraph=True, options={"lower": lower})

    def check(frames: int, valid: int, seed: int, larger: tuple[int, int] = (0, 0)) -> None:
        inputs = family.inputs(seed)
        batch, channels, _, height, width = inputs["hidden_states"].shape
        shape = (batch, channels, frames, height + larger[0], width + larger[1])
        inputs["hidden_states"] = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        length = inputs["encoder_attention_mask"].shape[1]
        inputs["encoder_attention_mask"] = zoo.partial_mask(length, valid)
        with torch.no_grad():
            expected = first(model(**inputs, return_dict=False))
            for reused in (False, True):
                assert relative_error(first(fast(**inputs, return_dict=False)), expected) < 1e-4
                assert last_reused(fast) is reused

    for frames in (3, 5, 7, 3):
        check(frames, valid=2, seed=frames)
    assert (hvcompile.stats(fast).recompiles, len(lowerings)) == (1, 2)
    for larger in ((2, 4), (6, 2), (0, 0)):  # all three at once: their product is the length, by floor divisions
        check(4, valid=2, seed=sum(larger), larger=larger)
    assert (hvcompile.stats(fast).recompiles, len(lowerings)) == (2, 3)
    for valid in range(1, 7):
        check(5, valid, seed=20 + valid)
    assert (hvcompile.stats(fast).recompiles, len(lowerings)) == (2, 3)
