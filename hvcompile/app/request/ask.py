"""One video of many: what a line of a file of prompts, or a client, asks of a pipeline that is loaded and compiled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvcompile.app.request.clips import Clips
from hvcompile.app.request.generate import MOST_FPS
from hvcompile.errors import InputError

LONGEST_PROMPT = 20_000
"""Characters; text encoders read a few hundred words."""
LARGEST_SCALE = 1000
"""Of guidance; pipelines take 1 to 20."""
PICTURE_FIELDS = ("image", "last_image")
"""Fields of a video that are files."""
OWN_SECTIONS = ("first_block_cache", "attention", "sparse_attention")
"""Sections of the backend's options that a single video may set. The others change weights, or belong to the ranks."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One video; None leaves a choice to the command, and then to the pipeline.

    Attributes:
        prompt: what it shows.
        seed: of the first noise.
        steps: denoising steps.
        frames: length of the clip.
        height: pixels.
        width: pixels.
        guidance: guidance scale.
        true_cfg: true guidance scale.
        negative_prompt: what should not be seen.
        image: a file that it begins with.
        last_image: a file that it ends with.
        fps: frames a second of the file.
        settings: other arguments of the pipeline's call, by name.
        options: of the backend, by section; only those of ``OWN_SECTIONS``.

    """

    prompt: str
    seed: int = 0
    steps: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    guidance: float | None = None
    true_cfg: float | None = None
    negative_prompt: str | None = None
    image: str | None = None
    last_image: str | None = None
    fps: int = 24
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise InputError where a value can't be."""
        for key in ("prompt", "negative_prompt"):
            _check_text(key, getattr(self, key))
        if not self.prompt.strip():
            raise InputError("prompt is empty: say what the video shows")
        for key in ("steps", "frames", "height", "width", "fps"):
            _check_number(key, getattr(self, key), low=1, high=MOST_FPS if key == "fps" else 2**31)
        _check_number("seed", self.seed, low=-(2**63), high=2**64 - 1)
        for key in ("guidance", "true_cfg"):
            value = getattr(self, key)
            if value is not None and not 0 <= value <= LARGEST_SCALE:
                raise InputError(f"{key} is {_short(value)}: give a number from 0 to {LARGEST_SCALE}")
        if (self.true_cfg or 0) > 1 and self.negative_prompt is None:
            raise InputError(f"true_cfg is {self.true_cfg}, which does nothing without negative_prompt: give that too")
        for section, fields in self.options.items():
            if section not in OWN_SECTIONS:
                raise InputError(
                    f"options has {section[:40]!r}, which all videos of a worker share: allowed here are "
                    f"{', '.join(OWN_SECTIONS)}; give others to the command"
                )
            _check_names(f"options.{section}", fields, "threshold")
        _check_names("set", self.settings, "max_sequence_length")

    @property
    def shape(self) -> str:
        """The same text for all that one compiled graph serves.

        Guidance above 1 may double the batch, or call the model twice a step; what it is beyond that changes no graph.
        Where it is not given, the pipeline's own may be either.
        """
        sizes = (self.frames, self.height, self.width, sorted(self.options.items()), sorted(self.settings.items()))
        guided = [None if scale is None else scale > 1 for scale in (self.guidance, self.true_cfg)]
        absent = [value is None for value in (self.negative_prompt, self.image, self.last_image)]
        return _canonical([*sizes, *guided, *absent])

    def of(self, base: Clips) -> Clips:
        """Give the video as the commands know one: what is not given is as ``base`` has it.

        Args:
            base: of one prompt. Its options of the backend are all in ``backend_settings``, as ``settled`` puts them.

        """
        names = ("steps", "frames", "height", "width", "guidance", "true_cfg", "negative_prompt")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        pictures = {"image": self.image, "last_image": self.last_image}
        given |= {name: Path(place) for name, place in pictures.items() if place is not None}
        set_here = {text.partition("=")[0].strip() for text in typed(self.settings)}
        kept = tuple(text for text in base.call_settings if text.partition("=")[0].strip() not in set_here)
        options = dict(base.backend_options())
        for section, fields in self.options.items():
            known = options.get(section)
            options[section] = {**(known if isinstance(known, dict) else {}), **fields}
        return dataclasses.replace(
            base,
            prompt=self.prompt,
            prompts_file=None,
            seed=self.seed,
            seeds=None,
            call_settings=(*kept, *typed(self.settings)),
            backend_settings=typed(_flat(options)),
            **given,
        )


def settled(base: Clips) -> Clips:
    """A request with the same options of the backend, all in ``backend_settings``: no file is needed to read them."""
    settings = typed(_flat(base.backend_options()))
    return dataclasses.replace(base, fp8=None, options_file=None, backend_settings=settings)


