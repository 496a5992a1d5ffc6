"""Loads a pipeline of diffusers, the embedded tiny one or any other with a transformer that denoises."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
from safetensors import safe_open

from hvcompile.app import incomplete, saved
from hvcompile.app.denoisers import denoisers
from hvcompile.errors import InputError
from hvcompile.hollow.host import offload as keep_on_host

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

OFFLOADS = ("model", "blocks", "group", "none")
"""Ways to keep on the host what the device does not need now; see docs/memory.md."""

# What a pipeline's call must take for a generation to be asked for, and followed step by step.
_NEEDED = ("prompt", "num_inference_steps", "generator", "output_type")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A pipeline that runs on a device, and what to call it with where the user gives nothing.

    Attributes:
        pipe: a diffusers pipeline with one or more denoisers, in evaluation mode.
        defaults: keyword arguments of the call; only those in which we differ from the pipeline's own defaults.
        device: where it computes. What is offloaded is elsewhere in between.

    """

    pipe: Any
    defaults: Mapping[str, Any]
    device: torch.device

    @property
    def kind(self) -> str:
        """The name of the pipeline's class."""
        return type(self.pipe).__name__

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """Those of the pipeline's call."""
        return inspect.signature(self.pipe.__call__).parameters

    @property
    def makes_video(self) -> bool:
        """Whether the pipeline makes a video; else it makes a picture."""
        return self.accepts("num_frames")

    @property
    def required(self) -> list[str]:
        """Arguments of the call that have no default, besides the prompt."""
        return [name for name, item in self.parameters.items() if item.default is item.empty and name != "prompt"]

    def accepts(self, argument: str) -> bool:
        """Whether the pipeline's call has this keyword argument."""
        return argument in self.parameters

    def default(self, argument: str) -> Any:
        """Tell what the pipeline uses for ``argument`` where it is not given."""
        return self.defaults.get(argument, self.parameters[argument].default)


def load(
    model: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    *,
    is_offloaded: bool = False,
    float8: Path | None = None,
) -> Loaded:
    """Load a pipeline.

    Args:
        model: a directory in the layout of diffusers, or a hub id; None for the embedded tiny HunyuanVideo.
        dtype: a key of ``DTYPES``; None for bfloat16 on a GPU and float32 on the CPU.
        device: as torch writes it ("cpu", "cuda:1"); None for a GPU where there is one.
        is_offloaded: leave it on the host, for ``offload``: it may be larger than the device.
        float8: a directory of transformers with float8 weights, which take the place of the pipeline's own.

    Raises:
        InputError: no such directory, not a pipeline, a hub id that can't be fetched, a pipeline without a transformer
            or whose call can't be followed, an unknown dtype or a device that is not there.

    """
    place = resolve_device(device)
    precision = resolve_dtype(dtype, place)
    parts = saved.load(float8, precision) if float8 is not None else {}
    if model is not None:
        check_model(model)
        return _loaded(_from_pretrained(model, precision, parts), model, place, {}, is_offloaded)
    from hvcompile.app import tiny

    pipe = _from_pretrained(str(tiny.DIRECTORY), precision, parts)
    return _loaded(pipe, "the tiny pipeline", place, tiny.DEFAULTS, is_offloaded)


def offload(loaded: Loaded, how: str | None) -> None:
    """Keep on the host what the device does not need now.

    Args:
        loaded: a pipeline that lies on the host.
        how: one of ``OFFLOADS``: whole models, which leaves each of them one graph; the same and the blocks' weights of
            the transformers even while they run; or layers, of which none is a graph with blocks. None for neither.

    Raises:
        InputError: a transformer has no blocks.

    """
    if how == "blocks":
        for model in denoisers(loaded.pipe).values():
            keep_on_host(model, loaded.device)
    if how in {"model", "blocks"}:
        loaded.pipe.enable_model_cpu_offload(device=loaded.device)
    elif how == "group":
        has_streams = loaded.device.type == "cuda"
        loaded.pipe.enable_group_offload(loaded.device, offload_type="leaf_level", use_stream=has_streams)


def tile(loaded: Loaded, is_tiled: bool) -> None:
    """Decode in tiles, or whole, where the pipeline has the choice.

    A full-size clip does not fit in memory decoded whole; small ones are not tiled in any case.
    """
    vae = getattr(loaded.pipe, "vae", None)
    switch = getattr(vae, "enable_tiling" if is_tiled else "disable_tiling", None)
    if switch is not None:
        switch()


def compile_decoder(loaded: Loaded) -> None:
    """Compile the VAE's decoder, with a graph for each shape of its tiles.

    Raises:
        InputError: the pipeline has no VAE with a decoder.

    """
    decoder = getattr(getattr(loaded.pipe, "vae", None), "decoder", None)
    if not isinstance(decoder, torch.nn.Module):
        raise InputError(f"compile-vae has nothing to compile: {loaded.kind} has no VAE with a decoder; leave it out")
    decoder.compile(dynamic=False)


