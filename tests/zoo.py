"""Tiny random-weight configurations of the diffusers transformers, for trying structure recovery on them.

Every family is a model of width about 32 on a few tokens, fp32 on the CPU, with inputs drawn from a seed. All weights
are redrawn, so that nothing the library starts at zero hides a block from the output. Token counts, text lengths and
channel counts are kept unequal, so that shapes do not match by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Family:
    """A model family: how to build a tiny one, what to call it with, and where its trunk is."""

    name: str
    build: Callable[..., torch.nn.Module]
    inputs: Callable[..., dict[str, Any]]
    blocks: tuple[str, ...]
    num_blocks: int


HEAD_DIM = 16
WIDTH = 32
TEXT = 7
TEXT_DIM = 24


class Draw:
    """Draws inputs from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed + 1000)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def timestep(self, batch: int = 1) -> torch.Tensor:
        return self.uniform(batch, low=1.0, high=999.0)

    def angles(self, tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The cosine and sine of rotary angles, each of (tokens, dim), every angle repeated twice."""
        angles = self.normal(tokens, dim // 2).repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()


def partial_mask(length: int, valid: int, batch: int = 1, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A padding mask whose first `valid` positions of `length` are kept."""
    return (torch.arange(length) < valid).expand(batch, length).to(dtype)


def make(cls: Callable[..., torch.nn.Module], **config: Any) -> torch.nn.Module:
    """A model of a class with weights that are random everywhere and the same in every call."""
    torch.manual_seed(0)
    model = cls(**config).eval()
    with torch.no_grad():
        # All are redrawn: some start at zero, and some the library leaves uninitialised.
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape)
            if bool((parameter == 1).all()):
                parameter.add_(noise, alpha=0.1)
            elif parameter.ndim < 2:
                parameter.copy_(noise * 0.1)
            else:
                parameter.copy_(noise * (parameter.shape[0] / max(parameter.numel(), 1)) ** 0.5)
            parameter.requires_grad_(False)
    return model


def builder(class_name: str, **config: Any) -> Callable[..., torch.nn.Module]:
    """A build function for a class of diffusers; its keyword arguments override the configuration."""

    def build(**changes: Any) -> torch.nn.Module:
        import diffusers

        return make(getattr(diffusers, class_name), **(config | changes))

    return build


# HunyuanVideo


def hunyuan_video_config(num_layers: int, num_single_layers: int, width: int) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": width // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        "num_refiner_layers": 1,
        "text_embed_dim": 16,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    }


def build_hunyuan_video(num_layers: int = 2, num_single_layers: int = 3, width: int = WIDTH) -> torch.nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    config = hunyuan_video_config(num_layers, num_single_layers, width)
    return make(HunyuanVideoTransformer3DModel, **config, guidance_embeds=True)


def build_hunyuan_video_i2v_concat(
    num_layers: int = 2, num_single_layers: int = 3, width: int = WIDTH
) -> torch.nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    config = hunyuan_video_config(num_layers, num_single_layers, width) | {"in_channels": 9}
    return make(HunyuanVideoTransformer3DModel, **config, guidance_embeds=False, image_condition_type="latent_concat")


def build_hunyuan_video_i2v_replace(
    num_layers: int = 2, num_single_layers: int = 3, width: int = WIDTH
) -> torch.nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    config = hunyuan_video_config(num_layers, num_single_layers, width)
    return make(HunyuanVideoTransformer3DModel, **config, guidance_embeds=True, image_condition_type="token_replace")


def build_hunyuan_video_framepack(
    num_layers: int = 2, num_single_layers: int = 3, width: int = WIDTH
) -> torch.nn.Module:
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    config = hunyuan_video_config(num_layers, num_single_layers, width)
    return make(
        HunyuanVideoFramepackTransformer3DModel,
        **config,
        guidance_embeds=True,
        has_image_proj=True,
        image_proj_dim=12,
        has_clean_x_embedder=True,
    )


def inputs_hunyuan_video(seed: int = 0, channels: int = 4, guidance: bool = True) -> dict[str, Any]:
    draw = Draw(seed)
    kwargs = {
        "hidden_states": draw.normal(1, channels, 3, 4, 6),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw.normal(1, TEXT, 16),
        "encoder_attention_mask": partial_mask(TEXT, 5),
        "pooled_projections": draw.normal(1, 8),
    }
    if guidance:
        kwargs["guidance"] = draw.uniform(1, low=1000.0, high=8000.0)
    return kwargs


def inputs_hunyuan_video_i2v_concat(seed: int = 0) -> dict[str, Any]:
    return inputs_hunyuan_video(seed, channels=9, guidance=False)


def inputs_hunyuan_video_framepack(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 500)
    # The history is 16 frames at a quarter, 2 at a half and 2 at the full resolution, then come the 3 new ones.
    return inputs_hunyuan_video(seed) | {
        "image_embeds": draw.normal(1, 5, 12),
        "indices_latents": torch.arange(20, 23),
        "latents_clean": draw.normal(1, 4, 2, 4, 6),
        "indices_latents_clean": torch.tensor([0, 19]),
        "latents_history_2x": draw.normal(1, 4, 2, 4, 6),
        "indices_latents_history_2x": torch.arange(17, 19),
        "latents_history_4x": draw.normal(1, 4, 16, 4, 6),
        "indices_latents_history_4x": torch.arange(1, 17),
    }


# CogVideoX


def build_cogvideox(num_layers: int = 3, width: int = WIDTH, **config: Any) -> torch.nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    sizes: dict[str, Any] = {
        "num_attention_heads": width // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 20,
        "text_embed_dim": TEXT_DIM,
        "num_layers": num_layers,
        "sample_width": 6,
        "sample_height": 4,
        "sample_frames": 9,
        "max_text_seq_length": TEXT,
        "use_rotary_positional_embeddings": True,
    }
    return make(CogVideoXTransformer3DModel, **(sizes | config))


def inputs_cogvideox(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 3, 4, 4, 6),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "timestep": draw.integers(1, 1000, 1),
        "image_rotary_emb": draw.angles(3 * 2 * 3, HEAD_DIM),
    }


# Mochi


def build_mochi(num_layers: int = 3, width: int = WIDTH) -> torch.nn.Module:
    from diffusers import MochiTransformer3DModel

    return make(
        MochiTransformer3DModel,
        num_attention_heads=width // HEAD_DIM,
        attention_head_dim=HEAD_DIM,
        num_layers=num_layers,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=20,
        max_sequence_length=TEXT,
    )


