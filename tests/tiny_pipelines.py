"""Whole pipelines of diffusers with random weights, each at its smallest, to be written to a directory and generated.

Every one has its own kind of transformer, decoder, scheduler and text encoder; tokenizers are those of the embedded
tiny pipeline, whose vocabulary is small. What they draw is noise of a certain texture: here it only counts that each
runs as its class does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zoo
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from hvcompile.app import pipelines, tiny
from hvcompile.app.arguments import call_arguments
from hvcompile.app.generate import Request

TEXT = 24
"""Width of the text's embedding, as the transformers of the zoo take it."""
IMAGE_TOKEN = "<image>"


@dataclass(frozen=True)
class Tiny:
    """A pipeline: how it is built, what the command line asks of it, and what it makes.

    Attributes:
        build: the pipeline in memory.
        fields: of the request, besides the model and the files.
        shape: of what it makes: frames, height, width.
        takes_image: whether it begins with a picture.
        num_denoisers: how many transformers it has.
        recompiles: of the first one: prompts of two lengths, sections of two lengths, an empty negative prompt.

    """

    build: Callable[[], Any]
    fields: dict[str, Any]
    shape: tuple[int, int, int]
    takes_image: bool = False
    num_denoisers: int = 1
    recompiles: int = 0

    def request(self, model: Path, folder: Path, **more: Any) -> Request:
        """What the command line would ask for, lowered eagerly; a picture to begin with is drawn in ``folder``."""
        fields = self.fields | {"prompt": "a red ball", "backend_settings": ("lower=eager",)}
        if self.takes_image:
            fields["image"] = folder / "begin.png"
            ramp = np.linspace(0, 255, 60, dtype=np.uint8)
            Image.fromarray(np.stack(np.broadcast_arrays(ramp, ramp[:40, None], np.uint8(90)), -1)).save(
                fields["image"]
            )
        ending = ".mp4" if self.shape[0] > 1 else ".png"
        return Request(**(fields | more), model=str(model), output=folder / f"{model.name}{ending}")


def drawn(module: Any) -> Any:
    """A module with all weights drawn anew from a seed, in evaluation mode."""
    tiny.initialise(module.eval(), torch.Generator().manual_seed(7))
    return module


def t5(cls: Any = T5EncoderModel, config: Any = T5Config) -> Any:
    tokenizer = tiny.llama_tokenizer()
    sizes = {"d_model": TEXT, "d_kv": 8, "d_ff": 16, "num_heads": 2, "num_layers": 2}
    return drawn(cls(config(vocab_size=len(tokenizer), **sizes)))


def flow_scheduler(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def hunyuan_vae() -> Any:
    from diffusers import AutoencoderKLHunyuanVideo

    return drawn(
        AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
        )
    )


def hunyuan_transformer(cls: str = "HunyuanVideoTransformer3DModel", **config: Any) -> Any:
    sizes = zoo.hunyuan_video_config(2, 2, 32) | {"text_embed_dim": 64, "pooled_projection_dim": 64}
    return zoo.builder(cls, **(sizes | {"guidance_embeds": True} | config))()


def hunyuan_texts() -> dict[str, Any]:
    tokenizer, tokenizer_2 = tiny.llama_tokenizer(), tiny.clip_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": drawn(tiny.llama(tokenizer)),
        "tokenizer_2": tokenizer_2,
        "text_encoder_2": drawn(tiny.clip(tokenizer_2)),
    }


def hunyuan_video() -> Any:
    from diffusers import HunyuanVideoPipeline

    return HunyuanVideoPipeline(
        transformer=hunyuan_transformer(), vae=hunyuan_vae(), scheduler=flow_scheduler(shift=7.0), **hunyuan_texts()
    )


def llava() -> tuple[Any, Any]:
    """A language model that reads pictures, 576 tokens each, and its tokenizer."""
    tokenizer = tiny.llama_tokenizer()
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=1024,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=336, patch_size=14
    )
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image, pad_token_id=tokenizer.pad_token_id
    )
    return drawn(LlavaForConditionalGeneration(config)), tokenizer


