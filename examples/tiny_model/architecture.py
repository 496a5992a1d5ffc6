"""The trained tiny HunyuanVideo before training: VAE and transformer; ``hvcompile.app.tiny`` has the text encoders."""

from __future__ import annotations

from typing import Final

from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel

from hvcompile.app import tiny

DIRECTORY: Final = tiny.DIRECTORY
"""Where ``publish.py`` writes the trained pipeline, in the layout of diffusers, and ``check.py`` looks for it."""

SIZE: Final = {"num_frames": 17, "height": 32, "width": 48}
"""Of the clips that it is trained on, as arguments of the pipeline."""


def autoencoder() -> AutoencoderKLHunyuanVideo:
    """Build the VAE, untrained: 16 latent channels, 8 x 8 pixels and 4 frames a latent value."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=16, block_out_channels=(8, 16, 32, 32), layers_per_block=1, norm_num_groups=1
    )


def transformer() -> HunyuanVideoTransformer3DModel:
    """Build the transformer, untrained: 4 dual and 8 single blocks of width 128, every part of the full model."""
    return HunyuanVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=4,
        num_single_layers=8,
        num_refiner_layers=2,
        mlp_ratio=3.0,
        patch_size=2,
        patch_size_t=1,
        qk_norm="rms_norm",
        guidance_embeds=True,
        text_embed_dim=64,
        pooled_projection_dim=64,
        rope_axes_dim=(8, 12, 12),
    )
