"""The door to what a call on an absent GPU is given: a model and its arguments as fake tensors on that device.

All names were checked on torch 2.13.0. Each has its reason beside it.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext


def fake_tensors() -> FakeTensorMode:
    """The mode in which tensors on the absent device can be made."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def on_gpu(
    mode: FakeTensorMode, model: torch.nn.Module, arguments: Any, *, dynamic: bool = False
) -> tuple[torch.nn.Module, Any]:
    """A model and the arguments of its call as they would be on the absent GPU: equal, and without memory.

    Args:
        mode: of the fake tensors.
        model: is copied, without its weights.
        arguments: tensors in lists, tuples and dicts.
        dynamic: whether the sizes of the arguments may be others in another call, as ``torch.compile(dynamic=True)``
            has it; numbers among the arguments stay as they are.

    """
    # Private: what torch itself looks into nested arguments with (2.11.0, 2.13.0).
    from torch.utils import _pytree as pytree

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return _empty(mode, tensor)

    # A copy of a module copies its tensors; those that it is told of already it takes as they are.
    known: dict[int, Any] = {}
    for parameter in model.parameters():
        known[id(parameter)] = torch.nn.Parameter(moved(parameter), requires_grad=parameter.requires_grad)
    attributes = (item for module in model.modules() for item in vars(module).values())
    for tensor in (*model.buffers(), *(item for item in attributes if isinstance(item, torch.Tensor))):
        known.setdefault(id(tensor), moved(tensor))
    make = _with_unknown_sizes(mode) if dynamic else moved
    return copy.deepcopy(model, known), pytree.tree_map_only(torch.Tensor, make, arguments)


def _empty(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


def _with_unknown_sizes(mode: FakeTensorMode) -> Any:
    """A function that gives fake tensors whose sizes have names, equal sizes the same one; what Dynamo would make."""
    # Private: Dynamo takes fake tensors as they are, so that nothing public gives their sizes names (2.13.0).
    from torch._dynamo.source import ConstantSource

    elsewhere, count = FakeTensorMode(), iter(range(1 << 30))

    def make(tensor: torch.Tensor) -> torch.Tensor:
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK] * tensor.ndim)
        source = ConstantSource(f"argument_{next(count)}")
        return mode.from_tensor(_empty(elsewhere, tensor), source=source, symbolic_context=context)

    return make


@contextlib.contextmanager
def constants_on_cpu() -> Iterator[None]:
    """Have constants that are moved to the absent device stay on the CPU: tracing computes them as it goes."""

    def device_put(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        return tensor.clone() if device.type == "cuda" else tensor.to(device, non_blocking=non_blocking)

    # Private: what ``torch.as_tensor(number, device="cuda")`` is traced into (2.13.0).
    library = torch.library.Library("prims", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings(action="ignore"):  # that there is one already, which is the point
        library.impl("device_put", device_put, "BackendSelect", allow_override=True)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]