def hunyuan_video_i2v(condition: str) -> Callable[[], Any]:
    def build() -> Any:
        from diffusers import HunyuanVideoImageToVideoPipeline

        channels = 9 if condition == "latent_concat" else 4
        transformer = hunyuan_transformer(
            in_channels=channels, image_condition_type=condition, guidance_embeds=condition == "token_replace"
        )
        text_encoder, tokenizer = llava()
        return HunyuanVideoImageToVideoPipeline(
            transformer=transformer,
            vae=hunyuan_vae(),
            scheduler=flow_scheduler(shift=7.0),
            image_processor=CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336),
            **(hunyuan_texts() | {"text_encoder": text_encoder, "tokenizer": tokenizer}),
        )

    return build


def framepack() -> Any:
    from diffusers import HunyuanVideoFramepackPipeline

    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    return HunyuanVideoFramepackPipeline(
        transformer=hunyuan_transformer(
            "HunyuanVideoFramepackTransformer3DModel", image_proj_dim=16, has_image_proj=True, has_clean_x_embedder=True
        ),
        vae=hunyuan_vae(),
        scheduler=flow_scheduler(shift=7.0),
        image_encoder=drawn(SiglipVisionModel(vision)),
        feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
        **hunyuan_texts(),
    )


def cogvideox() -> Any:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline

    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=2, layers_per_block=1, latent_channels=4
    )
    return CogVideoXPipeline(
        tokenizer=tiny.llama_tokenizer(),
        text_encoder=t5(),
        vae=drawn(vae),
        transformer=zoo.build_cogvideox(2, max_text_seq_length=226),
        scheduler=CogVideoXDDIMScheduler(),
    )


def mochi() -> Any:
    from diffusers import AutoencoderKLMochi, MochiPipeline

    vae = AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=(0.0,) * 12,
        latents_std=(1.0,) * 12,
    )
    return MochiPipeline(
        scheduler=flow_scheduler(),
        vae=drawn(vae),
        text_encoder=t5(),
        tokenizer=tiny.llama_tokenizer(),
        transformer=zoo.builder(
            "MochiTransformer3DModel",
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=3,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=TEXT,
            time_embed_dim=20,
            max_sequence_length=256,
        )(),
    )


def wan_vae() -> Any:
    from diffusers import AutoencoderKLWan

    return drawn(
        AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
    )


def wan_transformer(**config: Any) -> Any:
    return zoo.builder("WanTransformer3DModel", **(zoo.WAN | {"text_dim": TEXT, "rope_max_seq_len": 64} | config))()


def wan(num_denoisers: int = 1) -> Callable[[], Any]:
    def build() -> Any:
        from diffusers import WanPipeline

        two = {"transformer_2": wan_transformer(ffn_dim=48), "boundary_ratio": 0.875} if num_denoisers == 2 else {}
        return WanPipeline(
            tokenizer=tiny.llama_tokenizer(),
            text_encoder=t5(UMT5EncoderModel, UMT5Config),
            vae=wan_vae(),
            scheduler=flow_scheduler(shift=5.0),
            transformer=wan_transformer(),
            **two,
        )

    return build


def wan_i2v() -> Any:
    from diffusers import WanImageToVideoPipeline

    return WanImageToVideoPipeline(
        tokenizer=tiny.llama_tokenizer(),
        text_encoder=t5(UMT5EncoderModel, UMT5Config),
        vae=wan_vae(),
        scheduler=flow_scheduler(shift=5.0),
        transformer=wan_transformer(in_channels=12, out_channels=4),
        transformer_2=wan_transformer(in_channels=12, out_channels=4),
        boundary_ratio=0.9,
    )


