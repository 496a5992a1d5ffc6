"""The architecture of the trained tiny HunyuanVideo: its parts as they are before training."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel, LlamaTokenizer

DIRECTORY: Final = Path("runs/tiny_hunyuan_video")
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


def llama(tokenizer: LlamaTokenizer) -> LlamaModel:
    """Build the first text encoder, untrained; the pipeline reads the output of its last layer but two."""
    return LlamaModel(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Build the second text encoder, untrained; the pipeline reads its pooled output."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            projection_dim=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
