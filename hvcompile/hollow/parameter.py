"""Parameters that keep their place in a model and have no memory there: their values are kept elsewhere.

Such a parameter stays the object that it was, so the module, LoRA adapters and Dynamo's guards still know it. Shape,
dtype and device can be asked for, anything that needs its values raises. What stands for the values hangs on the
parameter, so it is shared by every graph compiled for the model and dies with it.

Most operations on a tensor whose storage was merely resized to zero end the process. ``__torch_function__`` refuses
them; some calls, ``torch.tensor(weight)`` among them, don't ask it. For these the storage itself refuses its address,
or, where torch was built without CUDA and a storage can't, every operator on the weight is refused as it is dispatched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hvcompile.errors import HvcompileError
from hvcompile.torch_private import dynamo, storages

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
        *("error", "state", "cure"),
    )
)
_SETTABLE = frozenset({"requires_grad", "grad"})
_VALUES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})


class HollowStorage(torch.UntypedStorage):
    """The storage of a hollow parameter and of what aliases it: can be asked for its size and place, and no more.

    Some of its methods would end the process (``is_shared``), or make the weight crash (``share_memory_``). A subclass
    says by which ``error``, what has become of the weight (``state``), and what to do (``cure``).
    """

    error: ClassVar[type[HvcompileError]] = HvcompileError
    state: ClassVar[str] = ""
    cure: ClassVar[str] = ""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") or name in _OF_STORAGE:
            return super().__getattribute__(name)
        raise self.error(f"the storage of a weight that is kept {self.state} has no {name!r}: {self.cure}")

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise self.error(f"the storage of a weight that is kept {self.state} can't be copied: {self.cure}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self.error(f"the storage of a weight that is kept {self.state} can't be pickled: {self.cure}")


class HollowParameter(torch.nn.Parameter):
    """A parameter without memory. A subclass says where its values are, and how it moves.

    Attributes:
        path: where in the model it was when it became one, for errors.
        hollow: its storage, which keeps its class as long as it is held here.
        own: what torch knew of the parameter, without elements; None where the storage itself refuses to be read.
        storage_kind: the class of its storage.
        elsewhere: what another compiler than hvfast is told.
        since: what made it what it is, for errors.
        way_back: what to do where ordinary weights are needed.

    """

    path: str
    hollow: torch.UntypedStorage
    own: torch.nn.Parameter | None
    storage_kind: ClassVar[type[HollowStorage]]
    elsewhere: ClassVar[str]
    since: ClassVar[str]
    way_back: ClassVar[str] = "call hvcompile.restore(model) first"

    def __new__(cls, data: Any = None, requires_grad: bool = True) -> Any:
        """Give an ordinary parameter: who makes another of this one's class (accelerate) hands in its values."""
        return torch.nn.Parameter(data, requires_grad)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Let through what needs no values, and all while Dynamo captures a graph for hvfast, which needs none."""
        if torch.compiler.is_dynamo_compiling():
            if not _is_captured_by_hvfast():
                raise cls.storage_kind.error(cls.elsewhere)
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        name = getattr(func, "__name__", "")
        if name in _METHODS or (name == "__get__" and getattr(func.__self__, "__name__", "") not in _VALUES):  # type: ignore[attr-defined]
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if name in _MOVES and args:
            device = _asked_device(*_MOVES[name](*args), **(kwargs or {}))
            if device is not None:
                is_there = device == args[0].device and not (kwargs or {}).get("copy", False)
                return args[0] if is_there else args[0].moved_to(device)
        if name == "type" and len(args) == 1 and not kwargs:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        if name == "__set__" and getattr(func.__self__, "__name__", "") in _SETTABLE:  # type: ignore[attr-defined]
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        # As Module.to does with what has moved, and with what has not.
        if name == "__set__" and isinstance(args[0], cls) and (args[0] is args[1] or _take_place(args[0], args[1])):
            return None
        answer = cls.answer(name, args, kwargs or {})
        if answer is not NotImplemented:
            return answer
        what = getattr(getattr(func, "__self__", None), "__name__", name) if name in {"__get__", "__set__"} else name
        raise _refusal(what, (args, kwargs or {}))

    @classmethod
    def answer(cls, name: str, args: Sequence[Any], kwargs: Any) -> Any:
        """What a call that needs values gives all the same; NotImplemented where it is refused."""
        del name, args, kwargs
        return NotImplemented

    def moved_to(self, device: torch.device) -> HollowParameter:
        """A weight of the same values on a device, as ``Tensor.to`` gives one."""
        raise NotImplementedError

    def follow(self, moved: HollowParameter) -> bool:
        """Take over where ``moved_to`` has put the values; False where that was another weight's."""
        raise NotImplementedError

    def as_subclass(self, cls: Any) -> Any:
        """Refuse: torch does not ask ``__torch_function__``, and a plain tensor without memory crashes."""
        raise self._error(f"can't become a {cls.__name__}")

    def __format__(self, format_spec: str) -> str:
        return format(repr(self), format_spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise self._error("can't be copied")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self._error("can't be pickled")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.path!r}, shape={tuple(self.shape)}, {self.storage_kind.state})"

    def _error(self, what: str) -> HvcompileError:
        kind = self.storage_kind
        return kind.error(f"{self.path} is kept {kind.state} and {what}: {kind.cure}")