def inputs_mochi(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 4, 3, 4, 6),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "timestep": draw.timestep(),
        "encoder_attention_mask": partial_mask(TEXT, 5, dtype=torch.bool),
    }


# Wan and its relatives


WAN: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": HEAD_DIM,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_DIM,
    "freq_dim": 20,
    "ffn_dim": 40,
    "num_layers": 3,
    "rope_max_seq_len": 32,
}
# The image-to-video attention takes all but the last 512 tokens of the context for the image.
WAN_IMAGE: dict[str, Any] = WAN | {"in_channels": 9, "image_dim": 12, "added_kv_proj_dim": WIDTH}
WAN_IMAGE_TEXT = 512


def inputs_wan(seed: int = 0, channels: int = 4, text: int = TEXT) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, channels, 3, 4, 6),
        "timestep": draw.integers(1, 1000, 1),
        "encoder_hidden_states": draw.normal(1, text, TEXT_DIM),
    }


def inputs_wan_ti2v(seed: int = 0) -> dict[str, Any]:
    # Wan 2.2 gives every token its own timestep: the first frame, here 6 tokens, is clean.
    step = Draw(seed + 500).integers(1, 1000, 1, 1)
    return inputs_wan(seed) | {"timestep": torch.cat([torch.zeros_like(step).expand(1, 6), step.expand(1, 12)], dim=1)}


def inputs_wan_i2v(seed: int = 0) -> dict[str, Any]:
    image = Draw(seed + 500).normal(1, 5, 12)
    return inputs_wan(seed, channels=9, text=WAN_IMAGE_TEXT) | {"encoder_hidden_states_image": image}


def inputs_wan_vace(seed: int = 0) -> dict[str, Any]:
    return inputs_wan(seed) | {"control_hidden_states": Draw(seed + 500).normal(1, 6, 3, 4, 6)}


def inputs_wan_animate(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 500)
    return inputs_wan(seed, channels=12, text=WAN_IMAGE_TEXT) | {
        "encoder_hidden_states_image": draw.normal(1, 5, 12),
        "pose_hidden_states": draw.normal(1, 4, 2, 4, 6),
        "face_pixel_values": draw.normal(1, 3, 5, 16, 16),
    }


def inputs_skyreels_v2_forcing(seed: int = 0) -> dict[str, Any]:
    timestep = Draw(seed + 500).integers(1, 1000, 1, 3)
    return inputs_wan(seed) | {"timestep": timestep, "enable_diffusion_forcing": True, "fps": [1]}


# LTX


def inputs_ltx(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 18, 4),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "timestep": draw.timestep(),
        "encoder_attention_mask": partial_mask(TEXT, 5),
        "num_frames": 3,
        "height": 2,
        "width": 3,
    }


def inputs_ltx23(seed: int = 0) -> dict[str, Any]:
    return inputs_ltx2(seed) | {"sigma": Draw(seed + 700).timestep(), "use_cross_timestep": True}


def inputs_ltx2(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 500)
    return inputs_ltx(seed) | {
        "audio_hidden_states": draw.normal(1, 5, 6),
        "audio_encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "audio_encoder_attention_mask": partial_mask(TEXT, 5),
        "audio_num_frames": 5,
    }


# Flux and its relatives


FLUX: dict[str, Any] = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_DIM,
    "axes_dims_rope": (4, 6, 6),
}


def grid_ids(height: int, width: int, axes: int = 3) -> torch.Tensor:
    """The position of every image token, (height * width, axes), row and column in the second and third place."""
    ids = torch.zeros(height, width, axes)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None, :]
    return ids.reshape(height * width, axes)


def inputs_flux(seed: int = 0, axes: int = 3, guidance: bool = False, pooled: bool = True) -> dict[str, Any]:
    draw = Draw(seed)
    kwargs = {
        "hidden_states": draw.normal(1, 12, 8),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "timestep": draw.uniform(1, low=0.1),
        "img_ids": grid_ids(3, 4, axes),
        "txt_ids": torch.zeros(TEXT, axes),
    }
    if pooled:
        kwargs["pooled_projections"] = draw.normal(1, 10)
    if guidance:
        kwargs["guidance"] = draw.uniform(1, low=1.0, high=8.0)
    return kwargs


def inputs_flux_guided(seed: int = 0) -> dict[str, Any]:
    return inputs_flux(seed, guidance=True)


def inputs_flux2(seed: int = 0) -> dict[str, Any]:
    return inputs_flux(seed, axes=4, guidance=True, pooled=False)


def inputs_flux_unpooled(seed: int = 0) -> dict[str, Any]:
    return inputs_flux(seed, pooled=False)


def inputs_chroma(seed: int = 0) -> dict[str, Any]:
    image = torch.ones(1, 12, dtype=torch.bool)
    mask = torch.cat([partial_mask(TEXT, 5, dtype=torch.bool), image], dim=1)
    return inputs_flux_unpooled(seed) | {"attention_mask": mask}


def inputs_bria(seed: int = 0) -> dict[str, Any]:
    return inputs_flux_unpooled(seed) | {"timestep": Draw(seed + 500).timestep()}


def inputs_bria_fibo(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 700)
    return inputs_bria(seed) | {"text_encoder_layers": [draw.normal(1, TEXT, 20) for _ in range(5)]}


def inputs_qwen_image(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 12, 8),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "encoder_hidden_states_mask": partial_mask(TEXT, 5),
        "timestep": draw.uniform(1, low=0.1),
        "img_shapes": [[(1, 3, 4)]],
    }


def inputs_flux_controlnet(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 500)
    return inputs_flux(seed) | {
        "controlnet_block_samples": [draw.normal(1, 12, WIDTH) for _ in range(2)],
        "controlnet_single_block_samples": [draw.normal(1, 12, WIDTH) for _ in range(2)],
    }


def inputs_qwen_image_edit(seed: int = 0) -> dict[str, Any]:
    # The second image is a reference, and keeps timestep zero.
    draw = Draw(seed + 500)
    return inputs_qwen_image(seed) | {"hidden_states": draw.normal(1, 18, 8), "img_shapes": [[(1, 3, 4), (1, 2, 3)]]}


