"""Weights that live on in float8 alone: how they are made, what they refuse, and how the originals come back.

A linear layer's parameter keeps its identity, but gives up its memory and becomes a ``QuantizedWeight``, which is
hollow (see ``hollow.parameter``): anything that needs its values raises. The float8 copy hangs on the parameter, so it
is shared by every graph compiled for the model and dies with it. That of a weight that was kept on the host stays
there.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from hvcompile.errors import QuantizedWeightError
from hvcompile.float8 import format as float8_format
from hvcompile.float8.format import Granularity
from hvcompile.hollow.host import HostWeight, bring_back
from hvcompile.hollow.memory import HostMemory
from hvcompile.hollow.parameter import HollowParameter, HollowStorage, empty_of, empty_out, fill

log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class Joined:
    """Weights that are one matrix: float8 data ``[N, K]``, and scales in float32, ``[N, 1]`` or ``[]``.

    The data of weights that were kept on the host stays there, in ``memory``; scales are on the weights' device. It
    stays the same object when the weights move to another device, so that whoever holds it follows them and keeps no
    memory on the device that they left.
    """

    data: torch.Tensor
    scale: torch.Tensor
    granularity: Granularity
    memory: HostMemory | None = None
    _copied: weakref.ref[Joined] | None = None

    def copied_to(self, device: torch.device) -> Joined:
        """The same on a device; one copy for all of its weights that ask for it, as long as one of them lives."""
        known = self._copied() if self._copied is not None else None
        if known is None or known.scale.device != device:
            data = self.data if self.memory is not None else self.data.to(device, copy=True)
            known = Joined(data, self.scale.to(device, copy=True), self.granularity, self.memory)
            self._copied = weakref.ref(known)
        return known

    def take(self, other: Joined) -> bool:
        """Move to where a copy of it lies, whose memory it takes; False where ``other`` is no copy of it."""
        if other is not self and (self._copied is None or self._copied() is not other):
            return False
        self.data, self.scale = other.data, other.scale
        return True

    @property
    def num_bytes(self) -> int:
        """What it occupies."""
        return self.data.untyped_storage().nbytes() + self.scale.untyped_storage().nbytes()


_CURE = (
    "call hvcompile.restore(model) before you save, cast, change or copy the model or run it uncompiled (a call beyond "
    "Dynamo's recompile limit runs uncompiled as well), or compile with options={'fp8': False}"
)


class _Storage(HollowStorage):
    error, state, cure = QuantizedWeightError, "in float8 alone", _CURE


class QuantizedWeight(HollowParameter):
    """A parameter without memory, whose float8 copy is rows ``start`` to ``stop`` of ``joined``.

    Attributes:
        joined: its float8 copy, with those of the weights that are multiplied with it at once.
        start: its first row there.
        original: a copy of what it was, on the CPU; None where that was let go.

    """

    joined: Joined
    start: int
    original: torch.Tensor | None
    storage_kind: ClassVar[type[HollowStorage]] = _Storage
    since = "hvfast compiled its model"
    way_back = "call hvcompile.restore(model) first"
    elsewhere: ClassVar[str] = (
        "this model's weights are kept in float8 alone since hvfast compiled it, so another torch.compile of it can't "
        f"read them: {_CURE}. A backend that calls hvfast is known as one where it is functools.partial(hvfast, ...)"
    )

    @classmethod
    def answer(cls, name: str, args: Sequence[Any], kwargs: Any) -> Any:
        """A weight for its own detached one, where who asked reads no values."""
        return args[0] if name == "detach" and _is_asked_by_an_adapters_loader() else NotImplemented

    @torch.no_grad()
    def moved_to(self, device: torch.device) -> QuantizedWeight:
        """A weight of the same float8 data on a device."""
        joined = self.joined
        # One that is there came with those that are multiplied with this weight, and have moved before it.
        if joined.scale.device != device or self.device == device:
            joined = joined.copied_to(device)
        moved = empty_of(self, type(self), self.path, device)
        moved.joined, moved.start, moved.original = joined, self.start, self.original
        return moved  # type: ignore[no-any-return]

    def follow(self, moved: HollowParameter) -> bool:
        """Take over where the copy of its matrix lies."""
        assert isinstance(moved, QuantizedWeight)
        return moved.start == self.start and self.joined.take(moved.joined)

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Its own part of ``joined``: data and scale."""
        stop = self.start + self.shape[0]
        scale = self.joined.scale
        return self.joined.data[self.start : stop], scale if scale.ndim == 0 else scale[self.start : stop]


_LOADED_CURE = (
    "what it was made from was never here. To cast, change, fuse or copy the model, or to run it uncompiled or by "
    "another backend, load the original checkpoint in its place (from_pretrained()); hvcompile.save_float8 saves it"
)


class _LoadedStorage(HollowStorage):
    error, state, cure = QuantizedWeightError, "in float8 alone", _LOADED_CURE


class LoadedWeight(QuantizedWeight):
    """A ``QuantizedWeight`` that was loaded as one, so that nothing can be restored."""

    storage_kind = _LoadedStorage
    since = "hvcompile.load_float8"
    way_back = "load the original checkpoint"
    elsewhere: ClassVar[str] = (
        f"this model's weights were loaded in float8, so another torch.compile of it can't read them: {_LOADED_CURE}"
    )


