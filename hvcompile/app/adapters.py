"""Low-rank adapters from the command line: loaded and fused into the weights before anything is compiled."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from hvcompile.app.pipelines import first_line
from hvcompile.errors import InputError


def fuse(pipe: Any, texts: Sequence[str]) -> None:
    """Fuse adapters into a pipeline's weights.

    Args:
        pipe: a pipeline of diffusers.
        texts: ``place`` or ``place:scale``, the place as ``load_lora_weights`` takes it.

    Raises:
        InputError: peft is not installed, the pipeline takes no adapters, or one can't be loaded.

    """
    if not texts:
        return
    kind = type(pipe).__name__
    if importlib.util.find_spec("peft") is None:
        raise InputError("lora needs peft, which is not installed: pip install peft")
    if not hasattr(pipe, "load_lora_weights"):
        raise InputError(f"lora can't be used: {kind} takes no adapters; leave it out")
    scales = {}
    for number, text in enumerate(texts):
        place, scale = parse(text)
        name = f"lora{number}"
        try:
            pipe.load_lora_weights(place, adapter_name=name)
        except Exception as error:  # every library below raises its own kind; the cause stays attached
            raise InputError(
                f"lora {place!r} can't be loaded into {kind}: {first_line(error)}; give a file or directory of "
                "safetensors, or a hub id, made for this model"
            ) from error
        scales[name] = scale
    pipe.set_adapters(list(scales), adapter_weights=list(scales.values()))
    pipe.fuse_lora(adapter_names=list(scales))
    pipe.unload_lora_weights()


def parse(text: str) -> tuple[str, float]:
    """Read ``place`` or ``place:scale``; raises InputError where what follows the last colon is no scale."""
    place, colon, scale = text.rpartition(":")
    if not colon or "/" in scale:  # no scale, as in an address of the web
        return text, 1.0
    try:
        return place, float(scale)
    except ValueError as error:
        raise InputError(f"lora {text!r}: {scale!r} is no scale: give PATH, or PATH:0.8") from error
