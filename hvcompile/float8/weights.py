"""Weights that live on in float8 alone: how they are made, what they refuse, and how the originals come back.

A linear layer's parameter keeps its identity, so the module, LoRA adapters and Dynamo's guards still know it, but gives
up its memory and becomes a ``QuantizedWeight``: shape, dtype and device can be asked for, anything that needs its
values raises. The float8 copy hangs on the parameter, so it is shared by every graph compiled for the model and dies
with it.

Most operations on a tensor whose storage was merely resized to zero end the process. ``__torch_function__`` refuses
them; some calls, ``torch.tensor(weight)`` among them, don't ask it. For these the storage itself refuses its address,
or, where torch was built without CUDA and a storage can't, every operator on the weight is refused as it is dispatched.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from hvcompile.errors import QuantizedWeightError
from hvcompile.float8 import format as float8_format
from hvcompile.float8.format import Granularity
from hvcompile.torch_private import dynamo, storages

log = logging.getLogger(__name__)

# What a tensor without memory can still tell: these methods, and all attributes but a few.
_METHODS = frozenset(
    (
        *("dim", "ndimension", "numel", "nelement", "size", "stride", "storage_offset", "element_size"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_conj", "is_neg", "is_inference", "is_same_size"),
        *("get_device", "untyped_storage", "has_names", "requires_grad_", "__len__", "__hash__", "__dir__", "_is_view"),
        *("_is_zerotensor", "_has_symbolic_sizes_strides", "_has_compatible_shallow_copy_type"),
    )
)
_OF_STORAGE = frozenset(
    (
        *("nbytes", "size", "element_size", "device", "get_device", "resizable", "untyped", "is_cuda", "is_hpu"),
        *("is_sparse", "is_sparse_csr", "_cdata", "_weak_ref", "_free_weak_ref", "_expired", "_fix_weakref"),
    )
)
_SETTABLE = frozenset({"requires_grad", "grad"})
_VALUES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})


@dataclasses.dataclass(eq=False)
class Joined:
    """Weights that are one matrix: float8 data ``[N, K]``, and scales in float32, ``[N, 1]`` or ``[]``.

    It stays the same object when the weights move to another device, so that whoever holds it follows them and keeps
    no memory on the device that they left.
    """

    data: torch.Tensor
    scale: torch.Tensor
    granularity: Granularity
    _copied: weakref.ref[Joined] | None = None

    def copied_to(self, device: torch.device) -> Joined:
        """The same on a device; one copy for all of its weights that ask for it, as long as one of them lives."""
        known = self._copied() if self._copied is not None else None
        if known is None or known.data.device != device:
            known = Joined(self.data.to(device, copy=True), self.scale.to(device, copy=True), self.granularity)
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


class _Hollow(torch.UntypedStorage):
    """The storage of a ``QuantizedWeight`` and of what aliases it: can be asked for its size and place, and no more.

    Some of its methods would end the process (``is_shared``), or make the weight crash (``share_memory_``).
    """

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") or name in _OF_STORAGE:
            return super().__getattribute__(name)
        raise QuantizedWeightError(f"the storage of a weight that is kept in float8 alone has no {name!r}: {_CURE}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise QuantizedWeightError(f"the storage of a weight that is kept in float8 alone can't be copied: {_CURE}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise QuantizedWeightError(f"the storage of a weight that is kept in float8 alone can't be pickled: {_CURE}")


class QuantizedWeight(torch.nn.Parameter):
    """A parameter without memory, whose float8 copy is rows ``start`` to ``stop`` of ``joined``.

    Attributes:
        path: where in the model it was when it was quantised, for errors.
        joined: its float8 copy, with those of the weights that are multiplied with it at once.
        start: its first row there.
        hollow: its storage, which keeps its class as long as it is held here.
        original: a copy of what it was, on the CPU; None where that was let go.
        own: what torch knew of the parameter, without elements; None where the storage itself refuses to be read.

    """

    path: str
    joined: Joined
    start: int
    original: torch.Tensor | None
    hollow: torch.UntypedStorage
    own: torch.nn.Parameter | None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Let through what needs no values, and all while Dynamo captures a graph for hvfast, which needs none."""
        if torch.compiler.is_dynamo_compiling():
            if not _is_captured_by_hvfast():
                raise QuantizedWeightError(_ELSEWHERE)
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        name = getattr(func, "__name__", "")
        if name in _METHODS or (name == "__get__" and getattr(func.__self__, "__name__", "") not in _VALUES):  # type: ignore[attr-defined]
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if name in _MOVES and args:
            device = _asked_device(*_MOVES[name](*args), **(kwargs or {}))
            if device is not None:
                is_there = device == args[0].device and not (kwargs or {}).get("copy", False)
                return args[0] if is_there else _moved(args[0], device)
        if name == "type" and len(args) == 1 and not kwargs:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if name == "__set__" and getattr(func.__self__, "__name__", "") in _SETTABLE:  # type: ignore[attr-defined]
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if name == "detach" and _is_asked_by_an_adapters_loader():
            return args[0]
        # As Module.to does with what has moved, and with what has not.
        if name == "__set__" and (args[0] is args[1] or _take_place(args[0], args[1])):
            return None
        what = getattr(getattr(func, "__self__", None), "__name__", name) if name in {"__get__", "__set__"} else name
        raise _refusal(what, (args, kwargs or {}))

    def as_subclass(self, cls: Any) -> Any:
        """Refuse: torch does not ask ``__torch_function__``, and a plain tensor without memory crashes."""
        raise QuantizedWeightError(f"{self.path} is kept in float8 alone and can't become a {cls.__name__}: {_CURE}")

    def __format__(self, format_spec: str) -> str:
        return format(repr(self), format_spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise QuantizedWeightError(f"{self.path} is kept in float8 alone and can't be copied: {_CURE}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise QuantizedWeightError(f"{self.path} is kept in float8 alone and can't be pickled: {_CURE}")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantizedWeight({self.path!r}, shape={tuple(self.shape)}, in float8 alone)"

    @property
    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Its own part of ``joined``: data and scale."""
        stop = self.start + self.shape[0]
        scale = self.joined.scale
        return self.joined.data[self.start : stop], scale if scale.ndim == 0 else scale[self.start : stop]


_CURE = (
    "call hvcompile.restore(model) before you save, cast, change or copy the model or run it uncompiled (a call beyond "
    "Dynamo's recompile limit runs uncompiled as well), or compile with options={'fp8': False}"
)
_ELSEWHERE = (
    "this model's weights are kept in float8 alone since hvfast compiled it, so another torch.compile of it can't read "
    f"them: {_CURE}. A backend that calls hvfast is known as one where it is functools.partial(hvfast, ...)"
)


def _refusal(what: str, operands: Any) -> QuantizedWeightError:
    weight = next((item for item in _flat(operands) if isinstance(item, QuantizedWeight)), None)
    return QuantizedWeightError(
        f"{weight.path if weight is not None else 'a weight'} has been kept in float8 alone since hvfast compiled "
        f"its model, and {what!r} asks for its values: {_CURE}"
    )


def _refuse(func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
    """Refuse an operator that was not asked by way of ``__torch_function__``."""
    raise _refusal(str(func), (args, kwargs or {}))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_captured_by_hvfast() -> bool:
    """Asked while Dynamo captures; the answer is a constant of the capture and leaves no trace in the graph."""
    return dynamo.is_own(dynamo.tracing_backend())


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


def _asked_device(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.device | None:
    """The device that ``tensor.to(...)`` asks for; None where it asks for more than that, such as another dtype."""
    kwargs.pop("copy", None)
    try:
        device, dtype, memory_format = storages.target_of_to(*args, **kwargs)
    except (TypeError, RuntimeError):
        return None
    if device is not None and device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if dtype not in {None, tensor.dtype} or memory_format is not None or (device is not None and device.type == "meta"):
        return None
    return tensor.device if device is None else device


@torch.no_grad()
def _moved(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    """A weight of the same float8 data on a device, as ``Tensor.to`` gives a tensor of the same values."""
    joined = weight.joined
    # One that is there came with those that are multiplied with this weight, and have moved before it.
    if joined.data.device != device or weight.device == device:
        joined = joined.copied_to(device)
    moved: Any = torch.nn.Parameter(torch.empty(0, dtype=weight.dtype, device=device), requires_grad=False)
    moved.data = hollow_like(weight, device)
    refuse_values(moved, weight.path)
    moved.joined, moved.start, moved.original = joined, weight.start, weight.original
    return moved  # type: ignore[no-any-return]


@torch.no_grad()
def _take_place(weight: QuantizedWeight, moved: Any) -> bool:
    """Move a weight, which stays the object that it is, to where ``_moved`` has it; False for any other tensor."""
    if not isinstance(moved, QuantizedWeight) or (moved.path, moved.start) != (weight.path, weight.start):
        return False
    if moved.shape != weight.shape or moved.dtype != weight.dtype or not weight.joined.take(moved.joined):
        return False
    plain, hollow, own = weight.requires_grad, hollow_like(weight, moved.device), weight.own
    weight.__class__ = torch.nn.Parameter  # type: ignore[assignment]
    if own is None:
        weight.data = hollow
    else:
        storages.allow_operators(weight, own, hollow)
    refuse_values(weight, weight.path)
    weight.requires_grad_(plain)
    return True


_MOVES: dict[str, Callable[..., tuple[Any, ...]]] = {
    "to": lambda *args: args,
    "cpu": lambda weight, *_: (weight, "cpu"),
    "cuda": lambda weight, device=None, *_: (weight, "cuda" if device is None else torch.device("cuda", device)),
    "float": lambda weight, *_: (weight, torch.float32),
    "double": lambda weight, *_: (weight, torch.float64),
    "half": lambda weight, *_: (weight, torch.float16),
    "bfloat16": lambda weight, *_: (weight, torch.bfloat16),
}
"""Methods that ask for a place or a dtype, as the arguments of ``to`` that ask for the same."""


def _flat(args: Any) -> Iterator[Any]:
    if isinstance(args, (tuple, list)):
        for item in args:
            yield from _flat(item)
    elif isinstance(args, dict):
        yield from _flat(list(args.values()))
    else:
        yield args


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
        if len(parts) == 1:
            joined = Joined(*parts[0], granularity)
        else:
            data, scale = zip(*parts, strict=True)
            joined = Joined(torch.cat(data), torch.cat(scale), granularity)
    del parts
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
        return float8_format.quantize(weight.detach(), granularity)
    if weight.joined.granularity == granularity:
        return weight.rows
    return float8_format.quantize(float8_format.dequantize(*weight.rows, weight.dtype), granularity)


def _free(weight: torch.Tensor, path: str, *, keep_original: bool) -> None:
    """Make a parameter a ``QuantizedWeight``. Whoever else holds its memory keeps it."""
    weight.original = weight.detach().to("cpu", copy=True) if keep_original else None  # type: ignore[attr-defined]
    like = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")
    weight.data = weight.data.new_empty(0)  # before another is made
    weight.data = hollow_like(like, weight.device)
    refuse_values(weight, path)


def hollow_like(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of such a shape, strides and dtype without memory."""
    hollow = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    hollow.untyped_storage().resize_(0)
    return hollow


def refuse_values(weight: torch.Tensor, path: str) -> None:
    """Make a parameter without memory a ``QuantizedWeight``."""
    # For what reaches it past __torch_function__: torch.tensor(weight), torch.Tensor(weight), compiled code.
    is_refusing = storages.forbid_address(weight, f"{path} is kept in float8 alone and has no values: {_CURE}")
    own = None if is_refusing else storages.refuse_operators(weight, _refuse)
    storage = weight.untyped_storage()
    storage.__class__ = _Hollow
    weight.__class__ = QuantizedWeight
    weight.path, weight.hollow, weight.own = path, storage, own  # type: ignore[attr-defined]


class Restored(NamedTuple):
    """How many weights ``hvcompile.restore`` brought back: exactly, from a copy, and to within float8's precision."""

    exact: int
    dequantized: int


@torch.inference_mode(False)  # what is made in it could never be trained again
@torch.no_grad()
def restore_weights(module: torch.nn.Module) -> Restored:
    """Give the weights of a module that are in float8 alone their values back.

    See ``hvcompile.restore``, which also lets go of the float8 copies.
    """
    weights = [weight for weight in module.parameters() if isinstance(weight, QuantizedWeight)]
    exact = 0
    for weight in weights:
        if weight.original is not None:
            values = weight.original.to(weight.device)
            exact += 1
        else:
            values = float8_format.dequantize(*weight.rows, weight.dtype)
        plain = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device)
        plain.copy_(values)
        own = weight.own
        for name in ("path", "joined", "start", "original", "hollow", "own"):
            delattr(weight, name)
        weight.__class__ = torch.nn.Parameter  # type: ignore[assignment]
        if own is None:
            weight.data = plain
        else:
            storages.allow_operators(weight, own, plain)
    if exact < len(weights):
        log.warning(
            "hvcompile.restore: %d of %d weights came back from float8, so they are not exactly what they were "
            "(compile with options={'fp8': {'keep_original': 'cpu'}} to keep exact copies)",
            len(weights) - exact,
            len(weights),
        )
    return Restored(exact, len(weights) - exact)