# Who may have a state dict with such weights in it: peft and diffusers, while they load an adapter. They read the names
# of all weights, and the shapes of some. Each is a module and the beginning of a function's name.
_READ_NAMES = (
    ("diffusers.loaders.peft", "load_"),
    ("diffusers.loaders.lora_pipeline", ""),
    ("peft.utils.hotswap", ""),
    ("peft.tuners.tuners_utils", ""),
    ("peft.utils.save_and_load", "set_"),
    ("peft.utils.save_and_load", "_find_mismatched_keys"),
)


def _is_asked_by_an_adapters_loader() -> bool:
    """Whether ``state_dict``, which detaches each weight, was called by what reads no values.

    The weight itself stands in the dictionary then. Whoever reads it after all is refused.
    """
    frame = inspect.currentframe()
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if not name.startswith(("hvcompile.", "torch.")):
            return any(name == place and frame.f_code.co_name.startswith(start) for place, start in _READ_NAMES)
        frame = frame.f_back
    return False


def join(
    weights: Sequence[torch.Tensor], paths: Sequence[str], *, granularity: Granularity, keep_original: bool
) -> Joined:
    """Quantise weights ``[N, K]`` of equal K, stacked as one matrix, and free them; those that are so already stay.

    At most one float8 copy of these weights is made on top of what is there.
    """
    known = _known(weights, granularity)
    if keep_original and any(isinstance(weight, QuantizedWeight) and weight.original is None for weight in weights):
        log.warning(
            "fp8.keep_original is 'cpu', but %s and others are in float8 alone already: nothing exact is left to keep",
            paths[0],
        )
    if known is not None:
        return known
    with torch.no_grad(), torch.autocast(weights[0].device.type, enabled=False):
        parts = [_quantized(weight, granularity) for weight in weights]
        data, scale = (items[0] if len(parts) == 1 else torch.cat(items) for items in zip(*parts, strict=True))
        memory = next(filter(None, map(_memory_of, weights)), None)
        joined = Joined(data if memory is None else memory.copy_of(data), scale, granularity, memory)
    del parts, data
    start = 0
    for weight, path in zip(weights, paths, strict=True):
        if not isinstance(weight, QuantizedWeight):
            _free(weight, path, keep_original=keep_original)
        weight.joined, weight.start = joined, start  # type: ignore[attr-defined]
        start += weight.shape[0]
    return joined


def _known(weights: Sequence[torch.Tensor], granularity: Granularity) -> Joined | None:
    """What these weights are already, in this order; None where that is something else."""
    first = weights[0]
    if not isinstance(first, QuantizedWeight) or first.joined.granularity != granularity:
        return None
    start = 0
    for weight in weights:
        if not isinstance(weight, QuantizedWeight) or weight.joined is not first.joined or weight.start != start:
            return None
        start += weight.shape[0]
    return first.joined if start == first.joined.data.shape[0] else None


@torch.no_grad()
def _quantized(weight: torch.Tensor, granularity: Granularity) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(weight, QuantizedWeight):
        # Of a weight on the host ``detach`` gives what is there; one weight at a time goes through the device.
        return float8_format.quantize(weight.detach().to(weight.device), granularity)
    data, scale = (item.to(weight.device) for item in weight.rows)
    if weight.joined.granularity == granularity:
        return data, scale
    return float8_format.quantize(float8_format.dequantize(data, scale, weight.dtype), granularity)


def _memory_of(weight: torch.Tensor) -> HostMemory | None:
    """What a weight's copy on the host is allocated by; None where there is none."""
    if isinstance(weight, QuantizedWeight):
        return weight.joined.memory
    return weight.memory if isinstance(weight, HostWeight) else None


def _free(weight: torch.Tensor, path: str, *, keep_original: bool) -> None:
    """Make a parameter a ``QuantizedWeight``. Whoever else holds its memory keeps it."""
    device = weight.device
    if isinstance(weight, HostWeight):
        bring_back(weight)
    weight.original = weight.detach().to("cpu", copy=True) if keep_original else None  # type: ignore[attr-defined]
    empty_out(weight, path, QuantizedWeight, device)


class Restored(NamedTuple):
    """How many weights ``hvcompile.restore`` brought back: exactly, from a copy, and to within float8's precision."""

    exact: int
    dequantized: int


@torch.inference_mode(False)  # what is made in it could never be trained again
@torch.no_grad()
def restore_weights(module: torch.nn.Module) -> Restored:
    """Give the weights of a module that are in float8 alone, or on the host, their values back.

    What was kept on the host becomes an ordinary parameter there. See ``hvcompile.restore``, which also lets go of the
    float8 copies.
    """
    weights = [weight for weight in module.parameters() if isinstance(weight, (QuantizedWeight, HostWeight))]
    exact = 0
    for weight in weights:
        if isinstance(weight, HostWeight):
            bring_back(weight)
            exact += 1
            continue
        device = weight.joined.data.device
        if weight.original is not None:
            values = weight.original.to(device)
            exact += 1
        else:
            data, scale = weight.rows
            values = float8_format.dequantize(data, scale.to(device), weight.dtype)
        plain = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=device)
        plain.copy_(values)
        fill(weight, plain, "joined", "start", "original")
    if exact < len(weights):
        log.warning(
            "hvcompile.restore: %d of %d weights came back from float8, so they are not exactly what they were "
            "(compile with options={'fp8': {'keep_original': 'cpu'}} to keep exact copies)",
            len(weights) - exact,
            len(weights),
        )
    return Restored(exact, len(weights) - exact)
