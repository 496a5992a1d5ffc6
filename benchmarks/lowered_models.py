"""Models of the families, as wide as they are published and a few blocks deep, without weights.

Widths, heads and sequence lengths are those that decide what compiles: which kernel takes an attention, what float8 may
touch, how a kernel fits in registers. Depth decides none of that. Everything is on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Inputs = dict[str, Any]


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


def _hunyuan(
    samples: int, *, channels: int = 16, guidance: bool = True, latents: tuple[int, int, int] = (33, 90, 160)
) -> Inputs:
    """129 frames of 1280x720, and 256 tokens of text, some of them padding."""
    inputs = {
        "hidden_states": _empty(samples, channels, *latents),
        "timestep": _empty(samples, dtype=torch.int64),
        "encoder_hidden_states": _empty(samples, 256, 4096),
        "encoder_attention_mask": _empty(samples, 256, dtype=torch.int64),
        "pooled_projections": _empty(samples, 768),
    }
    return inputs | ({"guidance": _empty(samples)} if guidance else {})


def _framepack(samples: int) -> Inputs:
    """9 latent frames of 832x480, the history at three resolutions, and an image."""
    size = (60, 104)
    return _hunyuan(samples, latents=(9, *size)) | {
        "image_embeds": _empty(samples, 729, 1152),
        "indices_latents": _empty(9, dtype=torch.int64),
        "latents_clean": _empty(samples, 16, 2, *size),
        "indices_latents_clean": _empty(2, dtype=torch.int64),
        "latents_history_2x": _empty(samples, 16, 2, *size),
        "indices_latents_history_2x": _empty(2, dtype=torch.int64),
        "latents_history_4x": _empty(samples, 16, 16, *size),
        "indices_latents_history_4x": _empty(16, dtype=torch.int64),
    }


def _cogvideox(samples: int) -> Inputs:
    """49 frames of 720x480 by CogVideoX 5B."""
    frames, height, width = 13, 60, 90
    angles = frames * height // 2 * width // 2
    return {
        "hidden_states": _empty(samples, frames, 16, height, width),
        "encoder_hidden_states": _empty(samples, 226, 4096),
        "timestep": _empty(samples, dtype=torch.int64),
        "image_rotary_emb": tuple(_empty(angles, 64, dtype=torch.float32) for _ in range(2)),
    }


def _mochi(samples: int) -> Inputs:
    """85 frames of 848x480."""
    return {
        "hidden_states": _empty(samples, 12, 15, 60, 106),
        "encoder_hidden_states": _empty(samples, 256, 4096),
        "timestep": _empty(samples, dtype=torch.float32),
        "encoder_attention_mask": _empty(samples, 256, dtype=torch.bool),
    }


def _wan(samples: int) -> Inputs:
    """81 frames of 1280x720 by Wan 14B."""
    return {
        "hidden_states": _empty(samples, 16, 21, 90, 160),
        "timestep": _empty(samples, dtype=torch.int64),
        "encoder_hidden_states": _empty(samples, 512, 4096),
    }


def _ltx(samples: int) -> Inputs:
    """161 frames of 704x480."""
    frames, height, width = 21, 15, 22
    return {
        "hidden_states": _empty(samples, frames * height * width, 128),
        "encoder_hidden_states": _empty(samples, 128, 4096),
        "timestep": _empty(samples, dtype=torch.float32),
        "encoder_attention_mask": _empty(samples, 128, dtype=torch.int64),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def _flux(samples: int) -> Inputs:
    """1024x1024."""
    return {
        "hidden_states": _empty(samples, 64 * 64, 64),
        "encoder_hidden_states": _empty(samples, 512, 4096),
        "pooled_projections": _empty(samples, 768),
        "timestep": _empty(samples),
        "img_ids": _empty(64 * 64, 3),
        "txt_ids": _empty(512, 3),
        "guidance": _empty(samples, dtype=torch.float32),
    }


def _qwen_image(samples: int) -> Inputs:
    """1328x1328, and a prompt of 75 tokens."""
    return {
        "hidden_states": _empty(samples, 83 * 83, 64),
        "encoder_hidden_states": _empty(samples, 75, 3584),
        "encoder_hidden_states_mask": _empty(samples, 75, dtype=torch.int64),
        "timestep": _empty(samples),
        "img_shapes": [[(1, 83, 83)]] * samples,
    }


_DUAL_SINGLE = {"num_layers": 2, "num_single_layers": 3}
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any], Callable[[int], Inputs]]] = {
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {**_DUAL_SINGLE, "guidance_embeds": True}, _hunyuan),
    "HunyuanVideo I2V, concat": (
        "HunyuanVideoTransformer3DModel",
        {**_DUAL_SINGLE, "in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"},
        lambda samples: _hunyuan(samples, channels=33, guidance=False),
    ),
    "HunyuanVideo I2V, replace": (
        "HunyuanVideoTransformer3DModel",
        {**_DUAL_SINGLE, "guidance_embeds": True, "image_condition_type": "token_replace"},
        _hunyuan,
    ),
    "Framepack": (
        "HunyuanVideoFramepackTransformer3DModel",
        {**_DUAL_SINGLE, "guidance_embeds": True, "has_image_proj": True, "has_clean_x_embedder": True},
        _framepack,
    ),
    "CogVideoX": (
        "CogVideoXTransformer3DModel",
        {"num_layers": 3, "num_attention_heads": 48, "use_rotary_positional_embeddings": True},
        _cogvideox,
    ),
    "Mochi": ("MochiTransformer3DModel", {"num_layers": 3}, _mochi),
    "Wan": ("WanTransformer3DModel", {"num_layers": 3}, _wan),
    "LTX": ("LTXVideoTransformer3DModel", {"num_layers": 3}, _ltx),
    "Flux": ("FluxTransformer2DModel", {**_DUAL_SINGLE, "guidance_embeds": True}, _flux),
    "Qwen-Image": ("QwenImageTransformer2DModel", {"num_layers": 3}, _qwen_image),
}
"""By name: diffusers' class, what of its configuration is not the default, and the inputs of so many samples."""


def model_and_inputs(family: str, samples: int = 1) -> tuple[Any, Inputs]:
    """A model of a family and one call's arguments, all on the meta device.

    Weights are in bfloat16, but for those that diffusers keeps in float32 when it loads the model.
    """
    import diffusers

    name, config, inputs = FAMILIES[family]
    with torch.device("meta"):
        model = getattr(diffusers, name)(**config).eval().requires_grad_(False)
        given = inputs(samples)
    kept = model._keep_in_fp32_modules or ()
    for path, parameter in model.named_parameters():
        if not any(part in kept for part in path.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model, {**given, "return_dict": False}
