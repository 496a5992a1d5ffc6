"""Tiny configurations of diffusers' transformers that the tests' zoo lacks, for the census alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from zoo import HEADS, ONE_LIST, PLAIN_LIST, TEXT, TEXT_DIM, WAN, WIDTH, Draw, Family, builder


def inputs_anyflow_far(seed: int = 0) -> dict[str, Any]:
    """Three chunks of one frame each, of which only the last has noise."""
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 3, 4, 8, 8),
        "timestep": draw.uniform(1, 3, low=1.0, high=999.0),
        "r_timestep": draw.uniform(1, 3, low=1.0, high=999.0),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "chunk_partition": [1, 1, 1],
    }


def inputs_prior(seed: int = 0) -> dict[str, Any]:
    """An image embedding from a text's."""
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 12),
        "timestep": draw.timestep(),
        "proj_embedding": draw.normal(1, 12),
        "encoder_hidden_states": draw.normal(1, TEXT, 12),
    }


def inputs_temporal(seed: int = 0) -> dict[str, Any]:
    """Three frames, each an element of the batch."""
    draw = Draw(seed)
    return {"hidden_states": draw.normal(3, WIDTH, 4, 6), "num_frames": 3}


def inputs_dreamlite(seed: int = 0) -> dict[str, Any]:
    """A feature map, and a text that it attends to."""
    draw = Draw(seed)
    return {"hidden_states": draw.normal(1, WIDTH, 4, 6), "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM)}


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "anyflow_far",
            builder("AnyFlowFARTransformer3DModel", **WAN, chunk_partition=(1, 1, 1)),
            inputs_anyflow_far,
            PLAIN_LIST,
            3,
        ),
        Family(
            "prior",
            builder("PriorTransformer", **HEADS, num_layers=3, embedding_dim=12, num_embeddings=TEXT),
            inputs_prior,
            ONE_LIST,
            3,
        ),
        Family(
            "temporal",
            builder("TransformerTemporalModel", **HEADS, in_channels=WIDTH, num_layers=3, norm_num_groups=4),
            inputs_temporal,
            ONE_LIST,
            3,
        ),
        Family(
            "dreamlite",
            builder(
                "DreamLiteTransformer2DModel",
                **HEADS,
                in_channels=WIDTH,
                num_layers=3,
                norm_num_groups=4,
                cross_attention_dim=TEXT_DIM,
            ),
            inputs_dreamlite,
            ONE_LIST,
            3,
        ),
    )
}
