"""Blocks whose attention takes graphs, as FlexAttention's masks and scores are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from diffusers.models.attention_dispatch import attention_backend
from oracle import first, hvfast, relative_error
from slow import SLOW
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from toy import Toy, toy_inputs

import hvcompile
from hvcompile.journal import JournalRow

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
ALWAYS = {"first_block_cache": {"threshold": 1e9}}


def row_of(model: Any, name: str) -> JournalRow:
    return next(row for row in hvcompile.stats(model).journal[0] if row.name == name)


class FlexBlock(nn.Module):
    """Attention whose scores fall with the distance, by a slope that is a parameter, under a mask that is given."""

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.attend, self.out = nn.Linear(16, 16), nn.Linear(16, 16)
        self.slope, self.reach = nn.Parameter(torch.tensor(0.3)), reach

    def forward(self, hidden: torch.Tensor, masks: list[BlockMask], time: torch.Tensor) -> torch.Tensor:
        def score(score: torch.Tensor, *at: torch.Tensor) -> torch.Tensor:
            return score - self.slope * (at[2] - at[3]).abs() * self.reach

        # Inductor for CPUs takes no query straight from a product, and adds nothing to what comes out.
        heads = nn.functional.silu(self.attend(hidden))[:, None]
        mixed = flex_attention(heads, heads, heads, score_mod=score, block_mask=masks[self.reach % len(masks)])
        assert isinstance(mixed, torch.Tensor)
        result: torch.Tensor = hidden + 0.2 * (self.out(mixed[:, 0]) + time[:, None])
        return result


class FlexToy(Toy):
    def __init__(self, reaches: tuple[int, ...]) -> None:
        super().__init__(1)
        self.blocks = nn.ModuleList(map(FlexBlock, reaches))


def masks_of(tokens: int, reaches: tuple[int, ...]) -> list[BlockMask]:
    def made(reach: int) -> BlockMask:
        order = torch.arange(tokens) // reach
        return create_block_mask(
            lambda batch, head, query, key: order[query] >= order[key], None, None, tokens, tokens, device="cpu"
        )

    return [made(reach) for reach in reaches]


def steps_of(model: Any) -> list[bool]:
    return [step.reused for step in hvcompile.stats(model).steps]


@pytest.mark.parametrize("lower", ["eager", "aot", pytest.param("inductor", marks=SLOW)])
def test_masks_and_scores_are_part_of_what_a_block_computes(lower: str) -> None:
    """Blocks with other scores or masks have other bodies; those with the same share one, inside a branch too."""
    model = FlexToy((1, 1, 2, 2)).eval()
    inputs = toy_inputs(tokens=128) | {"text": masks_of(128, (3, 5))}
    fast = hvfast(model, fullgraph=True, options={"lower": lower, **ALWAYS})
    with torch.no_grad():
        expected = model(**inputs)
        assert relative_error(fast(**inputs), expected) < 1e-5
        assert relative_error(fast(**inputs), expected) < 1e-5
    assert row_of(fast, "outline").report.matched == ("blocks x 4: 4 blocks share 2 bodies",)
    assert steps_of(fast) == [False, True]
    with torch.no_grad():
        model.get_parameter("blocks.3.slope").mul_(4)
        changed = model(**inputs)
        assert relative_error(changed, expected) > 1e-4
        assert relative_error(fast(**inputs), changed) < 1e-5


def test_a_mask_that_is_an_attribute_of_a_class() -> None:
    class OfClass(FlexBlock):
        mask = masks_of(128, (3,))[0]

        def forward(self, hidden: torch.Tensor, masks: list[BlockMask], time: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden, [self.mask], time)

    model = FlexToy((1, 1, 1)).eval()
    model.blocks = nn.ModuleList(OfClass(1) for _ in range(3))
    inputs = toy_inputs(tokens=128)
    fast = hvfast(model, fullgraph=True, options={"lower": "eager", **ALWAYS})
    with torch.no_grad():
        assert relative_error(fast(**inputs), model(**inputs)) < 1e-5
    assert row_of(fast, "outline").report.matched == ("blocks x 3: 3 blocks share 1 bodies",)


def far_inputs(seed: int, step: int = 0) -> dict[str, Any]:
    draw = zoo.Draw(seed)
    return {
        "hidden_states": draw.normal(1, 3, 4, 8, 8) + 0.01 * step,
        "timestep": draw.uniform(1, 3, low=1.0, high=999.0) * (1 - 0.1 * step),
        "r_timestep": draw.uniform(1, 3, low=1.0, high=999.0) * (1 - 0.1 * step),
        "encoder_hidden_states": draw.normal(1, zoo.TEXT, zoo.TEXT_DIM),
        "chunk_partition": [1, 1, 1],
    }


@pytest.mark.parametrize("lower", ["eager", pytest.param("inductor", marks=SLOW)])
def test_a_causal_video_model(lower: str) -> None:
    """Its blocks share one body; a computed step is eager's, and later steps are reused."""
    chunks: dict[str, Any] = {"full_chunk_limit": 2, "chunk_partition": (1, 1, 1)}
    model: Any = zoo.builder("AnyFlowFARTransformer3DModel", **zoo.WAN)(**chunks)
    given = {"attention_mask": model.build_attention_mask(chunk_partition=[1, 1, 1], height=8, width=8)}
    computed = hvfast(model, fullgraph=True, options={"lower": lower, "first_block_cache": False})
    cached = hvfast(model, fullgraph=True, options={"lower": lower, **ALWAYS})
    with torch.no_grad():
        for step in range(3):
            inputs = far_inputs(5, step) | given
            expected = first(model(**inputs, return_dict=False))
            assert relative_error(first(computed(**inputs, return_dict=False)), expected) < 1e-5
        torch._dynamo.reset()
        for step in range(3):
            inputs = far_inputs(5, step) | given
            found = first(cached(**inputs, return_dict=False))
            if step == 0:
                assert relative_error(found, first(model(**inputs, return_dict=False))) < 1e-5
    assert row_of(cached, "outline").report.matched == ("blocks x 3: 3 blocks share 1 bodies",)
    assert steps_of(cached) == [False, True, True]


@pytest.mark.parametrize("name", ["hunyuan_video", "flux", "qwen_image"])
def test_masks_that_are_made_inside_the_model_are_a_reason(name: str) -> None:
    """diffusers' own backend makes an empty mask in every attention, by torch.vmap."""
    family = zoo.FAMILIES[name]
    model, inputs = family.build(), family.inputs(seed=3)
    fast = hvfast(model, fullgraph=True, options={"lower": "eager"})
    with torch.no_grad(), attention_backend("flex"):
        expected = first(model(**inputs, return_dict=False))
        assert relative_error(first(fast(**inputs, return_dict=False)), expected) < 1e-6
    assert "torch.vmap" in row_of(fast, "outline").report.declined[0][1]