def resolve_device(device: str | None) -> torch.device:
    """Turn the text of a device, or None, into a device that is there; raises InputError otherwise."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
        if place.type == "meta":
            raise RuntimeError("it computes nothing")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device!r} can't be used: {first_line(error)}; give cpu, cuda or cuda:N") from error
    return place


def resolve_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """Turn the name of a dtype, or None, into a dtype: None is bfloat16 on a GPU and float32 on the CPU."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown: give one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_model(model: str) -> None:
    """Raise InputError where ``model`` is a path with no pipeline at it; a hub id is only tried by ``load``."""
    try:
        path = Path(model).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name that no file system takes, or nobody's home
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"model {model[:60]!r} can't be used ({reason}): give a directory") from error
    is_path = bool(model.strip())  # nothing at all would be the current directory
    if is_path and path.is_dir():
        index = path / "model_index.json"
        if not index.is_file():
            raise InputError(f"model {model!r} is a directory without model_index.json: give the root of a pipeline")
        try:
            content = json.loads(index.read_text())
            is_index = isinstance(content, dict) and "_class_name" in content
        except (ValueError, RecursionError):
            is_index = False
        if not is_index:
            raise InputError(f"model {model!r}: its model_index.json is damaged: copy or download the pipeline again")
    elif is_path and path.exists():
        raise InputError(f"model {model!r} is a file: give a directory in the layout of diffusers, or a hub id")
    elif model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise InputError(
            f"model {model!r} is neither a directory nor a hub id: give a path that is there, or owner/name"
        )


def transformer_config(model: str) -> dict[str, Any]:
    """Read the configuration of a HunyuanVideo pipeline's transformer, and no weights.

    Raises:
        InputError: there is no such pipeline, or its transformer is of another kind.

    """
    check_model(model)
    kind = HunyuanVideoTransformer3DModel.__name__
    try:
        config = dict(HunyuanVideoTransformer3DModel.load_config(_place(model), subfolder="transformer"))
    except Exception as error:  # every library below raises its own kind; the cause stays attached
        raise InputError(
            f"model {model!r} has no transformer that can be read: {first_line(error)}; give the directory or hub id "
            "of a HunyuanVideo pipeline"
        ) from error
    if config.get("_class_name") != kind or config.get("image_condition_type") is not None:
        wanted = f"a {kind} that makes video from text alone"
        raise InputError(f"model {model!r} holds a {config.get('_class_name')}: give a pipeline with {wanted}")
    return config


def load_transformer(model: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load the transformer of a HunyuanVideo pipeline, and its scheduler; raises InputError as ``load`` does."""
    with incomplete.refused(model):
        try:
            transformer = HunyuanVideoTransformer3DModel.from_pretrained(
                _place(model), subfolder="transformer", dtype=dtype
            )
            scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(_place(model), subfolder="scheduler")
        except Exception as error:  # as above
            raise InputError(
                f"model {model!r} can't be loaded: {first_line(error)}; copy or download it again"
            ) from error
    return transformer, scheduler


def _place(model: str) -> str:
    path = Path(model).expanduser()
    return str(path) if path.is_dir() else model


def _from_pretrained(model: str, dtype: torch.dtype, parts: Mapping[str, Any] = MappingProxyType({})) -> Any:
    is_local = Path(model).expanduser().is_dir()
    if is_local:
        _check_weights(model)
    with incomplete.refused(model):
        try:
            return DiffusionPipeline.from_pretrained(_place(model), dtype=dtype, **parts)
        except Exception as error:  # every library below raises its own kind; the cause stays attached
            if is_local:
                raise InputError(
                    f"model {model!r} can't be loaded: {first_line(error, Path(_place(model)))}; copy or download it "
                    "again"
                ) from error
            raise InputError(
                f"model {model!r} is no directory here and can't be fetched from the hub: {first_line(error)}; check "
                "its name, the network and, for a gated model, HF_TOKEN, or download it and give its directory"
            ) from error


def _check_weights(model: str) -> None:
    """Raise InputError where a file of weights is damaged; reads the beginning of each, and names it."""
    root = Path(model).expanduser()
    for file in sorted(root.glob("*/*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:  # safetensors has an error of its own, beside the system's
            raise InputError(
                f"model {model!r} can't be loaded: {file.relative_to(root)} is damaged ({first_line(error)}); copy or "
                "download it again"
            ) from error


def _loaded(
    pipe: Any, name: str, device: torch.device, defaults: Mapping[str, Any], is_offloaded: bool = False
) -> Loaded:
    kind = type(pipe).__name__
    if not denoisers(pipe):
        raise InputError(f"model {name!r} is a {kind}, which has no transformer to compile: give one that has")
    loaded = Loaded(pipe=pipe, defaults=defaults, device=device)
    missing = [key for key in _NEEDED if not loaded.accepts(key)]
    if missing:
        raise InputError(
            f"model {name!r} is a {kind}, whose call lacks {', '.join(missing)}: it can't be followed here"
        )
    pipe.set_progress_bar_config(disable=True)
    for part, module in pipe.components.items():
        tensors = module.state_dict(keep_vars=True) if isinstance(module, torch.nn.Module) else {}
        lacking = [tensor for tensor, held in tensors.items() if held.is_meta]
        if lacking:
            raise InputError(
                f"model {name!r}: the weights of {part} lack {lacking[0]} and {len(lacking) - 1} more of what its "
                "configuration asks for: copy or download it again"
            )
    if not is_offloaded:
        pipe.to(device)
    tile(loaded, True)
    return loaded


def first_line(error: BaseException, known: Path | None = None) -> str:
    """Cut an exception's message, which may be a page long, down to a part of a line.

    Args:
        error: of whatever library.
        known: a directory that the reader knows of: of files in it, the rest of the path is left.

    """
    text = str(error) if known is None else str(error).replace(f"{known}/", "")
    message = " ".join(text.split()) or type(error).__name__
    return textwrap.shorten(message, 120, placeholder=" ...").rstrip(" .:;")