def inputs_hidream(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 4, 6, 6),
        "timesteps": draw.timestep(),
        "encoder_hidden_states_t5": draw.normal(1, TEXT, 20),
        "encoder_hidden_states_llama3": draw.normal(5, 1, TEXT, TEXT_DIM),
        "pooled_embeds": draw.normal(1, 10),
    }


def inputs_hunyuan_image(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 4, 3, 4),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "encoder_attention_mask": partial_mask(TEXT, 5),
        "guidance": draw.uniform(1, low=1000.0, high=8000.0),
    }


def inputs_hunyuan_image_glyphs(seed: int = 0) -> dict[str, Any]:
    return inputs_hunyuan_image(seed) | {
        "encoder_hidden_states_2": Draw(seed + 500).normal(1, 5, 20),
        "encoder_attention_mask_2": partial_mask(5, 3),
    }


# Images with a text stream


def inputs_image(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 4, 4, 6),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "timestep": draw.timestep(),
    }


def inputs_sd3(seed: int = 0) -> dict[str, Any]:
    return inputs_image(seed) | {"pooled_projections": Draw(seed + 500).normal(1, 10)}


def inputs_auraflow(seed: int = 0) -> dict[str, Any]:
    return inputs_image(seed) | {"timestep": Draw(seed + 500).uniform(1, low=0.1)}


def inputs_cogview(seed: int = 0) -> dict[str, Any]:
    size = torch.tensor([[32.0, 48.0]])
    return inputs_image(seed) | {"original_size": size, "target_size": size, "crop_coords": torch.zeros(1, 2)}


def inputs_masked_image(seed: int = 0) -> dict[str, Any]:
    return inputs_image(seed) | {"encoder_attention_mask": partial_mask(TEXT, 5)}


def inputs_square_image(seed: int = 0) -> dict[str, Any]:
    # The positions of these models are computed for a square and interpolated for anything else.
    return inputs_masked_image(seed) | {"hidden_states": Draw(seed + 500).normal(1, 4, 6, 6)}


def inputs_prx(seed: int = 0) -> dict[str, Any]:
    kwargs = inputs_auraflow(seed)
    return kwargs | {"attention_mask": partial_mask(TEXT, 5, dtype=torch.bool)}


def inputs_lumina2(seed: int = 0) -> dict[str, Any]:
    return inputs_masked_image(seed) | {"timestep": Draw(seed + 500).uniform(1, low=0.1)}


def inputs_lumina(seed: int = 0) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    kwargs = inputs_image(seed)
    return kwargs | {
        "timestep": Draw(seed + 500).uniform(1, low=0.1),
        "encoder_mask": partial_mask(TEXT, 5),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(HEAD_DIM, 8, 8),
        "cross_attention_kwargs": {},
    }


def inputs_hunyuan_dit(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 4, 4, 6),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw.normal(1, 5, 12),
        "text_embedding_mask": partial_mask(5, 4),
        "encoder_hidden_states_t5": draw.normal(1, TEXT, TEXT_DIM),
        "text_embedding_mask_t5": partial_mask(TEXT, 5),
        "image_meta_size": draw.uniform(1, 6, low=16.0, high=64.0),
        "style": torch.zeros(1, dtype=torch.int64),
        "image_rotary_emb": draw.angles(2 * 3, HEAD_DIM),
    }


def inputs_dit(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 4, 6, 6),
        "timestep": draw.integers(1, 1000, 1),
        "class_labels": draw.integers(0, 10, 1),
    }


def inputs_omnigen(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    tokens = TEXT + 1 + 2 * 3
    return {
        "hidden_states": draw.normal(1, 4, 4, 6),
        "timestep": draw.uniform(1, low=0.1),
        "input_ids": draw.integers(1, 40, 1, TEXT),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(1, tokens, tokens).tril().index_fill(1, torch.arange(TEXT + 1, tokens), 1.0),
        "position_ids": torch.arange(tokens)[None],
    }


def inputs_z_image(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "x": [draw.normal(4, 1, 4, 6)],
        "t": draw.uniform(1, low=0.1),
        "cap_feats": [draw.normal(TEXT, TEXT_DIM)],
    }


def inputs_flux3(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 12, 8),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "timestep": draw.uniform(1, low=0.1),
        "img_ids": grid_ids(3, 4, axes=4),
        "txt_ids": torch.zeros(TEXT, 4),
        "image_cond_hidden_states": draw.normal(1, 6, 8),
        "image_cond_ids": grid_ids(2, 3, axes=4),
    }


def inputs_krea2(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 12, 8),
        "encoder_hidden_states": draw.normal(1, TEXT, 3, TEXT_DIM),
        "timestep": draw.uniform(1, low=0.1),
        "position_ids": torch.cat([torch.zeros(TEXT, 3), grid_ids(3, 4)]),
        "encoder_attention_mask": partial_mask(TEXT, 5, dtype=torch.bool),
    }


def inputs_ernie_image(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 4, 3, 4),
        "timestep": draw.timestep(),
        "text_bth": draw.normal(1, TEXT, TEXT_DIM),
        "text_lens": torch.tensor([5]),
    }


def inputs_glm_image(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 500)
    return inputs_image(seed) | {
        "prior_token_id": draw.integers(0, 30, 1, 6),
        "prior_token_drop": torch.zeros(1, 6, dtype=torch.bool),
        "target_size": torch.tensor([[32.0, 48.0]]),
        "crop_coords": torch.zeros(1, 2),
    }


def inputs_nucleus_image(seed: int = 0) -> dict[str, Any]:
    return inputs_qwen_image(seed) | {
        "encoder_hidden_states_mask": partial_mask(TEXT, 5, dtype=torch.bool),
        "img_shapes": [(1, 3, 4)],
    }


def inputs_ideogram4(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    positions = torch.cat([torch.arange(TEXT)[:, None].expand(TEXT, 3), grid_ids(3, 4).long() + TEXT])
    return {
        "hidden_states": draw.normal(1, TEXT + 12, 8),
        "timestep": draw.uniform(1, low=0.1),
        "encoder_hidden_states": draw.normal(1, TEXT + 12, TEXT_DIM),
        "position_ids": positions[None],
        "segment_ids": torch.ones(1, TEXT + 12, dtype=torch.int64),
        "indicator": torch.tensor([[3] * TEXT + [2] * 12]),  # 3 marks text, 2 the image
    }


def inputs_bria_fibo2(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 4, 4, 6),
        "timestep": draw.uniform(1, low=0.1),
        "encoder_hidden_states": draw.normal(1, 2, TEXT, TEXT_DIM),
        "context_latents": [draw.normal(1, 4, 4, 4)],
    }


