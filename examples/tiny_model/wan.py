"""The tiny Wan (text to video) before training: tokenizer, text encoder, VAE and transformer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from family import LATENT_CHANNELS, SLOW, Family, damp_clocks, initialise_autoencoder
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from hvcompile.app import tiny

NUM_TEXT_TOKENS: Final = 512
"""What ``WanPipeline`` pads every text to, with zeros that the cross-attention sees like words."""


class Wan(Family):
    """The second family: cross-attention to the text, guidance by two passes, a scheduler of more than one step."""

    pipeline = WanPipeline
    directory = Path(__file__).parents[2] / "tests" / "tiny_wan_video"
    trained = ("transformer", "text_encoder")
    compiles_vae = False  # 0.42 s a step instead of 0.30
    embeds_guidance = False

    def autoencoder(self) -> Any:
        """Build the VAE, with the weights that its training begins with."""
        vae = AutoencoderKLWan(base_dim=8, z_dim=LATENT_CHANNELS, dim_mult=[1, 2, 4, 4], num_res_blocks=1)
        initialise_autoencoder(vae)
        for half in (vae.encoder, vae.decoder):
            # Its norms divide a pixel's channels by their length: no colour may give zeros.
            torch.nn.init.normal_(half.conv_in.bias, std=0.5)
        return vae

    def moments(self, vae: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Mean and log variance of the latents: (batch, 32, latent frames, height, width).

        ``AutoencoderKLWan`` encodes a latent frame at a time and keeps what its causal convolutions saw; all at once
        comes to the same.
        """
        encoder = vae.encoder
        hidden = encoder.conv_in(pixels)
        for layer in encoder.down_blocks:
            hidden = layer(hidden)
            if getattr(layer, "mode", "") == "downsample3d":  # left out by itself where no chunks are kept
                hidden = torch.cat([hidden[:, :, :1], layer.time_conv(hidden)], dim=2)
        hidden = encoder.nonlinearity(encoder.norm_out(encoder.mid_block(hidden)))
        moments: torch.Tensor = vae.quant_conv(encoder.conv_out(hidden))
        return moments

    def pixels(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Decode, without clamping: (batch, 3, frames, height, width), -1 to 1; all at once, as ``moments``."""
        decoder = vae.decoder
        hidden = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                hidden = resnet(hidden)
            for layer in block.upsamplers or ():
                if layer.mode == "upsample3d":  # the first frame stays one frame, and the others do not see it
                    two = layer.time_conv(hidden[:, :, 1:]).unflatten(1, (2, -1))
                    hidden = torch.cat([hidden[:, :, :1], two.movedim(1, 3).flatten(2, 3)], dim=2)
                hidden = layer(hidden)
        pixels: torch.Tensor = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(hidden)))
        return pixels

    def note_statistics(self, vae: Any, latents: torch.Tensor) -> None:
        """Set ``latents_mean`` and ``latents_std``, one number a channel."""
        vae.register_to_config(
            latents_mean=latents.mean(dim=(0, 2, 3, 4)).tolist(), latents_std=latents.std(dim=(0, 2, 3, 4)).tolist()
        )

    def normalised(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the transformer takes them and the pipeline's decoding expects them."""
        mean, std = (
            torch.tensor(numbers, device=latents.device)[:, None, None, None]
            for numbers in (vae.config.latents_mean, vae.config.latents_std)
        )
        return (latents - mean) / std

    def new_pipeline(self, vae: Path) -> Any:
        """Put the trained VAE and the other parts, with the weights that their training begins with, together."""
        words = tokenizer()
        pipe = WanPipeline(
            tokenizer=words,
            text_encoder=text_encoder(words),
            vae=AutoencoderKLWan.from_pretrained(vae),
            scheduler=UniPCMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
            ),
            transformer=transformer(),
        )
        _initialise(pipe.transformer)
        return pipe

    def tokenise(self, pipe: Any, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Tokenise; of the padding that the pipeline adds, at least one token a caption is kept (see ``prepare``)."""
        tokens = pipe.tokenizer(list(captions), padding="longest", return_tensors="pt")
        one = {"input_ids": pipe.tokenizer.pad_token_id, "attention_mask": 0}
        return {name: torch.nn.functional.pad(tokens[name], (0, 1), value=value) for name, value in one.items()}

    def encode_text(self, parts: dict[str, Any], tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Encode as ``WanPipeline.encode_prompt`` does: zeros where there is padding."""
        mask = tokens["attention_mask"]
        states = parts["text_encoder"](tokens["input_ids"], mask).last_hidden_state
        return {"encoder_hidden_states": states * mask[..., None]}

    def is_modulation(self, name: str) -> bool:
        """No layer of a block is: they share one, outside."""
        return False

    def blocks(self, transformer: Any) -> list[torch.nn.Module]:
        """List the transformer's repeated blocks."""
        return list(transformer.blocks)

    def prepare(self, transformer: Any, text: dict[str, torch.Tensor]) -> None:
        """Let the last token of a text, padding always, count as often as the pipeline's padding would repeat it."""
        bias = torch.zeros(text["input_ids"].shape[1])
        bias[-1] = math.log(NUM_TEXT_TOKENS - len(bias) + 1)
        for block in transformer.blocks:
            block.attn2.set_processor(_Biased(bias))

    def finish(self, transformer: Any) -> None:
        """Leave it as training did."""


class _Biased(WanAttnProcessor):  # type: ignore[misc]  # diffusers has no types
    """Attention with a number added to every key's score: log n makes one key count as n alike."""

    def __init__(self, bias: torch.Tensor) -> None:
        super().__init__()
        self.bias = bias[None, None, None]  # (batch, heads, queries, keys)

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Attend as the plain processor does; it has no mask of its own."""
        text = args[0] if args else kwargs["encoder_hidden_states"]
        bias = self.bias.to(hidden_states)
        result: torch.Tensor = super().__call__(attn, hidden_states, text, bias)
        return result


def tokenizer() -> T5Tokenizer:
    """Build a T5 tokenizer: one token a known word, single characters for all else, and the end of the text."""
    words = dict.fromkeys((*tiny.WORDS, *sorted(tiny.TRAINED_WORDS)))
    characters = ["▁", *(chr(code) for code in range(0x21, 0x7F))]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary += [(f"▁{word}", -1.0) for word in words] + [(character, -10.0) for character in characters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=NUM_TEXT_TOKENS)


def text_encoder(words: T5Tokenizer) -> UMT5EncoderModel:
    """Build the text encoder, untrained; T5 has its own way of drawing weights, which is fit to train."""
    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(words), d_model=64, d_kv=16, d_ff=128, num_heads=4, num_layers=2, dropout_rate=0.0)
    )


def transformer() -> WanTransformer3DModel:
    """Build the transformer, untrained: 8 blocks of width 128, every part of the full model."""
    return WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=64,
        ffn_dim=512,
        num_layers=8,
        rope_max_seq_len=64,
    )


@torch.no_grad()
def _initialise(transformer: WanTransformer3DModel) -> None:
    """Draw the starting weights: blocks that do nothing yet, slow clocks, padding that queries look away from.

    Without the last, some fifteen words would count as little as 3 % beside 500 tokens of padding, all zeros, whose
    keys are the bias alone.
    """
    embedder = transformer.condition_embedder
    for layer in (embedder.time_proj, transformer.proj_out, *(block.attn2.to_out[0] for block in transformer.blocks)):
        layer.weight.zero_()
        layer.bias.zero_()
    for layer in (embedder.text_embedder.linear_1, embedder.text_embedder.linear_2):
        layer.weight.normal_(std=layer.in_features**-0.5)
        layer.bias.zero_()
    transformer.scale_shift_table.zero_()
    for block in transformer.blocks:
        block.scale_shift_table.zero_()
        away = torch.randn(block.attn2.inner_dim).sign()
        for layer in (block.attn2.to_q, block.attn2.to_k):
            layer.weight.normal_(std=layer.in_features**-0.5)
        block.attn2.to_q.bias.copy_(away)
        block.attn2.to_k.bias.copy_(-0.3 * away)
    damp_clocks(transformer, SLOW)
