"""Complete HunyuanVideo pipelines of a few million parameters: a trained one, shipped, and one made in code.

Both are the real diffusers ``HunyuanVideoPipeline`` with real tokenizers, text encoders, VAE and scheduler, each at its
smallest, and are loaded by ``HunyuanVideoPipeline.from_pretrained`` with no line of this project. The trained one
(``DIRECTORY``; examples/tiny_model made it) is the default of the command line. The weights of the other are random and
seeded, so its pictures are abstract: it is for tests and benchmarks, which want other sizes, and no file.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
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
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, LlamaConfig, LlamaModel, LlamaTokenizer

SEED = 1959
"""Seed of all weights."""

_SLOW = 2e-3
"""Radians a timestep unit (of 1000): sinusoids of the timestep much faster than this hardly reach the weights."""

DIRECTORY = Path(__file__).parent / "tiny_hunyuan_video"
"""The trained pipeline, in the layout of diffusers; its README.md is the model card."""

DEFAULTS = {"num_inference_steps": 30, "num_frames": 17, "height": 32, "width": 48}
"""What is asked of the trained pipeline where the user gives nothing: what it was trained on."""

_TEXT = """
a an the and or of in on at to from with without over under into through across behind beside between near by around up
down left right is are was it its his her their this that no not one two three four five six many few some
red orange yellow green blue purple pink white black grey brown golden silver bright dark pale warm cold
small big large tiny huge tall long short round square soft hard old young new wet dry clear
ball box cube circle disc ring star line wave cloud drop spot square triangle cat dog bird fish horse man woman child
person people hand face tree flower grass leaf forest mountain river lake sea beach desert field road street city house
window door room table car train boat plane sky sun moon rain snow wind fire smoke water light shadow night day morning
evening sunset sunrise summer winter
moves moving rises rising falls falling walks walking runs running jumps jumping flies flying swims swimming turns
turning spins spinning bounces bouncing rolls rolling grows growing shrinks shrinking floats floating drifts drifting
shines shining glows glowing burns burning opens closes stands sits slowly quickly gently suddenly
video film photo picture painting drawing scene close view shot camera pan zoom slow motion realistic detailed style
cinematic background foreground
"""
WORDS = tuple(dict.fromkeys(_TEXT.split()))
"""Words that are one token each, besides those of the pipeline's own prompt template."""

_CAPTIONS = """
a and the to over background small big red orange yellow green blue purple white grey black circle square triangle
diamond moves left right up down rises falls bounces slowly quickly
"""
TRAINED_WORDS = frozenset(_CAPTIONS.split())
"""Words of the captions that the shipped pipeline was trained on."""


def unknown_words(prompts: Iterable[str]) -> list[str]:
    """Words of prompts that the shipped pipeline was not trained on, in order, each once, in lower case."""
    words = (word for prompt in prompts for word in re.findall(r"[^\W_]+", prompt.lower()))
    return list(dict.fromkeys(word for word in words if word not in TRAINED_WORDS))


_END_OF_WORD = "</w>"
_SPECIAL = ("<unk>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def write(directory: str | Path, *, seed: int = SEED) -> None:
    """Write the tiny pipeline, in the on-disk layout of diffusers, to ``directory`` (made if absent; about 20 MB)."""
    pipeline(seed=seed).save_pretrained(directory)


def pipeline(*, seed: int = SEED) -> HunyuanVideoPipeline:
    """Build the tiny pipeline in memory: fp32, on the CPU, the same weights every time for one ``seed``."""
    tokenizer, tokenizer_2 = llama_tokenizer(), clip_tokenizer()
    with torch.random.fork_rng(devices=[]):  # the constructors draw from the global generator; the caller's is kept
        text_encoder, text_encoder_2 = llama(tokenizer), clip(tokenizer_2)
        transformer = HunyuanVideoTransformer3DModel(**transformer_config())
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=16, block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4
        )
    generator = torch.Generator().manual_seed(seed)
    for module in (text_encoder, text_encoder_2, transformer, vae):
        initialise(module.eval(), generator)
    return HunyuanVideoPipeline(
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
    )


def transformer_config(num_layers: int = 4, num_single_layers: int = 8, num_attention_heads: int = 8) -> dict[str, Any]:
    """The configuration of a tiny HunyuanVideo transformer, 16 wide a head."""
    return {
        "in_channels": 16,
        "out_channels": 16,
        "num_attention_heads": num_attention_heads,
        "attention_head_dim": 16,
        "num_layers": num_layers,
        "num_single_layers": num_single_layers,
        "num_refiner_layers": 2,
        "mlp_ratio": 4.0,
        "patch_size": 2,
        "patch_size_t": 1,
        "qk_norm": "rms_norm",
        "guidance_embeds": True,
        "text_embed_dim": 64,
        "pooled_projection_dim": 64,
        "rope_axes_dim": (4, 6, 6),
    }


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


