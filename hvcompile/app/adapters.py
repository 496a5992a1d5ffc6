"""Low-rank adapters from the command line: loaded and fused into the weights before anything is compiled."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from hvcompile.app import quiet
from hvcompile.app.denoisers import denoisers
from hvcompile.app.pipelines import first_line
from hvcompile.errors import InputError


def fuse(pipe: Any, texts: Sequence[str]) -> None:
    """Fuse adapters into the weights of every denoiser, and of the text encoders that they have weights for.

    Args:
        pipe: a pipeline of diffusers.
        texts: ``place`` or ``place:scale``, the place as ``load_lora_weights`` takes it.

    Raises:
        InputError: peft is not installed, the pipeline takes no adapters, or one can't be loaded, fits no weight, or
            fits only in part.

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
            with quiet.hearing("diffusers", *_UNFIT) as messages:
                _load(pipe, place, name)
            foreign = _foreign(pipe, place, name)
        except Exception as error:  # every library below raises its own kind; the cause stays attached
            raise InputError(
                f"lora {place!r} can't be loaded into {kind}: {first_line(error)}; give a file or directory of "
                "safetensors, or a hub id, made for this model"
            ) from error
        if not _adapted(pipe, name):
            raise InputError(f"lora {place!r} fits no weight of {kind}: give one that was made for this model")
        _check_whole(place, kind, messages, foreign)
        scales[name] = scale
    parts = list(dict.fromkeys(part for name in scales for part in _adapted(pipe, name)))
    pipe.set_adapters(list(scales), adapter_weights=list(scales.values()))
    pipe.fuse_lora(components=parts, adapter_names=list(scales))
    pipe.unload_lora_weights()


def _load(pipe: Any, place: str, name: str) -> None:
    """Load an adapter into each denoiser; a second one has to be asked for."""
    pipe.load_lora_weights(place, adapter_name=name)
    for denoiser in list(denoisers(pipe))[1:]:
        pipe.load_lora_weights(place, adapter_name=name, **{f"load_into_{denoiser}": True})


# diffusers 0.42: parts of one line, each with the names of tensors, separated by commas, after its colon.
_UNFIT = ("unexpected keys found in the model: ", "missing keys in the model: ")


def _foreign(pipe: Any, place: str, name: str) -> list[str]:
    """The tensors of an adapter for parts that the pipeline does not have, or loads none into: diffusers skips them."""
    found = pipe.lora_state_dict(place)
    tensors = found[0] if isinstance(found, tuple) else found
    known = {*_adapted(pipe, name), *(["transformer"] if set(_adapted(pipe, name)) & set(denoisers(pipe)) else [])}
    return [key for key in tensors if key.partition(".")[0] not in known and not key.endswith(".alpha")]


def _check_whole(place: str, kind: str, messages: Sequence[str], foreign: Sequence[str]) -> None:
    """Raise InputError where tensors of an adapter had no place, or the adapter lacks some.

    Args:
        place: of the adapter.
        kind: the pipeline's class.
        messages: what diffusers logged while it loaded.
        foreign: tensors that it skipped.

    """
    told = [[name for message in messages for name in _names_after(message, part)] for part in _UNFIT]
    # Of two denoisers, each tells.
    unfit, lacking = list(dict.fromkeys([*told[0], *foreign])), list(dict.fromkeys(told[1]))
    if unfit:
        raise InputError(
            f"lora {place!r} fits {kind} only in part: {len(unfit)} of its tensors have no place there, such as "
            f"{unfit[0]}; give one that was made for this model"
        )
    if lacking:
        raise InputError(
            f"lora {place!r} is not whole: it lacks {len(lacking)} tensors, such as {lacking[0]}; copy or download it "
            "again"
        )


def _names_after(message: str, part: str) -> list[str]:
    """The names that follow a part of a message, up to the end of its sentence."""
    _, found, rest = message.partition(part)
    names = re.split(r"\.(?: |$)", rest, maxsplit=1)[0] if found else ""
    return [name.strip() for name in names.split(",") if name.strip()]


def _adapted(pipe: Any, name: str) -> list[str]:
    """The parts of a pipeline that an adapter was loaded into."""
    return [part for part, model in pipe.components.items() if name in (getattr(model, "peft_config", None) or {})]


def parse(text: str) -> tuple[str, float]:
    """Read ``place`` or ``place:scale``.

    Raises:
        InputError: what follows the last colon is no scale, or the place is a path with nothing at it.

    """
    place, colon, number = text.rpartition(":")
    scale = 1.0
    if not colon or "/" in number:  # no scale, as in an address of the web
        place = text
    else:
        try:
            scale = float(number)
        except ValueError as error:
            raise InputError(f"lora {text!r}: {number!r} is no scale: give PATH, or PATH:0.8") from error
        if not math.isfinite(scale):
            raise InputError(f"lora {text!r}: the scale is {number}: give a finite number")
    looks_like_path = place.startswith(("/", "./", "../", "~")) or place.endswith(".safetensors")
    if looks_like_path and not os.path.exists(os.path.expanduser(place)):
        raise InputError(f"lora {place!r} is not there: give a file or directory of safetensors, or a hub id")
    return os.path.expanduser(place) if looks_like_path else place, scale