# Other video models


def inputs_anyflow(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 3, 4, 4, 6),
        "timestep": draw.uniform(1, 3, low=1.0, high=999.0),
        "r_timestep": draw.uniform(1, 3, low=1.0, high=999.0),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
    }


def inputs_allegro(seed: int = 0) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    draw = Draw(seed)
    freqs_t, freqs_h, freqs_w, *grids = get_3d_rotary_pos_embed_allegro(18, ((0, 0), (2, 3)), (2, 3), 3)
    positions = torch.cartesian_prod(*(grid.long() for grid in grids)).T.reshape(3, 1, -1)
    return {
        "hidden_states": draw.normal(1, 4, 3, 4, 6),
        "encoder_hidden_states": draw.normal(1, 1, TEXT, TEXT_DIM),
        "timestep": draw.integers(1, 1000, 1),
        "encoder_attention_mask": partial_mask(TEXT, 5),
        "image_rotary_emb": ((freqs_t, freqs_h, freqs_w), tuple(positions)),
    }


def inputs_consisid(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 500)
    return inputs_cogvideox(seed) | {
        "id_cond": draw.normal(1, 10),
        "id_vit_hidden": [draw.normal(1, 4, 12) for _ in range(2)],
    }


def inputs_cogvideox_absolute(seed: int = 0) -> dict[str, Any]:
    kwargs = inputs_cogvideox(seed)
    del kwargs["image_rotary_emb"]
    return kwargs


def inputs_cogvideox_i2v(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 500)
    return inputs_cogvideox(seed) | {
        "hidden_states": draw.normal(1, 4, 8, 4, 6),
        "ofs": torch.full((1,), 2.0),
        "image_rotary_emb": draw.angles(2 * 2 * 3, HEAD_DIM),
    }


def inputs_video(seed: int = 0, square: bool = False) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 4, 3, 6 if square else 4, 6),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "timestep": draw.timestep(),
    }


def inputs_square_video(seed: int = 0) -> dict[str, Any]:
    return inputs_video(seed, square=True)


def inputs_masked_video(seed: int = 0) -> dict[str, Any]:
    return inputs_video(seed) | {"encoder_attention_mask": partial_mask(TEXT, 5)}


def inputs_easyanimate(seed: int = 0) -> dict[str, Any]:
    return inputs_video(seed) | {"encoder_hidden_states_t5": Draw(seed + 500).normal(1, 5, 20)}


def inputs_kandinsky5(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 3, 4, 6, 4),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "timestep": draw.timestep(),
        "pooled_projections": draw.normal(1, 10),
        "visual_rope_pos": (torch.arange(3), torch.arange(2), torch.arange(3)),
        "text_rope_pos": torch.arange(TEXT),
    }


def inputs_kandinsky6(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 3, 4, 6, 4),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "timestep": draw.timestep(),
        "pooled_projections": draw.normal(1, 10),
        "audio_hidden_states": draw.normal(1, 5, 6),
    }


def inputs_hunyuan_video15(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 9, 3, 2, 3),
        "timestep": draw.timestep(),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "encoder_attention_mask": partial_mask(TEXT, 5),
        "encoder_hidden_states_2": draw.normal(1, 5, 20),
        "encoder_attention_mask_2": partial_mask(5, 3),
        "image_embeds": draw.normal(1, 4, 12),
    }


def inputs_helios(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed + 500)
    return inputs_wan(seed) | {
        "indices_hidden_states": torch.arange(19, 22)[None],
        "indices_latents_history_short": torch.arange(18, 19)[None],
        "indices_latents_history_mid": torch.arange(16, 18)[None],
        "indices_latents_history_long": torch.arange(16)[None],
        "latents_history_short": draw.normal(1, 4, 1, 4, 6),
        "latents_history_mid": draw.normal(1, 4, 2, 4, 6),
        "latents_history_long": draw.normal(1, 4, 16, 4, 6),
    }


# Audio


def inputs_stable_audio3(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 4, 10),
        "timestep": draw.uniform(1, low=0.1),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "global_hidden_states": draw.normal(1, 12),
        "encoder_attention_mask": partial_mask(TEXT, 5),
        "local_add_cond": draw.normal(1, 5, 10),
    }


def inputs_ace_step(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 18, 4),
        "timestep": draw.uniform(1, low=0.5),
        "timestep_r": draw.uniform(1, high=0.5),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "context_latents": draw.normal(1, 18, 8),
    }


def inputs_longcat_audio(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 10, 4),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "encoder_attention_mask": partial_mask(TEXT, 5, dtype=torch.bool),
        "timestep": draw.uniform(1, low=0.1),
        "latent_cond": draw.normal(1, 10, 4),
    }


