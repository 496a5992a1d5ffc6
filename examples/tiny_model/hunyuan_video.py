"""The tiny HunyuanVideo before training: VAE and transformer; ``hvcompile.app.tiny`` has the text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from family import LATENT_CHANNELS, SLOW, Family, damp_clocks, initialise_autoencoder

from hvcompile.app import tiny

_SLOW_IN_THE_END = 2e-3
"""Radians a timestep unit beyond which the timestep's sinusoids are damped once more after training."""


class HunyuanVideo(Family):
    """The family of the pipeline that the package ships."""

    pipeline = HunyuanVideoPipeline
    directory = tiny.DIRECTORY
    trained = ("transformer", "text_encoder", "text_encoder_2")
    compiles_vae = True
    embeds_guidance = True

    def autoencoder(self) -> Any:
        """Build the VAE, with the weights that its training begins with."""
        return initialise_autoencoder(
            AutoencoderKLHunyuanVideo(
                latent_channels=LATENT_CHANNELS,
                block_out_channels=(8, 16, 32, 32),
                layers_per_block=1,
                norm_num_groups=1,
            )
        )

    def moments(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Mean and log variance of the latents: (batch, 32, latent frames, height, width)."""
        moments: torch.Tensor = vae._encode(pixels)
        return moments

    def pixels(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Decode, without clamping: (batch, 3, frames, height, width), -1 to 1."""
        pixels: torch.Tensor = vae.decoder(vae.post_quant_conv(latents))
        return pixels

    def note_statistics(self, vae: Any, latents: torch.Tensor) -> None:
        """Give the latents mean zero a channel, and set ``scaling_factor`` so that they have variance one in all.

        The mean moves from the encoder's last convolution into the decoder's first; both have kernels of one, so no
        reconstruction changes.
        """
        mean = latents.mean(dim=(0, 2, 3, 4))
        vae.quant_conv.bias[: len(mean)] -= mean
        vae.post_quant_conv.bias += vae.post_quant_conv.weight.flatten(1) @ mean
        vae.register_to_config(scaling_factor=1 / (latents - mean[:, None, None, None]).std().item())

    def normalised(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the transformer takes them and the pipeline's decoding expects them."""
        scaled: torch.Tensor = latents * vae.config.scaling_factor
        return scaled

    def new_pipeline(self, vae: Path) -> Any:
        """Put the trained VAE and the other parts, with the weights that their training begins with, together."""
        tokenizer, tokenizer_2 = tiny.llama_tokenizer(), tiny.clip_tokenizer()
        pipe = HunyuanVideoPipeline(
            text_encoder=tiny.llama(tokenizer),
            tokenizer=tokenizer,
            transformer=transformer(),
            vae=AutoencoderKLHunyuanVideo.from_pretrained(vae),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=tiny.clip(tokenizer_2),
            tokenizer_2=tokenizer_2,
        )
        self._initialise(pipe)
        return pipe

    @torch.no_grad()
    def _initialise(self, pipe: Any) -> None:
        """Draw the starting weights: words far apart, blocks that do nothing yet (adaptive norms of zero)."""
        for encoder in (pipe.text_encoder, pipe.text_encoder_2):
            for module in encoder.modules():
                if isinstance(module, torch.nn.Embedding):
                    module.weight.normal_()
                elif isinstance(module, torch.nn.Linear):
                    module.weight.normal_(std=module.in_features**-0.5)
        for name, module in pipe.transformer.named_modules():
            if isinstance(module, torch.nn.Linear) and (self.is_modulation(name) or name == "proj_out"):
                module.weight.zero_()
                module.bias.zero_()
        damp_clocks(pipe.transformer, SLOW)

    def tokenise(self, pipe: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tokenise, prompt template and all; padding behind the longest caption is left out, being masked anyway."""
        prompts = [DEFAULT_PROMPT_TEMPLATE["template"].format(caption) for caption in captions]
        llama = pipe.tokenizer(prompts, padding="longest", return_tensors="pt")
        clip = pipe.tokenizer_2(list(captions), padding="longest", return_tensors="pt")
        return {"llama_ids": llama.input_ids, "llama_mask": llama.attention_mask, "clip_ids": clip.input_ids}

    def encode_text(self, parts: dict[str, Any], tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Encode as ``HunyuanVideoPipeline.encode_prompt`` does."""
        mask = tokens["llama_mask"]
        encoded = parts["text_encoder"](tokens["llama_ids"], attention_mask=mask, output_hidden_states=True)
        start = DEFAULT_PROMPT_TEMPLATE["crop_start"]
        return {
            "encoder_hidden_states": encoded.hidden_states[-3][:, start:],
            "encoder_attention_mask": mask[:, start:],
            "pooled_projections": parts["text_encoder_2"](tokens["clip_ids"]).pooler_output,
        }

    def is_modulation(self, name: str) -> bool:
        """Whether a layer of the transformer's blocks computes shifts, scales and gates from the timestep."""
        return "norm" in name and name.endswith(".linear")

    def blocks(self, transformer: Any) -> list[torch.nn.Module]:
        """List the transformer's repeated blocks."""
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    def prepare(self, transformer: Any, text: dict[str, torch.Tensor]) -> None:
        """Leave it as it is: padding is masked."""

    @torch.no_grad()
    def finer(self, transformer: Any) -> Any:
        """Build a transformer with a token for each latent value, whose weights come from one of larger patches.

        Where a patch's values are alike, it begins with the same embedding and the same prediction.
        """
        fine = type(transformer).from_config({**transformer.config, "patch_size": 1})
        weights = transformer.state_dict()
        embedding = "x_embedder.proj.weight"  # (width, channels, 1, rows, columns)
        weights[embedding] = weights[embedding].sum(dim=(3, 4), keepdim=True)
        for name in ("proj_out.weight", "proj_out.bias"):  # (channels x rows x columns, ...)
            weights[name] = weights[name].unflatten(0, (LATENT_CHANNELS, -1)).mean(dim=1)
        fine.load_state_dict(weights)
        return fine

    def finish(self, transformer: Any) -> None:
        """Damp the timestep's fast sinusoids, as its model card says."""
        damp_clocks(transformer, _SLOW_IN_THE_END)


def transformer() -> HunyuanVideoTransformer3DModel:
    """Build the transformer, untrained: 4 dual and 8 single blocks of width 128, every part of the full model."""
    return HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
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
