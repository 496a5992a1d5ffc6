"""The keyword arguments of a pipeline's call, from a request: checked against what the pipeline takes."""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Mapping
from typing import Any

from hvcompile.app.grid import Grid
from hvcompile.app.pipelines import Loaded
from hvcompile.app.request.assignments import assignments
from hvcompile.app.request.clips import Clips
from hvcompile.errors import InputError

OPTIONS = {
    "prompt": "PROMPT",
    "image": "--image",
    "last_image": "--last-image",
    "num_inference_steps": "--steps",
    "num_frames": "--frames",
    "height": "--height",
    "width": "--width",
    "generator": "--seed",
    "guidance_scale": "--guidance",
    "true_cfg_scale": "--true-cfg",
    "negative_prompt": "--negative-prompt",
    "num_videos_per_prompt": "--seeds",
    "num_images_per_prompt": "--seeds",
}
"""Arguments of pipelines that have options of their own."""
RESERVED = ("output_type", "return_dict", "callback_on_step_end", "callback_on_step_end_tensor_inputs")
"""Arguments that are ours: by them a run is followed, and its frames taken."""


def call_arguments(request: Clips, loaded: Loaded) -> dict[str, Any]:
    """Give the keyword arguments of the pipeline's call, besides the prompt and the seed.

    Raises:
        InputError: the pipeline doesn't take one, needs another, or has none of a name that was set.

    """
    if not loaded.makes_video and request.frames is not None:
        raise InputError(f"frames can't be used: {loaded.kind} makes pictures; leave it out")
    Grid.of(loaded.pipe).check(height=request.height, width=request.width, frames=request.frames)
    named = {
        "num_inference_steps": request.steps,
        "num_frames": request.frames,
        "height": request.height,
        "width": request.width,
        "guidance_scale": request.guidance,
        "true_cfg_scale": request.true_cfg,
        "negative_prompt": request.negative_prompt,
        **request.pictures,
    }
    arguments = {name: value for name, value in named.items() if value is not None}
    for name in arguments:
        if not loaded.accepts(name):
            option = OPTIONS[name].removeprefix("--")
            raise InputError(f"{option} can't be used: {loaded.kind} has no {name}; leave it out")
    if request.negative_prompt is not None and loaded.accepts("true_cfg_scale"):
        scale = request.true_cfg if request.true_cfg is not None else loaded.default("true_cfg_scale")
        if (scale or 0) <= 1:
            raise InputError("negative-prompt does nothing in this pipeline without true-cfg: give one above 1")
    arguments |= _set(request, loaded)
    _check_complete(arguments, loaded)
    return {**loaded.defaults, **arguments}


def _set(request: Clips, loaded: Loaded) -> dict[str, Any]:
    """The arguments that ``--set`` gives."""
    found = assignments(request.call_settings, "--set", "max_sequence_length=128")
    hints = _hints(loaded)
    for name, value in found.items():
        hint = hints.get(name, Any)
        if name in RESERVED:
            raise InputError(f"--set {name} can't be given: it is how the run is followed; leave it out")
        if name in OPTIONS:
            raise InputError(f"--set {name} can't be given: use {OPTIONS[name]}")
        if not loaded.accepts(name):
            allowed = [key for key in loaded.parameters if key not in OPTIONS and key not in RESERVED]
            raise InputError(f"--set {name}: {loaded.kind} has no such argument; allowed are {', '.join(allowed)}")
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            found[name] = _member(name, value, hint)
        elif not fits(value, hint):
            raise InputError(f"--set {name} is {value!r}, a {type(value).__name__}; {loaded.kind} takes {_words(hint)}")
    return found


def _member(name: str, value: Any, kind: type[enum.Enum]) -> enum.Enum:
    """The member of an enumeration that has this value."""
    try:
        return kind(value)
    except ValueError as error:
        allowed = ", ".join(str(member.value) for member in kind)
        raise InputError(f"--set {name} is {value!r}; allowed is one of {allowed}") from error


def _check_complete(arguments: Mapping[str, Any], loaded: Loaded) -> None:
    """Raise InputError where the pipeline can't be called with these alone."""
    for name in loaded.required:
        if name not in arguments:
            option = OPTIONS.get(name, f"--set {name}=...")
            raise InputError(f"{loaded.kind} needs {name}: give {option}")


def _hints(loaded: Loaded) -> Mapping[str, Any]:
    """The types of the call's arguments, as far as they can be told."""
    try:
        return typing.get_type_hints(loaded.pipe.__call__)
    except Exception:  # a pipeline may name types that it does not import
        return {}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of a type; what is no type of JSON's is left to the pipeline."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is type(None) or hint is None:
        return hint is Any or value is None
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin in (list, tuple):
        members = [part for part in parts if part is not ...]
        return isinstance(value, list) and (
            not members or all(any(fits(item, part) for part in members) for item in value)
        )
    if origin is dict:
        return isinstance(value, dict)
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        return not isinstance(value, bool) and isinstance(value, int if hint is int else (int, float))
    return isinstance(value, hint) if hint in (str, list, tuple, dict) else not isinstance(hint, type)


def _words(hint: Any) -> str:
    """A type as it is written."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