def inputs_stable_audio(seed: int = 0) -> dict[str, Any]:
    draw = Draw(seed)
    return {
        "hidden_states": draw.normal(1, 4, 10),
        "timestep": draw.uniform(1, low=0.1),
        "encoder_hidden_states": draw.normal(1, TEXT, TEXT_DIM),
        "global_hidden_states": draw.normal(1, 1, 12),
        "rotary_embedding": draw.angles(11, HEAD_DIM // 2),
    }


DUAL_SINGLE = ("transformer_blocks", "single_transformer_blocks")
ONE_LIST = ("transformer_blocks",)
PLAIN_LIST = ("blocks",)
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": HEAD_DIM}
CHANNELS: dict[str, Any] = {"in_channels": 4, "out_channels": 4}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("hunyuan_video", build_hunyuan_video, inputs_hunyuan_video, DUAL_SINGLE, 5),
        Family(
            "hunyuan_video_i2v_concat",
            build_hunyuan_video_i2v_concat,
            inputs_hunyuan_video_i2v_concat,
            DUAL_SINGLE,
            5,
        ),
        Family("hunyuan_video_i2v_replace", build_hunyuan_video_i2v_replace, inputs_hunyuan_video, DUAL_SINGLE, 5),
        Family(
            "hunyuan_video_framepack", build_hunyuan_video_framepack, inputs_hunyuan_video_framepack, DUAL_SINGLE, 5
        ),
        Family("cogvideox", build_cogvideox, inputs_cogvideox, ONE_LIST, 3),
        Family("mochi", build_mochi, inputs_mochi, ONE_LIST, 3),
        Family(
            "cogvideox_absolute",
            lambda **config: build_cogvideox(**({"use_rotary_positional_embeddings": False} | config)),
            inputs_cogvideox_absolute,
            ONE_LIST,
            3,
        ),
        Family(
            "cogvideox_i2v",
            lambda **config: build_cogvideox(
                **({"in_channels": 8, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 20} | config)
            ),
            inputs_cogvideox_i2v,
            ONE_LIST,
            3,
        ),
        Family(
            "hunyuan_video15",
            builder(
                "HunyuanVideo15Transformer3DModel",
                **HEADS,
                in_channels=9,
                out_channels=4,
                num_layers=3,
                num_refiner_layers=1,
                text_embed_dim=TEXT_DIM,
                text_embed_2_dim=20,
                image_embed_dim=12,
                rope_axes_dim=(4, 6, 6),
            ),
            inputs_hunyuan_video15,
            ONE_LIST,
            3,
        ),
        Family(
            "motif_video",
            builder(
                "MotifVideoTransformer3DModel",
                **HEADS,
                **CHANNELS,
                num_layers=2,
                num_single_layers=3,
                text_embed_dim=TEXT_DIM,
                rope_axes_dim=(4, 6, 6),
                enable_text_cross_attention_dual=True,
                enable_text_cross_attention_single=True,
            ),
            inputs_masked_video,
            DUAL_SINGLE,
            5,
        ),
        Family(
            "motif_video_decoder",
            builder(
                "MotifVideoTransformer3DModel",
                **HEADS,
                **CHANNELS,
                num_layers=2,
                num_single_layers=5,
                num_decoder_layers=2,
                text_embed_dim=TEXT_DIM,
                rope_axes_dim=(4, 6, 6),
            ),
            inputs_masked_video,
            DUAL_SINGLE,
            7,
        ),
        Family("wan_t2v", builder("WanTransformer3DModel", **WAN), inputs_wan, PLAIN_LIST, 3),
        Family("wan_ti2v", builder("WanTransformer3DModel", **WAN), inputs_wan_ti2v, PLAIN_LIST, 3),
        Family("wan_i2v", builder("WanTransformer3DModel", **WAN_IMAGE), inputs_wan_i2v, PLAIN_LIST, 3),
        Family(
            "wan_vace",
            builder("WanVACETransformer3DModel", **(WAN | {"num_layers": 4}), vace_layers=[0, 2], vace_in_channels=6),
            inputs_wan_vace,
            ("vace_blocks", "blocks"),
            6,
        ),
        Family(
            "wan_animate",
            builder(
                "WanAnimateTransformer3DModel",
                **(WAN_IMAGE | {"in_channels": 12, "num_layers": 4}),
                latent_channels=4,
                motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
                motion_encoder_size=16,
                motion_style_dim=8,
                motion_dim=4,
                motion_encoder_dim=8,
                face_encoder_hidden_dim=16,
                face_encoder_num_heads=2,
                inject_face_latents_blocks=2,
            ),
            inputs_wan_animate,
            PLAIN_LIST,
            4,
        ),
        Family("chronoedit", builder("ChronoEditTransformer3DModel", **WAN_IMAGE), inputs_wan_i2v, PLAIN_LIST, 3),
        Family("skyreels_v2", builder("SkyReelsV2Transformer3DModel", **WAN), inputs_wan, PLAIN_LIST, 3),
        Family(
            "skyreels_v2_forcing",
            builder("SkyReelsV2Transformer3DModel", **WAN, inject_sample_info=True, num_frame_per_block=3),
            inputs_skyreels_v2_forcing,
            PLAIN_LIST,
            3,
        ),
        Family(
            "helios",
            builder(
                "HeliosTransformer3DModel",
                **{key: value for key, value in WAN.items() if key != "rope_max_seq_len"},
                rope_dim=(4, 6, 6),
            ),
            inputs_helios,
            PLAIN_LIST,
            3,
        ),
        Family(
            "ltx",
            builder(
                "LTXVideoTransformer3DModel",
                **HEADS,
                **CHANNELS,
                cross_attention_dim=WIDTH,
                num_layers=3,
                caption_channels=TEXT_DIM,
            ),
            inputs_ltx,
            ONE_LIST,
            3,
        ),
        Family(
            "ltx2",
            builder(
                "LTX2VideoTransformer3DModel",
                **HEADS,
                **CHANNELS,
                cross_attention_dim=WIDTH,
                audio_in_channels=6,
                audio_out_channels=6,
                audio_num_attention_heads=2,
                audio_attention_head_dim=8,
                audio_cross_attention_dim=16,
                num_layers=3,
                caption_channels=TEXT_DIM,
            ),
            inputs_ltx2,
            ONE_LIST,
            3,
        ),
        Family(
            "ltx23",
            builder(
                "LTX2VideoTransformer3DModel",
                **HEADS,
                **CHANNELS,
                cross_attention_dim=WIDTH,
                audio_in_channels=6,
                audio_out_channels=6,
                audio_num_attention_heads=2,
                audio_attention_head_dim=8,
                audio_cross_attention_dim=16,
                num_layers=3,
                caption_channels=TEXT_DIM,
                gated_attn=True,
                cross_attn_mod=True,
                audio_gated_attn=True,
                audio_cross_attn_mod=True,
                rope_type="split",
            ),
            inputs_ltx23,
            ONE_LIST,
            3,
        ),
        Family(
            "allegro",
            builder(
                "AllegroTransformer3DModel",
                num_attention_heads=2,
                attention_head_dim=18,
                in_channels=4,
                out_channels=4,
                num_layers=3,
                cross_attention_dim=36,
                sample_height=4,
                sample_width=6,
                sample_frames=3,
                caption_channels=TEXT_DIM,
            ),
            inputs_allegro,
            ONE_LIST,
            3,
        ),
        Family(
            "consisid",
            builder(
                "ConsisIDTransformer3DModel",
                **HEADS,
                **CHANNELS,
                time_embed_dim=20,
                text_embed_dim=TEXT_DIM,
                num_layers=4,
                sample_width=6,
                sample_height=4,
                sample_frames=9,
                max_text_seq_length=TEXT,
                use_rotary_positional_embeddings=True,
                is_train_face=True,
                cross_attn_dim_head=8,
                cross_attn_num_heads=2,
                LFE_id_dim=10,
                LFE_vit_dim=12,
                LFE_depth=2,
                LFE_dim_head=6,
                LFE_num_heads=2,
                LFE_num_id_token=2,
                LFE_num_querie=3,
                LFE_output_dim=21,
                LFE_num_scale=2,
            ),
            inputs_consisid,
            ONE_LIST,
            4,
        ),
        Family(
            "easyanimate",
            builder(
                "EasyAnimateTransformer3DModel",
                **HEADS,
                **CHANNELS,
                patch_size=2,
                sample_width=6,
                sample_height=4,
                num_layers=4,
                mmdit_layers=3,
                time_embed_dim=20,
                text_embed_dim=TEXT_DIM,
                text_embed_dim_t5=20,
            ),
            inputs_easyanimate,
            ONE_LIST,
            4,
        ),
        Family(
            "latte",
            builder(
                "LatteTransformer3DModel",
                **HEADS,
                **CHANNELS,
                num_layers=3,
                cross_attention_dim=WIDTH,
                attention_bias=True,
                sample_size=6,
                patch_size=2,
                activation_fn="gelu-approximate",
                num_embeds_ada_norm=1000,
                norm_type="ada_norm_single",
                norm_elementwise_affine=False,
                norm_eps=1e-6,
                caption_channels=TEXT_DIM,
                video_length=3,
            ),
            inputs_square_video,
            ("transformer_blocks", "temporal_transformer_blocks"),
            6,
        ),
        Family(
            "cosmos",
            builder(
                "CosmosTransformer3DModel",
                **HEADS,
                **CHANNELS,
                num_layers=3,
                text_embed_dim=TEXT_DIM,
                adaln_lora_dim=4,
                max_size=(4, 8, 8),
                concat_padding_mask=False,  # resizing the mask takes torchvision
            ),
            inputs_video,
            ONE_LIST,
            3,
        ),
        Family(
            "kandinsky5",
            builder(
                "Kandinsky5Transformer3DModel",
                in_text_dim=TEXT_DIM,
                in_text_dim2=10,
                time_dim=20,
                model_dim=WIDTH,
                ff_dim=40,
                num_visual_blocks=3,
                axes_dims=(4, 6, 6),
            ),
            inputs_kandinsky5,
            ("visual_transformer_blocks",),
            3,
        ),
        Family(
            "kandinsky6",
            builder(
                "Kandinsky6Transformer3DModel",
                in_visual_dim=4,
                out_visual_dim=4,
                in_text_dim=TEXT_DIM,
                in_text_dim2=10,
                time_dim=20,
                model_dim=WIDTH,
                ff_dim=40,
                num_text_blocks=2,
                num_visual_blocks=3,
                axes_dims=(4, 6, 6),
                visual_cond=False,
                in_audio_dim=6,
                out_audio_dim=6,
            ),
            inputs_kandinsky6,
            ("visual_transformer_blocks",),
            3,
        ),
        Family(
            "sana_video",
            builder(
                "SanaVideoTransformer3DModel",
                **HEADS,
                **CHANNELS,
                num_layers=3,
                num_cross_attention_heads=2,
                cross_attention_head_dim=HEAD_DIM,
                cross_attention_dim=WIDTH,
                caption_channels=TEXT_DIM,
                sample_size=6,
                rope_max_seq_len=32,
            ),
            inputs_masked_video,
            ONE_LIST,
            3,
        ),
        Family(
            "sana",
            builder(
                "SanaTransformer2DModel",
                **HEADS,
                **CHANNELS,
                num_layers=3,
                num_cross_attention_heads=2,
                cross_attention_head_dim=HEAD_DIM,
                cross_attention_dim=WIDTH,
                caption_channels=TEXT_DIM,
                sample_size=6,
            ),
            inputs_masked_image,
            ONE_LIST,
            3,
        ),
        Family(
            "flux", builder("FluxTransformer2DModel", **FLUX, pooled_projection_dim=10), inputs_flux, DUAL_SINGLE, 5
        ),
        Family(
            "flux_controlnet",
            builder("FluxTransformer2DModel", **FLUX, pooled_projection_dim=10),
            inputs_flux_controlnet,
            DUAL_SINGLE,
            5,
        ),
        Family(
            "flux_guided",
            builder("FluxTransformer2DModel", **FLUX, pooled_projection_dim=10, guidance_embeds=True),
            inputs_flux_guided,
            DUAL_SINGLE,
            5,
        ),
        Family(
            "flux2",
            builder(
                "Flux2Transformer2DModel",
                **(FLUX | {"axes_dims_rope": (4, 4, 4, 4)}),
                timestep_guidance_channels=20,
            ),
            inputs_flux2,
            DUAL_SINGLE,
            5,
        ),
        Family(
            "chroma",
            builder(
                "ChromaTransformer2DModel",
                **FLUX,
                approximator_num_channels=16,
                approximator_hidden_dim=40,
                approximator_layers=2,
            ),
            inputs_chroma,
            DUAL_SINGLE,
            5,
        ),
        Family("bria", builder("BriaTransformer2DModel", **FLUX), inputs_bria, DUAL_SINGLE, 5),
        Family(
            "bria_fibo",
            builder("BriaFiboTransformer2DModel", **FLUX, text_encoder_dim=20),
            inputs_bria_fibo,
            DUAL_SINGLE,
            5,
        ),
        Family(
            "longcat_image", builder("LongCatImageTransformer2DModel", **FLUX), inputs_flux_unpooled, DUAL_SINGLE, 5
        ),
        Family(
            "ovis_image",
            builder("OvisImageTransformer2DModel", **FLUX, out_channels=8),
            inputs_flux_unpooled,
            DUAL_SINGLE,
            5,
        ),
        Family(
            "qwen_image",
            builder(
                "QwenImageTransformer2DModel",
                **HEADS,
                in_channels=8,
                out_channels=2,
                num_layers=3,
                joint_attention_dim=TEXT_DIM,
                axes_dims_rope=(4, 6, 6),
            ),
            inputs_qwen_image,
            ONE_LIST,
            3,
        ),
        Family(
            "qwen_image_edit",
            builder(
                "QwenImageTransformer2DModel",
                **HEADS,
                in_channels=8,
                out_channels=2,
                num_layers=3,
                joint_attention_dim=TEXT_DIM,
                axes_dims_rope=(4, 6, 6),
                zero_cond_t=True,
            ),
            inputs_qwen_image_edit,
            ONE_LIST,
            3,
        ),
        Family(
            "hunyuan_image",
            builder(
                "HunyuanImageTransformer2DModel",
                **HEADS,
                **CHANNELS,
                num_layers=2,
                num_single_layers=3,
                num_refiner_layers=1,
                guidance_embeds=True,
                text_embed_dim=TEXT_DIM,
                rope_axes_dim=(8, 8),
            ),
            inputs_hunyuan_image,
            DUAL_SINGLE,
            5,
        ),
        Family(
            "hunyuan_image_glyphs",
            builder(
                "HunyuanImageTransformer2DModel",
                **HEADS,
                **CHANNELS,
                num_layers=2,
                num_single_layers=3,
                num_refiner_layers=1,
                guidance_embeds=True,
                text_embed_dim=TEXT_DIM,
                text_embed_2_dim=20,
                rope_axes_dim=(8, 8),
            ),
            inputs_hunyuan_image_glyphs,
            DUAL_SINGLE,
            5,
        ),
        Family(
            "hidream",
            builder(
                "HiDreamImageTransformer2DModel",
                **HEADS,
                **CHANNELS,
                patch_size=2,
                num_layers=2,
                num_single_layers=3,
                caption_channels=[20, TEXT_DIM],
                text_emb_dim=10,
                num_routed_experts=2,
                num_activated_experts=1,
                axes_dims_rope=(8, 4, 4),
                max_resolution=(8, 8),
                llama_layers=[0, 1, 2, 3, 4],
            ),
            inputs_hidream,
            ("double_stream_blocks", "single_stream_blocks"),
            5,
        ),
        Family(
            "sd3",
            builder(
                "SD3Transformer2DModel",
                **HEADS,
                **CHANNELS,
                sample_size=8,
                num_layers=3,
                joint_attention_dim=TEXT_DIM,
                caption_projection_dim=WIDTH,
                pooled_projection_dim=10,
                pos_embed_max_size=4,
            ),
            inputs_sd3,
            ONE_LIST,
            3,
        ),
        Family(
            "sd35",
            builder(
                "SD3Transformer2DModel",
                **HEADS,
                **CHANNELS,
                sample_size=8,
                num_layers=5,
                joint_attention_dim=TEXT_DIM,
                caption_projection_dim=WIDTH,
                pooled_projection_dim=10,
                pos_embed_max_size=4,
                dual_attention_layers=(0, 1),
                qk_norm="rms_norm",
            ),
            inputs_sd3,
            ONE_LIST,
            5,
        ),
        Family(
            "auraflow",
            builder(
                "AuraFlowTransformer2DModel",
                **HEADS,
                **CHANNELS,
                sample_size=8,
                num_mmdit_layers=2,
                num_single_dit_layers=3,
                joint_attention_dim=TEXT_DIM,
                caption_projection_dim=WIDTH,
                pos_embed_max_size=16,
            ),
            inputs_auraflow,
            ("joint_transformer_blocks", "single_transformer_blocks"),
            5,
        ),
        Family(
            "cogview3plus",
            builder(
                "CogView3PlusTransformer2DModel",
                **HEADS,
                **CHANNELS,
                num_layers=3,
                text_embed_dim=TEXT_DIM,
                time_embed_dim=20,
                condition_dim=4,
                pos_embed_max_size=8,
                sample_size=8,
            ),
            inputs_cogview,
            ONE_LIST,
            3,
        ),
        Family(
            "cogview4",
            builder(
                "CogView4Transformer2DModel",
                **HEADS,
                **CHANNELS,
                num_layers=3,
                text_embed_dim=TEXT_DIM,
                time_embed_dim=20,
                condition_dim=4,
                pos_embed_max_size=8,
                sample_size=8,
                rope_axes_dim=(8, 8),
            ),
            inputs_cogview,
            ONE_LIST,
            3,
        ),
        Family(
            "pixart",
            builder(
                "PixArtTransformer2DModel",
                **HEADS,
                **CHANNELS,
                num_layers=3,
                cross_attention_dim=WIDTH,
                sample_size=6,
                caption_channels=TEXT_DIM,
            ),
            inputs_square_image,
            ONE_LIST,
            3,
        ),
        Family(
            "dit",
            builder(
                "DiTTransformer2DModel",
                **HEADS,
                **CHANNELS,
                num_layers=3,
                sample_size=6,
                num_embeds_ada_norm=10,
            ),
            inputs_dit,
            ONE_LIST,
            3,
        ),
        Family(
            "hunyuan_dit",
            builder(
                "HunyuanDiT2DModel",
                **HEADS,
                in_channels=4,
                patch_size=2,
                sample_size=6,
                hidden_size=WIDTH,
                num_layers=6,
                cross_attention_dim=12,
                cross_attention_dim_t5=TEXT_DIM,
                pooled_projection_dim=10,
                text_len=5,
                text_len_t5=TEXT,
            ),
            inputs_hunyuan_dit,
            PLAIN_LIST,
            6,
        ),
        Family(
            "lumina2",
            builder(
                "Lumina2Transformer2DModel",
                in_channels=4,
                hidden_size=WIDTH,
                num_layers=3,
                num_refiner_layers=2,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=8,
                axes_dim_rope=(4, 6, 6),
                axes_lens=(32, 16, 16),
                cap_feat_dim=TEXT_DIM,
            ),
            inputs_lumina2,
            ("layers",),
            3,
        ),
        Family(
            "lumina",
            builder(
                "LuminaNextDiT2DModel",
                sample_size=8,
                hidden_size=WIDTH,
                num_layers=3,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=8,
                cross_attention_dim=TEXT_DIM,
            ),
            inputs_lumina,
            ("layers",),
            3,
        ),
        Family(
            "omnigen",
            builder(
                "OmniGenTransformer2DModel",
                hidden_size=WIDTH,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=40,
                num_layers=3,
                pad_token_id=0,
                vocab_size=40,
                rope_scaling={"long_factor": [1.5] * 8, "short_factor": [1.0] * 8, "type": "su"},
                pos_embed_max_size=8,
                time_step_dim=20,
            ),
            inputs_omnigen,
            ("layers",),
            3,
        ),
        Family(
            "z_image",
            builder(
                "ZImageTransformer2DModel",
                in_channels=4,
                dim=WIDTH,
                n_layers=3,
                n_refiner_layers=2,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=TEXT_DIM,
                axes_dims=[4, 6, 6],
                axes_lens=[96, 16, 16],
            ),
            inputs_z_image,
            ("layers",),
            3,
        ),
        Family(
            "prx",
            builder(
                "PRXTransformer2DModel",
                in_channels=4,
                context_in_dim=TEXT_DIM,
                hidden_size=WIDTH,
                num_heads=2,
                depth=3,
                axes_dim=[8, 8],
            ),
            inputs_prx,
            PLAIN_LIST,
            3,
        ),
        Family(
            "stable_audio",
            builder(
                "StableAudioDiTModel",
                **HEADS,
                **CHANNELS,
                sample_size=10,
                num_layers=3,
                num_key_value_attention_heads=1,
                cross_attention_dim=HEAD_DIM,
                time_proj_dim=20,
                global_states_input_dim=12,
                cross_attention_input_dim=TEXT_DIM,
            ),
            inputs_stable_audio,
            ONE_LIST,
            3,
        ),
        Family(
            "stable_audio3",
            builder(
                "StableAudio3DiTModel",
                io_channels=4,
                embed_dim=64,
                depth=3,
                num_heads=2,
                cond_token_dim=TEXT_DIM,
                global_cond_dim=12,
                local_add_cond_dim=5,
                timestep_features_dim=20,
                num_memory_tokens=3,
            ),
            inputs_stable_audio3,
            ONE_LIST,
            3,
        ),
        Family(
            "ace_step",
            builder(
                "AceStepTransformer1DModel",
                hidden_size=WIDTH,
                intermediate_size=40,
                num_hidden_layers=4,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=HEAD_DIM,
                in_channels=12,
                audio_acoustic_hidden_dim=4,
                sliding_window=2,
                encoder_hidden_size=TEXT_DIM,
            ),
            inputs_ace_step,
            ("layers",),
            4,
        ),
        Family(
            "longcat_audio",
            builder(
                "LongCatAudioDiTTransformer",
                dit_dim=WIDTH,
                dit_depth=3,
                dit_heads=2,
                dit_text_dim=TEXT_DIM,
                latent_dim=4,
            ),
            inputs_longcat_audio,
            PLAIN_LIST,
            3,
        ),
        Family(
            "anyflow",
            builder("AnyFlowTransformer3DModel", **WAN),
            inputs_anyflow,
            PLAIN_LIST,
            3,
        ),
        Family(
            "joyimage_edit",
            builder(
                "JoyImageEditTransformer3DModel",
                in_channels=4,
                hidden_size=WIDTH,
                num_attention_heads=2,
                text_dim=TEXT_DIM,
                num_layers=3,
                rope_dim_list=[4, 6, 6],
            ),
            inputs_video,
            ("double_blocks",),
            3,
        ),
        Family(
            "flux3",
            builder(
                "Flux3Transformer2DModel",
                **HEADS,
                in_channels=8,
                cond_in_channels=8,
                num_layers=2,
                num_single_layers=3,
                joint_attention_dim=TEXT_DIM,
                timestep_channels=20,
                axes_dims_rope=(4, 4, 4, 4),
            ),
            inputs_flux3,
            ("txt_mode_blocks", "mode_blocks.image", "mode_blocks.image_cond", "single_transformer_blocks"),
            9,
        ),
        Family(
            "krea2",
            builder(
                "Krea2Transformer2DModel",
                **HEADS,
                in_channels=8,
                num_layers=3,
                num_key_value_heads=1,
                intermediate_size=40,
                timestep_embed_dim=20,
                text_hidden_dim=TEXT_DIM,
                num_text_layers=3,
                text_num_attention_heads=2,
                text_num_key_value_heads=2,
                text_intermediate_size=40,
                axes_dims_rope=(4, 6, 6),
            ),
            inputs_krea2,
            ONE_LIST,
            3,
        ),
        Family(
            "ernie_image",
            builder(
                "ErnieImageTransformer2DModel",
                **CHANNELS,
                hidden_size=WIDTH,
                num_attention_heads=2,
                num_layers=3,
                ffn_hidden_size=40,
                text_in_dim=TEXT_DIM,
                rope_axes_dim=(4, 6, 6),
            ),
            inputs_ernie_image,
            ("layers",),
            3,
        ),
        Family(
            "glm_image",
            builder(
                "GlmImageTransformer2DModel",
                **HEADS,
                **CHANNELS,
                num_layers=3,
                text_embed_dim=TEXT_DIM,
                time_embed_dim=20,
                condition_dim=4,
                prior_vq_quantizer_codebook_size=30,
            ),
            inputs_glm_image,
            ONE_LIST,
            3,
        ),
        Family(
            "nucleus_image",
            builder(
                "NucleusMoEImageTransformer2DModel",
                **HEADS,
                in_channels=8,
                out_channels=2,
                num_layers=6,
                joint_attention_dim=TEXT_DIM,
                axes_dims_rope=(4, 6, 6),
                num_experts=4,
                moe_intermediate_dim=20,
                capacity_factors=2.0,
            ),
            inputs_nucleus_image,
            ONE_LIST,
            6,
        ),
        Family(
            "ideogram4",
            builder(
                "Ideogram4Transformer2DModel",
                **HEADS,
                in_channels=8,
                num_layers=3,
                intermediate_size=40,
                adaln_dim=20,
                llm_features_dim=TEXT_DIM,
                mrope_section=(4, 2, 2),
            ),
            inputs_ideogram4,
            ("layers",),
            3,
        ),
        Family(
            "bria_fibo2",
            builder(
                "BriaFibo2Transformer2DModel",
                in_channels=4,
                dim=WIDTH,
                n_layers=4,
                n_refiner_layers=2,
                n_heads=2,
                cap_feat_dim=TEXT_DIM,
                injection_layer_ids=(1,),
                perceiver_num_layers=1,
                min_num_gist_tokens=5,
                max_num_gist_tokens=5,
                gist_step=5,
                axes_dims=(4, 6, 6),
                axes_lens=(16, 16, 16),
            ),
            inputs_bria_fibo2,
            ("layers",),
            4,
        ),
    )
}