def _refusal(what: str, operands: Any) -> HvcompileError:
    weight = next(item for item in _flat(operands) if isinstance(item, HollowParameter))
    kind = weight.storage_kind
    cast = ". Weights that were cast before this one stay cast" if what in _MOVES else ""
    return kind.error(
        f"{weight.path} has been kept {kind.state} since {weight.since}, and {what!r} asks for its values: {kind.cure}"
        f"{cast}"
    )


def _refuse_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Raise before an optimizer's step has changed a weight, where it would come to one without memory."""
    del args, kwargs
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if isinstance(weight, HollowParameter) and weight.grad is not None:
                raise _refusal(f"{type(optimizer).__name__}.step", (weight,))


register_optimizer_step_pre_hook(_refuse_step)


def _refuse(func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
    """Refuse an operator that was not asked by way of ``__torch_function__``."""
    raise _refusal(str(func), (args, kwargs or {}))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_captured_by_hvfast() -> bool:
    """Asked while Dynamo captures; the answer is a constant of the capture and leaves no trace in the graph."""
    return dynamo.is_own(dynamo.tracing_backend())


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
def _take_place(weight: HollowParameter, moved: Any) -> bool:
    """Move a weight, which stays the object that it is, to where ``moved_to`` has it; False for any other tensor."""
    if type(moved) is not type(weight) or moved.path != weight.path:
        return False
    if moved.shape != weight.shape or moved.dtype != weight.dtype or not weight.follow(moved):
        return False
    plain, hollow, own, kind = weight.requires_grad, hollow_like(weight, moved.device), weight.own, type(weight)
    weight.__class__ = torch.nn.Parameter  # type: ignore[assignment]
    if own is None:
        weight.data = hollow
    else:
        storages.allow_operators(weight, own, hollow)
    refuse_values(weight, weight.path, kind)
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


def hollow_like(like: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of such a shape, strides and dtype without memory."""
    hollow = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    hollow.untyped_storage().resize_(0)
    return hollow


def empty_of(weight: torch.Tensor, kind: type[HollowParameter], path: str, device: torch.device) -> Any:
    """A new hollow parameter of a weight's shape, strides and dtype on a device."""
    made: Any = torch.nn.Parameter(torch.empty(0, dtype=weight.dtype, device=device), requires_grad=False)
    made.data = hollow_like(weight, device)
    refuse_values(made, path, kind)
    return made


def empty_out(weight: torch.Tensor, path: str, kind: type[HollowParameter], device: torch.device) -> None:
    """Make a parameter hollow on a device. Whoever else holds its memory keeps it."""
    like = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")
    weight.data = weight.data.new_empty(0)  # before another is made
    weight.data = hollow_like(like, device)
    refuse_values(weight, path, kind)


def refuse_values(weight: torch.Tensor, path: str, kind: type[HollowParameter]) -> None:
    """Make a parameter without memory one of a kind that refuses to be read."""
    # For what reaches it past __torch_function__: torch.tensor(weight), torch.Tensor(weight), compiled code.
    state, cure = kind.storage_kind.state, kind.storage_kind.cure
    is_refusing = storages.forbid_address(weight, f"{path} is kept {state} and has no values: {cure}")
    own = None if is_refusing else storages.refuse_operators(weight, _refuse)
    storage = weight.untyped_storage()
    storage.__class__ = kind.storage_kind
    weight.__class__ = kind
    weight.path, weight.hollow, weight.own = path, storage, own  # type: ignore[attr-defined]


def fill(weight: Any, values: torch.Tensor, *attributes: str) -> None:
    """Make a hollow parameter an ordinary one that holds ``values``, whose memory it takes.

    Args:
        weight: the parameter.
        values: of its shape and dtype.
        attributes: of its kind, which go.

    """
    own = weight.own
    for name in ("path", "hollow", "own", *attributes):
        delattr(weight, name)
    weight.__class__ = torch.nn.Parameter
    if own is None:
        weight.data = values
    else:
        storages.allow_operators(weight, own, values)