def ltx() -> Any:
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline

    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    return LTXPipeline(
        scheduler=flow_scheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
        vae=drawn(vae),
        text_encoder=t5(),
        tokenizer=tiny.llama_tokenizer(),
        transformer=zoo.builder(
            "LTXVideoTransformer3DModel",
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=3,
            caption_channels=TEXT,
        )(),
    )


def flux() -> Any:
    from diffusers import AutoencoderKL, FluxPipeline

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    tokenizer = tiny.clip_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        projection_dim=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        eos_token_id=tokenizer.eos_token_id,
    )
    return FluxPipeline(
        scheduler=flow_scheduler(),
        vae=drawn(vae),
        text_encoder=drawn(CLIPTextModel(text)),
        tokenizer=tokenizer,
        text_encoder_2=t5(),
        tokenizer_2=tiny.llama_tokenizer(),
        transformer=zoo.builder(
            "FluxTransformer2DModel",
            patch_size=1,
            in_channels=16,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 6, 6),
            guidance_embeds=True,
        )(),
    )


def qwen_image() -> Any:
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline

    known = tiny.clip_tokenizer()
    tokenizer = Qwen2Tokenizer(vocab=known.get_vocab() | {"<|endoftext|>": len(known)}, merges=[])
    text = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": len(tokenizer) + 8,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            "rope_theta": 1000000.0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return QwenImagePipeline(
        scheduler=flow_scheduler(),
        vae=drawn(vae),
        text_encoder=drawn(Qwen2_5_VLForConditionalGeneration(text)),
        tokenizer=tokenizer,
        transformer=zoo.builder(
            "QwenImageTransformer2DModel",
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        )(),
    )


SMALL: dict[str, Any] = {"height": 32, "width": 48, "steps": 4}
CLIP = SMALL | {"frames": 9}

PIPELINES = {
    "hunyuan_video": Tiny(hunyuan_video, CLIP, (9, 32, 48)),
    "hunyuan_video_i2v_concat": Tiny(hunyuan_video_i2v("latent_concat"), CLIP, (5, 32, 48), takes_image=True),
    "hunyuan_video_i2v_replace": Tiny(hunyuan_video_i2v("token_replace"), CLIP, (9, 32, 48), takes_image=True),
    "framepack": Tiny(
        framepack,
        CLIP | {"call_settings": ("latent_window_size=2", "sampling_type=vanilla")},
        (17, 32, 48),
        takes_image=True,
        recompiles=1,
    ),
    "cogvideox": Tiny(cogvideox, CLIP | {"guidance": 3.0}, (9, 32, 48)),
    "mochi": Tiny(mochi, SMALL | {"frames": 7}, (7, 32, 48)),
    "wan21": Tiny(wan(1), CLIP, (9, 32, 48)),
    "wan22": Tiny(wan(2), CLIP, (9, 32, 48), num_denoisers=2),
    "wan22_i2v": Tiny(wan_i2v, CLIP, (9, 32, 48), takes_image=True, num_denoisers=2),
    "ltx": Tiny(ltx, CLIP | {"width": 64}, (9, 32, 64), recompiles=1),
    "flux": Tiny(flux, SMALL, (1, 32, 48)),
    "qwen_image": Tiny(qwen_image, SMALL | {"true_cfg": 3.0, "negative_prompt": "blue"}, (1, 32, 48), recompiles=1),
}


def write(name: str, directory: Path) -> Path:
    """Write a pipeline in the layout of diffusers; returns its directory."""
    place = directory / name
    PIPELINES[name].build().save_pretrained(place)
    return place


def eager(loaded: pipelines.Loaded, request: Request) -> Any:
    """The frames ``[frames, height, width, 3]`` that a request asks for, made by diffusers alone."""
    output = loaded.pipe(
        prompt=request.prompt,
        generator=torch.Generator().manual_seed(request.seed or 0),
        output_type="np",
        **call_arguments(request, loaded),
    )
    return np.asarray(output.frames[0] if hasattr(output, "frames") else output.images[:1], np.float32)