def llama_tokenizer() -> LlamaTokenizer:
    """Build a Llama tokenizer: one token a known word, pieces of words otherwise, bytes for every other character.

    The pipeline formats a prompt into its template and drops as many tokens as the template's start has under Llama
    3's tokenizer: 95. Here too, then, the start must be 95 tokens, and it is, with a token for every word and every
    punctuation mark. Llama 3 pads at the end, and HunyuanVideo's mask relies on it; transformers' class would at the
    start.
    """
    start = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0]
    template_words = re.findall(r"\n\n| ?[A-Za-z]+|[^A-Za-z]", re.sub(r"<\|\w+\|>", "", start))
    words = [*template_words, *WORDS, *(word.capitalize() for word in WORDS), *(f" {word}" for word in WORDS)]
    merges = _merges([word.replace(" ", "▁") for word in words])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    alphabet = [chr(code) for code in range(0x21, 0x7F)] + ["\n", "▁"]
    tokenizer = LlamaTokenizer(
        vocab=_vocabulary(_SPECIAL, byte_tokens, alphabet, map("".join, merges)),
        merges=merges,
        unk_token=_SPECIAL[0],
        bos_token=_SPECIAL[1],
        eos_token=_SPECIAL[2],
        pad_token=_SPECIAL[2],
        additional_special_tokens=list(_SPECIAL[3:]),
        add_bos_token=True,
        add_prefix_space=False,
        padding_side="right",
        model_max_length=512,
    )
    length = len(tokenizer(start).input_ids)
    if length != DEFAULT_PROMPT_TEMPLATE["crop_start"]:
        raise RuntimeError(
            f"this diffusers' prompt template starts with {length} tokens of the tiny tokenizer, but the pipeline "
            f"crops {DEFAULT_PROMPT_TEMPLATE['crop_start']}: add or split words in hvcompile.app.tiny.llama_tokenizer"
        )
    return tokenizer


def clip_tokenizer() -> CLIPTokenizer:
    """Build a CLIP tokenizer: lower case, one token a known word, pieces of UTF-8 bytes for all else."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    last = [byte + _END_OF_WORD for byte in alphabet]
    merges = _merges(WORDS, _END_OF_WORD)
    special = ("<|startoftext|>", "<|endoftext|>")
    vocab = _vocabulary(special, alphabet, last, map("".join, merges))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _vocabulary(*groups: Iterable[str]) -> dict[str, int]:
    tokens = dict.fromkeys(itertools.chain(*groups))
    return {token: index for index, token in enumerate(tokens)}


def _merges(words: Sequence[str], end_of_word: str = "") -> list[tuple[str, str]]:
    """Find byte-pair merges, first to be applied first, that make each of ``words`` one token.

    A word is encoded with the merges so far, and merges for what is left apart are added behind them; being last they
    can't change an earlier word. (The trainer of the tokenizers library gives other numbers from run to run.)
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        symbols = [*word[:-1], word[-1] + end_of_word]
        while len(symbols) > 1:
            pairs = list(itertools.pairwise(symbols))
            known = [pair for pair in pairs if pair in ranks]
            pair = min(known, key=ranks.__getitem__) if known else pairs[0]
            ranks.setdefault(pair, len(ranks))
            symbols[pairs.index(pair)] = "".join(pair)
            del symbols[pairs.index(pair) + 1]
    return list(ranks)


def initialise(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Draw all weights of ``module`` anew, in place, in the order of their names, from ``generator`` alone.

    Every matrix keeps the scale of its input (deviation 1 / sqrt(fan-in)), so no block is idle. A trained model changes
    little from one timestep to the next, and the first-block cache lives on that; random weights do not, unless the
    columns that read the fast sinusoids of the timestep are damped.
    """
    for name, parameter in sorted(module.named_parameters()):
        if parameter.ndim < 2:
            torch.nn.init.constant_(parameter, 1.0 if name.endswith("weight") else 0.0)
            continue
        torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()), generator=generator)
        if name.endswith("timestep_embedder.linear_1.weight"):
            half = parameter.shape[1] // 2
            place = torch.arange(half, device=parameter.device) / half
            frequency = torch.exp(-math.log(10_000) * place).repeat(2)  # radians a timestep unit
            damping = 1 / (1 + (frequency / _SLOW) ** 2)
            parameter.data *= damping * math.sqrt(2 * half) / damping.norm()
        elif name.startswith("decoder.conv_out."):
            parameter.data *= 0.4  # keeps the pixels within the displayed range, so that little is clipped
