"""The door to Inductor's generated code: run on fake tensors, where kernels do nothing and all else is seen.

The code is a Python module. Its names for allocations, kernels and library calls are exchanged before it is called. So
shapes, strides and the operators' own checks of their arguments are those of a real call. All names were checked on
torch 2.13.0.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from hvcompile.torch_private.absent_gpu import decide_items
from hvcompile.torch_private.operations import tensors_in


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hooks:
    """Who is told of what the code does.

    Attributes:
        on_kernel: of a Triton launch: the kernel's name, its source and its arguments.
        before_operator: of an operator of torch, before it: its name and its arguments.
        on_operator: of an operator of torch, after it: its name, the tensors that went in, those that came out, and the
            floating point operations of its products.
        on_item: of a number read from the device; answers it.
        on_enter: of a function of the code that begins; its name.
        on_leave: of one that ends.

    """

    on_kernel: Callable[[str, str, Sequence[Any]], None]
    before_operator: Callable[[str, Sequence[Any], Mapping[str, Any]], None]
    on_operator: Callable[[str, Sequence[torch.Tensor], Sequence[torch.Tensor], int], None]
    on_item: Callable[[torch.Tensor], Any]
    on_enter: Callable[[str], None]
    on_leave: Callable[[str], None]


def _shapes(value: Any) -> Any:
    """Nested arguments, with shapes for tensors."""
    if isinstance(value, Mapping):
        return {name: _shapes(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shapes(item) for item in value]
    return tuple(value.shape) if isinstance(value, torch.Tensor) else value


def run(
    code: str,
    mode: FakeTensorMode,
    hooks: Hooks,
    numbers: Sequence[int],
    count: Mapping[Any, Callable[..., Any]] = types.MappingProxyType({}),
) -> Sequence[Any]:
    """Call generated code once, with inputs of its own making.

    Args:
        code: as Inductor wrote it.
        mode: makes the tensors.
        hooks: are told.
        numbers: for the last inputs that are numbers.
        count: of operators whose products torch's counter does not know, what tells their operations by shapes.

    Returns:
        The outputs, fake.

    Raises:
        RuntimeError and others: an operator refuses its arguments.

    """
    from torch._inductor.async_compile import AsyncCompile

    def kernel(_: Any, name: str, source: str, *__: Any, **___: Any) -> _Kernel:
        return _Kernel(name, source, hooks)

    module: Any = types.ModuleType("generated")
    with (
        mock.patch.object(AsyncCompile, "triton", kernel),
        mock.patch.object(AsyncCompile, "wait", return_value=None),
        mode,
        torch.no_grad(),
    ):
        # A device guard of torch's own would make a context.
        exec(compile(code.replace("with torch.cuda._DeviceGuard(0):", "if True:"), "generated", "exec"), vars(module))
        _exchange(module, hooks)
        args = module.get_args()
        places = [place for place, item in enumerate(args) if isinstance(item, int)]
        for place, number in zip(places[len(places) - len(numbers) :], numbers, strict=True):
            args[place] = number
        with decide_items(hooks.on_item), _Operators(hooks, count):
            return module.call(args)  # type: ignore[no-any-return]


def _exchange(module: Any, hooks: Hooks) -> None:
    """Exchange what the code calls by names of its module."""

    def empty(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda:0")

    def reinterpret(tensor: torch.Tensor, size: Any, stride: Any, offset: int = 0) -> torch.Tensor:
        return torch.as_strided(tensor, size, stride, offset + tensor.storage_offset())

    module.empty_strided_cuda, module.reinterpret_tensor = empty, reinterpret
    module.assert_alignment = lambda *_: None
    module.copy_if_misaligned = lambda tensor: tensor
    module.get_raw_stream = lambda *_: 0
    module.extern_kernels = _Extern()
    for name, function in list(vars(module).items()):
        if isinstance(function, types.FunctionType) and re.search(r"(subgraph|graph_)\w*\d+$", name):
            setattr(module, name, _told(name, function, hooks))


def _told(name: str, function: Callable[..., Any], hooks: Hooks) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        hooks.on_enter(name)
        try:
            return function(*args)
        finally:
            hooks.on_leave(name)

    return call


class _Kernel:
    """Stands for a Triton kernel."""

    def __init__(self, name: str, source: str, hooks: Hooks) -> None:
        self._name, self._source, self._hooks = name, source, hooks

    def run(self, *args: Any, **_: Any) -> None:
        """Tell of a launch."""
        self._hooks.on_kernel(self._name, self._source, args)


class _Extern:
    """Inductor's library calls. Where there is no fake of what writes to ``out``, that of what returns it is asked."""

    def __getattr__(self, name: str) -> Any:
        from torch._inductor.select_algorithm import extern_kernels

        if name != "_scaled_mm":
            return getattr(extern_kernels, name)

        def scaled_mm(*args: Any, out: torch.Tensor, **kwargs: Any) -> None:
            result = torch.ops.aten._scaled_mm.default(*args, **kwargs)
            layouts = [(tuple(item.shape), item.stride(), item.dtype) for item in (result, out)]
            if layouts[0] != layouts[1]:
                raise RuntimeError(f"_scaled_mm returns {layouts[0]}, and the code makes room for {layouts[1]}")

        return scaled_mm


def _all_nonzero(tensor: torch.Tensor) -> torch.Tensor:
    """What ``nonzero`` returns at most: the places of all elements, in columns as CUDA's kernel lays them out.

    How many there are depends on data. The fake result's length would have a name and no number, at which torch's check
    of strides in the generated code, written in C++, ends the process.
    """
    size = tensor.numel(), tensor.ndim
    return tensor.new_empty_strided(size, (1, tensor.numel()), dtype=torch.int64)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells of every operator."""

    def __init__(self, hooks: Hooks, count: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._hooks, self._count = hooks, count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._hooks.before_operator(str(func), args, kwargs or {})
        result = _all_nonzero(args[0]) if func is torch.ops.aten.nonzero.default else func(*args, **(kwargs or {}))
        flops = self._flops(func, args, kwargs or {}, result)
        self._hooks.on_operator(str(func), list(tensors_in((args, kwargs))), list(tensors_in(result)), flops)
        return result

    def _flops(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        """Floating point operations of an operator's products, by torch's own formulas and those that were given."""
        packet = getattr(func, "overloadpacket", func)
        if packet in self._count:  # takes shapes
            return int(self._count[packet](*_shapes(args), **_shapes(kwargs)))
        return int(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0
