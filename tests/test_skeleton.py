"""Pipelines without weights call their transformers as the pipelines themselves do, and say why where they can't."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)
from typer.testing import CliRunner

from hvcompile.app import cli
from hvcompile.app.skeleton import skeleton, transformer_call
from hvcompile.app.stand_ins import TextEncoder, give_zeros
from hvcompile.errors import InputError

WIDTH = 16
PROMPT = "a cat walks on the grass"


def t5_tokenizer() -> Any:
    words = [(f"▁{word}", -1.0) for word in PROMPT.split()]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=special + words, extra_ids=0, model_max_length=64)


def t5(kind: Any, config: Any) -> Any:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return kind(config(vocab_size=32, feed_forward_proj="gated-gelu", **sizes))


def wan() -> Any:
    # ``expand_timesteps``, of Wan 2.2, stands in the index beside the parts: a timestep a token
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(UMT5EncoderModel, UMT5Config),
        vae=diffusers.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=diffusers.WanTransformer3DModel(
            **{"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": WIDTH, "freq_dim": 32, "ffn_dim": 32},
            **{"num_layers": 3, "rope_max_seq_len": 32},
        ),
        expand_timesteps=True,
    )


def mochi() -> Any:
    channels = {f"{part}_block_out_channels": (32, 32, 32, 32) for part in ("encoder", "decoder")}
    return diffusers.MochiPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(T5EncoderModel, T5Config),
        vae=diffusers.AutoencoderKLMochi(**channels, layers_per_block=(1, 1, 1, 1, 1)),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=diffusers.MochiTransformer3DModel(
            **{"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 16},
            **{"text_embed_dim": WIDTH, "time_embed_dim": 4},
        ),
    )


def cogvideox() -> Any:
    return diffusers.CogVideoXPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(T5EncoderModel, T5Config),
        vae=diffusers.AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
        transformer=diffusers.CogVideoXTransformer3DModel(
            **{"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4},
            **{"text_embed_dim": WIDTH, "num_layers": 2, "sample_width": 2, "sample_height": 2, "sample_frames": 9},
        ),
    )


SIZES = {"num_frames": 13, "height": 32, "width": 64}


class SeenError(Exception):
    """A pipeline has called its transformer."""


def real_call(pipe: Any) -> dict[str, Any]:
    """What a pipeline with its weights calls its transformer with."""
    seen: dict[str, Any] = {}

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        assert not args
        seen.update(kwargs)
        raise SeenError

    pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    with pytest.raises(SeenError):
        pipe(PROMPT, **SIZES)
    return seen


def described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.stride()
    return tuple(map(described, value)) if isinstance(value, (tuple, list)) else value


@pytest.mark.parametrize("build", [wan, mochi, cogvideox])
def test_it_calls_its_transformer_as_the_pipeline_does(build: Callable[[], Any], tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    args, kwargs = transformer_call(skeleton(str(tmp_path), torch.float32), PROMPT, SIZES)
    real = real_call(build())
    assert args == ()
    assert {name: described(item) for name, item in kwargs.items()} == {
        name: described(item) for name, item in real.items()
    }
    assert all(item.is_meta for item in kwargs.values() if isinstance(item, torch.Tensor))


@pytest.mark.parametrize(("build", "blocks"), [(wan, "blocks.0 .. blocks.2"), (mochi, "transformer_blocks.1")])
def test_it_is_explained(build: Callable[[], Any], blocks: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    size = [word for name, value in SIZES.items() for word in (f"--{name.removeprefix('num_')}", str(value))]
    done = CliRunner().invoke(cli.app, ["explain", str(tmp_path), *size])
    assert done.exit_code == 0, done.output
    assert blocks in done.stdout
    assert done.stderr == ""


def test_what_fails_is_named_and_sizes_are_blamed_where_they_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wan().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"in check_inputs: .*32.*; check the sizes given, or use hvcompile.explain"):
        transformer_call(skeleton(str(tmp_path)), PROMPT, {"height": 41})
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "knows", staticmethod(lambda _: False))  # its real kind computes on values
        pipe = skeleton(str(tmp_path))
    with pytest.raises(InputError, match=r"in its text_encoder \(a UMT5EncoderModel\): .*meta tensors; use") as caught:
        transformer_call(pipe, PROMPT, SIZES)
    assert "sizes" not in str(caught.value)


CLIP = CLIPTextConfig(
    **{"vocab_size": 32, "hidden_size": 24, "projection_dim": 40, "intermediate_size": 8, "num_hidden_layers": 3},
    **{"num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2},
)
LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=24, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2, pad_token_id=0
)


@pytest.mark.parametrize(
    ("kind", "config"),
    [(CLIPTextModel, CLIP), (CLIPTextModelWithProjection, CLIP), (LlamaModel, LLAMA), (LlamaForCausalLM, LLAMA)],
)
def test_a_text_encoder_gives_what_the_real_one_does(kind: Any, config: Any) -> None:
    real = kind(config).to(torch.bfloat16)
    ids, mask = torch.tensor([[1, 5, 6, 2]] * 2), torch.ones(2, 4, dtype=torch.long)
    with torch.no_grad():
        wanted = real(ids, attention_mask=mask, output_hidden_states=True)
    assert TextEncoder.knows(config)
    given = TextEncoder(kind.__name__, config, torch.bfloat16)(ids, attention_mask=mask, output_hidden_states=True)
    for name in ("text_embeds", "last_hidden_state", "pooler_output", "logits", "hidden_states"):
        if hasattr(wanted, name):
            assert described(getattr(given, name)) == described(getattr(wanted, name)), name
    assert described(given[0]) == described(wanted[0])


def test_another_part_gives_zeros_where_it_would_give_meta_tensors() -> None:
    with torch.device("meta"):
        part = give_zeros(torch.nn.Linear(4, 6))
    result = part(torch.ones(2, 4))
    assert torch.equal(result, torch.zeros(2, 6))
    assert not result.is_meta
