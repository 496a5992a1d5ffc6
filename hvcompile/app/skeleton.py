"""A pipeline without its weights: built from its configuration, to learn how it calls its model.

A checkpoint's configuration files are a few megabytes; its weights are tens of gigabytes and are neither read nor
fetched. Tokenizers and schedulers are real, and text encoders give zeros of the shapes that they would give
(``stand_ins.py``). The transformer is on the meta device. So a call of the pipeline runs as far as the first call of
its transformer in a second or two, whatever the size of the model.
"""

from __future__ import annotations

import importlib
import inspect
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

from hvcompile.app import tiny
from hvcompile.app.grid import Grid
from hvcompile.app.pipelines import DTYPES, check_model, first_line
from hvcompile.app.stand_ins import CPU, TextEncoder, give_zeros, mapped, on_meta
from hvcompile.errors import InputError

# Everything of a repository but its weights: configurations, vocabularies and merges of tokenizers.
_WITHOUT_WEIGHTS = ["*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True, kw_only=True)
class FirstCall:
    """The first call that a pipeline makes of its transformer.

    Attributes:
        pipe: its transformer on the meta device.
        args: positional arguments of the call, all tensors on the meta device.
        kwargs: those by name.
        sizes: of the clip, as the pipeline was asked for it.

    """

    pipe: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    sizes: Mapping[str, int]

    def facts(self) -> dict[str, str]:
        """What was called, in words."""
        facts = {"pipeline": type(self.pipe).__name__, "transformer": type(self.pipe.transformer).__name__}
        clip = [f"{name.removeprefix('num_')} {size}" for name, size in self.sizes.items()]
        return facts | ({"clip": ", ".join(clip)} if clip else {})


def first_call(model: str | None, dtype: str | None, prompt: str | None, sizes: Mapping[str, int | None]) -> FirstCall:
    """Build a pipeline without its weights, and ask it for a clip as far as its transformer.

    Args:
        model: a directory in the layout of diffusers, or a hub id; None for the embedded tiny pipeline.
        dtype: a key of ``pipelines.DTYPES``; None for bfloat16.
        prompt: None for one of ours; its length counts only where the pipeline does not pad.
        sizes: ``num_frames``, ``height`` and ``width``; None leaves one to the pipeline.

    Raises:
        InputError: the request can't be met; the message says why.

    """
    asked = {name: size for name, size in sizes.items() if size is not None}
    if model is None:
        defaults = {name: size for name, size in tiny.DEFAULTS.items() if name in sizes}
        pipe, asked = skeleton(str(tiny.DIRECTORY), DTYPES[dtype or "bfloat16"]), {**defaults, **asked}
    else:
        pipe = skeleton(model, DTYPES[dtype or "bfloat16"])
    grid = {name.removeprefix("num_"): size for name, size in sizes.items()}
    Grid.of(pipe).check(height=grid["height"], width=grid["width"], frames=grid["frames"])
    args, kwargs = transformer_call(pipe, prompt or "a cat walks", asked)
    return FirstCall(pipe=pipe, args=args, kwargs=kwargs, sizes=asked)


class _CallSeenError(Exception):
    """Ends a pipeline's call once its transformer is called."""


def skeleton(model: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Build a pipeline of diffusers without weights: its transformer is on the meta device.

    Args:
        model: a directory in the layout of diffusers, or a hub id, of which all but the weights is fetched.
        dtype: of the modules.

    Raises:
        InputError: no such directory, not a pipeline, a hub id that can't be fetched, or a part that can't be built.

    """
    check_model(model)
    directory = Path(model).expanduser()
    try:
        if not directory.is_dir():
            directory = Path(snapshot_download(model, allow_patterns=_WITHOUT_WEIGHTS))
        index = DiffusionPipeline.load_config(str(directory))
        entries = {name: entry for name, entry in index.items() if isinstance(entry, (list, tuple))}
        parts = {name: _part(directory / name, library, kind, dtype) for name, (library, kind) in entries.items()}
        kind = getattr(diffusers, index["_class_name"])
        settings = {name: item for name, item in index.items() if name not in parts and not name.startswith("_")}
        pipe = _computing_on_cpu(kind)(**parts, **settings)
    except Exception as error:  # every library below raises its own kind; the cause stays attached
        raise InputError(
            f"model {model!r} can't be built from its configuration: {first_line(error)}; check its name and the "
            "network, or download it and give its directory"
        ) from error
    if not isinstance(getattr(pipe, "transformer", None), torch.nn.Module):
        raise InputError(f"model {model!r} is a {type(pipe).__name__}, which has no transformer to explain")
    for part in _parts_around(pipe).values():
        if not isinstance(part, TextEncoder):
            give_zeros(part)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _part(directory: Path, library: str | None, kind: str | None, dtype: torch.dtype) -> Any:
    if library is None or kind is None:
        return None
    made = getattr(importlib.import_module(library), kind)
    if not issubclass(made, torch.nn.Module):
        return made.from_pretrained(str(directory))
    if library == "transformers":
        config = transformers.AutoConfig.from_pretrained(str(directory))
        if TextEncoder.knows(config):
            return TextEncoder(kind, config, dtype)
        with torch.device("meta"):
            module = made(config)
    else:
        with torch.device("meta"):
            module = made.from_config(made.load_config(str(directory)))
    return torch.nn.Module.to(module.eval(), dtype)  # diffusers' own warns of what would stay in float32


def _computing_on_cpu(kind: type) -> Any:
    """A pipeline's class that makes its tensors on the CPU: it asks its modules where, and those hold no values."""
    here = property(lambda _: CPU)
    return type(kind.__name__, (kind,), {"_execution_device": here, "device": here, "__module__": kind.__module__})


def _parts_around(pipe: Any) -> dict[str, torch.nn.Module]:
    """The modules of a pipeline besides its transformer."""
    return {
        name: part
        for name, part in pipe.components.items()
        if name != "transformer" and isinstance(part, torch.nn.Module)
    }


def transformer_call(pipe: Any, prompt: str, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the first call of a skeleton's transformer, on the meta device.

    Args:
        pipe: from ``skeleton``.
        prompt: its length counts only where the pipeline does not pad.
        arguments: of the pipeline's call, such as ``num_frames``.

    Raises:
        InputError: the pipeline does not get that far; the message says where it fails, and why.

    """
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((mapped(on_meta, args), mapped(on_meta, kwargs)))
        raise _CallSeenError

    handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        pipe(prompt, **arguments)
    except _CallSeenError:
        return seen[0]
    except Exception as error:  # whatever a pipeline makes of these arguments
        where, about_sizes = _place_of(error, pipe)
        advice = "check the sizes given, or use" if about_sizes and arguments else "use"
        raise InputError(
            f"{type(pipe).__name__} fails before it calls its transformer{where}: {first_line(error)}; {advice} "
            "hvcompile.explain(model, *args, **kwargs) on inputs of your own"
        ) from error
    finally:
        handle.remove()
    raise InputError(f"{type(pipe).__name__} never called its transformer: give at least one step")


def _place_of(error: Exception, pipe: Any) -> tuple[str, bool]:
    """Where in a pipeline something was raised, in words, and whether that is where sizes are looked at.

    That is a part of the pipeline, such as its text encoder, if one was running, else a method of its own.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for name, part in _parts_around(pipe).items():
        inner = {id(module) for module in part.modules()}
        if any(id(frame.f_locals.get("self")) in inner for frame in frames):
            kind = part.kind if isinstance(part, TextEncoder) else type(part).__name__
            return f", in its {name} (a {kind})", False
    file = inspect.getsourcefile(type(pipe).__mro__[1])  # the pipeline itself; ours adds a device
    own = [frame.f_code.co_name for frame in frames if frame.f_code.co_filename == file]
    named = [name for name in own if name != "__call__" and name.isidentifier()]
    return (f", in {named[-1]}" if named else ""), bool({"check_inputs", "prepare_latents"} & set(own))
