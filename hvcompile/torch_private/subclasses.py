"""The door to tensors around tensors: weights that a library has quantised, taken apart and put together again.

torchao keeps a quantised weight as one tensor of a class of its own, around plain ones: data, scales, zero points. A
subgraph takes none of these (``invoke_subgraph`` and ``cond`` ask each class for an implementation of theirs), so the
plain ones are inputs of the graph, and ``Together`` makes the weight of them where it is read.

All names were checked on torch 2.11.0 and 2.13.0, and with torchao 0.18.

- ``__tensor_flatten__`` and ``__tensor_unflatten__``: torch's protocol for such classes, by which AOTAutograd takes
  them apart too. It is described in the documentation of ``torch.utils._python_dispatch`` alone.
- ``torch._dispatch.python.enable_python_dispatcher``: what Dynamo runs an operation on fake tensors within. Without it
  2.11 can't multiply such a weight by an input of symbolic sizes.
- ``torch._dynamo.source.AttrSource``: where Dynamo would look for a tensor within another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import AttrSource

from hvcompile.version import version_of


def as_dynamo_runs() -> contextlib.AbstractContextManager[Any]:
    """Within, operations on fake tensors run as they do while Dynamo captures a graph."""
    return enable_python_dispatcher()


def is_wrapper(tensor: object) -> bool:
    """Whether a tensor is one of a library's around others, such as torchao's quantised weights.

    Those of torch itself are not meant: a ``DTensor`` is also a way to compute on several ranks.
    """
    kind = type(tensor)
    has_protocol = hasattr(kind, "__tensor_flatten__") and hasattr(kind, "__tensor_unflatten__")
    return isinstance(tensor, torch.Tensor) and has_protocol and kind.__module__.split(".", maxsplit=1)[0] != "torch"


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """How a weight is made of others: its class and shape, their names, and what its class must know besides.

    Two are equal where the same class makes the same weight of the same parts. What the class must know is compared by
    its text, since libraries' own settings need not compare at all.

    Attributes:
        kind: the class.
        names: of its attributes that are tensors, in order.
        inner: for each of these, how it is made of others in turn; None for a plain tensor.
        context: what ``__tensor_flatten__`` gives beside the names.
        shape, stride: of the weight.

    """

    kind: type
    names: tuple[str, ...]
    inner: tuple[Parts | None, ...]
    context: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @functools.cached_property
    def text(self) -> str:
        """Everything of it, as text."""
        inner = [part.text if part is not None else None for part in self.inner]
        kind = f"{self.kind.__module__}.{self.kind.__qualname__}"
        return repr((kind, self.names, inner, self.context, tuple(self.shape), tuple(self.stride)))

    def __eq__(self, other: object) -> bool:
        """Whether the other makes the same weight of the same parts."""
        return isinstance(other, Parts) and self.kind is other.kind and self.text == other.text

    def __hash__(self) -> int:
        """By its text."""
        return hash(self.text)

    def put_together(self, tensors: Iterator[Any]) -> Any:
        """The weight, of the next plain tensors, which may be fake ones, or such as trace."""
        parts = {
            name: next(tensors) if inner is None else inner.put_together(tensors)
            for name, inner in zip(self.names, self.inner, strict=True)
        }
        kind: Any = self.kind
        return kind.__tensor_unflatten__(parts, self.context, torch.Size(self.shape), self.stride)

    def paths(self, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
        """The attributes that lead from the weight to each plain tensor."""
        for name, inner in zip(self.names, self.inner, strict=True):
            if inner is None:
                yield (*before, name)
            else:
                yield from inner.paths((*before, name))


def parts_of(weight: Any) -> Parts:
    """How a weight is made of plain tensors."""
    names, context = weight.__tensor_flatten__()
    held = [getattr(weight, name) for name in names]
    inner = tuple(parts_of(item) if is_wrapper(item) else None for item in held)
    return Parts(type(weight), tuple(names), inner, context, tuple(weight.shape), tuple(weight.stride()))


class Together:
    """Makes a weight of its parts: what a node of the graph calls right before the weight is read.

    Its name tells what it makes, for torch's caches of compiled code, whose keys hold the name alone.

    Attributes:
        parts: of the weight.
        mixes_rows: whether a linear layer with such a weight computes a row of its result from other rows of its input
            too, as it does where one scale holds for all of the input; None where that is not known.

    """

    def __init__(self, parts: Parts, mixes_rows: bool | None) -> None:
        self.parts, self.mixes_rows = parts, mixes_rows
        library = parts.kind.__module__.split(".", maxsplit=1)[0]
        digest = hashlib.sha256(f"{parts.text} {version_of(library) or ''}".encode()).hexdigest()[:12]
        self.__name__ = self.__qualname__ = f"{parts.kind.__name__}_{digest}"
        self.__module__ = __name__

    def __call__(self, *tensors: Any) -> Any:
        """The weight."""
        return self.parts.put_together(iter(tensors))

    def __eq__(self, other: object) -> bool:
        """Whether the other makes such weights too."""
        return isinstance(other, Together) and self.parts == other.parts

    def __hash__(self) -> int:
        """As of what it makes."""
        return hash(self.parts)

    def __repr__(self) -> str:
        return self.__name__


def mark_as_part(placeholder: Any, weight: Any, path: tuple[str, ...]) -> None:
    """Say of a placeholder where Dynamo would find it: in the weight that another placeholder is of."""
    source: Any = getattr(weight, "_dynamo_source", None)
    for name in path if source is not None else ():
        # Private: AOTAutograd and the rest here know a weight by where it comes from (2.11.0, 2.13.0).
        source = AttrSource(source, name)
    placeholder._dynamo_source = source


def is_together(node: fx.Node) -> bool:
    """Whether a node puts a weight together."""
    return node.op == "call_function" and isinstance(node.target, Together)


def without_class(item: Any) -> Any:
    """A tensor as a plain one of the same memory, where its class does no more than change what functions do with it.

    diffusers has such a class for weights in GGUF. Other tensors, and all else, are given back.
    """
    kind = type(item)
    if not isinstance(item, torch.Tensor) or kind in {torch.Tensor, torch.nn.Parameter}:
        return item
    if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:  # its memory is its own business
        return item
    # Named in torch's documentation of ``__torch_function__`` (2.11.0, 2.13.0).
    with torch._C.DisableTorchFunctionSubclass():
        return item.detach()


def mixes_rows(weight: torch.Tensor) -> bool | None:
    """Whether a linear layer with this weight makes a row of its result from other rows of its input too.

    It is tried out: one row is far larger than the others. A scale for the whole input then rounds these to nothing.

    Returns:
        None where it can't be tried, as with a fake weight.

    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, weight.shape[-1], generator=generator) * torch.tensor([2.0**10] + [2.0**-12] * 3)[:, None]
    try:
        with torch.no_grad():
            given = rows.to(weight.device, weight.dtype)
            among = torch.nn.functional.linear(given, weight)[1:].float()
            alone = torch.nn.functional.linear(given[1:].contiguous(), weight).float()
            return bool((among - alone).abs().max() > 0.01 * alone.abs().max())
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AssertionError):
        return None