def typed(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Values by name as a command line has them."""
    return tuple(f"{name}={json.dumps(value)}" for name, value in values.items())


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by dotted names."""
    flat: dict[str, Any] = {}
    for section, value in options.items():
        flat |= {f"{section}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {}
        if not isinstance(value, dict) or not value:
            flat[section] = value
    return flat


def _check_text(name: str, value: str | None) -> None:
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is no valid text ({error.reason} at {error.start}): give UTF-8") from error
    if len(value or "") > LONGEST_PROMPT:
        raise InputError(f"{name} has {len(value or '')} characters: give {LONGEST_PROMPT} or fewer")


def _check_number(name: str, value: int | None, *, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise InputError(f"{name} is {_short(value)}: give a whole number from {low} to {high}")


def _check_names(what: str, values: Mapping[str, Any], example: str) -> None:
    """Raise InputError where a name is none of an argument: joined to its value, it would be read as another."""
    for name in values:
        if not name.isidentifier():
            raise InputError(f"{what} has {name[:40]!r}, which is no argument's name: give names such as {example}")


def _short(value: float) -> str:
    """A number as text, of which nobody need read a thousand digits."""
    text = f"{value}"
    return text if len(text) <= 40 else f"{text[:20]}... of {len(text)} digits"


# How values of a line are read: the words for what is allowed, and whether a value is that.
def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_scale(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LARGEST_SCALE


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_sections(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, dict) for item in value.values())


_WHOLE = ("a whole number", _is_whole)
_SCALE = (f"a number from 0 to {LARGEST_SCALE}", _is_scale)
_TEXT = ("a text", _is_text)
KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "prompt": _TEXT,
    **dict.fromkeys(("seed", "steps", "frames", "height", "width", "fps"), _WHOLE),
    **dict.fromkeys(("guidance", "true_cfg"), _SCALE),
    **dict.fromkeys(("negative_prompt", *PICTURE_FIELDS, "name"), _TEXT),
    "set": ("an object of arguments", _is_object),
    "options": ("an object of sections, each an object", _is_sections),
}
"""Keys of a line: what each holds, in words, and whether a value is that."""


def parsed(content: Any) -> tuple[Ask, str | None]:
    """Read one video from the object that a line holds.

    Returns:
        What is asked for, and the ``name`` of its file; None where the line gives none.

    Raises:
        InputError: a key is unknown, a value is of another kind or out of range, or the prompt is missing.

    """
    if not isinstance(content, dict):
        raise InputError(f'it holds a {type(content).__name__}: give an object such as {{"prompt": "a cat"}}')
    for key, value in content.items():
        if key not in KINDS:
            raise InputError(f"it has {key[:40]!r}, which is unknown: allowed are {', '.join(KINDS)}")
        words, is_fit = KINDS[key]
        if value is not None and not is_fit(value):
            raise InputError(f"{key} is {json.dumps(value)[:60]}: give {words}")
    given = {key: value for key, value in content.items() if value is not None}
    if "prompt" not in given:
        raise InputError("it has no prompt: say what the video shows")
    name = given.pop("name", None)
    if "set" in given:
        given["settings"] = given.pop("set")
    return Ask(**given), name


def identity(ask: Ask, base: Clips, ranks: int) -> str:
    """A digest of all that a user says of a video: what is asked, the model by its name, and its settings.

    Not what makes it: the device, the threads, and the versions of torch and hvcompile move its last bits, and a video
    that is done would else be made again after each update. ``Made.maker`` has them, and a batch tells where they mix.
    """
    whole = ask.of(base)
    common = {
        "model": base.model,
        "lora": base.lora,
        "mode": base.mode,
        "dtype": base.dtype,
        "dynamic": base.dynamic,
        "tiling": base.vae_tiling,
        "ranks": ranks,
        "options": dict(whole.backend_options()),
        "settings": sorted(whole.call_settings),
        "sizes": [getattr(whole, key) for key in ("steps", "frames", "height", "width", "guidance", "true_cfg")],
        "negative_prompt": whole.negative_prompt,
        "pictures": list(_digests(ask)),
    }
    if base.compile_vae:  # as an extra key: what was made without keeps its digest
        common["compile_vae"] = True
    own = {"prompt": ask.prompt, "seed": ask.seed, "fps": ask.fps}
    return hashlib.sha256(_canonical([common, own]).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _digests(ask: Ask) -> Iterator[str]:
    for place in (ask.image, ask.last_image):
        yield "" if place is None else hashlib.sha256(Path(place).read_bytes()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=dict)
