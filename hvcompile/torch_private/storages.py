"""The door to private torch of storages: which memory a tensor lies in, and tensors that have none.

All names were checked on torch 2.11.0 and 2.13.0.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

# ``StorageWeakRef`` is used by torch's own sharing between processes and is not documented: it alone gives a storage's
# address also where that storage belongs to a fake tensor, whose ``data_ptr`` raises (2.11.0, 2.13.0).


# Private: how often a tensor was written to in place; autograd counts, and nothing public tells (2.11.0, 2.13.0). A
# getter rather than a function: over a thousand weights are asked in every step.
version_of: Callable[[Any], int] = operator.attrgetter("_version")


def mark_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The version and address of a tensor, which tell most changes of it without a look at its content.

    A tracked write moves the version. ``.data = other`` and ``set_()`` move the address. A write through ``.data``
    moves neither. A tensor that was made in inference mode has no version.
    """
    return -1 if tensor.is_inference() else version_of(tensor), tensor.data_ptr()


def storage_id(tensor: torch.Tensor) -> int:
    """What tells a tensor's storage from all others that are alive; a view has that of its base. Fake tensors too."""
    # Private: inside vmap, tensors are wrappers that give no storage (2.11.0, 2.13.0).
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return StorageWeakRef(tensor.untyped_storage()).cdata  # type: ignore[no-any-return, no-untyped-call]


def target_of_to(*args: Any, **kwargs: Any) -> tuple[torch.device | None, torch.dtype | None, Any]:
    """The device, dtype and memory format that ``tensor.to(*args, **kwargs)`` asks for; None for what it leaves.

    Raises:
        TypeError, RuntimeError: ``to`` takes no such arguments.

    """
    # Private: what ``Module.to`` itself parses its arguments with; ``Tensor.to`` takes them in six forms
    # (2.11.0, 2.13.0).
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype, memory_format


def forbid_address(tensor: torch.Tensor, message: str) -> bool:
    """Make whoever asks for a tensor's address get an error; also through its aliases and views.

    Args:
        tensor: its storage is its own; what the storage holds is lost to all.
        message: of the error.

    Returns:
        Whether that holds for reading too. It does where torch was built with CUDA; elsewhere for writing alone, and to
        read would end the process (see ``refuse_operators``).

    """
    # Private: FakeTensor keeps native code from its storages by it; nothing public does (2.11.0, 2.13.0).
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    # Private: the same for reading, made for CUDA graphs and so in builds with CUDA alone (2.11.0, 2.13.0).
    set_message = getattr(torch._C, "_set_storage_data_ptr_access_error_msg", None)
    if set_message is None:
        return False
    set_message(tensor.untyped_storage()._cdata, message)
    return True


class _Refusing(torch.nn.Parameter):
    """Makes a tensor of which torch hands every operator to Python; see ``refuse_operators``."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} was called on a tensor without memory")


def refuse_operators(parameter: Any, refuse: Callable[..., Any]) -> torch.nn.Parameter:
    """Have ``refuse`` called for every operator on a parameter, also where torch asks no ``__torch_function__``.

    ``torch.tensor(parameter)`` and ``torch.Tensor(parameter)`` are such: both alias it first, which is an operator. The
    parameter stays the object that it is; what torch knows of it is exchanged for a tensor of equal metadata that has
    torch's Python dispatch key.

    Args:
        parameter: has no memory.
        refuse: is called as a ``__torch_dispatch__`` is, and raises.

    Returns:
        What torch knew of it, without elements, for ``allow_operators``: version, hooks, and who else holds it.

    """
    # Private: the one constructor that sets the dispatch key of a tensor that is there (2.11.0, 2.13.0).
    own: Any = torch.Tensor._make_subclass(_Refusing, parameter.data, parameter.requires_grad)
    own.grad, parameter.grad = parameter.grad, None
    # Private: the public torch.utils.swap_tensors refuses tensors to which there are weak references, and Dynamo holds
    # some (2.11.0, 2.13.0).
    torch._C._swap_tensor_impl(parameter, own)
    own.__class__ = torch.nn.Parameter
    own.data = own.data.new_empty(0)
    # Not a method of a class: Dynamo traces no class that has one (2.11.0, 2.13.0).
    parameter.__torch_dispatch__ = refuse
    return own  # type: ignore[no-any-return]


def allow_operators(parameter: Any, own: torch.nn.Parameter, data: torch.Tensor) -> None:
    """Take ``refuse_operators``, which gave ``own``, back from a parameter, which from now on holds ``data``."""
    own.data = data
    own.requires_grad_(parameter.requires_grad)
    own.grad, parameter.grad = parameter.grad, None
    del parameter.__torch_dispatch__
    torch._C._swap_tensor_impl(parameter, own)  # private: as in ``refuse_operators``
    own.__class__ = _Refusing


class LiveBytes:
    """How many bytes the tensors that were made, and are not yet gone, take at once; of fake tensors too.

    Attributes:
        peak: the most so far.
        outside: of storages that were there before; see ``note``.

    """

    def __init__(self) -> None:
        self._inside: dict[int, tuple[Any, int]] = {}
        self._outside: dict[int, tuple[Any, int]] = {}
        self.peak = 0

    @property
    def outside(self) -> int:
        """Bytes of the storages that were there before."""
        return sum(num_bytes for _, num_bytes in self._outside.values())

    def note(self, tensors: Sequence[torch.Tensor]) -> None:
        """Take what was not made since the start as there before."""
        for tensor in tensors:
            reference: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            if reference.cdata not in self._inside:
                self._outside.setdefault(reference.cdata, (reference, tensor.untyped_storage().nbytes()))

    def add(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Count tensors that an operator returned; says whether the peak is a new one."""
        for tensor in tensors:
            reference: Any = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            if reference.cdata not in self._outside:
                self._inside.setdefault(reference.cdata, (reference, tensor.untyped_storage().nbytes()))
        self._inside = {key: item for key, item in self._inside.items() if not item[0].expired()}
        live = sum(num_bytes for _, num_bytes in self._inside.values())
        is_new = live > self.peak
        self.peak = max(self.peak, live)
        return is_new
